"""Images and videos as runs of ids: integer arithmetic on whole arrays."""

from __future__ import annotations

import numpy as np

from emu3_megatron.grammar.automaton import Ids
from emu3_megatron.grammar.document import Image, Video
from emu3_megatron.grammar.meta import read_meta, write_meta
from emu3_megatron.grammar.rules import DialectRules, Field, Layout, SpanRule
from emu3_megatron.vocabulary import Vocabulary

_KEPT_HEADS = 4096
"""Sizes whose head and layout are kept."""


class SpanWriter:
    """Writes spans of one dialect as ids, and reads checked ones back.

    Args:
        name: The dialect's name, for messages.
        rules: The dialect.
        vocabulary: The ids.
        spelling: Id of each character of the meta text.
    """

    def __init__(
        self, name: str, rules: DialectRules, vocabulary: Vocabulary, *, spelling: dict[str, int]
    ) -> None:
        self._name = name
        self._rules = rules
        self._vocabulary = vocabulary
        self._spelling = spelling
        self._characters = {token: character for character, token in spelling.items()}
        self._kept: dict[tuple[float | None, ...], tuple[Ids, Layout]] = {}

    def write(self, span: Image | Video) -> Ids:
        """``BOI meta IMG body EOI`` of a span, int64 ``[N]``.

        Raises `ValueError` for codes that are not integers of the right shape and range, and for a number
        that the meta text states but the span lacks.
        """
        codes_THW, (head, layout) = self._prepare(span)
        ids = np.empty(len(head) + layout.length + 1, dtype=np.int64)
        ids[: len(head)] = head
        ids[-1] = self._vocabulary.eoi
        self._write_body(ids[len(head) : -1], codes_THW, layout)
        return ids

    def write_open(self, span: Image | Video, *, frames: int | None) -> Ids:
        """The beginning of a span: its head for `frames` frames in all, then the frames that `span` holds."""
        codes_THW, (head, layout) = self._prepare(span, frames=frames)
        body = np.empty(len(codes_THW) * layout.frame_length, dtype=np.int64)
        self._write_body(body, codes_THW, layout)
        return np.concatenate([head, body])

    def head(
        self, height: int, width: int, frames: int | None, fps: float | None, seconds: float | None
    ) -> tuple[Ids, Layout]:
        """``BOI meta IMG`` (read-only) and the layout of a span; an image where `frames` is None."""
        size = (frames, height, width, fps, seconds)
        known = self._kept.get(size)
        if known is None:
            if len(self._kept) >= _KEPT_HEADS:
                self._kept.clear()
            known = self._kept[size] = self._build_head(size)
        return known

    def read(self, ids: Ids) -> Image | Video:
        """The span that `ids` write; they must have been checked (`Automaton` does)."""
        vocabulary = self._vocabulary
        end = int((ids == vocabulary.img).argmax())
        rule, values = read_meta(self._rules, "".join(self._characters[int(i)] for i in ids[1:end]))
        height, width = int(values[Field.HEIGHT]), int(values[Field.WIDTH])
        frames = int(values[Field.FRAMES]) if Field.FRAMES in values else None
        layout = Layout.build(
            rule, is_video=frames is not None, frames=frames or 1, height=height, width=width
        )
        codes_THW = np.empty((layout.frames, height, width), dtype=np.int64)
        for source, target in self._rows(ids[end + 1 : -1], codes_THW, layout):
            np.subtract(source, vocabulary.vision_offset, out=target)
        if frames is None:
            return Image(codes_THW[0])
        return Video(codes_THW, fps=values.get(Field.FPS), seconds=values.get(Field.SECONDS))

    def _rule(self, *, is_video: bool) -> SpanRule:
        if not is_video:
            return self._rules.image
        if self._rules.video is None:
            raise ValueError(
                f"dialect {self._name!r} has no videos: write the frames as images, or use another dialect"
            )
        return self._rules.video

    def _prepare(self, span: Image | Video, *, frames: int | None = None) -> tuple[Ids, tuple[Ids, Layout]]:
        """Codes ``[T, H, W]`` of a span, then head and layout for `frames` (default: those it holds)."""
        codes = np.asarray(span.codes)
        is_video = isinstance(span, Video)
        if codes.ndim != 2 + is_video or codes.dtype.kind not in "iu" or 0 in codes.shape[-2:]:
            rule = "a video must be integers [T, H, W]" if is_video else "an image must be integers [H, W]"
            raise ValueError(f"codes of {rule}, none empty; got {codes.dtype} of shape {codes.shape}")
        codes_THW = codes if is_video else codes[None]
        # as unsigned, negative codes wrap to huge numbers: one pass checks both ends
        unsigned = codes_THW.view(f"u{codes_THW.itemsize}")
        if unsigned.size and int(unsigned.max()) >= self._vocabulary.codebook_size:
            raise ValueError(
                f"vision codes must lie in [0, {self._vocabulary.codebook_size}) of vocabulary "
                f"{self._vocabulary.name!r}, got {int(codes.min())} to {int(codes.max())}"
            )
        height, width = codes.shape[-2:]
        total = frames if frames is not None else (len(codes) if is_video else None)
        fps, seconds = (span.fps, span.seconds) if isinstance(span, Video) else (None, None)
        return codes_THW, self.head(height, width, total, fps, seconds)

    def _write_body(self, body: Ids, codes_THW: Ids, layout: Layout) -> None:
        vocabulary = self._vocabulary
        for target, source in self._rows(body, codes_THW, layout):
            np.add(source, vocabulary.vision_offset, out=target, dtype=np.int64, casting="unsafe")
        frames_TN = body.reshape(-1, layout.frame_length)
        if layout.ends_rows:
            frames_TN[:, layout.width :: layout.row_length] = vocabulary.eol
        if layout.ends_frames:
            frames_TN[:, -1] = vocabulary.eof

    @staticmethod
    def _rows(body: Ids, codes_THW: Ids, layout: Layout) -> list[tuple[Ids, Ids]]:
        """Pairs of views, of `body` and of `codes_THW`, that hold the same vision tokens.

        Rows that end in EOL make one regular grid; a last row without EOL stands outside of it.
        """
        count, height, width = codes_THW.shape
        frames_TN = body.reshape(-1, layout.frame_length)
        regular = min(height, layout.frame_length // layout.row_length)
        grid = frames_TN[:, : regular * layout.row_length].reshape(count, regular, layout.row_length)
        pairs = [(grid[:, :, :width], codes_THW[:, :regular])]
        if regular < height:
            rest = regular * layout.row_length
            pairs.append((frames_TN[:, None, rest : rest + width], codes_THW[:, regular:]))
        return pairs

    def _build_head(self, size: tuple[float | None, ...]) -> tuple[Ids, Layout]:
        values = dict(zip(Field, size, strict=True))
        rule = self._rule(is_video=values[Field.FRAMES] is not None)
        meta = [self._spelling[character] for character in write_meta(rule, values)]
        head = np.array([self._vocabulary.boi, *meta, self._vocabulary.img], dtype=np.int64)
        head.setflags(write=False)
        frames, height, width = (int(number or 1) for number in size[:3])
        is_video = values[Field.FRAMES] is not None
        return head, Layout.build(rule, is_video=is_video, frames=frames, height=height, width=width)

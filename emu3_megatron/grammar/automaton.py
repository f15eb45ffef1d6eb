"""The decoding automaton: after any beginning of a document, what may come next.

The same automaton checks sequences for the parser and constrains generation, so the two cannot disagree.
A state is a small hashable tuple. `Automaton.allowed` gives one shared `Allowed` object for equal sets (a
handful per vocabulary), so an engine can keep one mask per `Allowed` on its device and gather rows by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from emu3_megatron.grammar.errors import GrammarError
from emu3_megatron.grammar.meta import END, next_characters, read_meta
from emu3_megatron.grammar.rules import DialectRules, Field, Layout
from emu3_megatron.vocabulary import Vocabulary

Ids = npt.NDArray[np.int64]

_KEPT_METAS = 4096
"""Beginnings of meta texts whose `Allowed` an automaton keeps."""

_ANY_VISION = -1
"""Marks, among the expected ids of a frame, a place for any vision token."""


class Unit(Enum):
    """What an automaton accepts."""

    DOCUMENT = "document"
    """``BOS ... EOS``."""
    SPAN = "span"
    """One image or video, ``BOI ... EOI``, and nothing else."""


class Phase(IntEnum):
    """Where in a document (or span) a state stands."""

    START = 0
    """Before the first id."""
    TEXT = 1
    """Between spans: text, a new span, or the end."""
    META = 2
    """Between BOI and IMG."""
    BODY = 3
    """Among the vision tokens, up to EOI."""
    END = 4
    """After the last id."""


class State(NamedTuple):
    """How far a sequence has come."""

    phase: Phase
    meta: str = ""
    """Meta text so far, while in META."""
    layout: Layout | None = None
    """Layout of the current span, while in BODY."""
    position: int = 0
    """Ids since IMG, while in BODY."""


@dataclass(frozen=True)
class Allowed:
    """The ids that may come next: the range ``start .. stop-1`` and a few more."""

    kind: Literal["forced", "text", "vision", "set", "end"]
    """``forced``: one id. ``text``: any text id, BOI or EOS. ``vision``: any vision id. ``set``: a few ids
    (in the meta text). ``end``: none, the sequence is complete."""
    start: int = 0
    stop: int = 0
    extra: tuple[int, ...] = ()
    """Ids outside the range, ascending."""

    def __contains__(self, token: object) -> bool:
        """Whether `token` may come next."""
        if not isinstance(token, (int, np.integer)):
            return False
        return bool(self.start <= token < self.stop) or token in self.extra

    def __len__(self) -> int:
        """How many ids may come next."""
        return self.stop - self.start + len(self.extra)

    @property
    def forced(self) -> int | None:
        """The only id that may come next; None where there is a choice, or none."""
        return self.extra[0] if self.kind == "forced" else None

    def ids(self) -> Ids:
        """The allowed ids, int64, ascending."""
        extra = np.array(self.extra, dtype=np.int64)
        return np.sort(np.concatenate([np.arange(self.start, self.stop), extra]))

    def mask(self, size: int) -> npt.NDArray[np.bool_]:
        """Boolean mask ``[size]``, read-only and shared: True where an id may come next.

        `size` is a number of logits: `Vocabulary.size` or `Vocabulary.padded_size`.
        """
        return _mask(self, size)


@lru_cache(maxsize=1024)
def _mask(allowed: Allowed, size: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros(size, dtype=np.bool_)
    mask[allowed.start : allowed.stop] = True
    mask[list(allowed.extra)] = True
    mask.setflags(write=False)
    return mask


class Automaton:
    """Follows sequences of one dialect, id by id or run by run; one serves any number of sequences.

    Args:
        rules: The dialect.
        vocabulary: The ids.
        spelling: Id of each character of the meta text.
        text_size: Text ids are ``0 .. text_size-1``: those that the text tokenizer knows.
        unit: Whether whole documents are followed, or single spans.
    """

    def __init__(
        self,
        rules: DialectRules,
        vocabulary: Vocabulary,
        *,
        spelling: dict[str, int],
        text_size: int,
        unit: Unit = Unit.DOCUMENT,
    ) -> None:
        self.rules = rules
        self.vocabulary = vocabulary
        self.unit = unit
        self._ids = {**spelling, END: vocabulary.img}
        self._characters = {token: character for character, token in self._ids.items()}
        self._text_size = text_size
        self._text = Allowed("text", 0, text_size, tuple(sorted((vocabulary.boi, vocabulary.eos))))
        self._vision = Allowed("vision", vocabulary.vision_offset, vocabulary.size)
        self._end = Allowed("end")
        self._first = self._one(vocabulary.bos if unit is Unit.DOCUMENT else vocabulary.boi)
        self._eol = self._one(vocabulary.eol)
        self._eof = self._one(vocabulary.eof)
        self._eoi = self._one(vocabulary.eoi)
        self._shared: dict[Allowed, Allowed] = {}
        self._after_meta: dict[str, Allowed] = {}

    @staticmethod
    def _one(token: int) -> Allowed:
        return Allowed("forced", extra=(token,))

    def start(self, prefix: Iterable[int] | npt.NDArray[np.integer] = ()) -> State:
        """The state after `prefix`, which may end anywhere: in a text, in the meta text, in a frame.

        Raises `GrammarError` at the first id that cannot follow those before it.
        """
        return self.run(State(Phase.START), prefix)

    def allowed(self, state: State) -> Allowed:
        """What may come next; equal sets are the same object."""
        if state.phase is Phase.BODY:
            return self._allowed_in_body(state)
        if state.phase is Phase.TEXT:
            return self._text
        if state.phase is Phase.META:
            return self._allowed_in_meta(state.meta)
        return self._first if state.phase is Phase.START else self._end

    def advance(self, state: State, token: int) -> State:
        """The state after one more id. Raises `GrammarError` (position 0) where `token` may not come next."""
        if token not in self.allowed(state):
            raise self._error(state, token, 0)
        return self._next(state, int(token))

    def run(self, state: State, ids: Iterable[int] | npt.NDArray[np.integer]) -> State:
        """The state after many ids; texts and vision tokens are checked as whole arrays.

        Raises `GrammarError` at the first id that cannot follow those before it.
        """
        array = as_ids(ids)
        others = np.flatnonzero((array < 0) | (array >= self._text_size))
        index = 0
        while index < len(array):
            taken = 0
            if state.phase is Phase.TEXT:
                position = int(np.searchsorted(others, index))
                taken = int(others[position] if position < len(others) else len(array)) - index
            elif state.phase is Phase.BODY and state.layout is not None:
                taken = self._take_body(array[index:], state.layout, state.position)
                state = state._replace(position=state.position + taken)
            if not taken:
                token = int(array[index])
                if token not in self.allowed(state):
                    raise self._error(state, token, index)
                state, taken = self._next(state, token), 1
            index += taken
        return state

    def forced_run(self, state: State) -> list[int]:
        """The ids that must come next, up to the next choice or the end of the document; often none."""
        run: list[int] = []
        while (token := self.allowed(state).forced) is not None:
            run.append(token)
            state = self._next(state, token)
        return run

    def is_complete(self, state: State) -> bool:
        """Whether the sequence may end here (and must)."""
        return state.phase is Phase.END

    def describe(self, allowed: Allowed) -> str:
        """`allowed` in words, for messages."""
        if allowed.kind == "text":
            return "text, BOI or EOS"
        if allowed.kind == "vision":
            return "a vision token"
        return " or ".join(self.describe_id(token) for token in allowed.extra) or "nothing more"

    def describe_id(self, token: int) -> str:
        """One id in words, for messages."""
        names = {number: name.upper() for name, number in self.vocabulary.control_ids.items()}
        if token in names:
            return f"{names[token]} ({token})"
        if token in self._characters:
            return f"{self._characters[token]!r} ({token})"
        if self.vocabulary.vision_offset <= token < self.vocabulary.size:
            return f"vision code {token - self.vocabulary.vision_offset} ({token})"
        return f"text id {token}" if 0 <= token < self._text_size else f"id {token}"

    def incomplete(self, state: State, length: int) -> GrammarError:
        """The error for a sequence of `length` ids that ends in `state`."""
        return GrammarError(
            f"{self.unit.value} is incomplete: it ends after {length} ids, "
            f"where {self.describe(self.allowed(state))} must follow",
            position=length,
            incomplete=True,
        )

    def _error(self, state: State, token: int, position: int) -> GrammarError:
        return GrammarError(
            f"{self.describe_id(token)} at position {position} cannot follow: "
            f"expected {self.describe(self.allowed(state))}",
            position=position,
        )

    def _allowed_in_meta(self, meta: str) -> Allowed:
        allowed = self._after_meta.get(meta)
        if allowed is None:
            if len(self._after_meta) >= _KEPT_METAS:
                self._after_meta.clear()
            tokens = tuple(sorted(self._ids[character] for character in next_characters(self.rules, meta)))
            allowed = self._one(tokens[0]) if len(tokens) == 1 else Allowed("set", extra=tokens)
            allowed = self._after_meta[meta] = self._shared.setdefault(allowed, allowed)
        return allowed

    def _allowed_in_body(self, state: State) -> Allowed:
        layout, position = state.layout, state.position
        if layout is None or position == layout.length:
            return self._eoi
        index = position % layout.frame_length
        if layout.ends_frames and index == layout.frame_length - 1:
            return self._eof
        if layout.ends_rows and index % layout.row_length == layout.width:
            return self._eol
        return self._vision

    def _next(self, state: State, token: int) -> State:
        """The state after an id that is known to be allowed."""
        vocabulary = self.vocabulary
        if state.phase is Phase.BODY:
            if token == vocabulary.eoi:
                return State(Phase.TEXT if self.unit is Unit.DOCUMENT else Phase.END)
            return State(Phase.BODY, "", state.layout, state.position + 1)
        if state.phase is Phase.META:
            if token == vocabulary.img:
                return State(Phase.BODY, layout=self.layout(state.meta))
            return State(Phase.META, state.meta + self._characters[token])
        if token == vocabulary.boi:
            return State(Phase.META)
        return State(Phase.END if token == vocabulary.eos else Phase.TEXT)

    def layout(self, meta: str) -> Layout:
        """The layout that a complete meta text states."""
        rule, values = read_meta(self.rules, meta)
        return Layout.build(
            rule,
            is_video=rule is self.rules.video,
            frames=int(values.get(Field.FRAMES, 1)),
            height=int(values[Field.HEIGHT]),
            width=int(values[Field.WIDTH]),
        )

    def _take_body(self, ids: Ids, layout: Layout, position: int) -> int:
        """How many of `ids` are in order, where `position` ids of the body came before."""
        ids = ids[: layout.length - position]
        frame_length = layout.frame_length
        breaks = (layout, self.vocabulary.eol, self.vocabulary.eof)
        # three pieces: the rest of the current frame, whole frames, the beginning of the last frame
        head = min(-position % frame_length, len(ids))
        tail = (len(ids) - head) % frame_length
        pieces = [(ids[:head], _expected(*breaks, position % frame_length, head))]
        if len(ids) > head + tail:
            pieces.append((ids[head : len(ids) - tail].reshape(-1, frame_length), _expected_frame(*breaks)))
        pieces.append((ids[len(ids) - tail :], _expected(*breaks, 0, tail)))
        taken = 0
        for piece, expected in pieces:
            in_order = self._in_order(piece, expected).ravel()
            if not in_order.all():
                return taken + int(in_order.argmin())
            taken += len(in_order)
        return taken

    def _in_order(self, ids: Ids, expected: Ids) -> npt.NDArray[np.bool_]:
        # as unsigned, ids below the offset wrap to huge numbers: one comparison checks both ends
        codes = (ids - self.vocabulary.vision_offset).view(np.uint64)
        return np.where(expected == _ANY_VISION, codes < self.vocabulary.codebook_size, ids == expected)


def _expected(layout: Layout, eol: int, eof: int, first: int, count: int) -> Ids:
    """`count` ids of a frame from its index `first` on: breaks, and `_ANY_VISION` elsewhere.

    No larger than asked: a hostile meta text may state a frame of a hundred million ids.
    """
    expected = np.full(count, _ANY_VISION, dtype=np.int64)
    if layout.ends_rows:
        expected[(layout.width - first) % layout.row_length :: layout.row_length] = eol
    if layout.ends_frames and first + count == layout.frame_length:
        expected[-1:] = eof
    return expected


@lru_cache(maxsize=64)
def _expected_frame(layout: Layout, eol: int, eof: int) -> Ids:
    """A whole frame."""
    return _expected(layout, eol, eof, 0, layout.frame_length)


def as_ids(ids: Iterable[int] | npt.NDArray[np.integer]) -> Ids:
    """`ids` as a contiguous int64 array ``[N]``. Raises `ValueError` for another shape or type."""
    array = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"ids must be a sequence of integers, got shape {array.shape} and dtype {array.dtype}"
        )
    return np.ascontiguousarray(array, dtype=np.int64)

"""From conversation files to a dataset: questions as prompts, answers as texts, pictures as spans."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emu3_megatron.data import ShardWriter
from emu3_megatron.data.writer import Segment
from emu3_megatron.errors import UserError
from emu3_megatron.grammar import Image, Video
from emu3_megatron.media import BoundedResizeRule, ResizeRule
from emu3_megatron.posttraining.conversation_files import ConversationInputs
from emu3_megatron.posttraining.conversation_writer import ConversationWriter
from emu3_megatron.posttraining.conversations import Conversation, bad
from emu3_megatron.text import CHAT_TEMPLATES
from emu3_megatron.tokenization import BadEntry, Entry, TokenizationConfig, TokenizationJob
from emu3_megatron.tokenization.decode import Sample, SampleDecoder
from emu3_megatron.tokenization.encode import BucketEncoder
from emu3_megatron.tokenization.job import Maker
from emu3_megatron.tokenization.shard import ShardReport

ENDS = 2
"""BOS and EOS, which a template adds."""


@dataclass(frozen=True, kw_only=True)
class ConversationConfig(TokenizationConfig):
    """Settings of a job; `manifest` names conversation files, `image_area` is not used."""

    media_folder: Path | None = None
    """Paths of images and videos are relative to it; to the conversation file's folder where None."""
    template: str = "emu3-chat"
    """How turns are written: ``emu3-chat`` or ``emu3-stage1``."""
    min_area: int = 512 * 512
    """Pixels below which pictures are enlarged to so many (paper: 512 x 512)."""
    max_area: int = 1024 * 1024
    """Pixels above which pictures are reduced to so many (paper: 1024 x 1024)."""
    max_tokens: int | None = None
    """Set aside what is longer, BOS and EOS counted; None: the plan drops what its windows cannot hold."""

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if self.template not in CHAT_TEMPLATES:
            raise UserError(f"template={self.template!r} is not one of {', '.join(CHAT_TEMPLATES)}")
        if self.max_tokens is not None and self.max_tokens <= ENDS:
            raise UserError(f"max_tokens={self.max_tokens} must exceed {ENDS}, BOS and EOS")

    def resize_rule(self, kind: str, spatial_factor: int) -> ResizeRule | BoundedResizeRule:
        """Pictures keep their size within the bounds; frames do too, unless `video_area` is given."""
        if kind == "video" and self.video_area is not None:
            return super().resize_rule(kind, spatial_factor)
        return BoundedResizeRule(
            min_area=self.min_area,
            max_area=self.max_area,
            spatial_factor=spatial_factor,
            max_aspect_ratio=self.max_aspect_ratio,
        )

    def identity(self) -> dict[str, Any]:
        """As in every job; the folder of the media is not compared: it may have been moved."""
        return {key: value for key, value in super().identity().items() if key != "media_folder"}


class ConversationJob(TokenizationJob):
    """A tokenization job (shards, workers, resumption, quarantine) whose entries are conversations."""

    config: ConversationConfig

    def open_inputs(self) -> ConversationInputs:
        """The conversations of all files."""
        return ConversationInputs(self.config.manifest, self.config.media_folder)

    def make_maker(
        self, decoder: SampleDecoder, encoder: BucketEncoder | None, on_entry: Callable[[], object]
    ) -> Maker:
        """What turns conversations into documents."""
        writer = ConversationWriter(self.toolkit.dialect, CHAT_TEMPLATES[self.config.template])
        return ConversationMaker(writer, decoder, encoder, self.config, on_entry)


def tokenize_conversations(config: ConversationConfig) -> bool:
    """Run one worker of a job. Returns whether the dataset is complete."""
    job = ConversationJob(config)
    return job.finalize() if config.finalize else job.run()


class ConversationMaker:
    """Makes a shard of conversations. A conversation of which one picture cannot be used is set aside whole.

    Args:
        writer: Writes segments.
        decoder: Media to pixels.
        encoder: Pixels to codes; None where there is no vision tokenizer.
        config: Split and longest document.
        on_entry: Called after each conversation, for a progress bar.
    """

    def __init__(
        self,
        writer: ConversationWriter,
        decoder: SampleDecoder,
        encoder: BucketEncoder | None,
        config: ConversationConfig,
        on_entry: Callable[[], object],
    ) -> None:
        self._writer, self._decoder, self._encoder = writer, decoder, encoder
        self._config, self._on_entry = config, on_entry

    def make(self, entries: Iterable[Conversation | BadEntry], writer: ShardWriter) -> ShardReport:
        """Decode, encode, and add every good conversation to `writer`, in order.

        Raises:
            UserError: media without a vision tokenizer.
            OSError: a fault of the file system that did not pass.
        """
        report = ShardReport()
        conversations = list(self._of_split(entries, report))
        media = [entry for each in conversations if isinstance(each, Conversation) for entry in each.media]
        samples = self._pass_through_encoder(media)
        codes = self._encoder.finish() if self._encoder else {}
        spans = iter([_span(sample, codes.get(key)) for key, sample in enumerate(samples)])
        for conversation in conversations:
            if isinstance(conversation, BadEntry):
                report.set_aside(conversation)
            else:
                self._write(conversation, [next(spans) for _ in conversation.media], writer, report)
            self._on_entry()
        report.tokens = writer.num_tokens
        return report

    def _of_split(
        self, entries: Iterable[Conversation | BadEntry], report: ShardReport
    ) -> Iterator[Conversation | BadEntry]:
        """Leave out conversations of other splits; bad ones of an unknown split stay."""
        for entry in entries:
            known = entry.split is not None or isinstance(entry, Conversation)
            if self._config.split is not None and known and entry.split != self._config.split:
                report.other_splits += 1
                self._on_entry()
            else:
                report.entries += 1
                yield entry

    def _pass_through_encoder(self, media: Sequence[Entry]) -> list[Sample | BadEntry]:
        """Feed the encoder with every picture; returns the samples without their pixels."""
        samples: list[Sample | BadEntry] = []
        for sample in self._decoder(media):
            if isinstance(sample, Sample):
                if self._encoder is None:
                    raise UserError(
                        f"conversation {sample.entry.id!r} has a picture: give --vision_tokenizer, or "
                        "conversations of text alone"
                    )
                assert sample.pixels is not None
                self._encoder.add(len(samples), sample.pixels, video=sample.clip is not None)
                sample = Sample(entry=sample.entry, pixels=None, clip=sample.clip)
            samples.append(sample)
        return samples

    def _write(
        self,
        conversation: Conversation,
        spans: Sequence[Image | Video | BadEntry],
        writer: ShardWriter,
        report: ShardReport,
    ) -> None:
        """Write one document, or set the conversation aside."""
        unusable = next((span for span in spans if isinstance(span, BadEntry)), None)
        if unusable is not None:
            reason = f"{unusable.path} {unusable.reason}"
            report.set_aside(bad(conversation.place, reason, id=conversation.id, path=unusable.path))
            return
        usable = [span for span in spans if not isinstance(span, BadEntry)]
        try:
            segments = self._writer.segments(conversation, usable)
            self._check_length(segments)
        except ValueError as error:
            report.set_aside(bad(conversation.place, str(error), id=conversation.id))
            return
        writer.add_document(segments, sample_id=conversation.id)
        report.texts += 1
        for span in usable:
            report.images += isinstance(span, Image)
            report.clips += isinstance(span, Video)

    def _check_length(self, segments: Sequence[Segment]) -> None:
        limit = self._config.max_tokens
        length = sum(len(ids) for ids, _ in segments) + ENDS
        if limit is not None and length > limit:
            raise ValueError(f"is {length} tokens long; max_tokens={limit}, and conversations are never cut")


def _span(sample: Sample | BadEntry, codes: Any) -> Image | Video | BadEntry:
    """A picture's codes as a segment of a document."""
    if isinstance(sample, BadEntry):
        return sample
    if sample.clip is None:
        return Image(codes)
    return Video(codes, fps=sample.clip.fps, seconds=sample.clip.seconds)

"""Text corpora to datasets: every process makes whole shards, of lines that it finds by itself."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from emu3_megatron.data import ShardWriter, read_shard_record, write_manifest
from emu3_megatron.errors import UserError
from emu3_megatron.files import TEMPORARY_SUFFIX, atomic_write, printable, write_json_atomic
from emu3_megatron.grammar import Dialect
from emu3_megatron.text import load_text_tokenizer
from emu3_megatron.tokenization.job import JOB_FILE, QUARANTINE_FILE, REPORTS, claim_folder
from emu3_megatron.tokenization.retrying import retry
from emu3_megatron.tokenization.text_inputs import Part, TextDocument, cut, fingerprint
from emu3_megatron.tokenization.toolkit import choose_vocabulary
from emu3_megatron.vision import VisionTokenizer
from emu3_megatron.vocabulary import Vocabulary

LISTED = 1000
"""Bad lines of a shard that are listed; all are counted."""

BATCH_DOCUMENTS, BATCH_CHARACTERS = 512, 1 << 18
"""Documents, or characters, that a process encodes at a time: NumPy's and our own cost for each is shared."""


@dataclass(frozen=True, kw_only=True)
class TextJobConfig:
    """Settings of a job. Raises `UserError` on construction where a value is out of range."""

    input: tuple[Path, ...]
    """JSON Lines (any name) and plain text (`*.txt`, a document a line), plain or `.gz`, and Parquet
    (`*.parquet`), in order."""
    output: Path
    """Folder of the dataset."""
    text_tokenizer: Path
    """`*.tiktoken` (Qwen), `*.model` (SentencePiece) or `tokenizer.json` (Hugging Face)."""
    vision_tokenizer: Path | None = None
    """Folder of the vision tokenizer that the run uses; only its codebook's size is looked at."""
    vocabulary: str = "auto"
    """`emu3`, `emu3.5`, `tiny`, or `auto`: as large as the two tokenizers."""
    dialect: str = "emu3"
    """`emu3`, `emu3-frames` or `emu3.5`."""
    key: str = "text"
    """Key of a JSON object, or column, under which a document stands."""
    name: str = ""
    """First part of the shards' file names; the output folder's name where empty."""
    shard_bytes: int = 1 << 28
    """Bytes of input that make a shard, about: the unit of work and of resumption."""
    processes: int = 1
    """Processes of this worker; each makes a shard at a time."""
    worker: int = 0
    """This worker's number, from 0; it makes the shards of that remainder."""
    num_workers: int = 1
    """Workers that share the output folder."""
    quarantine_budget: float = 0.01
    """Share of lines that may be set aside before the job fails."""
    progress: bool = True
    """Show a progress bar on stderr."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("shard_bytes", "processes", "num_workers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.worker < self.num_workers:
            raise UserError(f"worker={self.worker} must lie in 0..{self.num_workers - 1} (num_workers - 1)")
        if not 0 <= self.quarantine_budget <= 1:
            raise UserError(f"quarantine_budget={self.quarantine_budget} must be a share, from 0 to 1")

    @property
    def dataset_name(self) -> str:
        """First part of the shards' file names."""
        return self.name or self.output.resolve().name


@dataclass(kw_only=True)
class TextReport:
    """What became of a shard's lines; kept as JSON beside the shards."""

    documents: int = 0
    """Documents written."""
    tokens: int = 0
    """Their tokens."""
    bad: int = 0
    """Lines set aside."""
    damaged: int = 0
    """1 where the input breaks inside this part, and all that follows is lost."""
    examples: list[dict[str, str]] = field(default_factory=list)
    """The first `LISTED` of them, and the damage: id, path, reason, error."""

    def set_aside(self, document: TextDocument, path: Path) -> None:
        """Count a document that cannot be used, and list it if there is room."""
        self.bad += 1
        self.damaged += document.damaged
        if self.bad <= LISTED or document.damaged:
            self.examples.append(
                {
                    "id": document.name,
                    "path": printable(str(path)),
                    "reason": document.reason or "has no text left after normalisation",
                    "error": "DamagedInput" if document.damaged else "EntryError",
                }
            )


class TextShards:
    """Makes shards; every process has its own, with its own tokenizer.

    Args:
        config: the job.
        vocabulary: of the dataset.
    """

    def __init__(self, config: TextJobConfig, vocabulary: Vocabulary) -> None:
        self._config = config
        self.dialect = Dialect.preset(config.dialect, vocabulary, load_text_tokenizer(config.text_tokenizer))

    def make(self, shard: int, num_shards: int, part: Part) -> TextReport:
        """Make one shard. Its report is written first, so that a published shard always has one."""
        config, report = self._config, TextReport()
        with ShardWriter(
            config.output,
            config.dataset_name,
            vocabulary=self.dialect.vocabulary,
            shard=shard,
            num_shards=num_shards,
        ) as writer:
            for batch in _batches(part.documents(config.key)):
                encoded = iter(self.dialect.encode_texts([row.text for row in batch if not row.reason]))
                good: list[tuple[str, npt.NDArray[np.integer[Any]]]] = []
                for row in batch:
                    ids = None if row.reason else next(encoded)
                    if ids is None or not len(ids):
                        report.set_aside(row, part.path)
                    else:
                        good.append((row.name, ids))
                writer.add_texts([ids for _, ids in good], [name for name, _ in good])
            report.documents, report.tokens = writer.num_documents, writer.num_tokens
            write_json_atomic(report_path(config, shard, num_shards), asdict(report))
        return report


def _batches(documents: Iterable[TextDocument]) -> Iterator[list[TextDocument]]:
    """Runs of documents that are encoded together; only the last document of one may be a long one."""
    batch: list[TextDocument] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def report_path(config: TextJobConfig, shard: int, num_shards: int) -> Path:
    """File of a shard's report."""
    return config.output / REPORTS / f"{config.dataset_name}-{shard:05d}-of-{num_shards:05d}.json"


class TextJob:
    """One worker's view of a job. The folder is the only thing that workers share."""

    def __init__(self, config: TextJobConfig) -> None:
        """Cut the input into parts, and check that the folder belongs to this job.

        Raises:
            UserError: something does not fit together; the message says what.
        """
        self.config = config
        self.parts = cut(config.input, config.shard_bytes)
        text = load_text_tokenizer(config.text_tokenizer)
        vision = VisionTokenizer.from_pretrained(config.vision_tokenizer) if config.vision_tokenizer else None
        self.vocabulary = choose_vocabulary(config.vocabulary, text, vision)
        identity = {
            "input": [[path.name, fingerprint(path)] for path in config.input],
            "vocabulary": self.vocabulary.fingerprint,
            "text_tokenizer": text.fingerprint,
            **{key: getattr(config, key) for key in ("dialect", "key", "shard_bytes")},
            "name": config.dataset_name,
        }
        claim_folder(config.output, identity)

    def run(self) -> bool:
        """Make this worker's missing shards, then the manifest if all shards are there.

        Returns:
            Whether the dataset is complete.

        Raises:
            UserError: more lines were set aside than the budget allows.
            OSError: a fault of the file system that did not pass; shards that are done stay.
        """
        config, count = self.config, len(self.parts)
        mine = [i for i in range(config.worker, count, config.num_workers) if not self._is_done(i)]
        with tqdm(
            total=len(mine), desc="tokenize", unit="shard", disable=not config.progress, file=sys.stderr
        ) as bar:
            for report in self._make(mine):
                bar.update()
                if (
                    not report.documents and not report.damaged
                ):  # the wrong --key, say; other shares are judged over all shards
                    self._check_budget([report])
        if not all(map(self._is_done, range(count))):
            return False
        self._finish()
        return True

    def _make(self, shards: list[int]) -> Iterator[TextReport]:
        """Make shards here or in processes; yields their reports as they come."""
        config, count = self.config, len(self.parts)
        if config.processes == 1 or len(shards) < 2:
            for shard in shards:
                part = self.parts[shard]
                yield retry(partial(self._here.make, shard, count), part, name=str(part.path))
            return
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(config.processes, len(shards)), spawn) as pool:
            futures = [
                pool.submit(_make, config, self.vocabulary, shard, count, self.parts[shard])
                for shard in shards
            ]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    @cached_property
    def _here(self) -> TextShards:
        return TextShards(self.config, self.vocabulary)

    def _finish(self) -> None:
        """Write ``quarantine.jsonl`` and, last, ``manifest.json``."""
        config, count = self.config, len(self.parts)
        reports = [
            TextReport(**json.loads(report_path(config, shard, count).read_text())) for shard in range(count)
        ]
        with atomic_write(config.output / QUARANTINE_FILE) as stream:
            for report in reports:
                stream.writelines(
                    json.dumps(example, ensure_ascii=False).encode() + b"\n" for example in report.examples
                )
        self._check_budget(reports)
        dialect = self._here.dialect
        write_manifest(
            config.output,
            config.dataset_name,
            count,
            vocabulary=dialect.vocabulary,
            dialect_name=dialect.name,
            dialect_fingerprint=dialect.fingerprint,
            text_tokenizer_fingerprint=dialect.text_tokenizer.fingerprint,
            vision_tokenizer_fingerprint="",
            provenance={
                "job": json.loads((config.output / JOB_FILE).read_text()),
                "documents": sum(report.documents for report in reports),
                "quarantined": sum(report.bad for report in reports),
            },
        )
        # What killed processes left; nobody writes shards any more.
        for folder in (config.output, config.output / REPORTS):
            for leftover in folder.glob(f".{config.dataset_name}-*{TEMPORARY_SUFFIX}"):
                leftover.unlink(missing_ok=True)

    def _check_budget(self, reports: list[TextReport]) -> None:
        """Fail where too large a share of these shards is damaged, or of their lines was set aside."""
        damaged = [report.examples[-1] for report in reports if report.damaged]
        if len(damaged) > self.config.quarantine_budget * len(reports):
            raise UserError(
                f"{len(damaged)} of {len(reports)} parts of the input are damaged, more than "
                f"quarantine_budget={self.config.quarantine_budget:g} allows; the first: "
                f"{damaged[0]['path']}, {damaged[0]['id']} {damaged[0]['reason']}; raise the budget and run "
                "again to go on without what is lost (finished shards are kept), or mend the file and take "
                "another --output"
            )
        bad = sum(report.bad for report in reports)
        lines = bad + sum(report.documents for report in reports)
        if bad > self.config.quarantine_budget * lines:
            first = next(report.examples[0] for report in reports if report.bad)
            raise UserError(
                f"{bad} of {lines} lines cannot be used, more than quarantine_budget="
                f"{self.config.quarantine_budget:g} allows; the first: {first['path']}, {first['id']} "
                f"{first['reason']}; mend the input, name the right --key, or raise the budget and run "
                "again: finished shards are kept"
            )

    def _is_done(self, shard: int) -> bool:
        """Whether a shard is published."""
        count = len(self.parts)
        record = read_shard_record(self.config.output, self.config.dataset_name, shard, count)
        return record is not None and report_path(self.config, shard, count).is_file()


def _make(
    config: TextJobConfig, vocabulary: Vocabulary, shard: int, num_shards: int, part: Part
) -> TextReport:
    return retry(partial(_maker(config, vocabulary).make, shard, num_shards), part, name=str(part.path))


@lru_cache(maxsize=1)
def _maker(config: TextJobConfig, vocabulary: Vocabulary) -> TextShards:
    """A process of the pool loads the tokenizer once."""
    return TextShards(config, vocabulary)


def tokenize_text(config: TextJobConfig) -> bool:
    """Run one worker of a job; see `TextJob.run`. Returns whether the dataset is complete."""
    return TextJob(config).run()

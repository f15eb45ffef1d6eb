"""A tokenization job: who makes which shard, what is done already, and when the dataset is complete."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from emu3_megatron.data import ShardWriter, read_shard_record, write_manifest
from emu3_megatron.errors import MachineFault, UserError, one_line
from emu3_megatron.files import TEMPORARY_SUFFIX, atomic_write, write_json_atomic
from emu3_megatron.tokenization.config import TokenizationConfig
from emu3_megatron.tokenization.decode import SampleDecoder
from emu3_megatron.tokenization.encode import BucketEncoder
from emu3_megatron.tokenization.inputs import Inputs
from emu3_megatron.tokenization.shard import ShardMaker, ShardReport
from emu3_megatron.tokenization.toolkit import Toolkit

JOB_FILE = "job.json"
"""What the job was started with; a run with other settings is refused."""

QUARANTINE_FILE = "quarantine.jsonl"
"""Every entry that was set aside, in the manifest's order."""

REPORTS = "reports"
"""Folder of the shards' reports."""

SPLITS_NAMED = 10
"""Splits, the largest first, that an error names."""


FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
"""Errors of the operating system that end a worker at once: no other shard can be written either."""

FAILURES_IN_A_ROW = 3
"""Shards that may fail one after the other before a worker stops: then it is no single file."""


class EntryList(Protocol):
    """The numbered entries of a job."""

    fingerprints: list[str]
    """SHA-256 (hex) of the files they come from."""

    def __len__(self) -> int:
        """Number of entries, bad ones included."""
        ...

    def shard_range(self, shard: int, num_shards: int) -> tuple[int, int]:
        """First entry of a shard, and of the next."""
        ...

    def entries(self, start: int, stop: int) -> Iterator[Any]:
        """Read the entries from `start` to before `stop`."""
        ...


class Maker(Protocol):
    """Turns the entries of a shard into documents."""

    def make(self, entries: Iterable[Any], writer: ShardWriter) -> ShardReport:
        """Add every good entry to `writer`, in order; report what was set aside."""
        ...


class TokenizationJob:
    """One worker's view of a job. The folder is the only thing that workers share.

    What the entries are, and how they become documents, is decided by `open_inputs` and `make_maker`.
    """

    def __init__(self, config: TokenizationConfig) -> None:
        """Load the tokenizers, read the manifests, and check that the folder belongs to this job.

        Raises:
            UserError: something does not fit together; the message says what.
        """
        self.config = config
        self._reports: dict[int, ShardReport] = {}
        self._listed = -1
        self.toolkit = Toolkit.load(config)
        self.inputs: EntryList = self.open_inputs()
        if not len(self.inputs):
            raise UserError(f"{', '.join(map(str, config.manifest))}: no entries; nothing to tokenize")
        self._claim_folder()

    def open_inputs(self) -> EntryList:
        """The entries of the job."""
        return Inputs(self.config.manifest)

    def make_maker(
        self, decoder: SampleDecoder, encoder: BucketEncoder | None, on_entry: Callable[[], object]
    ) -> Maker:
        """What turns a shard's entries into documents."""
        return ShardMaker(self.toolkit.dialect, decoder, encoder, split=self.config.split, on_entry=on_entry)

    def _claim_folder(self) -> None:
        """Write ``job.json``, or compare with the one that is there."""
        identity = {
            **self.config.identity(),
            **self.toolkit.identity(),
            "manifests": self.inputs.fingerprints,
        }
        claim_folder(self.config.output, identity)

    def run(self) -> bool:
        """Make this worker's missing shards, then the manifest if all shards are there.

        Returns:
            Whether the dataset is complete.

        Raises:
            UserError: more entries were set aside than the budget allows.
            MachineFault: a fault that did not pass; all shards that it did not touch are made.
            OSError: the disk is full.
        """
        config = self.config
        mine = range(config.worker, config.num_shards, config.num_workers)
        missing = [shard for shard in mine if not self._is_done(shard)]
        if missing:
            self._make(missing)
        return self.finalize()

    def _make(self, shards: list[int]) -> None:
        """Make shards, showing progress and, at the end, where the time went."""
        config, toolkit = self.config, self.toolkit
        ranges = {shard: self.inputs.shard_range(shard, config.num_shards) for shard in shards}
        total = sum(stop - start for start, stop in ranges.values())
        begin = time.perf_counter()
        reports: list[ShardReport] = []
        with (
            tqdm(
                total=total,
                desc=f"tokenize {config.worker + 1}/{config.num_workers}",
                unit="entry",
                disable=not config.progress,
            ) as bar,
            SampleDecoder(config, toolkit.spatial_factor) as decoder,
        ):
            encoder = toolkit.encoder(config)
            maker = self.make_maker(decoder, encoder, bar.update)
            failures: dict[int, Exception] = {}
            for shard, (start, stop) in ranges.items():
                try:
                    reports.append(self._make_shard(shard, start, stop, maker))
                except OSError as error:
                    failures[shard] = error
                    if _is_general(failures, ranges):
                        break
                    if encoder:
                        encoder.clear()
                    continue
                self._check_budget()
        if config.progress:
            seconds = time.perf_counter() - begin
            print(_summary(reports, seconds, decoder, encoder), file=sys.stderr)
        if failures:
            raise _failed(failures)

    def _make_shard(self, shard: int, start: int, stop: int, maker: Maker) -> ShardReport:
        """Make one shard. Its report is written first, so that a published shard always has one."""
        config = self.config
        with ShardWriter(
            config.output,
            config.dataset_name,
            vocabulary=self.toolkit.dialect.vocabulary,
            shard=shard,
            num_shards=config.num_shards,
        ) as writer:
            report = maker.make(self.inputs.entries(start, stop), writer)
            write_json_atomic(self._report_path(shard), asdict(report))
        self._reports[shard] = report
        return report

    def finalize(self) -> bool:
        """Write ``quarantine.jsonl`` and ``manifest.json`` if all shards are there; any worker may do it.

        Returns:
            Whether all shards are there.

        Raises:
            UserError: more entries were set aside than the budget allows, no entry has the asked split, or a
                shard is missing although the settings ask for ``finalize``.
        """
        config, toolkit = self.config, self.toolkit
        missing = [shard for shard in range(config.num_shards) if not self._is_done(shard)]
        if missing:
            if config.finalize:
                raise UserError(
                    f"shards {missing} of {config.num_shards} are not finished; run their workers"
                )
            return False
        self._reports.clear()  # a worker that was killed may have made its shard again, of repaired files
        self._listed = -1
        self._check_budget()
        reports = self._reports.values()
        if config.split is not None and not any(
            report.images + report.clips + report.texts for report in reports
        ):
            raise UserError(self._no_such_split(config.split))
        write_manifest(
            config.output,
            config.dataset_name,
            config.num_shards,
            vocabulary=toolkit.dialect.vocabulary,
            dialect_name=toolkit.dialect.name,
            dialect_fingerprint=toolkit.dialect.fingerprint,
            text_tokenizer_fingerprint=toolkit.dialect.text_tokenizer.fingerprint,
            vision_tokenizer_fingerprint=toolkit.vision_fingerprint,
            provenance={
                "job": json.loads((config.output / JOB_FILE).read_text()),
                "manifests": [path.name for path in config.manifest],
                **{
                    key: sum(getattr(report, key) for report in reports)
                    for key in ("entries", "other_splits", "images", "clips", "frames", "texts")
                },
                "quarantined": sum(len(report.quarantine) for report in reports),
            },
        )
        # What killed workers left; nobody writes shards any more.
        for folder in (config.output, config.output / REPORTS):
            for leftover in folder.glob(f".{config.dataset_name}-*{TEMPORARY_SUFFIX}"):
                leftover.unlink(missing_ok=True)
        return True

    def _no_such_split(self, split: str) -> str:
        """That no document came about, and which splits there are."""
        there = Counter(entry.split for entry in self.inputs.entries(0, len(self.inputs)))
        named = [f"{name or 'none'} ({count})" for name, count in there.most_common(SPLITS_NAMED)]
        return (
            f"split={split!r} gave no document: the {len(self.inputs)} entries of "
            f"{', '.join(map(str, self.config.manifest))} have the splits {', '.join(named)}; name one of "
            f'these, or write the key "split" into the entries, remove {self.config.output}, and run again'
        )

    def _check_budget(self) -> None:
        """Write the quarantine list of all shards so far, and fail where it is longer than the budget."""
        self._read_reports()
        bad = [entry for _, report in sorted(self._reports.items()) for entry in report.quarantine]
        path = self.config.output / QUARANTINE_FILE
        if len(bad) != self._listed:
            with atomic_write(path) as stream:
                stream.writelines(json.dumps(entry, ensure_ascii=False).encode() + b"\n" for entry in bad)
            self._listed = len(bad)
        allowed = int(self.config.quarantine_budget * len(self.inputs))
        if len(bad) > allowed:
            example = f"{bad[0]['path'] or bad[0]['id']} {bad[0]['reason']}"
            raise UserError(
                f"{len(bad)} of {len(self.inputs)} entries cannot be used, more than the budget of {allowed} "
                f"({self.config.quarantine_budget:.1%}); the first: {example}; see {path}, "
                "repair the files, or raise --quarantine-budget and run again: finished shards are kept"
            )

    def _read_reports(self) -> None:
        """Read the reports that are new since the last time: one listing, and each file once."""
        folder = self.config.output / REPORTS
        present = set(os.listdir(folder)) if folder.is_dir() else set()
        for shard in range(self.config.num_shards):
            path = self._report_path(shard)
            if shard not in self._reports and path.name in present:
                self._reports[shard] = ShardReport(**json.loads(path.read_text()))

    def _report_path(self, shard: int) -> Path:
        """File of a shard's report."""
        config = self.config
        return config.output / REPORTS / f"{config.dataset_name}-{shard:05d}-of-{config.num_shards:05d}.json"

    def _is_done(self, shard: int) -> bool:
        """Whether a shard is published."""
        config = self.config
        record = read_shard_record(config.output, config.dataset_name, shard, config.num_shards)
        return record is not None and self._report_path(shard).is_file()


def claim_folder(output: Path, identity: dict[str, Any]) -> None:
    """Write ``job.json``, or compare with the one that is there.

    Args:
        output: folder of the dataset.
        identity: all that decides the shards' bytes, as JSON.

    Raises:
        UserError: the folder holds a job with other settings; the message names them.
    """
    identity = json.loads(json.dumps(identity))
    path = output / JOB_FILE
    if not path.exists():
        write_json_atomic(path, identity)
        return
    try:
        earlier = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); remove the folder and start again") from error
    different = sorted(k for k in {*identity, *earlier} if identity.get(k) != earlier.get(k))
    if different:
        changes = ", ".join(f"{k} ({earlier.get(k)!r} -> {identity.get(k)!r})" for k in different)
        raise UserError(
            f"{output} holds a job with other settings: {changes}; "
            "use the earlier ones, another --output, or remove the folder"
        )


def _is_general(failures: dict[int, Exception], shards: Iterable[int]) -> bool:
    """Whether the last failure will meet the shards after it too: a full disk, or many in a row."""
    *_, last = failures
    error = failures[last]
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    tried = [shard for shard in shards if shard <= last][-FAILURES_IN_A_ROW:]
    return len(tried) == FAILURES_IN_A_ROW and all(shard in failures for shard in tried)


def _failed(failures: dict[int, Exception]) -> Exception:
    """One error for all shards that could not be made, with every reason once."""
    reasons: dict[str, list[int]] = {}
    for shard, error in failures.items():
        reasons.setdefault(one_line(error), []).append(shard)
    listed = "; ".join(f"{shards}: {reason}" for reason, shards in reasons.items())
    full = any(isinstance(error, OSError) and error.errno in FULL for error in failures.values())
    return (OSError if full else MachineFault)(
        f"shards that could not be made: {listed}; finished shards are kept, run again when it is mended"
    )


def _summary(
    reports: list[ShardReport], seconds: float, decoder: SampleDecoder, encoder: BucketEncoder | None
) -> str:
    """One line on what was done, how fast, and where the time went."""
    kinds = ("images", "frames", "texts", "tokens")
    counts = {kind: sum(getattr(report, kind) for report in reports) for kind in kinds}
    rates = ", ".join(f"{count} {kind} ({count / seconds:.1f}/s)" for kind, count in counts.items() if count)
    encode = encoder.seconds if encoder else 0.0
    wait, bad = decoder.waited, sum(len(report.quarantine) for report in reports)
    return (
        f"{rates or 'nothing'} in {seconds:.1f} s: decoding {decoder.seconds:.1f} s in the background, "
        f"encoding {encode:.1f} s, waiting for pixels {wait:.1f} s ({wait / seconds:.1%}), "
        f"the rest {max(seconds - encode - wait, 0):.1f} s; {bad} set aside"
    )


def tokenize(config: TokenizationConfig) -> bool:
    """Run one worker of a job; see `TokenizationJob`. Returns whether the dataset is complete."""
    job = TokenizationJob(config)
    return job.finalize() if config.finalize else job.run()

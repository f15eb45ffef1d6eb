"""A curation job: scores by many processes, then one pass that decides and writes the results."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any, BinaryIO

from tqdm import tqdm

from emu3_megatron.curation.categories import category_of
from emu3_megatron.curation.clips import ClipTask, ClipWriter, clip_name, is_part
from emu3_megatron.curation.config import CurationConfig
from emu3_megatron.curation.manifest import BadEntry, RawManifest
from emu3_megatron.curation.pipeline import Pipeline, Step, look_ahead
from emu3_megatron.curation.pool import run_tasks
from emu3_megatron.curation.report import Report, headlines
from emu3_megatron.curation.scoring import ChunkScorer, MissingScore, read_scores, set_aside, unusable
from emu3_megatron.curation.sheets import write_sheets
from emu3_megatron.curation.units import Comparer, Score, Stage, Unit
from emu3_megatron.errors import UserError
from emu3_megatron.files import TEMPORARY_SUFFIX, atomic_write, printable, write_json_atomic

JOB_FILE, MANIFEST_FILE, QUARANTINE_FILE = "job.json", "manifest.jsonl", "quarantine.jsonl"


class CurationJob:
    """One worker's view of a job. The folder is the only thing that workers share."""

    def __init__(self, config: CurationConfig) -> None:
        """Read the manifests, build the stages, and check that the folder belongs to these manifests.

        Raises:
            UserError: something does not fit together; the message says what.
        """
        self.config = config
        self.manifest = RawManifest(config.manifest)
        self.pipeline = Pipeline(config)
        self._claim_folder()
        self._budget = _Budget(config, len(self.manifest))

    def _claim_folder(self) -> None:
        """Write ``job.json``, or compare with the one that is there. Settings may change, entries may not."""
        identity = {"manifests": self.manifest.fingerprints, "entries": len(self.manifest)}
        path = self.config.output / JOB_FILE
        if path.exists():
            try:
                earlier = json.loads(path.read_text())
            except ValueError as error:
                raise UserError(f"{path}: not JSON ({error}); remove the folder and start again") from error
            if earlier != identity:
                raise UserError(
                    f"{self.config.output} holds the scores of other manifests (then "
                    f"{earlier.get('entries')} entries, now {len(self.manifest)}, or "
                    "other contents); use another output, or remove the folder"
                )
        else:
            write_json_atomic(path, identity)

    def run(self) -> Report | None:
        """Compute the scores that this worker's chunks lack; then, where all chunks are there, the results.

        Returns:
            What was kept and dropped; None where other workers' chunks are missing.

        Raises:
            UserError: a setting does not fit, or more entries cannot be used than the settings allow.
            OSError: a fault that did not pass; what is done stays.
        """
        config = self.config
        mine = range(config.worker, self.manifest.chunks, config.num_workers)
        total = sum(map(self.manifest.chunk_size, mine))
        with self._bar(total, f"curate {config.worker + 1}/{config.num_workers}", "entry") as bar:
            run_tasks(
                mine,
                partial(ChunkScorer, config, self.manifest),
                processes=config.processes,
                timeout=config.entry_timeout,
                on_step=lambda: bar.update(),
                on_result=self._budget.add,
            )
        try:
            return self._finish()
        except MissingScore:
            return None

    def _bar(self, total: int, name: str, unit: str) -> tqdm[Any]:
        return tqdm(total=total, desc=name, unit=unit, disable=not self.config.progress, file=sys.stderr)

    def _steps(self) -> Iterator[Unit | BadEntry | Step]:
        """Every entry, followed by everything that happened to it. Raises `MissingScore`."""
        comparers = self.pipeline.comparers()
        for step in self._walk(None):
            if isinstance(step, Step):
                look_ahead(step, comparers)
        yield from self._walk(comparers)

    def _walk(self, comparers: Mapping[str, Comparer] | None) -> Iterator[Unit | BadEntry | Step]:
        """Every entry with its steps, decided by the scores that are kept."""
        for chunk in range(self.manifest.chunks):
            scores = read_scores(self.config.output, chunk)

            def score_of(stage: Stage, unit: Unit, scores: dict[Any, Score] = scores) -> Score:
                try:
                    return scores[stage.key, unit.id]
                except KeyError:
                    raise MissingScore(unit.id) from None

            for entry in self.manifest.entries(chunk):
                yield entry
                if isinstance(entry, Unit):
                    yield from self.pipeline.walk(entry, score_of, comparers)

    def _finish(self) -> Report:
        """Decide, write the clips, and then all results."""
        self._budget = _Budget(self.config, len(self.manifest))  # this time of all workers
        self._budget.add(self._unusable())
        problems = self._write_clips()
        report = Report(self.config.thumbnails)
        output = self.config.output
        with ExitStack() as stack:
            results = _Results(self.config, stack, problems)
            for step in self._steps():
                if isinstance(step, BadEntry):
                    report.bad_entry()
                    results.quarantine(step)
                elif isinstance(step, Unit):
                    report.entries[step.kind] += 1
                elif results.take(step):
                    report.step(step)
            report.write(output)
        if self.config.thumbnails:  # once the results are out: nothing that happens here takes them away
            write_sheets(report, output, processes=self.config.processes, timeout=self.config.entry_timeout)
        if self.config.num_workers == 1:  # else another worker may be writing the same results
            for leftover in output.rglob(f".*{TEMPORARY_SUFFIX}"):  # of killed runs
                leftover.unlink(missing_ok=True)
        return report

    def _unusable(self) -> Iterator[BadEntry]:
        """One line about each entry that cannot be used. Raises `MissingScore`."""
        last: Unit | None = None
        for step in self._walk(None):
            if isinstance(step, BadEntry):
                yield step
            elif isinstance(step, Unit):
                last = step
            elif last is not None and (found := next(unusable([step]), None)):
                yield found
                last = None

    def _write_clips(self) -> dict[str, str]:
        """Write the kept clips that are parts of videos; what is wrong with the others, by id."""
        config = self.config
        if not config.video.write_clips:
            for _ in self._steps():  # all scores must be there
                pass
            return {}
        tasks = []
        for step in self._steps():
            if isinstance(step, Step) and step.stage is None and step.unit.frames and _is_cut(step):
                target = config.output / "clips" / clip_name(step.unit)
                tasks.append(ClipTask(step.unit.id, step.unit.file, step.unit.frames, target))
        with self._bar(len(tasks), "write clips", "clip") as bar:
            results = run_tasks(
                tasks,
                ClipWriter,
                processes=config.processes,
                timeout=config.entry_timeout,
                on_step=lambda: bar.update(),
            )
        problems = {task: problem for task, problem in results.items() if problem is not None}
        first = {task.id[: task.id.rindex("@")]: task for task in reversed(problems)}  # of each entry
        self._budget.add(
            BadEntry(task.id, printable(str(task.source)), problems[task], "MediaError", "clips")
            for task in first.values()
        )
        return {task.id: problem for task, problem in problems.items()}


def _is_cut(step: Step) -> bool:
    """Whether a kept unit is a part of its video."""
    scores = {before.stage.name: before.score for before in step.path if before.stage}
    if "part" in scores:
        return is_part(step.unit, scores["part"]["of"])
    if "probe" in scores:
        return is_part(step.unit, scores["probe"]["frames"])
    return is_part(step.unit, len(scores["scenes"]["seconds"]) if "scenes" in scores else 0)


class _Budget:
    """Ends a job of which too much cannot be used: then it is rarely the files."""

    def __init__(self, config: CurationConfig, entries: int) -> None:
        self._config, self._entries = config, entries
        self._allowed = int(config.max_unusable_fraction * entries)
        self._bad: list[BadEntry] = []

    def add(self, bad: Iterable[BadEntry]) -> None:
        """Count entries. Raises `UserError` above the limit, and leaves a list of what was counted."""
        self._bad += bad
        if len(self._bad) <= self._allowed:
            return
        path, first = self._config.output / QUARANTINE_FILE, self._bad[0]
        with atomic_write(path) as stream:
            for entry in self._bad:
                _write_line(stream, asdict(entry))
        raise UserError(
            f"{len(self._bad)} of {self._entries} entries cannot be used, and max_unusable_fraction="
            f"{self._config.max_unusable_fraction:g} allows {self._allowed}; the first: "
            f"{first.path or first.id} {first.reason}; see {path}, repair the files, or raise it and run "
            "again: scores are kept"
        )


class _Results:
    """The files that a job writes, all published when the block ends."""

    def __init__(self, config: CurationConfig, stack: ExitStack, problems: dict[str, str]) -> None:
        self._config, self._stack, self._problems = config, stack, problems
        # The first context to be entered is the last to end: the clean manifest appears last.
        self._kept = stack.enter_context(atomic_write(config.output / MANIFEST_FILE))
        self._quarantine = stack.enter_context(atomic_write(config.output / QUARANTINE_FILE))
        self._stages: dict[str, BinaryIO] = {}

    def quarantine(self, entry: BadEntry) -> None:
        """List what cannot be used."""
        _write_line(self._quarantine, asdict(entry))

    def take(self, step: Step) -> bool:
        """Write a step to its files. False where a clip that was kept could not be written."""
        unit = step.unit
        if step.stage is None:
            if unit.id in self._problems:
                self._set_aside(unit, self._problems[unit.id], "MediaError", "clips")
                return False
            _write_line(self._kept, self._record(step))
            return True
        if "error" in step.score:
            self._set_aside(unit, step.score["error"], step.score["class"], step.stage.name)
        row: dict[str, Any] = {"id": unit.id, "keep": step.decision.keep}
        if step.decision.reason:
            row |= {"reason": step.decision.reason, "detail": step.decision.detail}
        if step.decision.flags:
            row["flags"] = sorted(step.decision.flags)
        score = step.score if "error" in step.score or not step.score else step.stage.summary(step.score)
        _write_line(self._stage_file(f"{unit.kind}-{step.stage.name}"), {**row, "score": dict(score)})
        return True

    def _set_aside(self, unit: Unit, reason: str, error: str, stage: str) -> None:
        self.quarantine(set_aside(unit, reason, error, stage))

    def _stage_file(self, name: str) -> BinaryIO:
        if name not in self._stages:
            path = self._config.output / "stages" / f"{name}.jsonl"
            self._stages[name] = self._stack.enter_context(atomic_write(path))
        return self._stages[name]

    def _record(self, step: Step) -> dict[str, Any]:
        """A line of the clean manifest."""
        unit = step.unit
        record = {**unit.record, "id": unit.id}
        if unit.path is not None:
            media = unit.record[unit.kind]
            if not os.path.isabs(media):
                record[unit.kind] = os.path.relpath(unit.path, self._config.output)
        if self._config.held_out is not None and record.get("split") is None:
            record["split"] = split_of(unit, self._config.held_out)
        if unit.kind == "video":
            record["category"] = category_of(unit.record)
        if unit.interval is not None and _is_cut(step):
            interval = {"start": unit.interval[0], "end": unit.interval[1]}
            if self._config.video.write_clips:
                record = {key: value for key, value in record.items() if key not in interval}
                record["source"] = {"id": unit.entry, "video": record["video"], **interval}
                record["video"] = f"clips/{clip_name(unit)}"
            else:
                record |= interval
        scores = headlines(step)
        return {**record, "scores": scores} if scores else record


def split_of(unit: Unit, held_out: float) -> str:
    """``images``, ``videos`` or ``texts``, or one of those held out, by the name of the unit's entry.

    All clips of a video are on one side; an entry's side depends on no other entry.

    Args:
        unit: What was kept.
        held_out: Share of the entries.
    """
    name = unit.id if unit.frames is None else unit.id[: unit.id.rindex("@")]
    digest = hashlib.blake2b(f"{unit.kind} {name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    side = "held-out-" if int.from_bytes(digest, "big") < held_out * 2**64 else ""
    return f"{side}{unit.kind}s"


def _write_line(stream: BinaryIO, row: dict[str, Any]) -> None:
    """Write one JSON line."""
    stream.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


def curate(config: CurationConfig) -> Report | None:
    """Run one worker of a job; see `CurationJob.run`."""
    return CurationJob(config).run()

"""Captioning a manifest: requests, the journal of what is paid for, and the captioned manifest."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from tqdm import tqdm

from emu3_megatron.curation.config import CaptionConfig
from emu3_megatron.curation.frames import Picture, clip_frames, image_of, info_of, resize, spread
from emu3_megatron.curation.manifest import BadEntry, RawManifest
from emu3_megatron.curation.units import Unit
from emu3_megatron.errors import UserError, one_line
from emu3_megatron.files import atomic_write, entry_interval, fsync_directory
from emu3_megatron.media import MediaError, frame_range

JOURNAL_FILE, MANIFEST_FILE, FAILURES_FILE = "journal.jsonl", "manifest.jsonl", "failures.jsonl"

IMAGE_PROMPT = (
    "Describe this image for someone who cannot see it, in one paragraph: the subjects and what they do, the "
    "setting, colours, composition, style, and any legible text. State only what is visible."
)
"""Default instruction for images."""

VIDEO_PROMPT = (
    "These frames are from one video clip, in order. Describe the clip in one paragraph: the subjects, what "
    "happens from beginning to end, the setting, and how the camera moves. State only what is visible."
)
"""Default instruction for clips."""


@dataclass(frozen=True)
class CaptionRequest:
    """What is to be described."""

    kind: str
    """``image`` or ``video``."""
    pictures: Sequence[Picture]
    """The image, or the frames of a clip in order, RGB uint8 ``[H, W, 3]``."""
    prompt: str
    """The instruction."""
    seconds: float = 0.0
    """Duration of a clip."""


@dataclass(frozen=True)
class CaptionAnswer:
    """A caption."""

    text: str
    """The caption, not blank."""
    finished: bool = True
    """False where the limit on its length cut it off."""


class CaptionError(Exception):
    """One sample cannot be captioned; the message is one line. The others go on."""


class Captioner(Protocol):
    """Describes pictures."""

    name: str
    """The model; another one captions anew."""
    concurrency: int
    """Calls that may run at the same time, in threads."""
    batch_size: int
    """Requests in one call."""

    def __call__(self, requests: Sequence[CaptionRequest]) -> Sequence[CaptionAnswer | CaptionError]:
        """Answer each request, or say why it fails after all retries.

        Raises:
            UserError: all requests would fail.
        """
        ...


@dataclass(frozen=True)
class Sample:
    """An image, a clip, or a piece of a long clip."""

    unit: Unit
    interval: tuple[float, float] | None = None
    """Seconds from the start of the file; None for an image."""
    piece: bool = False
    """Whether the clip is longer, and this is one of its pieces."""

    @property
    def seconds(self) -> float:
        """Duration; 0 for an image."""
        return 0.0 if self.interval is None else self.interval[1] - self.interval[0]

    @property
    def id(self) -> str:
        """Name of the entry; of a piece, with its seconds."""
        if not self.piece or self.interval is None:
            return self.unit.id
        return f"{self.unit.id}#{self.interval[0]:.2f}-{self.interval[1]:.2f}"


class Journal:
    """Captions that are paid for: appended, flushed to the disk, and never asked for again.

    One process at a time holds the file: two would ask for the same captions, and pay for them twice.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there; a last line that a kill cut off is dropped.

        Raises:
            UserError: the file is damaged, or another process holds it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._rows: dict[str, dict[str, Any]] = {}
        self._stream = open(path, "ab")  # noqa: SIM115  (closed by close)
        try:
            _hold(self._stream, path)
            sound = self._read(path)
            if sound < path.stat().st_size:
                _check_tail(path, sound)
                self._stream.truncate(sound)
        except BaseException:
            self._stream.close()
            raise
        fsync_directory(path.parent)

    def _read(self, path: Path) -> int:
        """Read the rows up to a damaged one; how many bytes they take."""
        sound = 0
        with open(path, "rb") as stream:
            for line in stream:
                try:
                    row: dict[str, Any] = json.loads(line if line.endswith(b"\n") else b"")
                    self._rows[row["key"]] = row
                except (ValueError, KeyError, TypeError):
                    break
                sound += len(line)
        return sound

    def get(self, key: str) -> dict[str, Any] | None:
        """The row of a key."""
        return self._rows.get(key)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; when this returns it survives a power cut. Safe in threads."""
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with self._lock:
            self._stream.write(line)
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._rows[row["key"]] = row

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _hold(stream: BinaryIO, path: Path) -> None:
    """Keep other processes from the journal until it is closed, or this process ends.

    A file system without locks (Lustre may be mounted so) leaves it to the user.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"{path}: another process captions into this folder; wait for its end, or choose another output"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise


def _check_tail(path: Path, sound: int) -> None:
    """Refuse to cut off more than one unfinished line: that is damage, and captions are money."""
    with open(path, "rb") as stream:
        stream.seek(sound)
        if stream.read().rstrip(b"\n").count(b"\n"):
            raise UserError(f"{path}: is damaged at byte {sound}; repair or remove that line, and run again")


class CaptionJob:
    """Captions for every image and clip of a manifest."""

    def __init__(self, config: CaptionConfig, captioner: Captioner) -> None:
        """Read the manifests, the prompts and the journal. Raises `UserError` where one cannot be read."""
        self._config, self._captioner = config, captioner
        self._manifest = RawManifest(config.manifest)
        self._prompts = {
            "image": _read_prompt(config.image_prompt, IMAGE_PROMPT),
            "video": _read_prompt(config.video_prompt, VIDEO_PROMPT),
        }
        self._journal = Journal(config.output / JOURNAL_FILE)
        self._failures: dict[str, BadEntry] = {}

    def run(self) -> tuple[int, int]:
        """Ask for every caption that is missing, and write the captioned manifest.

        Returns:
            Numbers of entries captioned, and of failures.

        Raises:
            UserError: all requests would fail; what is paid for stays.
        """
        try:
            with tqdm(
                total=len(self._manifest),
                desc="caption",
                unit="entry",
                disable=not self._config.progress,
                file=sys.stderr,
            ) as bar:
                self._ask(bar)
            return self._write()
        finally:
            self._journal.close()

    def _ask(self, bar: tqdm[Any]) -> None:
        """Keep as many requests in flight as the captioner allows."""
        flying: set[Future[None]] = set()
        limit = self._captioner.concurrency
        samples = self._missing(bar)
        with ThreadPoolExecutor(limit, thread_name_prefix="caption") as pool:
            try:
                while batch := list(islice(samples, self._captioner.batch_size)):
                    while len(flying) >= limit:
                        flying = _settle(flying)
                    flying.add(pool.submit(self._caption, batch))
                while flying:
                    flying = _settle(flying)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _missing(self, bar: tqdm[Any]) -> Iterator[Sample]:
        """What is not in the journal yet."""
        for entry in self._entries():
            if isinstance(entry, BadEntry):
                self._failures[entry.id] = entry
            else:
                for sample in self._samples(entry):
                    if self._journal.get(self._key(sample)) is None:
                        yield sample
            bar.update()

    def _entries(self) -> Iterator[Unit | BadEntry]:
        for chunk in range(self._manifest.chunks):
            yield from self._manifest.entries(chunk)

    def _samples(self, unit: Unit) -> list[Sample]:
        """What to ask for one entry; nothing for a text or where there is a caption already."""
        if unit.kind == "text" or (unit.text.strip() and not self._config.replace):
            return []
        if unit.kind == "image":
            return [Sample(unit)]
        try:
            start, end = _interval(unit, info_of(unit.file).seconds)
        except MediaError as error:
            self._fail(unit.id, unit, error)
            return []
        pieces = piece_count(end - start, self._config.max_seconds)
        edges = [start + (end - start) * i / pieces for i in range(pieces + 1)]
        return [Sample(unit, (edges[i], edges[i + 1]), pieces > 1) for i in range(pieces)]

    def _key(self, sample: Sample) -> str:
        """Name of a request in the journal: everything that its answer depends on."""
        config = self._config
        parts = [self._captioner.name, self._prompts[sample.unit.kind], config.max_edge, sample.id]
        parts += [config.frames, sample.interval] if sample.unit.kind == "video" else []
        parts.append(sample.unit.record[sample.unit.kind])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def _caption(self, samples: Sequence[Sample]) -> None:
        """Ask for captions and keep the answers."""
        requests: list[tuple[Sample, CaptionRequest]] = []
        for sample in samples:
            kind = sample.unit.kind
            try:
                request = CaptionRequest(kind, self._pictures(sample), self._prompts[kind], sample.seconds)
                requests.append((sample, request))
            except (OSError, MemoryError, UserError):
                raise
            except Exception as error:  # of this file; the others must not suffer
                self._fail(sample.id, sample.unit, error)
        answers = self._captioner([request for _, request in requests]) if requests else ()
        for (sample, _), answer in zip(requests, answers, strict=True):
            if isinstance(answer, CaptionError):
                self._fail(sample.id, sample.unit, answer)
                continue
            row = {"key": self._key(sample), "id": sample.id, "caption": answer.text}
            self._journal.add(row if answer.finished else {**row, "finished": False})

    def _fail(self, name: str, unit: Unit, error: Exception) -> None:
        self._failures[name] = BadEntry(
            name, str(unit.path), one_line(error), type(error).__name__, "caption"
        )

    def _pictures(self, sample: Sample) -> list[Picture]:
        """The image, or frames evenly spread over the interval, no larger than asked for."""
        edge = self._config.max_edge
        if sample.interval is None:
            return [resize(image_of(sample.unit.file), longer_edge=edge)]
        info = info_of(sample.unit.file)
        first, stop = frame_range(info, sample.interval)
        first = min(first, info.frame_count - 1)
        places = spread(first, max(stop, first + 1), self._config.frames)
        return [resize(frame, longer_edge=edge) for frame in clip_frames(sample.unit, places)]

    def _write(self) -> tuple[int, int]:
        """Write the manifest and the failures, in the order of the entries."""
        captioned = 0
        output = self._config.output
        with atomic_write(output / FAILURES_FILE) as failures, atomic_write(output / MANIFEST_FILE) as stream:
            for entry in self._entries():
                if isinstance(entry, BadEntry):
                    _write_line(failures, asdict(entry))
                    continue
                samples = self._samples(entry)
                if not samples and entry.id in self._failures:
                    _write_line(failures, asdict(self._failures[entry.id]))
                elif not samples:
                    _write_line(stream, self._record(entry))
                for sample in samples:
                    row = self._journal.get(self._key(sample))
                    if row is None:
                        _write_line(failures, asdict(self._failures[sample.id]))
                    else:
                        captioned += 1
                        _write_line(stream, self._record(entry, sample, row["caption"]))
        return captioned, len(self._failures)

    def _record(self, unit: Unit, sample: Sample | None = None, caption: str | None = None) -> dict[str, Any]:
        """A line of the captioned manifest."""
        record = {**unit.record, "id": unit.id if sample is None else sample.id}
        if unit.path is not None and not os.path.isabs(unit.record[unit.kind]):
            record[unit.kind] = os.path.relpath(unit.path, self._config.output)
        if caption is not None:
            record["caption"] = caption
            record.pop("captions", None)  # asked for only where there are none, or where all are replaced
        if sample is not None and sample.piece and sample.interval is not None:
            record |= {"start": round(sample.interval[0], 6), "end": round(sample.interval[1], 6)}
        return record


def _settle(flying: set[Future[None]]) -> set[Future[None]]:
    """Wait for a request to end; raise what it raised."""
    done, rest = wait(flying, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return rest


def piece_count(seconds: float, longest: float) -> int:
    """Into how many equal pieces a clip is cut: one up to `longest` seconds, else pieces of at least half."""
    pieces = 1
    while seconds / pieces > longest + 1e-6:
        pieces += 1
    return pieces


def _interval(unit: Unit, seconds: float) -> tuple[float, float]:
    """Part of the file that an entry means: its ``start`` and ``end``, or all of it."""
    start, end = entry_interval(unit.record) or (0.0, None)
    end = seconds if end is None else min(end, seconds)
    if end <= start:
        raise MediaError(f"lasts {seconds:.2f} s; start {start:g} and end {end:g} leave nothing of it")
    return start, end


def _read_prompt(path: Path | None, default: str) -> str:
    """An instruction from a file."""
    if path is None:
        return default
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the prompt ({error})") from error
    if not text:
        raise UserError(f"{path}: the prompt is empty")
    return text


def _write_line(stream: Any, row: dict[str, Any]) -> None:
    """Write one JSON line."""
    stream.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")

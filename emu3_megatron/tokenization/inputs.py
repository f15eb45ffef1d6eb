"""Reading manifests: JSON Lines files and WebDataset tar shards, as one numbered list of entries."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from emu3_megatron.errors import UserError
from emu3_megatron.files import parse_json, printable, sha256_file
from emu3_megatron.media import MediaError
from emu3_megatron.tokenization.entries import BadEntry, Entry, MediaPointer, parse_record
from emu3_megatron.tokenization.tar_members import Damage, tar_parts

IMAGE_EXTENSIONS = frozenset(
    "jpg jpeg png webp bmp tif tiff gif avif jp2 j2k ppm pgm jfif".split()  # noqa: SIM905
)
"""Member extensions that make a WebDataset sample an image."""

VIDEO_EXTENSIONS = frozenset("mp4 m4v mov webm mkv avi ts mpg mpeg".split())  # noqa: SIM905
"""Member extensions that make a WebDataset sample a video."""

CAPTION_EXTENSIONS = frozenset({"txt", "caption"})
"""Member extensions that hold the caption as UTF-8 text."""

COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
"""How files begin that gzip, bzip2, xz or zstd compressed; none of it begins a line of JSON."""

READ_EXTENSIONS = IMAGE_EXTENSIONS | VIDEO_EXTENSIONS | CAPTION_EXTENSIONS | {"json"}
"""Extensions of members that are read; one that is cut off speaks for itself."""


class Input(Protocol):
    """A numbered list of entries in one file."""

    fingerprint: str
    """SHA-256 (hex) of what decides the entries."""

    def __len__(self) -> int:
        """Number of entries, bad ones included."""
        ...

    def entries(self, start: int, stop: int) -> Iterator[Entry | BadEntry]:
        """Read the entries from `start` to before `stop`."""
        ...


class JsonLinesInput:
    """A JSON Lines manifest; blank lines do not count. Only the lines' offsets are kept in memory."""

    def __init__(self, path: Path) -> None:
        """Find the lines. Raises `UserError` where the file cannot be read, or is compressed."""
        self._path = path
        self._offsets, self._numbers = array("q"), array("q")
        offset = 0
        try:
            with open(path, "rb") as stream:
                if stream.read(len(max(COMPRESSED, key=len))).startswith(COMPRESSED):
                    raise UserError(f"{path}: is compressed; decompress it, and name a .jsonl or .tar file")
                stream.seek(0)
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        self._offsets.append(offset)
                        self._numbers.append(number)
                    offset += len(line)
        except OSError as error:
            raise UserError(f"{path}: cannot read the manifest ({error.strerror})") from error
        self.fingerprint = sha256_file(path)

    def __len__(self) -> int:
        """Number of lines that are not blank."""
        return len(self._offsets)

    def entries(self, start: int, stop: int) -> Iterator[Entry | BadEntry]:
        """Read the entries from `start` to before `stop`."""
        with open(self._path, "rb") as stream:
            for index in range(start, stop):
                stream.seek(self._offsets[index])
                yield self._parse(stream.readline(), self._numbers[index])

    def _parse(self, line: bytes, number: int) -> Entry | BadEntry:
        place = printable(f"{self._path.name}:{number}")
        try:
            record = parse_json(line)
        except ValueError as error:
            return BadEntry(id=place, path=None, reason=f"is not valid JSON: {error}", error="EntryError")
        return parse_record(record, place=place, folder=self._path.parent)


@dataclass(frozen=True)
class _TarSample:
    """Members of one WebDataset sample, by extension."""

    key: str
    members: dict[str, MediaPointer]


class TarInput:
    """A WebDataset shard: consecutive members that share a name up to its first dot are one sample.

    Each stretch of the file that is damaged is one bad entry, in its place. So is a sample beside it that has
    fewer members than another: the damage may have taken its caption.
    """

    def __init__(self, path: Path) -> None:
        """Read the headers. Raises `UserError` where the file is missing or no plain tar file."""
        self._path = path
        self._samples: list[_TarSample | BadEntry] = []
        self._beside_damage: set[int] = set()
        try:
            with open(path, "rb") as stream:
                self._size = os.fstat(stream.fileno()).st_size
                for part in tar_parts(stream):
                    if isinstance(part, Damage):
                        self._add_damage(part)
                    else:
                        self._add(part)
        except (OSError, tarfile.TarError) as error:
            raise UserError(
                f"{path}: cannot be read as an uncompressed tar file ({error}); decompress it, or repair it"
            ) from error
        self._most = max((len(s.members) for s in self._samples if isinstance(s, _TarSample)), default=0)
        headers = json.dumps(
            [
                [s.key, [[e, m.offset, m.size] for e, m in s.members.items()]]
                if isinstance(s, _TarSample)
                else [s.id, s.reason]
                for s in self._samples
            ]
        )
        self.fingerprint = hashlib.sha256(headers.encode()).hexdigest()

    def _add(self, member: tarfile.TarInfo) -> None:
        """Put a member into its sample."""
        if not member.isfile():
            return
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        sample = self._samples[-1] if self._samples else None
        if not isinstance(sample, _TarSample) or sample.key != key:
            if isinstance(sample, BadEntry):
                self._beside_damage.add(len(self._samples))
            sample = _TarSample(key, {})
            self._samples.append(sample)
        pointer = MediaPointer(self._path, member.name, member.offset_data, member.size)
        sample.members[extension.lower()] = pointer

    def _add_damage(self, damage: Damage) -> None:
        """Note a stretch without members, but for the end of a file whose last sample says that it is cut."""
        sample = self._samples[-1] if self._samples else None
        if isinstance(sample, _TarSample):
            extension, last = next(reversed(sample.members.items()))
            if damage.ends and last.offset + last.size > self._size and extension in READ_EXTENSIONS:
                return
            self._beside_damage.add(len(self._samples) - 1)
        place = printable(f"{self._path.name}:{damage.start}")
        self._samples.append(
            BadEntry(id=place, path=printable(str(self._path)), reason=str(damage), error="MediaError")
        )

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._samples)

    def entries(self, start: int, stop: int) -> Iterator[Entry | BadEntry]:
        """Read the entries from `start` to before `stop`."""
        for place, sample in enumerate(self._samples[start:stop], start):
            if isinstance(sample, BadEntry):
                yield sample
            elif place in self._beside_damage and len(sample.members) < self._most:
                reason = "lies beside damage of the tar file, and has fewer members than other samples"
                yield BadEntry(
                    id=printable(sample.key), path=str(self._path), reason=reason, error="MediaError"
                )
            else:
                yield self._parse(sample)

    def _parse(self, sample: _TarSample) -> Entry | BadEntry:
        try:
            record = _record(sample)
        except (ValueError, MediaError) as error:
            reason = f"has metadata that cannot be read: {error}"
            return BadEntry(id=printable(sample.key), path=str(self._path), reason=reason, error="EntryError")
        pointers = {key: value for key, value in record.items() if isinstance(value, MediaPointer)}
        names = {key: str(pointer) for key, pointer in pointers.items()}
        entry = parse_record({**record, **names}, place=sample.key, folder=self._path.parent)
        if isinstance(entry, BadEntry) or entry.media is None:
            return entry
        return replace(entry, media=pointers[entry.kind])


def _record(sample: _TarSample) -> dict[str, object]:
    """The manifest record that a WebDataset sample amounts to; pictures as `MediaPointer`."""
    record: dict[str, object] = {"id": sample.key}
    for extension, pointer in sample.members.items():
        if extension == "json":
            fields = parse_json(_bytes(pointer))
            if not isinstance(fields, dict):
                raise ValueError(f"{pointer.member} is no JSON object")
            record.update(
                {key: value for key, value in fields.items() if key not in ("id", "image", "video")}
            )
    for extension, pointer in sample.members.items():
        if extension in CAPTION_EXTENSIONS:
            record["caption"] = _bytes(pointer).decode()
        elif extension in IMAGE_EXTENSIONS:
            record["image"] = pointer
        elif extension in VIDEO_EXTENSIONS:
            record["video"] = pointer
    if "text" in record and ("image" in record or "video" in record):
        record.setdefault("caption", record.pop("text"))  # a common name for captions in the wild
        record.pop("text", None)
    return record


def _bytes(pointer: MediaPointer) -> bytes:
    """Bytes of a member."""
    data = pointer.load()
    assert isinstance(data, bytes)
    return data


class Inputs:
    """Several inputs, one after the other, as one list."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Open the inputs: ``*.tar`` is WebDataset, anything else JSON Lines."""
        self._inputs: list[Input] = [
            TarInput(path) if path.suffix == ".tar" else JsonLinesInput(path) for path in paths
        ]
        self._ends = list(accumulate(len(part) for part in self._inputs))
        self.fingerprints = [part.fingerprint for part in self._inputs]

    def __len__(self) -> int:
        """Number of entries."""
        return self._ends[-1]

    def shards_of(self, samples: int) -> int:
        """How many shards there are if none has more than `samples` entries (`UserError` under 1)."""
        if samples < 1:
            raise UserError(f"samples_per_shard={samples} must be at least 1")
        return max(1, -(-len(self) // samples))

    def shard_range(self, shard: int, num_shards: int) -> tuple[int, int]:
        """First entry of a shard, and of the next: shards are equal runs of the list."""
        return shard * len(self) // num_shards, (shard + 1) * len(self) // num_shards

    def entries(self, start: int, stop: int) -> Iterator[Entry | BadEntry]:
        """Read the entries from `start` to before `stop`."""
        while start < stop:
            index = bisect_right(self._ends, start)
            first = self._ends[index] - len(self._inputs[index])
            end = min(stop, self._ends[index])
            yield from self._inputs[index].entries(start - first, end - first)
            start = end

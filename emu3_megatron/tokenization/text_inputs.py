"""Text corpora as documents: lines of files cut at bytes, so that many processes read one file without an
index, and rows of Parquet files cut between row groups."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from emu3_megatron.errors import UserError, one_line
from emu3_megatron.files import entry_id, parse_json, printable

MAX_LINE_BYTES = 1 << 24
"""A longer line, or row of a Parquet file, is set aside. Python needs 36 bytes for an id, and a line may give
one for each of its bytes, so this keeps a process within 1 GB whatever lines a file holds."""

PARQUET = ".parquet"
"""Suffix of files that are read as Parquet."""

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes of compressed files."""

PARQUET_ROWS = 256
"""Rows of a Parquet file in memory at a time, besides what its row group needs."""

FINGERPRINT_BYTES = 1 << 20
"""Bytes at each end of a file that its fingerprint covers, besides its size."""


class DamagedInput(UserError):
    """A file ends or breaks inside; what stands before that place is good."""


class TextDocument(NamedTuple):
    """A line or row, as it was found."""

    name: str
    """Its own id, or the file and the place in it."""
    text: str
    """The document; empty where it cannot be used."""
    reason: str = ""
    """Why not; empty where it can."""
    damaged: bool = False
    """Whether the file breaks here, so that all that follows in its part is lost."""


class Part(Protocol):
    """What one shard is made of."""

    @property
    def path(self) -> Path:
        """The file it lies in."""
        ...

    def documents(self, key: str) -> Iterator[TextDocument]:
        """Its documents in order, with those that cannot be used; blank lines are left out.

        Where the file is damaged, the last one says so.

        Args:
            key: key or column of the text.

        Raises:
            UserError: the file is not what its name says.
            OSError: a fault of the file system.
        """
        ...


@dataclass(frozen=True)
class LinePart:
    """The lines of a file whose first byte lies in a range."""

    path: Path
    """JSON Lines or plain text, plain or compressed (`COMPRESSED`)."""
    start: int
    """First byte."""
    stop: int | None
    """The byte after the last; None for a compressed file, which is read to its end."""

    @property
    def holds_json(self) -> bool:
        """Whether lines are JSON; else each is a document itself."""
        name = self.path.stem if self.path.suffix in COMPRESSED else self.path.name
        return not name.endswith(".txt")

    def documents(self, key: str) -> Iterator[TextDocument]:
        """See `Part.documents`."""
        json_key = key if self.holds_json else None
        stem = printable(self.path.name)
        last = self.start
        try:
            for place, line in self.lines():
                if line is None:
                    yield TextDocument(f"{stem}:{place}", "", f"is longer than {MAX_LINE_BYTES} bytes")
                elif not line.isspace():
                    yield _document(line, f"{stem}:{place}", json_key)
                last = place
        except DamagedInput as error:
            yield TextDocument(f"{stem}:{last}", "", str(error), damaged=True)

    def lines(self) -> Iterator[tuple[int, bytes | None]]:
        """Lines with their places (bytes from the file's start, uncompressed); None for one that is too long.

        Raises:
            DamagedInput: a compressed file is damaged.
            OSError: a fault of the file system.
        """
        try:
            yield from self._lines()
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DamagedInput(f"is damaged after this line ({one_line(error)})") from error

    def _lines(self) -> Iterator[tuple[int, bytes | None]]:
        with _open(self.path) as stream:
            place = self.start
            if place:
                stream.seek(place - 1)
                place += _skip_line(stream) - 1  # the line that has begun before belongs to another part
            while self.stop is None or place < self.stop:
                line = stream.readline(MAX_LINE_BYTES + 1)
                if not line:
                    return
                if len(line) <= MAX_LINE_BYTES:
                    yield place, line
                    place += len(line)
                else:
                    yield place, None
                    place += len(line) + (0 if line.endswith(b"\n") else _skip_line(stream))


@dataclass(frozen=True)
class ParquetPart:
    """Neighbouring row groups of a Parquet file."""

    path: Path
    """The file."""
    groups: tuple[int, ...]
    """Numbers of the row groups."""
    first_row: int
    """Number of their first row in the file."""

    def documents(self, key: str) -> Iterator[TextDocument]:
        """See `Part.documents`."""
        with _open_parquet(self.path) as file:
            names = file.schema_arrow.names
            if key not in names:
                raise UserError(
                    f"{self.path}: has no column {key!r}, only {', '.join(names)}; name one in --key"
                )
            columns = [key, "id"] if "id" in names and key != "id" else [key]
            row, stem = self.first_row, printable(self.path.name)
            try:
                for batch in self._batches(file, columns):
                    yield from _rows(batch, stem, row, key)
                    row += batch.num_rows
            except DamagedInput as error:
                yield TextDocument(f"{stem}:{row}", "", str(error), damaged=True)

    def _batches(self, file: Any, columns: list[str]) -> Iterator[Any]:
        """Rows, some at a time."""
        try:
            yield from file.iter_batches(
                PARQUET_ROWS, row_groups=list(self.groups), columns=columns, use_threads=False
            )
        except (ValueError, NotImplementedError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError
            if isinstance(error, OSError) and error.errno is not None:
                raise  # pyarrow's own, for damaged pages, have no number
            raise DamagedInput(f"is damaged from this row on ({one_line(error)})") from error


def _document(line: bytes, name: str, key: str | None) -> TextDocument:
    """A line's document. `key` is None for plain text."""
    try:
        if key is None:
            return TextDocument(name, line.decode().rstrip("\r\n"))
        record = parse_json(line)
    except ValueError as error:
        kind = "UTF-8" if key is None else "valid JSON"
        return TextDocument(name, "", f"is not {kind}: {error}")
    if not isinstance(record, dict):
        return TextDocument(name, "", f"is a JSON {type(record).__name__}; a line is an object")
    return _checked(record, name, key)


def _rows(batch: Any, stem: str, first: int, key: str) -> Iterator[TextDocument]:
    """The documents of rows of Arrow, whose first has the number `first` in the file `stem`."""
    from pyarrow.types import is_dictionary

    if batch.nbytes <= MAX_LINE_BYTES and not any(is_dictionary(column.type) for column in batch.columns):
        try:
            records = batch.to_pylist()
        except UnicodeDecodeError:
            pass  # the rows one by one say which it was
        else:
            for row, record in enumerate(records, first):
                yield _checked(record, f"{stem}:{row}", key)
            return
    for row, cells in enumerate(zip(*batch.columns, strict=True), first):
        yield _row(dict(zip(batch.schema.names, cells, strict=True)), f"{stem}:{row}", key)


def _row(cells: dict[str, Any], name: str, key: str) -> TextDocument:
    """The document of a row, whose cells are Arrow's: only what may become one is made Python's."""
    cells = {column: _plain(cell) for column, cell in cells.items()}
    if sum(cell.as_buffer().size for cell in cells.values() if _is_string(cell)) > MAX_LINE_BYTES:
        return TextDocument(name, "", f"is longer than {MAX_LINE_BYTES} bytes")
    try:
        record = {column: cell.as_py() for column, cell in cells.items() if _is_string(cell) or column != key}
    except UnicodeDecodeError as error:
        return TextDocument(name, "", f"is not UTF-8: {error}")
    return _checked(record, name, key)


def _plain(cell: Any) -> Any:
    """A cell itself where its column is encoded by a dictionary."""
    from pyarrow import DictionaryScalar

    return cell.value if isinstance(cell, DictionaryScalar) else cell


def _is_string(cell: Any) -> bool:
    """Whether a cell of Arrow holds text."""
    from pyarrow import StringScalar

    return isinstance(cell, StringScalar) and cell.is_valid


def _checked(record: dict[str, Any], name: str, key: str) -> TextDocument:
    """A record's document, under its own id if it has one."""
    text = record.get(key)
    if not isinstance(text, str) or not text or text.isspace():
        return TextDocument(name, "", f'has a "{key}" that is not a string with something in it')
    return TextDocument(entry_id(record, name), text)


def cut(paths: Sequence[Path], part_bytes: int) -> list[Part]:
    """Parts of about `part_bytes`, in order; a compressed file, which can only be read whole, is one part.

    A Parquet file is cut between its row groups only.

    Raises:
        UserError: a file cannot be read, or there is not a byte in all of them.
    """
    parts: list[Part] = []
    for path in paths:
        size = _size(path)
        if not size:
            continue
        if path.suffix == PARQUET:
            parts += _parquet_parts(path, part_bytes)
            continue
        if path.suffix in COMPRESSED:
            parts.append(LinePart(path, 0, None))
            continue
        count = -(-size // part_bytes)
        edges = [size * i // count for i in range(count + 1)]
        parts += [LinePart(path, edges[i], edges[i + 1]) for i in range(count)]
    if not parts:
        raise UserError(f"{', '.join(map(str, paths)) or 'no input'}: nothing to tokenize")
    return parts


def _parquet_parts(path: Path, part_bytes: int) -> list[ParquetPart]:
    """Row groups in order, as many in a part as fill it."""
    parts: list[ParquetPart] = []
    with _open_parquet(path) as file:
        waiting: list[int] = []
        filled = first = row = 0
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            waiting.append(number)
            filled += group.total_byte_size
            row += group.num_rows
            if filled >= part_bytes or number == file.metadata.num_row_groups - 1:
                parts.append(ParquetPart(path, tuple(waiting), first))
                waiting, filled, first = [], 0, row
    return parts


def _open_parquet(path: Path) -> Any:
    """Open a Parquet file. pyarrow is needed for nothing else, hence the late import."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{path}: Parquet needs pyarrow; pip install 'emu3-megatron[parquet]'") from error
    try:
        return ParquetFile(path)
    except ValueError as error:
        raise UserError(
            f"{path}: cannot be read as Parquet ({one_line(error)}); mend it, or leave it out"
        ) from error


def fingerprint(path: Path) -> str:
    """SHA-256 (hex) of a file's size, its beginning and its end: all of a corpus would take too long."""
    size = _size(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as stream:
        digest.update(stream.read(FINGERPRINT_BYTES))
        stream.seek(max(0, size - FINGERPRINT_BYTES))
        digest.update(stream.read(FINGERPRINT_BYTES))
    return digest.hexdigest()


def _size(path: Path) -> int:
    try:
        with open(path, "rb") as stream:
            return os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); name JSON Lines or text files"
        ) from error


def _open(path: Path) -> BinaryIO:
    """Open a file for reading what was compressed in it, if it is."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".bz2":
        return cast(BinaryIO, bz2.open(path, "rb"))
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    return _open_zstd(path) if path.suffix == ".zst" else open(path, "rb")


def _open_zstd(path: Path) -> BinaryIO:
    """Open a file that zstd compressed; Python itself reads none before 3.14."""
    try:
        from pyarrow import input_stream
    except ImportError as error:
        raise UserError(f"{path}: zstd needs pyarrow; pip install 'emu3-megatron[parquet]'") from error
    return cast(BinaryIO, io.BufferedReader(input_stream(str(path), compression="zstd")))


def _skip_line(stream: BinaryIO) -> int:
    """Read to the end of a line, a piece at a time; returns the number of bytes."""
    read = 0
    while piece := stream.readline(MAX_LINE_BYTES):
        read += len(piece)
        if piece.endswith(b"\n"):
            break
    return read

"""Manifests and tar files become entries; whatever is malformed becomes a bad entry with a reason."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from emu3_megatron.errors import UserError
from emu3_megatron.media import MediaError
from emu3_megatron.tokenization import BadEntry, Entry, Inputs
from tests.media.clips import encode_image


def zstd(data: bytes) -> bytes:
    return bytes(pyarrow.compress(data, "zstd"))


PICTURE = np.zeros((16, 16, 3), np.uint8)


def read(*paths: Path) -> list[Entry | BadEntry]:
    inputs = Inputs(paths)
    return list(inputs.entries(0, len(inputs)))


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_good_entries(tmp_path: Path) -> None:
    manifest = tmp_path / "m.jsonl"
    lines = [
        {"id": "a", "image": "x/a.png", "caption": " a cat ", "split": "train", "extra": [1]},
        {"id": 7, "video": "b.mp4"},
        {"text": "prose", "task": "t"},
        {"id": "c", "image": "c.png", "caption": "  ", "text": None},
        {"id": "d", "video": "d.mp4", "start": 1.5, "end": 4},
        {"id": "e", "video": "d.mp4", "start": 2, "end": None},
    ]
    manifest.write_text("\n\n".join(map(json.dumps, lines)))
    image, video, text, blank, part, rest = read(manifest)
    assert isinstance(part, Entry)
    assert isinstance(rest, Entry)
    assert (part.interval, rest.interval) == ((1.5, 4.0), (2.0, None))
    assert isinstance(image, Entry)
    assert image.interval is None
    assert (image.id, image.kind, image.text, image.split) == ("a", "image", "a cat", "train")
    assert str(image.media) == str(tmp_path / "x/a.png")
    assert isinstance(video, Entry)
    assert (video.id, video.kind, video.text) == ("7", "video", None)
    assert isinstance(text, Entry)
    assert (text.id, text.kind, text.text, text.task, text.media) == ("m.jsonl:5", "text", "prose", "t", None)
    assert isinstance(blank, Entry)
    assert blank.text is None
    assert all(isinstance(each, Entry) and each.alternatives == () for each in read(manifest))


@pytest.mark.parametrize(
    ("record", "captions"),
    [
        ({"captions": ["one"]}, ["one"]),
        ({"captions": [" a ", "b", "a"]}, ["a", "b", "a"]),
        ({"caption": " b ", "captions": ["a", "b"]}, ["a", "b"]),
        ({"caption": "c", "captions": ["a", "b"]}, ["c", "a", "b"]),
        ({"caption": "  ", "captions": ["a", "b"]}, ["a", "b"]),
        ({"caption": "c", "captions": None}, ["c"]),
        ({"captions": ["一"] * 256}, ["一"] * 256),
    ],
)
def test_several_captions(tmp_path: Path, record: dict[str, Any], captions: list[str]) -> None:
    """A list in its order, repeats and all; a `caption` that is not in it comes first."""
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps({kind: "a", **record}) + "\n" for kind in ("image", "video")))
    path = write_tar(tmp_path / "a.tar", {"0.png": b"picture", "0.json": json.dumps(record).encode()})
    entries = read(manifest, path)
    assert len(entries) == 3
    for entry in entries:
        assert isinstance(entry, Entry)
        assert [entry.text, *entry.alternatives] == captions


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": "a", "caption": "a cat"}', 'has a caption but neither "image" nor "video"'),
        ('{"id": "a"}', "exactly one of the keys"),
        ('{"id": "a", "image": "a.png", "video": "b.mp4"}', "exactly one of the keys"),
        ('{"id": "a", "image": "a.png", "text": "b"}', "exactly one of the keys"),
        ('{"id": "a", "image": ""}', "blank"),
        ('{"id": "a", "image": 5}', "must be a string"),
        ('{"id": "a", "text": ["b"]}', "must be a string"),
        ('{"id": "a", "image": "a.png", "caption": 5}', "must be a string"),
        ('{"id": "a", "image": "a.png", "caption": ["b"]}', 'several go under "captions"'),
        ('{"id": "a", "captions": ["b"]}', 'has a caption but neither "image" nor "video"'),
        ('{"id": "a", "image": "a.png", "captions": []}', 'has empty "captions"; leave the key out'),
        ('{"id": "a", "image": "a.png", "captions": "b"}', "must be a list of strings"),
        ('{"id": "a", "image": "a.png", "captions": ["b", " "]}', "number 1 is blank"),
        ('{"id": "a", "image": "a.png", "captions": ["b", null]}', "number 1 is None"),
        (
            json.dumps({"id": "a", "image": "a.png", "captions": ["b"] * 257}),
            "has 257 captions; at most 256",
        ),
        (
            json.dumps({"id": "a", "image": "a.png", "caption": "a", "captions": ["b"] * 256}),
            "has 257 captions; at most 256",
        ),
        ('["a"]', "an entry is an object"),
        ('{"id": "a", ', "not valid JSON"),
        ("\x00\x01", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        (r'{"id": "a", "image": "a\u0000.png"}', "cannot be a path"),
        (r'{"id": "a", "video": "a\ud800.mp4"}', "cannot be a path"),
        ('{"id": "a", "video": "a.mp4", "start": "1"}', "number of seconds"),
        ('{"id": "a", "video": "a.mp4", "end": true}', "number of seconds"),
        ('{"id": "a", "video": "a.mp4", "end": NaN}', "number of seconds"),
        ('{"id": "a", "video": "a.mp4", "end": 1' + "0" * 400 + "}", "number of seconds"),
        ('{"id": "a", "video": "a.mp4", "start": -1}', "start < end"),
        ('{"id": "a", "video": "a.mp4", "start": 2, "end": 2}', "start < end"),
    ],
)
def test_bad_entries_have_a_reason_and_harm_no_other(tmp_path: Path, line: str, reason: str) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"id": "first", "text": "x"}\n' + line + '\n{"id": "last", "text": "y"}\n')
    first, bad, last = read(manifest)
    assert isinstance(bad, BadEntry)
    assert reason in bad.reason
    assert bad.id in ("a", "m.jsonl:2")
    assert isinstance(first, Entry)
    assert isinstance(last, Entry)


def test_names_can_always_be_written_as_utf8(tmp_path: Path) -> None:
    """JSON may hold lone surrogates and tar headers any bytes; neither may stop a job when it is reported."""
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(r'{"id": "a\ud800", "text": "x", "split": "b\ud800", "task": "c\ud800"}' + "\n")
    (entry,) = read(manifest)
    assert isinstance(entry, Entry)
    assert (entry.id, entry.split, entry.task) == (r"a\ud800", r"b\ud800", r"c\ud800")
    path = tmp_path / "a.tar"
    write_tar(path, {"x\udcff.png": b"no picture"})
    (entry,) = read(path)
    assert isinstance(entry, Entry)
    assert all(text.encode() for text in (entry.id, str(entry.media)))
    assert entry.media is not None
    assert entry.media.load() == b"no picture"


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_bytes(b'{"id": "a", "text": "\xff\xfe"}\n')
    (bad,) = read(manifest)
    assert isinstance(bad, BadEntry)


def test_webdataset(tmp_path: Path) -> None:
    png = encode_image(PICTURE, "PNG")
    path = write_tar(
        tmp_path / "a.tar",
        {
            "d/0.png": png,
            "d/0.txt": "一只猫".encode(),
            "d/0.json": b'{"split": "train", "score": 1, "id": "ignored"}',
            "d/1.mp4": b"video",
            "d/1.json": b'{"caption": "the sea"}',
            "d/2.json": b'{"text": "prose"}',
            "d/3.txt": b"caption alone",
            "d/4.png": png,
            "d/4.json": b"{broken",
            "d/5.jpg": png,
            "d/5.json": b'{"text": "named text"}',
            "d/6.txt": b"\xff\xfe",
        },
    )
    image, video, text, alone, broken, named, undecodable = read(path)
    assert isinstance(image, Entry)
    assert (image.id, image.text, image.split) == ("d/0", "一只猫", "train")
    assert image.media is not None
    assert image.media.load() == png
    assert isinstance(video, Entry)
    assert (video.kind, video.text) == ("video", "the sea")
    assert video.media is not None
    assert video.media.load() == b"video"
    assert isinstance(text, Entry)
    assert (text.kind, text.text) == ("text", "prose")
    assert isinstance(named, Entry)
    assert named.text == "named text"
    for bad in (alone, broken, undecodable):
        assert isinstance(bad, BadEntry)
        assert bad.reason


def test_a_tar_file_cut_off_loses_only_its_last_sample(tmp_path: Path) -> None:
    members = {f"{i}.png": bytes(2000) for i in range(4)}
    path = write_tar(tmp_path / "a.tar", members)
    path.write_bytes(path.read_bytes()[: 3 * 2560 + 512 + 100])
    entries = read(path)
    assert len(entries) == 4
    pointers = [entry.media for entry in entries if isinstance(entry, Entry) and entry.media]
    assert [len(pointer.load()) for pointer in pointers[:3]] == [2000] * 3
    with pytest.raises(MediaError, match="truncated"):
        pointers[3].load()


def samples_of(count: int) -> dict[str, bytes]:
    """Pictures and their captions, in blocks of 512 bytes: header, 4 blocks, header, 1 block."""
    return {
        name: data
        for i in range(count)
        for name, data in ((f"{i}.png", bytes([i]) * 2000), (f"{i}.txt", b"c%d" % i))
    }


@pytest.mark.parametrize("name_length", [1, 150])
@pytest.mark.parametrize("member", range(1, 20))
def test_a_damaged_header_of_a_tar_file_costs_its_own_sample(
    tmp_path: Path, member: int, name_length: int
) -> None:
    """Long names stand in headers before the header."""
    members = {f"{'n' * name_length}{name}": data for name, data in samples_of(10).items()}
    path = write_tar(tmp_path / "a.tar", members)
    with tarfile.open(path) as archive:
        header = archive.getmembers()[member].offset_data - 512
    data = bytearray(path.read_bytes())
    data[header + 3] ^= 1
    path.write_bytes(data)
    entries = read(path)
    good = [entry for entry in entries if isinstance(entry, Entry)]
    bad = [entry for entry in entries if isinstance(entry, BadEntry)]
    assert [(entry.id.lstrip("n"), entry.text) for entry in good] == [
        (str(i), f"c{i}") for i in range(10) if i != member // 2
    ]
    assert any("is damaged" in entry.reason and entry.id.startswith("a.tar:") for entry in bad)
    for entry in good:
        assert entry.media is not None
        assert entry.media.load() == bytes([int(entry.id.lstrip("n"))]) * 2000


@pytest.mark.parametrize("cut", range(7 * 512, 21 * 512 + 1, 256))
def test_wherever_a_tar_file_is_cut_somebody_says_so(tmp_path: Path, cut: int) -> None:
    path = write_tar(tmp_path / "a.tar", samples_of(10))
    path.write_bytes(path.read_bytes()[:cut])
    entries, problems = read(path), 0
    for place, entry in enumerate(entries):
        if isinstance(entry, BadEntry):
            problems += 1
            continue
        assert (entry.id, entry.text) in {(str(place), f"c{place}"), (str(place), None)}
        assert entry.media is not None
        try:
            assert entry.media.load() == bytes([place]) * 2000
        except MediaError:
            problems += 1
        else:
            assert entry.text == f"c{place}"
    assert problems


def test_what_lies_behind_an_end_mark_or_a_hole_is_read(tmp_path: Path) -> None:
    first, second = (
        write_tar(tmp_path / name, {key: data for key, data in samples_of(6).items() if keep(key)})
        for name, keep in (("1.tar", lambda key: key < "3"), ("2.tar", lambda key: key >= "3"))
    )
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    entries = read(joined)
    assert [entry.id for entry in entries if isinstance(entry, Entry)] == list("012345")
    assert len(entries) == 7
    holed = write_tar(tmp_path / "holed.tar", samples_of(10))
    data = bytearray(holed.read_bytes())
    data[7 * 512 * 4 : 7 * 512 * 5] = bytes(7 * 512)
    holed.write_bytes(data)
    entries = read(holed)
    assert [entry.id for entry in entries if isinstance(entry, Entry)] == list("012356789")
    assert len(entries) == 10


def test_a_deeply_nested_member_costs_its_own_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.json": b"[" * 100_000, "1.json": b'{"text": "x"}'})
    bad, good = read(path)
    assert isinstance(bad, BadEntry)
    assert isinstance(good, Entry)


def test_several_inputs_are_one_list(tmp_path: Path) -> None:
    paths = []
    for part, count in enumerate((3, 0, 5, 1)):
        path = tmp_path / f"{part}.jsonl"
        path.write_text("".join(json.dumps({"id": f"{part}-{i}", "text": "x"}) + "\n" for i in range(count)))
        paths.append(path)
    inputs = Inputs(paths)
    everything = [entry.id for entry in inputs.entries(0, len(inputs))]
    assert everything == ["0-0", "0-1", "0-2", "2-0", "2-1", "2-2", "2-3", "2-4", "3-0"]
    for start in range(10):
        for stop in range(start, 10):
            assert [entry.id for entry in inputs.entries(start, stop)] == everything[start:stop]
    for shards in (1, 2, 4, 20):
        ranges = [inputs.shard_range(shard, shards) for shard in range(shards)]
        assert [i for start, stop in ranges for i in range(start, stop)] == list(range(9))


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstd])
@pytest.mark.parametrize("name", ["m.jsonl.gz", "m.jsonl", "a.tar.gz", "a.tgz", "a.tar"])
def test_compressed_manifests_are_refused_with_one_line(
    tmp_path: Path, compress: Callable[[bytes], bytes], name: str
) -> None:
    (tmp_path / name).write_bytes(compress(b'{"id": "a", "text": "x"}\n' * 100))
    with pytest.raises(UserError, match="decompress it"):
        Inputs([tmp_path / name])


def test_inputs_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the manifest"):
        Inputs([tmp_path / "none.jsonl"])
    with pytest.raises(UserError, match="cannot read the manifest"):
        Inputs([tmp_path])
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b compressed")
    for name in ("a.tar", "none.tar"):
        with pytest.raises(UserError, match="tar file"):
            Inputs([tmp_path / name])

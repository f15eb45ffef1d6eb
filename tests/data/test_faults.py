"""Every damaged byte is reported by name, and never becomes a token."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3_megatron.data import MultimodalDataset, read_shard_record, write_manifest
from emu3_megatron.data.reader import FileCache
from emu3_megatron.data.verify import Counted, describe, show, verify
from emu3_megatron.errors import UserError
from emu3_megatron.vocabulary import Vocabulary
from tests.data.builders import VOCABULARY

ROOT = Path(__file__).parents[2]
SUFFIXES = (".bin", ".idx", ".crc", ".jsonl")


def read_everything(folder: Path) -> list[object]:
    dataset = MultimodalDataset.open(folder)
    numbers = np.arange(len(dataset))
    described = [values.tolist() for values in dataset.describe(numbers)]
    segments = [[(ids.tolist(), mode) for ids, mode in dataset.document(number)] for number in numbers]
    return [described, segments]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_any_flipped_byte_is_reported(make_dataset, suffix: str) -> None:
    """Any byte of any file: `verify` names the file; the reader gives the true tokens or an error."""
    folder = make_dataset("a", "ptic", 7, num_shards=1, text=5)
    truth = read_everything(folder)
    path = folder / f"a-00000-of-00001{suffix}"
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    places = (
        range(len(data))
        if len(data) < 200
        else sorted({*range(80), *rng.integers(0, len(data), 60).tolist()})
    )
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        faults = verify(folder)
        assert any(path.name in fault for fault in faults), (place, faults)
        if suffix == ".jsonl":  # names only: no token comes from it
            assert read_everything(folder) == truth
        else:
            with pytest.raises(UserError, match="a-00000-of-00001"):
                read_everything(folder)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_longer_and_missing_files_are_named(make_dataset, suffix: str) -> None:
    folder = make_dataset("a", "p", 7)
    path = folder / f"a-00001-of-00002{suffix}"
    data = path.read_bytes()
    for change, message in ((data[:-1], "truncated"), (data + b"x", "changed")):
        path.write_bytes(change)
        with pytest.raises(UserError, match=f"{path.name}: .*{message}"):
            MultimodalDataset.open(folder)
        assert any(path.name in fault for fault in verify(folder))
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name}: missing"):
        MultimodalDataset.open(folder)


def test_file_truncated_while_open_is_an_error(make_dataset) -> None:
    """megatron-core's file reader returns uninitialised memory here."""
    folder = make_dataset("a", "p", 8, num_shards=1)
    dataset = MultimodalDataset.open(folder)
    dataset.document(0)
    with open(folder / "a-00000-of-00001.bin", "r+b") as stream:
        stream.truncate(40)
    with pytest.raises(UserError, match=r"a-00000-of-00001\.bin: has no byte"):
        dataset.document(7)


def test_manifest_is_required_and_checked(make_dataset, tmp_path: Path) -> None:
    folder = make_dataset("a", "p", 4)
    path = folder / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"documents": 4', '"documents": 5'))
    with pytest.raises(UserError, match=r"manifest\.json: its checksum"):
        MultimodalDataset.open(folder)
    path.write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="not valid JSON"):
        MultimodalDataset.open(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"manifest\.json: no such file"):
        MultimodalDataset.open(folder)


def test_another_vocabulary_is_refused(make_dataset) -> None:
    folder = make_dataset("a", "p", 4)
    with pytest.raises(UserError, match=r"vocabulary 'tiny' .*'emu3' .* is asked for"):
        MultimodalDataset.open(folder, vocabulary=Vocabulary.preset("emu3"))


def test_index_of_another_shard_is_refused(make_dataset) -> None:
    folder = make_dataset("a", "p", 9)
    first, second = (folder / f"a-0000{number}-of-00002.idx" for number in (0, 1))
    data = first.read_bytes()
    second.write_bytes(data)
    with pytest.raises(UserError, match="a-00001-of-00002"):
        MultimodalDataset.open(folder)


def test_open_files_are_bounded(make_dataset) -> None:
    folder = make_dataset("a", "p", 40, num_shards=10)
    dataset = MultimodalDataset.open(folder, open_files=3)
    for number in range(40):
        dataset.document(number)
        assert len(dataset._files) <= 3
    with pytest.raises(UserError, match="at least 1"):
        FileCache(0)


def test_numbers_out_of_range_are_index_errors(make_dataset) -> None:
    dataset = MultimodalDataset.open(make_dataset("a", "p", 4))
    for number in (-1, 4):
        with pytest.raises(IndexError):
            dataset.document(number)
        with pytest.raises(IndexError):
            dataset.describe(np.array([number]))


def test_describe_equals_the_documents(make_dataset) -> None:
    dataset = MultimodalDataset.open(make_dataset("a", "ptiv", 30, num_shards=4))
    length, caption, kind, _ = dataset.describe(np.arange(30))
    for number in range(30):
        segments = dataset.document(number)
        modes = [mode for _, mode in segments]
        assert length[number] == sum(dataset.lengths(number))
        assert kind[number] == (1 if modes == [0, 1] else 2 if 1 in modes else 0)
        assert caption[number] == (len(segments[0][0]) if modes == [0, 1] else 0)


def test_info_and_show(make_dataset) -> None:
    folder = make_dataset("a", "pti", 12)
    text = "\n".join(describe(folder))
    assert "documents    12" in text
    assert "caption + span" in text
    by_name, by_number = list(show(folder, "a-1")), None
    for number in range(12):
        lines = list(show(folder, str(number)))
        by_number = lines if "sample a-1," in lines[0] else by_number
    assert by_name == by_number
    with pytest.raises(UserError, match="no document 'nobody'"):
        list(show(folder, "nobody"))


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.dataset", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_tool(make_dataset) -> None:
    folder = make_dataset("a", "p", 4)
    sound = run_tool("verify", str(folder))
    assert (sound.returncode, sound.stdout.strip()) == (0, f"{folder}: sound")
    path = folder / "a-00000-of-00002.bin"
    path.write_bytes(path.read_bytes()[:-4] + b"junk")
    damaged = run_tool("verify", str(folder))
    assert damaged.returncode == 1
    assert path.name in damaged.stdout
    missing = run_tool("info", str(folder / "nowhere"))
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: ")
    assert len(missing.stderr.splitlines()) == 1


@pytest.mark.parametrize("checksum", [True, False])
def test_any_flipped_byte_of_a_record_is_reported(make_dataset, checksum: bool) -> None:
    """By `verify`; and with its checksum, which records of earlier releases lack, nobody believes it."""
    folder = make_dataset("a", "ptic", 7, num_shards=1, text=5)
    path = folder / "a-00000-of-00001.json"
    truth = read_shard_record(folder, "a", 0, 1)
    assert truth is not None
    data = truth.file_contents(checksum=checksum)
    path.write_bytes(data)
    assert verify(folder) == []
    assert read_shard_record(folder, "a", 0, 1) == truth
    rng = np.random.default_rng(0)
    believed = 0
    for place in range(len(data)):
        flip = int(rng.integers(1, 256))
        path.write_bytes(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
        assert any(path.name in fault for fault in verify(folder)), place
        believed += read_shard_record(folder, "a", 0, 1) not in (None, truth)
    assert not (checksum and believed)
    path.write_bytes(data.replace(b'"documents"', b'"documentz"'))
    with pytest.raises(UserError, match=path.name):
        write_manifest(folder, "a", 1, vocabulary=VOCABULARY)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), max_size=9), min_size=1).filter(lambda parts: any(parts)))
def test_counted_percentiles_are_those_of_all_values(parts: list[list[int]]) -> None:
    counted, values = Counted(), np.concatenate(parts)
    for part in parts:
        counted.add(np.array(part, dtype=np.int64))
    assert len(counted) == len(values)
    assert counted.mean == pytest.approx(values.mean())
    for percent in (0, 33, 50, 90, 99, 100):
        assert counted.percentile(percent) == pytest.approx(np.percentile(values, percent))

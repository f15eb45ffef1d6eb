"""Decoding ahead: what waits is bounded in bytes, and the bounds change no byte of a dataset."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from emu3_megatron.media import MediaError, write_mp4, write_png
from emu3_megatron.tokenization import TokenizationConfig, tokenize
from emu3_megatron.tokenization import decode as decoding
from emu3_megatron.tokenization.decode import SampleDecoder
from emu3_megatron.tokenization.entries import BadEntry, Entry, MediaPointer
from tests.media.clips import moving_picture
from tests.tokenization.conftest import contents

MakeConfig = Callable[..., TokenizationConfig]
GIB = 1 << 30


def entries(kind: str, path: Path, count: int, taken: list[int]) -> Iterator[Entry]:
    """So many entries of one file; `taken` has the numbers of those that were asked for."""
    for number in range(count):
        taken.append(number)
        yield Entry(id=str(number), kind=kind, text=None, media=MediaPointer(path))


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_clips_wait_by_their_bytes_whatever_the_number_of_threads(
    tmp_path: Path, make_config: MakeConfig, threads: int
) -> None:
    """Clips of 768 MiB of pixels each: no more than two are in hand, and the next one's entry. (Their files
    are missing, which is found only when they are decoded.)"""
    config = make_config(
        Path("m.jsonl"), tmp_path, decode_threads=threads, video_area=1024 * 1024, video_frames=64
    )
    taken: list[int] = []
    with SampleDecoder(config, 8) as decoder:
        outcomes = decoder(entries("video", tmp_path / "gone.mp4", 200, taken))
        for number in range(20):
            outcome = next(outcomes)
            assert isinstance(outcome, BadEntry)
            assert outcome.id == str(number)
            assert (len(taken) - number) * 0.75 * GIB < 4 * GIB


class Live:
    """Counts the bytes of arrays that are still referred to."""

    def __init__(self) -> None:
        self.bytes = self.most = 0

    def picture(self, frames: int, height: int, width: int) -> npt.NDArray[np.uint8]:
        """A black clip; its memory is never touched."""
        array = np.zeros((frames, height, width, 3), np.uint8)
        self.bytes += array.nbytes
        self.most = max(self.most, self.bytes)
        weakref.finalize(array, self._drop, array.nbytes)
        return array

    def _drop(self, count: int) -> None:
        self.bytes -= count


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Live:
    """Pictures of 4K, whatever the file, which a preprocessor makes to nothing."""
    count = Live()

    class Source:
        def frames(self, video: Any, indices: Any) -> npt.NDArray[np.uint8]:
            return count.picture(len(indices), 2160, 3840)

    def images(media: list[Any]) -> list[npt.NDArray[np.uint8]]:
        return [count.picture(1, 2160, 3840)[0] for _ in media]

    monkeypatch.setattr(decoding, "frame_source", lambda *_, **__: Source())
    monkeypatch.setattr(decoding, "decode_images", images)
    monkeypatch.setattr(
        decoding,
        "Preprocessor",
        lambda **_: lambda clips, _: [torch.zeros(1, 3, 8, 8) for _ in clips],
    )
    return count


def test_pictures_of_their_own_size_are_not_kept(tmp_path: Path, make_config: MakeConfig, live: Live) -> None:
    """A chunk of 32 clips of 4K is 6 GiB, and one of 32 stills 0.75 GiB."""
    write_mp4(tmp_path / "clip.mp4", moving_picture(9, 64, 64), 8)
    write_png(tmp_path / "still.png", np.zeros((2160, 3840, 3), np.uint8))
    config = make_config(Path("m.jsonl"), tmp_path)
    for kind, name, limit in (("video", "clip.mp4", 8), ("image", "still.png", 1)):
        live.most = 0
        picture = limit * 2160 * 3840 * 3
        with SampleDecoder(config, 8) as decoder:
            samples = list(decoder(entries(kind, tmp_path / name, 32, [])))
        assert [sample.entry.id for sample in samples] == [str(number) for number in range(32)]  # type: ignore[union-attr]
        assert picture <= live.most <= 2 * (decoding.SOURCE_BYTES + picture)
        assert live.bytes == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_the_bounds_change_no_byte(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    assert tokenize(make_config(corpus, tmp_path / "usual", num_shards=2))
    for name in ("CHUNK_BYTES", "AHEAD_BYTES", "SOURCE_BYTES"):
        monkeypatch.setattr(decoding, name, 1)
    assert tokenize(make_config(corpus, tmp_path / "tight", num_shards=2, decode_threads=threads))
    assert contents(tmp_path / "tight") == contents(tmp_path / "usual")


@pytest.mark.parametrize(
    ("device", "media_device", "index"),
    [
        ("cuda:3", "gpu", 3),
        ("cuda", "gpu", 0),
        ("cpu", "gpu", 0),
        ("cuda:3", "cpu", None),
        ("cpu", "cpu", None),
    ],
)
def test_threads_resize_and_decode_on_the_gpu_of_the_encoder(
    tmp_path: Path,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    media_device: str,
    index: int | None,
) -> None:
    """What reaches the two constructors; whether a GPU does it only a GPU can show."""
    seen: list[tuple[object, object]] = []

    def note(*_: object, **settings: object) -> Any:
        seen.append((settings["device"], settings["device_index"]))
        raise MediaError("no GPU")

    monkeypatch.setattr(decoding, "Preprocessor", note)
    monkeypatch.setattr(decoding, "frame_source", note)
    write_mp4(tmp_path / "clip.mp4", moving_picture(9, 64, 64), 8)
    write_png(tmp_path / "still.png", moving_picture(1, 64, 64)[0])
    config = make_config(Path("m.jsonl"), tmp_path, device=device, media_device=media_device)
    with SampleDecoder(config, 8) as decoder:
        list(decoder(entries("video", tmp_path / "clip.mp4", 1, [])))
        with pytest.raises(MediaError, match="no GPU"):
            list(decoder(entries("image", tmp_path / "still.png", 1, [])))
    assert seen == [(media_device, index)] * 2


def test_the_workers_of_a_job_may_encode_on_several_devices_of_one_kind(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    identity, same, other = (
        make_config(Path("m.jsonl"), tmp_path, device=device).identity()
        for device in ("cuda:0", "cuda:7", "cpu")
    )
    assert identity == same
    assert identity != other
    assert other["device"] == "cpu"

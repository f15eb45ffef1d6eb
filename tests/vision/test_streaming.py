"""Streamed media: cut at random from pictures of any size, the same for any number of workers, bounded."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emu3_megatron.vision import streaming
from emu3_megatron.vision.draws import Draw, Draws
from emu3_megatron.vision.streaming import PackedPaths, StreamedDataset, open_stream
from emu3_megatron.vision.training_config import DataConfig
from tests.media.clips import PHOTOGRAPHS, encode, moving_picture, sound_alone
from tests.vision.test_training import config

STREAM = DataConfig(stream=True, height=32, width=48, frames=4, scale=(1.0, 1.0), flip=False)


def place_picture(path: Path, height: int, width: int) -> Path:
    """A picture whose pixels say where they are: red the column, green the row."""
    rows, columns = np.mgrid[:height, :width]
    Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], -1).astype(np.uint8)).save(path)
    return path


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bytes_of(pixels: torch.Tensor) -> torch.Tensor:
    return ((pixels + 1) * 127.5).round().to(torch.int64)


def test_paths_come_back_whatever_their_characters() -> None:
    paths = ["a/b.png", "", "übung/图.jpg", "x" * 300]
    packed = PackedPaths(paths)
    assert list(packed) == paths
    with pytest.raises(IndexError):
        packed[4]
    assert len(PackedPaths([])) == 0


def test_cuts_at_full_size_are_windows_of_the_picture_and_reach_all_of_it(tmp_path: Path) -> None:
    dataset = StreamedDataset([str(place_picture(tmp_path / "p.png", 60, 90))], [], STREAM)
    batch = dataset.draw(clips=False, size=200, crop=None, generator=generator())
    assert batch.pixels.shape == (200, 3, 32, 48)
    assert batch.background.shape == (200, 3)
    found = bytes_of(batch.pixels)
    left, top = found[:, 0, 0, 0], found[:, 1, 0, 0]
    assert torch.equal(found[:, 0], (left[:, None, None] + torch.arange(48)).expand(-1, 32, -1))
    assert torch.equal(found[:, 1], (top[:, None, None] + torch.arange(32)[:, None]).expand(-1, -1, 48))
    assert (int(left.min()), int(left.max())) == (0, 42)
    assert (int(top.min()), int(top.max())) == (0, 28)
    crops = dataset.draw(clips=False, size=2, crop=16, generator=generator())
    assert crops.pixels.shape == (2, 3, 16, 16)


def test_pictures_of_mixed_sizes_are_scaled_within_bounds_and_mirrored(tmp_path: Path) -> None:
    """The slope of the red ramp is 1 over the scale; small pictures are enlarged to cover."""
    paths = [str(place_picture(tmp_path / f"{h}.png", h, w)) for h, w in ((200, 250), (20, 40))]
    settings = dataclasses.replace(STREAM, scale=(0.25, 1.0), flip=True)
    slopes = []
    for path in paths:
        dataset = StreamedDataset([path], [], settings)
        found = bytes_of(dataset.draw(clips=False, size=100, crop=None, generator=generator()).pixels)
        slopes.append((found[:, 0, 16, 40] - found[:, 0, 16, 8]) / 32)
    big, small = slopes
    assert (big > 0).float().mean() == pytest.approx(0.5, abs=0.2)
    assert big.abs().max() < 4.2
    assert big.abs().max() > 3
    assert big.abs().min() < 1.3
    assert (small.abs() < 1).all(), "20 rows are enlarged to 32 at least"


def test_draws_are_the_same_with_and_without_workers_and_cache(tmp_path: Path) -> None:
    paths = [str(place_picture(tmp_path / f"{i}.png", 60 + i, 90)) for i in range(4)]

    def draws(**changes: object) -> list[Draw]:
        data = dataclasses.replace(STREAM, **changes)
        run = config(tmp_path, data=data)
        source = Draws(run, StreamedDataset(paths, [], data), 0, 1)
        return [source.take(step) for step in (0, 1, 2, 5, 6)]

    alone = draws()
    assert not torch.equal(alone[0].batch.pixels, alone[1].batch.pixels)
    for others in (draws(workers=2), draws(cache_mib=1)):
        for a, b in zip(alone, others, strict=True):
            assert torch.equal(a.batch.pixels, b.batch.pixels)
            assert a.frames == b.frames


def test_nothing_is_read_before_it_is_drawn_and_damage_is_passed_over(tmp_path: Path) -> None:
    place_picture(tmp_path / "good.png", 60, 90)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "cut.JPG").write_bytes((PHOTOGRAPHS / "rocket.jpg").read_bytes()[:5000])
    (tmp_path / "notes.txt").write_text("no picture")
    manifest = tmp_path / "m.jsonl"
    rows = [{"id": 1, "image": "good.png"}, {"id": 2, "image": "x.png", "split": "test"}, {"text": "words"}]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = dataclasses.replace(STREAM, folders=[str(tmp_path)], manifests=[str(manifest)])
    dataset = open_stream(settings)
    assert dataset.num_images == 3
    assert dataset.num_clips == 0
    with pytest.warns(UserWarning, match=r"cut\.JPG is passed over"):
        batch = dataset.draw(clips=False, size=40, crop=None, generator=generator())
    assert batch.pixels.shape[0] == 40
    assert open_stream(dataclasses.replace(settings, limit=2)).num_images == 2
    shutil.rmtree(tmp_path / "inner")
    (tmp_path / "good.png").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(ValueError, match=r"50 files .* in a row"),
    ):
        StreamedDataset([str(tmp_path / "good.png")], [], STREAM).draw(
            clips=False, size=1, crop=None, generator=generator()
        )
    with pytest.raises(ValueError, match=r"cut\.JPG: no such file"):
        StreamedDataset([str(tmp_path / "inner" / "cut.JPG")], [], STREAM).draw(
            clips=False, size=1, crop=None, generator=generator()
        )
    with pytest.raises(ValueError, match="no such folder"):
        open_stream(dataclasses.replace(STREAM, folders=[str(tmp_path / "none")]))
    with pytest.raises(ValueError, match="neither manifest nor folder"):
        open_stream(STREAM)


def test_a_missing_file_is_named_through_the_workers(tmp_path: Path) -> None:
    data = dataclasses.replace(STREAM, workers=1)
    source = Draws(config(tmp_path, data=data), StreamedDataset([str(tmp_path / "gone.png")], [], data), 0, 1)
    with pytest.raises(ValueError, match=r"^[^\n]*gone\.png: no such file[^\n]*$"):
        source.take(0)


def test_clips_begin_anywhere_and_keep_the_frame_rate(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mp4", moving_picture(24, 64, 96), rate=12, options={"crf": "10"})
    settings = dataclasses.replace(STREAM, frame_rate=6.0)
    dataset = StreamedDataset([], [str(path)], settings)
    batch = dataset.draw(clips=True, size=24, crop=None, generator=generator())
    assert batch.pixels.shape == (24, 4, 3, 32, 48)
    blue = bytes_of(batch.pixels)[:, :, 2].float().mean((2, 3))
    steps = (blue - 20) / 8
    assert steps[:, 0].round().unique().numel() > 6
    torch.testing.assert_close(steps.diff(dim=1), torch.full((24, 3), 2.0), rtol=0, atol=0.6)
    assert dataset.clips(torch.arange(1)).shape == (1, 4, 3, 32, 48)
    long = dataclasses.replace(STREAM, frames=40)
    with pytest.warns(UserWarning, match="24 of the 40 frames"), pytest.raises(ValueError, match="in a row"):
        StreamedDataset([], [str(path)], long).draw(clips=True, size=1, crop=None, generator=generator())


def test_files_of_sound_alone_are_passed_over(tmp_path: Path) -> None:
    paths = [
        sound_alone(tmp_path / "sound.mp4"),
        encode(tmp_path / "clip.mp4", moving_picture(6, 64, 96)),
    ]
    dataset = StreamedDataset([], [str(path) for path in paths], STREAM)
    with pytest.warns(UserWarning, match=r"sound\.mp4 is passed over: it holds no video"):
        batch = dataset.draw(clips=True, size=8, crop=None, generator=generator())
    assert batch.pixels.shape == (8, 4, 3, 32, 48)
    assert torch.equal(*dataset.clips(torch.arange(2)))


def test_whatever_a_decoder_raises_the_file_is_passed_over_but_for_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bad.png", "good.png"):
        place_picture(tmp_path / name, 60, 90)
    dataset = StreamedDataset([str(tmp_path / name) for name in ("bad.png", "good.png")], [], STREAM)
    transpose, errors = streaming.ImageOps.exif_transpose, [Exception()]

    def fails(image: Image.Image) -> Image.Image | None:
        if "bad" in image.filename:  # type: ignore[attr-defined]
            raise errors[-1]
        return transpose(image)

    monkeypatch.setattr(streaming.ImageOps, "exif_transpose", fails)
    for error in (IndexError(), KeyError("tag"), TypeError("x"), ZeroDivisionError()):
        errors.append(error)
        dataset._complained.clear()
        with pytest.warns(UserWarning, match=r"bad\.png is passed over: ."):
            dataset.draw(clips=False, size=8, crop=None, generator=generator())
        assert torch.equal(*dataset.images(torch.arange(2)))
    errors.append(MemoryError())
    with pytest.raises(MemoryError):
        dataset.draw(clips=False, size=8, crop=None, generator=generator())


def test_media_that_are_null_are_absent_and_others_must_be_paths(tmp_path: Path) -> None:
    manifest = tmp_path / "m.jsonl"
    rows: list[dict[str, object]] = [
        {"id": 1, "image": None, "video": "a.mp4"},
        {"id": 2, "image": "a.png", "video": None},
        {"id": 3, "image": None, "text": "words"},
    ]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = open_stream(dataclasses.replace(STREAM, manifests=[str(manifest)]))
    assert (dataset.num_images, dataset.num_clips) == (1, 1)
    for bad in (5, ["a.png"], {"bytes": ""}, " "):
        manifest.write_text(json.dumps({"id": "x7", "image": bad}) + "\n")
        with pytest.raises(ValueError, match=r"m\.jsonl: an entry \(id 'x7'\) has a 'image'.* path"):
            open_stream(dataclasses.replace(STREAM, manifests=[str(manifest)]))

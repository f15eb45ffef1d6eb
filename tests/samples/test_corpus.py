import hashlib
import os
import subprocess
import sys
from pathlib import Path

import av
import pytest
from PIL import Image

from emu3_megatron.samples import (
    CorpusConfig,
    World,
    parse_caption,
    read_manifest,
    write_corpus,
)

CONFIG = CorpusConfig(train_images=12, train_videos=3, train_texts=5, held_out_images=4, held_out_videos=2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return folder, write_corpus(folder, CONFIG)


def _digest(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_manifests_name_real_files(corpus):
    folder, manifests = corpus
    counts = {name: len(read_manifest(path)) for name, path in manifests.items()}
    assert counts == {
        "train-images": 12,
        "train-videos": 3,
        "train-texts": 5,
        "held-out-images": 4,
        "held-out-videos": 2,
    }
    for record in read_manifest(manifests["train-images"]):
        with Image.open(folder / record["image"]) as image:
            assert (image.format, image.size, image.mode) == ("PNG", (64, 64), "RGB")
    for record in read_manifest(manifests["held-out-videos"]):
        with av.open(str(folder / record["video"])) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
            assert float(stream.average_rate) == CONFIG.world.fps
            assert len(list(container.decode(video=0))) == CONFIG.world.frames


def test_captions_agree_with_attributes_and_splits_hold(corpus):
    _, manifests = corpus
    world = World(CONFIG.world)
    ids = set()
    for name, path in manifests.items():
        for record in read_manifest(path):
            ids.add(record["id"])
            assert name.startswith(record["split"])
            if "caption" not in record:
                assert record["text"]
                continue
            attributes = record["attributes"]
            assert parse_caption(record["caption"]) == attributes
            medium = "image" if "image" in record else "video"
            last = attributes["position" if medium == "image" else "direction"]
            allowed = world.combinations(medium, record["split"])
            assert (attributes["shape"], attributes["colour"], last) in allowed
    assert len(ids) == 26


def test_bytes_do_not_depend_on_processes(corpus, tmp_path):
    folder, _ = corpus
    write_corpus(tmp_path, CONFIG, processes=2)
    assert _digest(tmp_path) == _digest(folder)


def test_another_seed_is_another_corpus(corpus, tmp_path):
    _, manifests = corpus
    small = CorpusConfig(
        train_images=12, train_videos=0, train_texts=0, held_out_images=0, held_out_videos=0, seed=1
    )
    other = write_corpus(tmp_path, small)
    assert read_manifest(other["train-images"]) != read_manifest(manifests["train-images"])
    assert read_manifest(other["train-videos"]) == []


@pytest.mark.parametrize("fields", [{"train_images": -1}, {"chinese": 2.0}, {"wordings": 0}, {"wordings": 9}])
def test_meaningless_configs_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        CorpusConfig(**fields)


def test_a_broken_manifest_names_its_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"id": "a"}\n[1]\n')
    with pytest.raises(ValueError, match="line 2: a JSON list"):
        read_manifest(path)


def test_the_tool(tmp_path):
    root = Path(__file__).parents[2]

    def run(*arguments):
        counts = [f"--{split}-{kind}=1" for split in ("train", "held-out") for kind in ("images", "videos")]
        command = [sys.executable, "tools/make_samples.py", "--output", str(tmp_path), *counts, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)

    done = run("--world", "quickstart", "--processes", "1")
    assert done.returncode == 0, done.stderr
    assert "train-images" in done.stdout
    assert len(read_manifest(tmp_path / "held-out-videos.jsonl")) == 1
    bad = run("--world", "huge")
    assert bad.returncode == 2
    assert "known worlds" in bad.stderr

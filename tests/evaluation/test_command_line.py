"""The program from prompts to the report, with a tiny model."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from emu3_megatron.errors import UserError
from emu3_megatron.evaluation import command_line
from emu3_megatron.evaluation.generation import grid
from emu3_megatron.inference import Generator, ModelBundle
from emu3_megatron.media import decode_image
from emu3_megatron.vision import VisionTokenizer
from tests.evaluation.test_models import clip_folder, detector_folder
from tests.evaluation.test_tasks import GENEVAL, lines, written
from tests.evaluation.test_vlmeval import dataset
from tests.inference import worlds
from tests.inference.server.test_app import png_bytes
from tests.inference.test_tasks import VISION

DRAW = ["--checkpoint", "none", "--height", "8", "--width", "12", "--top-k", "20"]


@pytest.fixture(scope="module")
def generator() -> Iterator[Generator]:
    with worlds.one_process():
        torch.manual_seed(0)
        vision, config = VisionTokenizer(VISION).eval(), worlds.model_config()
        yield Generator(ModelBundle(worlds.tiny_model(config), config, worlds.dialect("emu3-frames"), vision))


@pytest.fixture(autouse=True)
def _opened(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "open_generator", lambda *_, **__: generator)


def run(*arguments: object) -> None:
    command_line.evaluate(command_line.build_parser().parse_args([str(each) for each in arguments]))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_geneval_from_prompts_to_the_report(tmp_path: Path) -> None:
    """The layout of GenEval; what is missing is drawn again to the same bytes, whatever else was there."""
    prompts = written(tmp_path / "p.jsonl", lines(GENEVAL, {**GENEVAL, "tag": "single_object"}))
    out = tmp_path / "out"
    draw = ["generate", "--suite", "geneval", "--prompts", prompts, "--samples", 2, "--output", out, *DRAW]
    run(*draw)
    first = files(out)
    assert {"00000/metadata.jsonl", "00001/samples/0001.png"} <= first.keys()
    assert json.loads(first["00000/metadata.jsonl"]) == GENEVAL
    assert decode_image(out / "00000/samples/0000.png").shape == (8, 12, 3)
    (out / "00001/samples/0000.png").unlink()
    run(*draw, "--batch", 1)
    again = files(out)
    for name, data in first.items():
        if name.endswith(".png"):
            assert again[name] == data
    with pytest.raises(UserError, match="another seed"):
        run(*draw, "--seed", 3)
    models = []
    for make, name in ((clip_folder, "clip"), (detector_folder, "detector")):
        folder = tmp_path / name
        folder.mkdir()
        models += [f"--{name}", make(folder)]
    run("score", "--output", out, *models)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {row["tag"] for row in rows} == {"counting", "single_object"}
    assert len(rows) == 4
    run("score", "--output", out, "--results", out / "results.jsonl", "--name", "tiny")
    scores = json.loads((out / "scores.json").read_text())
    assert scores["scores"].keys() == {"overall", "counting", "single_object", "clip_t"}
    run("report", out, "--output", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "GenEval" in page
    assert page.count("data:image/png") == 2


def test_sheets_and_clips_have_the_names_that_the_benchmarks_look_for(tmp_path: Path) -> None:
    written(tmp_path / "prompts" / "x1.txt", "a cat")
    run("generate", "--suite", "dpg", "--prompts", tmp_path / "prompts", "--output", tmp_path / "dpg", *DRAW)
    assert decode_image(tmp_path / "dpg" / "images" / "x1.png").shape == (16, 24, 3)
    info = written(tmp_path / "info.json", json.dumps([{"prompt_en": "a cat, red", "dimension": ["scene"]}]))
    clips = ["--frames", 8, "--fps", 8, "--samples", 2]
    run(
        "generate",
        "--suite",
        "vbench",
        "--prompts",
        info,
        "--output",
        tmp_path / "vbench",
        *clips,
        *DRAW,
    )
    assert (tmp_path / "vbench" / "videos" / "a cat, red-1.mp4").stat().st_size > 100


def test_the_checker_reads_what_was_drawn(tmp_path: Path) -> None:
    """Renderings of the sample world in the place of a model's pictures are read right."""
    from emu3_megatron.evaluation.tasks import READERS, write_tasks
    from emu3_megatron.samples import CorpusConfig, read_manifest, write_corpus

    corpus = tmp_path / "corpus"
    sizes = {"train_images": 2, "train_videos": 1, "train_texts": 1}
    write_corpus(corpus, CorpusConfig(**sizes, held_out_images=3, held_out_videos=3))
    out = tmp_path / "out"
    for name in ("held-out-images", "held-out-videos"):
        rows = read_manifest(corpus / f"{name}.jsonl")[:3]
        prompts = written(tmp_path / f"{name}.jsonl", lines(*rows))
        tasks = READERS["sample-world"](prompts, None)
        folder = out / name
        write_tasks(folder, tasks)
        for task, row in zip(tasks, rows, strict=True):
            source = corpus / row["video" if task.video else "image"]
            (folder / task.paths[0]).parent.mkdir(parents=True, exist_ok=True)
            (folder / task.paths[0]).write_bytes(source.read_bytes())
        run("score", "--suite", "sample-world", "--output", folder)
        scores = json.loads((folder / "scores.json").read_text())["scores"]
        assert min(scores.values()) == 1.0
        assert ("clip_direction" if "videos" in name else "position") in scores


def test_datasets_of_questions_are_answered(tmp_path: Path) -> None:
    import base64

    image = base64.b64encode(png_bytes()).decode()
    path = dataset(
        tmp_path / "POPE.tsv", {"index": "3", "image": image, "question": "a cat?", "answer": "yes"}
    )
    run(
        "answer", "--data", path, "--output", tmp_path, "--checkpoint", "none", "--area", 256,
        "--max-new-tokens", 4,
    )  # fmt: skip
    with open(tmp_path / "emu3" / "emu3_POPE.tsv", encoding="utf-8", newline="") as stream:
        (row,) = csv.DictReader(stream, delimiter="\t")
    assert (row["index"], row["answer"]) == ("3", "yes")
    assert "prediction" in row
    run("configure", "--output", tmp_path / "config.json", "--datasets", "POPE")
    assert json.loads((tmp_path / "config.json").read_text())["data"].keys() == {"POPE"}
    written(tmp_path / "emu3_POPE_score.csv", '"split","Overall"\n"Overall","85.2"\n')
    out = tmp_path / "understanding"
    run(
        "score", "--suite", "vlmeval", "--results", tmp_path / "emu3_POPE_score.csv", "--output", out,
    )  # fmt: skip
    assert json.loads((out / "scores.json").read_text())["scores"] == {"pope": 85.2}


def test_what_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    for arguments, reason in (
        ([], "nothing that was generated"),
        (["--suite", "vlmeval"], "--results"),
        (["--suite", "prompts", "--results", "x"], "no results of a tool"),
        (["--suite", "prompts"], "generate"),
    ):
        with pytest.raises(UserError, match=reason):
            run("score", "--output", tmp_path, *arguments)


def test_a_sheet_is_two_pictures_wide() -> None:
    pictures = [np.full((2, 3, 3), number, dtype=np.uint8) for number in range(4)]
    sheet = grid(pictures)
    assert sheet.shape == (4, 6, 3)
    assert sheet[[0, 0, 3, 3], [0, 5, 0, 5], 0].tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(grid(pictures[:1]), pictures[0])

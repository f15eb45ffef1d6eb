"""The generation program on a tiny run and on its export."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emu3_megatron.conversion import ExportedModel, export_hugging_face
from emu3_megatron.errors import UserError
from emu3_megatron.inference.command_line import build_parser, generate
from emu3_megatron.media import decode_image, load_clip, write_mp4, write_png
from emu3_megatron.text import train_sentencepiece
from emu3_megatron.vision import VisionTokenizer
from emu3_megatron.vocabulary import Vocabulary
from tests.inference import worlds
from tests.inference.test_tasks import VISION

VOCABULARY = Vocabulary.build("program", text_size=320, codebook_size=64)
SIZE = ["--height", "8", "--width", "12"]


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with worlds.one_process():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its tokenizers, its export, a picture and a clip."""
    from dataclasses import asdict

    from emu3_megatron.conversion.checkpoints import save_weights
    from emu3_megatron.model import build_model
    from emu3_megatron.parallel.config import ParallelConfig

    root = tmp_path_factory.mktemp("program")
    config = worlds.model_config()
    (model,) = build_model(
        config,
        vocabulary_padded_size=VOCABULARY.padded_size,
        vocabulary_size=VOCABULARY.size,
        parallel=ParallelConfig(),
        seed=0,
    )
    train_sentencepiece(["a red circle", "two blue squares"] * 4, root / "text.model", 310)
    torch.manual_seed(0)
    vision = VisionTokenizer(VISION).eval()
    vision.save_pretrained(root / "vision")
    record = {"model": asdict(config), "seed": 0, "trainer": {"precision": "fp32"}}
    save_weights(model, root / "run" / "checkpoints" / "step-00000003", VOCABULARY.to_dict(), record)
    export_hugging_face(
        root / "hf",
        model.state_dict(),
        ExportedModel(config=config, vocabulary=VOCABULARY),
        vision_tokenizer=vision,
        text_tokenizer=root / "text.model",
    )
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 16, 3), dtype=np.uint8)
    write_png(root / "picture.png", pixels[0])
    write_mp4(root / "clip.mp4", pixels, 8.0)
    return root


def run(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object, hf: bool = False) -> list[Any]:
    """The JSON lines of one command."""
    task, *rest = map(str, arguments)
    own = ["--text-tokenizer", str(folder / "text.model"), "--vision-tokenizer", str(folder / "vision")]
    model = ["--checkpoint", str(folder / "hf")] if hf else ["--checkpoint", str(folder / "run"), *own]
    generate(build_parser().parse_args([task, *model, *rest]))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_images(capsys, folder: Path, tmp_path: Path) -> None:
    """Files and lines; a seed repeats its image; the exported folder gives the same."""
    command = ["image", "--prompt", "a red circle", "--samples", 2, "--seed", 4, *SIZE]
    lines = run(capsys, folder, *command, "--output", tmp_path / "run")
    assert [line["seed"] for line in lines] == [4, 5]
    pictures = [decode_image(Path(line["output"])) for line in lines]
    assert pictures[0].shape == (8, 12, 3)
    assert not np.array_equal(*pictures)
    (line,) = run(
        capsys,
        folder,
        "image",
        "--prompt",
        "a red circle",
        "--seed",
        5,
        *SIZE,
        "--output",
        tmp_path / "one.png",
    )
    np.testing.assert_array_equal(decode_image(tmp_path / "one.png"), pictures[1])
    assert line["settings"] == {
        "temperature": 1.0,
        "top_k": 2048,
        "top_p": 1.0,
        "min_p": 0.0,
        "guidance": 3.0,
    }
    run(capsys, folder, *command, "--output", tmp_path / "hf", hf=True)
    for left, right in zip(
        sorted((tmp_path / "run").iterdir()), sorted((tmp_path / "hf").iterdir()), strict=True
    ):
        assert left.read_bytes() == right.read_bytes()


def test_prompts_from_a_file(capsys, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n\n两只狗\n", encoding="utf-8")
    command = ["image", "--prompts", tmp_path / "prompts.txt", *SIZE, "--output", tmp_path / "out"]
    assert [line["prompt"] for line in run(capsys, folder, *command)] == ["a red circle", "两只狗"]


def test_video_and_continuation(capsys, folder: Path, tmp_path: Path) -> None:
    (line,) = run(
        capsys, folder, "video", "--prompt", "go", "--seconds", 0.9, *SIZE, "--output", tmp_path / "new.mp4"
    )
    assert (line["frames"], line["fps"]) == (8, 8.0)
    assert load_clip(tmp_path / "new.mp4", 8, (8, 12)).shape == (8, 3, 8, 12)
    (line,) = run(
        capsys,
        folder,
        *["continue", "--video", folder / "clip.mp4", "--frames", 12, "--given-frames", 8],
        *["--height", 16, "--width", 16, "--output", tmp_path / "longer.mp4"],
        hf=True,
    )
    assert (line["frames"], line["given_frames"], line["tokens"]) == (12, 8, 4 * (4 + 1) + 2)
    assert load_clip(tmp_path / "longer.mp4", 12, (16, 16)).shape == (12, 3, 16, 16)


def test_captions(capsys, folder: Path) -> None:
    command = ["caption", "--image", folder / "picture.png", *SIZE, "--max-new-tokens", 5]
    first, second = (run(capsys, folder, *command, hf=hf) for hf in (False, True))
    assert first[0]["tokens"] <= 5
    # not the text: a random model writes bytes that are not UTF-8, which tokenizers show differently
    assert first[0]["tokens"] == second[0]["tokens"]


def test_questions(capsys, folder: Path) -> None:
    """Several media and questions; the template decides the prompt, and the same line repeats the answer."""
    image = ["--image", folder / "picture.png"]
    media = [*image, "--video", folder / "clip.mp4", *image]
    command = ["chat", *media, "--prompt", "what?", "--prompt", "why?", "--frames", 4, "--area", 256]
    command += ["--max-new-tokens", 4, "--temperature", 1, "--seed", 3]
    lines = run(capsys, folder, *command)
    assert [(line["prompt"], line["seed"]) for line in lines] == [("what?", 3), ("why?", 4)]
    assert all(0 < line["tokens"] <= 4 for line in lines)
    again = run(capsys, folder, *command, "--template", "emu3-chat")
    other = run(capsys, folder, *command, "--template", "{question} {media}")
    said = [[line["answer"] for line in each] for each in (lines, again, other)]
    assert said[0] == said[1] != said[2]


def repeated(line: dict[str, Any]) -> list[str]:
    """The command of one result, from its line alone; written beside the first."""
    given = dict(line["arguments"])
    given |= {"seed": line["seed"], "samples": None, "prompts": None}
    given |= {name: [line[name]] for name in ("prompt", "image", "video") if isinstance(line.get(name), str)}
    if line["task"] == "continue":
        given["prompt"] = line["prompt"]
    if "output" in line:
        output = Path(line["output"])
        given["output"] = str(output.with_name(f"again-{output.name}"))
    command = [given.pop("task")]
    for name, value in given.items():
        for each in value if isinstance(value, list) else [value]:
            if each not in (None, False):
                command += [f"--{name.replace('_', '-')}", *([] if each is True else [str(each)])]
    return command


@pytest.mark.parametrize(
    "command",
    [
        ["image", "--prompt", "a", "--prompt", "two", *SIZE, "--weights", "int8", "--guidance", "2"],
        [
            *["video", "--prompt", "a", "--samples", "2", "--frames", "4", "--fps", "12", "--ratio", "2:1"],
            *["--area", "128", "--negative-prompt", "b", "--plain-weights"],
        ],
        ["continue", "--video", "clip.mp4", "--frames", "8", "--rounds", "2", "--prompt", "go", *SIZE],
        ["caption", "--image", "picture.png", *SIZE, "--prefix", "two", "--max-new-tokens", "9"],
        [
            *["chat", "--prompt", "a", "--prompt", "b", "--video", "clip.mp4", "--image", "picture.png"],
            *["--frames", "4", "--fps", "4", "--area", "300", "--max-new-tokens", "7"],
        ],
    ],
    ids=lambda command: command[0],
)
def test_a_line_is_enough_to_repeat_its_result(
    capsys, folder: Path, tmp_path: Path, monkeypatch, command: list[str]
) -> None:
    monkeypatch.chdir(folder)
    output = ["--output", str(tmp_path / "out")] if command[0] in ("image", "video", "continue") else []
    *_, line = run(capsys, folder, *command, "--temperature", "1.5", "--seed", "7", *output)
    generate(build_parser().parse_args(repeated(line)))
    (again,) = (json.loads(text) for text in capsys.readouterr().out.splitlines())
    if output:
        assert Path(again["output"]) != Path(line["output"])
        assert Path(again["output"]).read_bytes() == Path(line["output"]).read_bytes()
    for name in ("caption", "answer", "tokens", "seed"):
        assert again.get(name) == line.get(name)


def test_documents_of_text_and_images(capsys, folder: Path, tmp_path: Path) -> None:
    """What is written are the segments of the line, whole pictures only, the prompt first."""
    command = [
        "interleave",
        "--prompt",
        "a red circle",
        "--samples",
        6,
        "--max-new-tokens",
        120,
        "--top-k",
        0,
    ]
    lines = run(capsys, folder, *command, "--output", tmp_path)
    assert len(lines) == 6
    for line in lines:
        output = Path(line["output"])
        assert json.loads((output / "document.json").read_text()) == line["segments"]
        assert line["segments"][0]["text"].startswith("a red circle")
        for segment in line["segments"]:
            if "image" in segment:
                assert decode_image(output / segment["image"]).shape[2] == 3
    assert (tmp_path / "00000" / "document.md").read_text().startswith("a red circle")


def test_sheets_and_rounds(capsys, folder: Path, tmp_path: Path) -> None:
    command = ["image", "--prompt", "a", "--samples", 3, *SIZE, "--sheet", tmp_path / "new" / "all.png"]
    lines = run(capsys, folder, *command, "--output", tmp_path / "images")
    sheet = decode_image(tmp_path / "new" / "all.png")
    assert sheet.shape == (4 + 2 * 12, 4 + 2 * 16, 3)
    np.testing.assert_array_equal(sheet[4:12, 20:32], decode_image(Path(lines[1]["output"])))
    (line,) = run(
        capsys, folder, "continue", "--video", folder / "clip.mp4", "--frames", 12, "--given-frames", 8,
        "--rounds", 3, *SIZE, "--output", tmp_path / "long.mp4", "--sheet", tmp_path / "frames.png",
    )  # fmt: skip
    assert (line["frames"], line["given_frames"]) == (20, 8)
    assert load_clip(tmp_path / "long.mp4", 20, (8, 12)).shape[0] == 20
    assert decode_image(tmp_path / "frames.png").shape == (4 + 12, 4 + 4 * 16, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["image", "--output", "x.png"], "no prompt"),
        (["image", "--prompt", "a", "--height", "8", "--output", "x.png"], "both --height and --width"),
        (["image", "--prompt", "a", "--height", "7", "--width", "8", "--output", "x.png"], "multiple of 4"),
        (["image", "--prompt", "a", "--samples", "2", *SIZE, "--output", "x.png"], "do not fit in one file"),
        (["image", "--prompt", "a", *SIZE, "--output", "x.jpg"], ".png files"),
        (["image", "--prompt", "a", *SIZE, "--top-p", "2", "--output", "x.png"], "top_p"),
        (["image", "--prompt", "a", "--ratio", "wide", "--output", "x.png"], "WIDTH:HEIGHT"),
        (["video", "--prompt", "a", *SIZE, "--output", "x.mp4"], "either --frames or --seconds"),
        (["caption", "--image", "missing.png", *SIZE], "missing.png"),
        (["chat", "--prompt", "a", "--image", "missing.png"], "missing.png"),
        (["chat", "--prompt", "a", "--template", "{question}"], "emu3-chat"),
        (["chat", "--image", "x.png"], "no prompt"),
    ],
)
def test_bad_arguments(
    capsys, folder: Path, tmp_path: Path, monkeypatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(capsys, folder, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["image", "--prompt", "a", "--output", "runs/v1.5"], "must exist"),
        (["image", "--prompt", "a", "--prompt", "b", "--output", "a.png"], "do not fit"),
        (["image", "--prompt", "a", "--output", "taken"], "taken is a file"),
        (["image", "--prompt", "a", "--output", "taken/a.png"], "taken is a file"),
        (["image", "--prompt", "a", "--output", "there"], "is a folder"),
        (["image", "--prompt", "a", "--output", "b", "--sheet", "there"], "is a folder"),
        (["video", "--prompt", "a", "--frames", "8", "--fps", "0", "--output", "a.mp4"], "--fps=0"),
        (["video", "--prompt", "a", "--frames", "8", "--fps", "nan", "--output", "a.mp4"], "--fps=nan"),
        (["continue", "--video", "a", "b", "--frames", "8", "--output", "a.mp4"], "do not fit"),
        (["continue", "--video", "a", "--frames", "8", "--fps", "-1", "--output", "a.mp4"], "--fps=-1"),
        (["interleave", "--prompt", "a", "--output", "taken"], "taken is a file"),
        (["interleave", "--prompt", "a", "--samples", "2", "--output", "taken"], "taken is a file"),
        (["chat", "--prompt", "a", "--fps", "0"], "--fps=0"),
        (["image", "--prompt", "a", "--top-p", "2", "--output", "x.png"], "top_p"),
        (["image", "--prompt", "a", "--area", "-1", "--output", "a.png"], "--area=-1 must be"),
        (["image", "--prompt", "a", "--max-rows", "0", "--output", "a.png"], "--max-rows=0 must be"),
        (["video", "--prompt", "a", "--seconds", "inf", "--output", "a.mp4"], "--seconds=inf must be"),
        (["video", "--prompt", "a", "--seconds", "-2", "--output", "a.mp4"], "--seconds=-2"),
        (
            ["video", "--prompt", "a", "--frames", "9", "--output", "a.mp4"],
            "--frames=9 must be a multiple of 4",
        ),
        (["continue", "--video", "a", "--rounds", "0", "--frames", "8", "--output", "a.mp4"], "--rounds=0"),
        (
            ["continue", "--video", "a", "--given-frames", "3", "--frames", "8", "--output", "a.mp4"],
            "--given-frames=3 must be a multiple of 4",
        ),
        (["chat", "--prompt", "a", "--video", "a", "--frames", "3"], "--frames=3 must be a multiple of 4"),
    ],
)
def test_arguments_are_checked_before_the_model_is_opened(
    folder: Path, tmp_path: Path, monkeypatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    (tmp_path / "there" / "00000.png").mkdir(parents=True)
    vision = ["--vision-tokenizer", str(folder / "vision")]
    with pytest.raises(ValueError, match=message):
        generate(build_parser().parse_args([*arguments, *vision, "--checkpoint", "no model"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken", "there"]


def test_frames_fit_the_vision_tokenizer_that_a_folder_holds(folder: Path, tmp_path: Path) -> None:
    command = ["video", "--prompt", "a", "--frames", "9", "--output", str(tmp_path / "a.mp4")]
    with pytest.raises(UserError, match="--frames=9 must be a multiple of 4"):
        generate(build_parser().parse_args([*command, "--checkpoint", str(folder / "hf")]))


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("emu3_megatron.inference.command_line", ["image", "--prompt", "a", "--output", "a.png"]),
        ("emu3_megatron.inference.server.command_line", []),
        ("emu3_megatron.evaluation.command_line", ["answer", "--data", "a.tsv", "--output", "a"]),
        (
            "emu3_megatron.evaluation.command_line",
            ["generate", "--suite", "geneval", "--prompts", "a", "--output", "a"],
        ),
    ],
)
def test_several_processes_are_refused(monkeypatch, module: str, arguments: list[str]) -> None:
    """They would all write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["program", *arguments, "--checkpoint", "no model"])
    with pytest.raises(UserError, match=r"WORLD_SIZE=2: .* one process"):
        importlib.import_module(module).main()


def test_a_folder_that_exists_may_have_a_dot(capsys, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "v1.5").mkdir()
    command = ["image", "--prompt", "a", "--samples", 2, *SIZE, "--output", tmp_path / "v1.5"]
    assert len(run(capsys, folder, *command)) == len(list((tmp_path / "v1.5").iterdir())) == 2


def test_layers_are_torch_ones_whatever_is_installed(folder: Path, monkeypatch) -> None:
    """As on a GPU with Transformer Engine; its layers could not be reduced to one byte."""
    from emu3_megatron.inference import open_bundle
    from emu3_megatron.model import build, layers

    def as_on_a_gpu(config: Any, *, cuda: bool) -> bool:
        return config.attention_backend != "torch"

    for module in (build, layers):
        monkeypatch.setattr(module, "uses_transformer_engine", as_on_a_gpu)
    own = {"text_tokenizer": folder / "text.model", "vision_tokenizer": folder / "vision"}
    for name, tokenizers in (("run", own), ("hf", {})):
        bundle = open_bundle(folder / name, weights="int8", **tokenizers)
        assert not bundle.model.transformer_engine
        assert bundle.config.attention_backend == "auto"


def test_checkpoints_name_norms_as_transformer_engine_does(folder: Path) -> None:
    """So that what was trained with its layers is found by torch's, and the other way round."""
    from emu3_megatron.conversion.maps import TRANSFORMER_ENGINE_NAMES
    from emu3_megatron.training.checkpoint import model_state

    sharded = model_state([worlds.tiny_model()])["model"]
    for fused, apart in TRANSFORMER_ENGINE_NAMES.items():
        for layer in range(2):
            assert sharded[f"decoder.layers.{layer}.{apart}"].key == f"decoder.layers.{fused}"


def test_bad_folders(folder: Path, tmp_path: Path) -> None:
    from emu3_megatron.inference import open_bundle

    with pytest.raises(UserError, match="does not exist"):
        open_bundle(tmp_path / "gone")
    with pytest.raises(UserError, match="no committed checkpoint"):
        open_bundle(tmp_path)
    with pytest.raises(UserError, match="give --text-tokenizer"):
        open_bundle(folder / "run")
    VisionTokenizer(type(VISION)(**{**vars(VISION), "codebook_size": 32})).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="32 codes"):
        open_bundle(folder / "run", text_tokenizer=folder / "text.model", vision_tokenizer=tmp_path / "other")

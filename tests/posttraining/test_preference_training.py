"""Preference training as a program: layouts, resume, the reference's cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training import layouts, runs

TWO = {"dp2": True, "tp2-sp": False, "pp2": True, "cp2": False}
"""Layouts of two processes, and whether the optimizer is distributed."""
FOUR = {"tp2-pp2-sp": True, "tp2-cp2-sp": False, "pp2-dp2": True, "pp2-cp2": True}
"""The same of four."""

STEPS = ["--trainer.steps", "8"]


def configuration(data: Path, base: Path) -> dict[str, Any]:
    fields = runs.configuration(data)
    fields["data"] |= {
        "sources": {"pairs": {"path": str(data / "pairs")}},
        "validation": {"held-out": {"path": str(data / "held-out-pairs")}},
    }
    fields["optimizer"] = {"learning_rate": 1e-3, "warmup_steps": 2, "clip_grad": 1.0}
    fields["trainer"]["steps"] = 8
    fields["checkpoint"] = {"interval": 4, "load": str(base)}
    fields["validation"] = {"interval": 8, "windows": 4}
    fields["dpo"] = {"beta": 0.2, "label_smoothing": 0.05, "cross_entropy_weight": 0.5}
    return fields


def train(config: Path, run: Path, *arguments: str) -> Any:
    return runs.train(config, run, *arguments, program=runs.PREFERENCES)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, config_file: Path) -> Path:
    """A model that was trained for a few steps."""
    run = tmp_path_factory.mktemp("base") / "run"
    done = runs.train(config_file, run, "--trainer.steps", "6")
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, base: Path) -> Path:
    path = tmp_path_factory.mktemp("config") / "pairs.yaml"
    path.write_text(json.dumps(configuration(tiny_data, base)))
    return path


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, pairs_file: Path) -> Path:
    run = tmp_path_factory.mktemp("single") / "run"
    done = train(pairs_file, run)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pairs_file: Path) -> Path:
    """Every layout with a cache that it filled itself, and one that asks at every step."""
    folder = tmp_path_factory.mktemp("layouts")
    for processes, names in ((2, TWO), (4, FOUR)):
        known = layouts.TWO | layouts.FOUR
        arguments = {
            name: layouts.options(known[name], distributed_optimizer=distributed)
            for name, distributed in names.items()
        }
        if processes == 2:
            arguments["online"] = [*arguments["pp2"], "--dpo.reference_mode", "online"]
        runs.launch_layouts(
            folder, pairs_file, arguments, processes=processes, save=False, program=runs.PREFERENCES
        )
    return folder


KEYS = ("loss", "loss_dpo", "loss_chosen", "grad_norm", "reward_chosen", "reward_rejected")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TWO, *FOUR, "online"])
def test_a_layout_equals_one_process(trained: Path, single: Path, name: str) -> None:
    lines, expected = runs.metrics(trained / name), runs.metrics(single)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["pairs"] for line in lines] == [line["pairs"] for line in expected]
    for line, want in zip(lines, expected, strict=True):
        limit = 1e-5 if line["step"] == 1 else layouts.ALL_STEPS
        for key in KEYS:
            # A reward is a difference of sums over 64 tokens: absolute, in nats.
            assert abs(line[key] - want[key]) <= limit * max(1.0, abs(want[key])), (line["step"], key)
    for key in ("validation_loss", "validation_preferred", "validation_margin"):
        assert lines[-1][key] == pytest.approx(expected[-1][key], abs=1e-3)


@pytest.mark.slow
def test_training_starts_at_the_reference(single: Path) -> None:
    first, *_, last = runs.metrics(single)
    assert first["loss_dpo"] == pytest.approx(np.log(2), abs=1e-4)
    assert abs(first["margin"]) < 1e-3
    assert abs(last["margin"]) > 1e-3


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run(single: Path, pairs_file: Path, tmp_path: Path) -> None:
    for part in ("checkpoints/step-00000004", "reference"):
        shutil.copytree(single / part, tmp_path / "run" / part)
    done = train(pairs_file, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    keys = ("step", "loss", "grad_norm", "margin")
    after = [{key: line[key] for key in keys} for line in runs.metrics(tmp_path / "run")]
    assert after == [{key: line[key] for key in keys} for line in runs.metrics(single)[4:]]


@pytest.mark.slow
def test_a_cache_of_another_checkpoint_or_other_pairs_is_refused(
    single: Path, base: Path, pairs_file: Path, tiny_data: Path, tmp_path: Path
) -> None:
    cache = ["--dpo.reference_cache", str(single / "reference"), *STEPS]
    other = tmp_path / "other-base"
    shutil.copytree(base, other)
    (step,) = (other / "checkpoints").glob("step-*")
    record = json.loads((step / "COMMIT").read_text())
    (step / "COMMIT").write_text(json.dumps({**record, "step": 7}))
    done = train(pairs_file, tmp_path / "a", *cache, "--dpo.reference", str(other))
    assert done.returncode == 2
    assert "another reference" in done.stderr
    assert "checkpoint " in done.stderr
    done = train(
        pairs_file,
        tmp_path / "b",
        *cache,
        "--data.sources",
        json.dumps({"pairs": {"path": str(tiny_data / "held-out-pairs")}}),
        "--data.validation",
        "{}",
    )
    assert done.returncode == 2
    assert "(pairs " in done.stderr
    # A damaged reference is neither asked nor taken for the one that was.
    weights = step / "__0_0.distcp"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    for mode, folder in (("cached", tmp_path / "asked"), ("cached", single / "reference"), ("online", None)):
        more = ["--dpo.reference_mode", mode]
        more += ["--dpo.reference_cache", str(folder)] if folder else []
        done = train(pairs_file, tmp_path / "d", *more, "--dpo.reference", str(step))
        assert done.returncode == 2
        assert f"{weights}: CRC-32C" in done.stderr
    damaged = tmp_path / "damaged"
    shutil.copytree(single / "reference", damaged)
    (damaged / "pairs.npz").write_bytes((damaged / "pairs.npz").read_bytes()[:1000])
    done = train(pairs_file, tmp_path / "c", "--dpo.reference_cache", str(damaged))
    assert done.returncode == 2
    assert "delete it" in done.stderr


@pytest.mark.slow
def test_what_is_no_pair_is_refused_by_name(pairs_file: Path, tiny_data: Path, tmp_path: Path) -> None:
    done = train(
        pairs_file,
        tmp_path / "run",
        "--data.sources",
        json.dumps({"stills": {"path": str(tiny_data / "stills")}}),
        "--dpo.reference_mode",
        "online",
    )
    assert done.returncode == 2
    assert "source 'stills', document" in done.stderr
    assert "not a preference pair" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dpo.beta", "0"], "dpo.beta=0"),
        (["--dpo.label_smoothing", "0.5"], "dpo.label_smoothing=0.5"),
        (["--dpo.counted", "[]"], "dpo.counted is empty"),
        (["--dpo.counted", "[codes]"], "codes"),
        (["--dpo.cross_entropy_weight", "-1"], "dpo.cross_entropy_weight=-1"),
        (["--checkpoint.load", "null"], "no reference"),
        (["--data.template.caption_dropout", "0.1"], "neither dropped nor moved"),
        (["--loss.z_loss", "0.1"], "z_loss"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_configuration_that_cannot_work_is_one_line(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    from emu3_megatron.errors import UserError
    from emu3_megatron.posttraining.preferences.config import PreferenceTrainingConfig
    from emu3_megatron.training.command_line import parse_as

    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(configuration(tmp_path / "data", tmp_path / "base")))
    assert parse_as(PreferenceTrainingConfig, ["--config", str(path)]).config.dpo.beta == 0.2
    with pytest.raises(UserError, match=r".*") as caught:
        parse_as(PreferenceTrainingConfig, ["--config", str(path), *arguments])
    assert message in str(caught.value)

"""Runs of a small model, alone or many layouts in one launch.

As a program, under torchrun: ``runs.py JOBS.json`` with ``{"jobs": [[argument, ...], ...], "save": bool,
"program": module}``;
every job is one run with its own layout, one after another in the same processes (starting them is what takes
long). Without ``save`` they write no checkpoints.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import programs

TRAINING, PREFERENCES = "emu3_megatron.training", "emu3_megatron.posttraining.preferences"
STEPS = 20
GLOBAL_BATCH = 4

MODEL = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "max_position_embeddings": 256,
    "embedding_dropout": 0.0,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}


def configuration(data: Path) -> dict[str, Any]:
    """The run that all tests vary: every document is aligned for context parallelism of up to 4."""
    return {
        "run": "overridden",
        "platform": "cpu",
        "seed": 5,
        "model": MODEL,
        "data": {
            "sources": {
                "stills": {"path": str(data / "stills"), "weight": 2.0},
                "clips": {"path": str(data / "clips")},
                "texts": {"path": str(data / "texts"), "weight": 0.5},
            },
            "context_length": 256,
            "alignment": 8,
            "num_workers": 0,
        },
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 5, "clip_grad": 1.0},
        "trainer": {"steps": STEPS, "global_batch_size": GLOBAL_BATCH, "precision": "fp32"},
        "checkpoint": {"interval": 10},
        "logging": {"tensorboard": False, "progress": False},
    }


def write_configuration(folder: Path, data: Path) -> Path:
    """The configuration as a file; JSON is YAML."""
    path = folder / "config.yaml"
    path.write_text(json.dumps(configuration(data)))
    return path


def command(
    config: Path, run: Path, *arguments: str, processes: int = 1, program: str = TRAINING
) -> list[str]:
    """The real command line, under torchrun where there is more than one process."""
    start = [sys.executable, "-m"]
    if processes > 1:
        launcher = ["torch.distributed.run", "--nproc-per-node", str(processes), "--standalone", "-m"]
        start += launcher
    return [*start, program, "--config", str(config), "--run_folder", str(run), *arguments]


def train(
    config: Path,
    run: Path,
    *arguments: str,
    processes: int = 1,
    timeout: float = 300,
    program: str = TRAINING,
) -> subprocess.CompletedProcess[str]:
    """Run the real command line to its end."""
    named = ("--config", config, "--run_folder", run)
    ended = programs.shared()("-m", program, *named, *arguments, processes=processes, timeout=timeout)
    return subprocess.CompletedProcess(arguments, ended.code, ended.out, ended.err)


def launch_layouts(
    folder: Path,
    config: Path,
    layouts: dict[str, list[str]],
    *,
    processes: int,
    save: bool = True,
    timeout: float = 500,
    program: str = TRAINING,
) -> None:
    """Train every layout into ``folder/NAME``, in one launch."""
    jobs = [["--config", str(config), "--run", str(folder / name), *rest] for name, rest in layouts.items()]
    (folder / "jobs.json").write_text(json.dumps({"jobs": jobs, "save": save, "program": program}))
    ended = programs.shared()(__file__, folder / "jobs.json", processes=processes, timeout=timeout)
    if ended.code:
        raise RuntimeError(ended.err[-4000:])


def metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def largest_difference(
    lines: list[dict[str, Any]], reference: list[dict[str, Any]], key: str = "loss"
) -> float:
    """Largest relative difference of `key` over equal steps."""
    by_step = {line["step"]: line[key] for line in reference}
    return max(abs(line[key] - by_step[line["step"]]) / abs(by_step[line["step"]]) for line in lines)


def _main() -> None:
    from megatron.core import parallel_state

    from emu3_megatron.parallel import platform
    from emu3_megatron.parallel.groups import destroy_parallel, initialize_parallel
    from emu3_megatron.posttraining.preferences.__main__ import Objectives, open_data
    from emu3_megatron.posttraining.preferences.config import PreferenceTrainingConfig
    from emu3_megatron.training import __main__ as training
    from emu3_megatron.training import command_line, log
    from emu3_megatron.training.config import TrainingConfig
    from emu3_megatron.training.objective import NextToken
    from emu3_megatron.training.trainer import Trainer

    class Unsaved(Trainer):
        def begin_save(self) -> None:
            pass

        def finish_save(self) -> Path:
            return Path(self.config.run)

    log.set_up()
    asked = json.loads(Path(sys.argv[1]).read_text())
    kind, objective, opener = {
        TRAINING: (TrainingConfig, NextToken.make, training.open_data),
        PREFERENCES: (PreferenceTrainingConfig, None, open_data),
    }[asked["program"]]
    for arguments in asked["jobs"]:
        config = command_line.parse_as(kind, arguments).config
        machine = platform.install(config.platform)
        initialize_parallel(config.parallel, machine, config.seed)
        Path(config.run).mkdir(parents=True, exist_ok=True)
        (Trainer if asked["save"] else Unsaved)(
            config, machine, opener(config, machine), objective or Objectives()
        ).fit()
        parallel_state.destroy_model_parallel()
    destroy_parallel()


if __name__ == "__main__":
    from emu3_megatron.parallel import platform as _platform

    _platform.install("cpu")  # before anything imports megatron-core
    _main()

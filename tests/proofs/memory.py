"""The memory proof: what `tools/estimate.py` predicts against what runs need.

``make prove NAME=memory``: two steps of a model with a wide vocabulary under six layouts on the CPU,
and with dropout in attention. The peak
of the fullest rank above its memory after imports is within 15% of the prediction. Exit code 0 only if all
are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests import programs
from tests.training import layouts, runs

TOLERANCE = 0.15
WINDOW = 1024
DOCUMENT = 300
"""Tokens of a document, BOS and EOS apart."""
LAYOUTS: dict[str, tuple[int, dict[str, object], list[str]]] = {
    "one process": (1, {}, []),
    "full recomputation": (1, {}, ["--model.recompute", "full"]),
    "TP2 SP": (2, {"tp": 2, "sp": "true"}, []),
    "PP2": (2, {"pp": 2}, []),
    "CP2": (2, {"cp": 2}, []),
    "DP2": (2, {}, []),
    "attention dropout": (1, {}, ["--model.attention_dropout", "0.1"]),
    "attention dropout, selective": (
        1,
        {},
        ["--model.attention_dropout", "0.1", "--model.recompute", "selective"],
    ),
    "attention dropout, TP2 SP": (2, {"tp": 2, "sp": "true"}, ["--model.attention_dropout", "0.1"]),
}
"""Processes, layout, further arguments."""


def write_data(folder: Path) -> None:
    """A dataset with 32,512 text ids: random text, as long as windows need."""
    import numpy as np

    from emu3_megatron.data import ShardWriter, write_manifest
    from emu3_megatron.vocabulary import Vocabulary

    vocabulary = Vocabulary.build("wide", text_size=32_000, codebook_size=512)
    rng = np.random.default_rng(0)
    with ShardWriter(folder, "wide", vocabulary=vocabulary) as writer:
        for number in range(64):
            writer.add_document([(rng.integers(0, 32_000, DOCUMENT), 0)], f"{number}")
    write_manifest(
        folder,
        "wide",
        1,
        vocabulary=vocabulary,
        dialect_name="emu3",
        dialect_fingerprint="none",
        text_tokenizer_fingerprint="none",
        vision_tokenizer_fingerprint="none",
        provenance={"maker": "tests/proofs/memory.py"},
    )


def configuration(data: Path) -> dict[str, object]:
    """The run that all layouts vary."""
    fields = runs.configuration(data)
    fields["model"] = {
        **runs.MODEL,
        "num_layers": 4,
        "hidden_size": 256,
        "ffn_hidden_size": 1024,
        "max_position_embeddings": WINDOW,
    }
    fields["data"] = {
        "sources": {"wide": {"path": str(data)}},
        "context_length": WINDOW,
        "alignment": 4,
        "num_workers": 0,
    }
    fields["trainer"] = {"steps": 2, "global_batch_size": 4, "precision": "fp32"}
    fields["optimizer"]["warmup_steps"] = 1
    return fields


def status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def work(arguments: list[str], answer: Path) -> None:
    """On every rank: train, and write the peak above the memory after imports, with the prediction."""
    from emu3_megatron.parallel import platform

    machine = platform.install("cpu")
    import torch

    from emu3_megatron.parallel.groups import destroy_parallel, initialize_parallel
    from emu3_megatron.training import command_line
    from emu3_megatron.training.data import TrainingData
    from emu3_megatron.training.estimate import rank_memory
    from emu3_megatron.training.trainer import Trainer

    class Unsaved(Trainer):
        def begin_save(self) -> None:
            pass

        def finish_save(self) -> Path:
            return Path(self.config.run)

    # What the trainer imports late belongs to the imports.
    import megatron.core.dist_checkpointing
    import megatron.core.distributed
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel  # noqa: F401

    import emu3_megatron.model.build  # noqa: F401

    config = command_line.parse(arguments).config
    initialize_parallel(config.parallel, machine, config.seed)
    data = TrainingData.open(config)
    Path(config.run).mkdir(parents=True, exist_ok=True)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    Unsaved(config, machine, data).fit()
    peak = status("VmHWM") - before
    peaks: list[int] = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(peaks, peak)
    if torch.distributed.get_rank() == 0:
        ranks = config.parallel.data_parallel_size(len(peaks))
        memory = rank_memory(config, ranks, data.vocabulary.padded_size, DOCUMENT + 2)
        parts = {**vars(memory), "total": memory.total}
        answer.write_text(json.dumps({"peaks": peaks, "predicted": parts}))
    destroy_parallel()


def measure(folder: Path, config: Path, name: str) -> dict[str, object]:
    """Run one layout in processes of its own."""
    processes, layout, further = LAYOUTS[name]
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    start = [sys.executable, "-W", "ignore"]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    options = layouts.options(layout, distributed_optimizer=True)
    command = [*start, __file__, "--answer", str(answer), "--config", str(config)]
    done = subprocess.run(
        [*command, "--run_folder", str(folder / name), *options, *further],
        env=programs.environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return dict(json.loads(answer.read_text()))


def main() -> int:
    """Measure all layouts, print the verdict, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    known, rest = parser.parse_known_args()
    if known.answer:
        work(rest, known.answer)
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder / "wide")
        config = folder / "config.yaml"
        config.write_text(json.dumps(configuration(folder / "wide")))
        for name in known.only:
            found = measure(folder, config, name)
            predicted: dict[str, float] = found["predicted"]  # type: ignore[assignment]
            peak = max(found["peaks"])  # type: ignore[call-overload]
            error = predicted["total"] / peak - 1
            failed += abs(error) > TOLERANCE
            mark = "FAIL" if abs(error) > TOLERANCE else "pass"
            parts = ", ".join(f"{key} {value / 2**20:.0f}" for key, value in predicted.items())
            print(
                f"{mark} {name:28s} measured {peak / 2**20:6.0f} MiB, predicted {error:+.0%} ({parts})",
                flush=True,
            )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

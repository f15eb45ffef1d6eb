"""The example scripts under a real SLURM of two nodes."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from emu3_megatron.media import write_png
from tests.slurm.cluster import wait_until
from tests.slurm.conftest import Workplace
from tests.tokenization.conftest import Tokenizers
from tests.training import runs

STEPS = 40
"""Enough that a run is still going when it is disturbed."""

SIGNAL_SECONDS = 240
SAME = 1e-4
"""Largest relative difference of a loss between one process and two, in fp32, at any step."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SLOWLY = """\
import os, runpy, sys, time
from emu3_megatron.training.callbacks.stop import StopOnSignal

if not int(os.environ.get("SLURM_RESTART_COUNT", "0")):
    at_once = StopOnSignal.on_step
    def later(*arguments):
        time.sleep(6)
        at_once(*arguments)
    StopOnSignal.on_step = later
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
"""In the place of the interpreter, for ``-m MODULE ...``: steps take six seconds before the first requeue,
so that the signal, which may take a hundred, finds a run that is going."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, config_file: Path) -> Path:
    """The undisturbed run of one process, without SLURM."""
    run = tmp_path_factory.mktemp("reference") / "run"
    done = runs.train(config_file, run, "--trainer.steps", str(STEPS), timeout=1500)
    assert done.returncode == 0, done.stderr
    return run


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def check_curve(run: Path, reference: Path) -> None:
    lines = runs.metrics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["windows"] for line in lines] == [runs.GLOBAL_BATCH * line["step"] for line in lines]
    assert runs.largest_difference(lines, runs.metrics(reference)) <= SAME


def test_two_nodes_train_as_one_process(workplace: Workplace, reference: Path) -> None:
    number = workplace.submit("stage1", arguments=("--run_folder", "run", "--trainer.steps", str(STEPS)))
    state = workplace.cluster.wait_for(number)
    assert state == "COMPLETED", workplace.explain("stage1", number)
    assert "2 processes on n[1-2]" in workplace.log("stage1", number)
    check_curve(workplace.folder / "run", reference)


def test_the_signal_before_the_time_limit_saves_requeues_and_keeps_the_curve(
    workplace: Workplace, reference: Path
) -> None:
    run = workplace.folder / "run"
    interpreter = program(workplace, "slowly", SLOWLY)
    workplace.add(f"PYTHON={interpreter}\nSIGNAL_SECONDS={SIGNAL_SECONDS}")
    options = ("--run_folder", "run", "--trainer.steps", str(STEPS), "--checkpoint.interval", "1000")
    number = workplace.submit("stage1", arguments=options)
    wait_until(lambda: steps_done(run) >= 3, 1000, "three steps are done", workplace.cluster.log_tails)
    # Bring the limit so near that SLURM sends the signal by itself, when it looks next: every 30 seconds.
    elapsed = workplace.cluster.job(number)["RunTime"]
    hours, minutes, _ = elapsed.rpartition("-")[2].split(":")
    set_limit(workplace, number, 60 * int(hours) + int(minutes) + SIGNAL_SECONDS // 60)
    wait_until(
        lambda: restarts(workplace, number) > 0, 600, "the job is requeued", workplace.cluster.log_tails
    )
    set_limit(workplace, number, 60)
    assert "requeued: the time limit is near, the state is saved" in workplace.log("stage1", number)
    saved = list((run / "checkpoints").glob("*/COMMIT"))
    assert len(saved) == 1
    stopped_at = json.loads((saved[0].parent / "emu3.json").read_text())["progress"]["step"]
    assert 3 <= stopped_at < STEPS

    state = workplace.cluster.wait_for(number)
    assert state == "COMPLETED", workplace.explain("stage1", number)
    assert f"step-{stopped_at:08d}: step {stopped_at}" in workplace.explain("stage1", number)
    check_curve(run, reference)


def program(workplace: Workplace, name: str, text: str) -> Path:
    """An executable for the tests' interpreter."""
    path = workplace.folder / name
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return path


def set_limit(workplace: Workplace, number: str, minutes: int) -> None:
    workplace.cluster.run("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}")


def restarts(workplace: Workplace, number: str) -> int:
    return int(workplace.cluster.job(number)["Restarts"])


def test_a_node_taken_away_is_survived_on_the_other(workplace: Workplace, reference: Path) -> None:
    run = workplace.folder / "run"
    options = ("--run_folder", "run", "--trainer.steps", str(STEPS), "--checkpoint.interval", "10")
    number = workplace.submit("stage1", "--nodes=1", arguments=options)
    wait_until(lambda: steps_done(run) >= 12, 1000, "twelve steps are done", workplace.cluster.log_tails)
    lost = workplace.cluster.job(number)["NodeList"]
    workplace.cluster.take_node_away(lost)
    try:
        state = workplace.cluster.wait_for(number)
        assert state == "COMPLETED", workplace.explain("stage1", number)
        assert workplace.cluster.job(number)["NodeList"] != lost
        # A busy machine takes more than ten steps before the node is missed: any checkpoint will do.
        assert re.search(r"resumed .*step-000000[123]0: step [123]0", workplace.explain("stage1", number))
        check_curve(run, reference)
    finally:
        workplace.cluster.bring_node_back(lost)


def test_the_first_failure_stands_at_the_end_of_the_log(workplace: Workplace) -> None:
    # In the place of the interpreter, so that the job starts it and not a training.
    text = (
        "import os, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    raise RuntimeError('the lamp of rank 1 went out')\n"
        "time.sleep(600)\n"
    )
    workplace.add(f"PYTHON={program(workplace, 'program', text)}\nMAX_FAILURES=0")
    number = workplace.submit("stage1")
    assert workplace.cluster.wait_for(number) == "FAILED"
    end = workplace.log("stage1", number).split("======== FAILED")[-1]
    assert "the first was rank 1 on node n2, with exit code 1" in end
    assert "the lamp of rank 1 went out" in end.splitlines()[-1]


def test_a_mistake_of_the_user_is_not_tried_again(workplace: Workplace) -> None:
    number = workplace.submit("stage1", arguments=("--run_folder", "run", "--trainer.steps", "none"))
    assert workplace.cluster.wait_for(number) == "FAILED"
    assert workplace.cluster.job(number)["Restarts"] == "0"
    assert "error: " in workplace.log("stage1", number).split("======== FAILED")[-1]
    assert workplace.log("stage1", number).count("trainer.steps") == 1


def test_an_array_of_workers_writes_the_bytes_of_one(workplace: Workplace, tokenizers: Tokenizers) -> None:
    generator = np.random.default_rng(0)
    entries: list[dict[str, str]] = []
    for number in range(8):
        write_png(workplace.folder / f"{number}.png", generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        entries.append({"id": f"picture-{number}", "image": f"{number}.png", "caption": "a cat"})
        entries.append({"id": f"text-{number}", "text": "a cup on the sea"})
    manifest = workplace.folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    workplace.add(
        "TOKENIZE_WORKERS=2\n"
        "tokenize_options() {\n"
        f"  OPTIONS=(--manifest {manifest} --output data/$1 --name mixed --num-shards 4 --image-area 1024\n"
        f"    --text-tokenizer {tokenizers['text_tokenizer']}\n"
        f"    --vision-tokenizer {tokenizers['vision_tokenizer']})\n"
        "}"
    )
    alone = workplace.submit("tokenize", "--array=0-0", arguments=("alone",))
    assert workplace.cluster.wait_for(alone) == "COMPLETED", workplace.explain("tokenize", f"{alone}_0")
    array = workplace.submit("tokenize", arguments=("array",))
    assert workplace.cluster.wait_for(array) == "COMPLETED", workplace.explain("tokenize", f"{array}_0")
    one, many = (checksums(workplace.folder / "data" / name) for name in ("alone", "array"))
    assert "manifest.json" in one
    assert {name for name in one if name.endswith(".bin")} == {
        f"mixed-{i:05d}-of-00004.bin" for i in range(4)
    }
    assert one == many


def checksums(folder: Path) -> dict[str, str]:
    """Digests of what makes a dataset; reports say how long it took."""
    files = [path for path in folder.iterdir() if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_chain_waits_for_what_it_needs(workplace: Workplace) -> None:
    workplace.add("STAGE2_NODES=1\nSTAGE2_CONFIG=$STAGE1_CONFIG\nTIME_LIMIT=60")
    submitted = workplace.chain("stage1", "stage2")
    assert list(submitted) == ["stage1", "stage2"]
    waiting = workplace.cluster.job(submitted["stage2"])
    assert waiting["Dependency"].startswith(f"afterok:{submitted['stage1']}")
    workplace.cluster.run("scancel", *submitted.values())

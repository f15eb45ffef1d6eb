"""What a job script decides; stand-ins for SLURM's programs: `srun` runs the ranks, `scontrol` takes notes.

`tests/slurm` runs the same scripts under a real SLURM.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "examples" / "slurm"

STAND_INS = {
    # Ranks as processes beside one another; like the real one it forwards SIGUSR1 to all.
    "srun": """
ranks=1; output=/dev/stderr
while [[ $1 == --* ]]; do
  case $1 in --ntasks=*) ranks=${1#*=} ;; --output=*) output=${1#*=} ;; esac
  shift
done
children=()
trap 'kill -USR1 -- "${children[@]/#/-}"' USR1
trap 'kill -TERM -- "${children[@]/#/-}"' TERM
set -m
for ((rank = 0; rank < ranks; rank++)); do
  SLURM_PROCID=$rank SLURM_LOCALID=0 SLURMD_NODENAME=n$((rank + 1)) "$@" >"${output//%t/$rank}" 2>&1 &
  children+=($!)
done
echo "${children[@]}" >"$NOTES/ranks"
worst=0
for child in "${children[@]}"; do
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done
  wait "$child"; code=$?
  ((code <= worst)) || worst=$code
done
exit "$worst"
""",
    # A requeue ends the script that asked for it.
    "scontrol": """
case $1 in
  requeue) echo "$2" >>"$NOTES/requeued"; kill -KILL $PPID ;;
  show) echo n1; echo n2 ;;
  *) echo "NodeName=n1 NodeAddr=10.0.0.1 NodeHostName=one" ;;
esac
""",
    "sleep": """[[ $1 == 0.* ]] || exit 0; exec /bin/sleep "$1"
""",
}

SETTINGS = """\
GPUS_PER_NODE=0
MAX_FAILURES=1
WORK={folder}
LOGS=$WORK/logs
CONTAINER=
PYTHON={folder}/program
prepare_environment() {{ :; }}
STAGE1_CONFIG={folder}/config.yaml
DPO_CONFIG={folder}/config.yaml
DPO_MODULE=its.own.module
"""


@dataclass
class Job:
    """A script on two imagined nodes, and what became of it."""

    folder: Path

    def start(
        self, program: str, attempt: int = 0, script: str = "stage1", **given: str
    ) -> subprocess.Popen[str]:
        (self.folder / "program").write_text(f"#!/usr/bin/env bash\n{program}\n")
        (self.folder / "program").chmod(0o755)
        names = ("SLURM_JOB_ID=7", "SLURM_JOB_NAME=stage1", "SLURM_JOB_NODELIST=n[1-2]", "SLURM_NNODES=2")
        environment = {
            **os.environ,
            **dict(name.split("=") for name in names),
            "SLURM_RESTART_COUNT": str(attempt),
            "EMU3_ROOT": str(SCRIPTS.parents[1]),
            "EMU3_SETTINGS": str(self.folder / "settings.sh"),
            "NOTES": str(self.folder),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            **given,
        }
        return subprocess.Popen(
            ["bash", SCRIPTS / f"{script}.sbatch", "--trainer.steps", "5"],
            env=environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, program: str, attempt: int = 0, script: str = "stage1", **given: str) -> tuple[int, str]:
        process = self.start(program, attempt, script, **given)
        log, _ = process.communicate(timeout=300)
        return process.returncode, log

    @property
    def requeued(self) -> bool:
        return (self.folder / "requeued").exists()

    def rank_log(self, rank: int, attempt: int = 0) -> str:
        return (self.folder / f"logs/stage1-7/attempt-{attempt}/rank-{rank}.log").read_text()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "settings.sh").write_text(SETTINGS.format(folder=tmp_path))
    (tmp_path / "config.yaml").touch()
    return Job(tmp_path)


def test_a_job_that_ends_well_is_finished(job: Job) -> None:
    code, log = job.run('echo "$RANK of $WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT"; echo "$@"')
    assert (code, job.requeued) == (0, False)
    assert log.endswith("finished\n")
    assert job.rank_log(0).splitlines()[0] == "0 of 2 at 10.0.0.1:20007"
    assert job.rank_log(1).splitlines()[0] == "1 of 2 at 10.0.0.1:20007"
    arguments = job.rank_log(0).splitlines()[1]
    assert arguments.startswith(f"-m emu3_megatron.training --config {job.folder}/config.yaml ")
    assert arguments.endswith("--trainer.steps 5")


def test_preferences_are_trained_by_their_own_program(job: Job) -> None:
    assert job.run('echo "$@"', script="dpo")[0] == 0
    assert job.rank_log(0).startswith("-m its.own.module --config ")


def test_a_mistake_of_the_user_fails_at_once(job: Job) -> None:
    code, log = job.run('((RANK == 1)) && echo "error: no such key"; exit 2')
    assert (code, job.requeued) == (2, False)
    assert "2 of 2 ranks failed; the first was rank 1 on node n2, with exit code 2" in log
    assert log.splitlines()[-1] == "error: no such key"


def test_a_crash_is_tried_again_so_often_and_no_oftener(job: Job) -> None:
    program = "((RANK == 0)) || { echo 'RuntimeError: gone'; exit 1; }"
    _, log = job.run(program)
    assert job.requeued
    assert "RuntimeError: gone" in log
    (job.folder / "requeued").unlink()
    code, log = job.run(program, attempt=1)
    assert (code, job.requeued) == (1, False)
    assert log.splitlines()[-1] == "RuntimeError: gone"


def test_a_step_that_was_never_created_is_tried_again(job: Job) -> None:
    """No rank leaves a log: its node was lost before the start."""
    srun = job.folder / "bin/srun"
    srun.write_text(srun.read_text().replace("ranks=1", "[[ -e $NOTES/checked ]] && exit 1\nranks=1", 1))
    # The check of the nodes is the first step.
    srun.write_text(srun.read_text().replace('exit "$worst"', 'touch "$NOTES/checked"; exit "$worst"'))
    _, log = job.run("true")
    assert "no rank left a record" in log
    assert job.requeued


UNTIL_TOLD = """
trap 'echo saved; exit 0' USR1 TERM
touch "$NOTES/started-$RANK"
for ((i = 0; i < 3000; i++)); do sleep 0.1; done
exit 1
"""


def wait_for_ranks(job: Job) -> None:
    deadline = time.monotonic() + 200
    while len(list(job.folder.glob("started-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_signal_before_the_time_limit_requeues(job: Job) -> None:
    process = job.start(UNTIL_TOLD)
    wait_for_ranks(job)
    process.send_signal(signal.SIGUSR1)
    log, _ = process.communicate(timeout=200)
    assert job.requeued
    assert "requeued: the time limit is near" in log
    assert job.rank_log(0).endswith("saved\n")
    assert job.rank_log(1).endswith("saved\n")


UNTIL_ENDED = """
[[ -z $FINISHES ]] || { mkdir -p "$NOTES/out"; echo picture >"$NOTES/out/1.png"; }
echo unfinished >"$NOTES/out/.2.png.tmp"
touch "$NOTES/started-$RANK"
for ((i = 0; i < 3000; i++)); do sleep 0.1; done
"""
"""Knows no signals, as most programs."""


def told(job: Job, program: str, attempt: int = 0, **given: str) -> tuple[int, str]:
    """How a job ends that is told of its time limit, and its log."""
    (job.folder / "out").mkdir(exist_ok=True)
    settings = job.folder / "settings.sh"
    lines = "GENERATE_WORKERS=8 GENERATE_PROMPTS=prompts.txt GENERATE_OUTPUT=out GENERATE_OPTIONS=(image)\n"
    settings.write_text(settings.read_text() + lines)
    process = job.start(program, attempt, "generate", SLURM_ARRAY_TASK_ID="3", **given)
    wait_for_ranks(job)
    process.send_signal(signal.SIGUSR1)
    log, _ = process.communicate(timeout=200)
    return process.returncode, log


def test_what_a_program_had_finished_by_its_time_limit_is_kept(job: Job) -> None:
    """However often: it is no failure."""
    for attempt in range(3):
        _, log = told(job, UNTIL_ENDED, attempt, FINISHES="yes")
        assert "requeued: the time limit is near, what is finished is kept" in log
        assert "saved" not in log
        assert job.requeued
        for path in (job.folder / "requeued", *job.folder.glob("started-*"), *job.folder.glob("out/*")):
            path.unlink()


def test_a_program_that_finishes_nothing_by_its_time_limit_is_not_started_for_ever(job: Job) -> None:
    _, log = told(job, UNTIL_ENDED, FINISHES="")
    assert "requeued: failure 1, at most 1 are started again" in log
    assert job.requeued
    for path in (job.folder / "requeued", *job.folder.glob("started-*")):
        path.unlink()
    code, log = told(job, UNTIL_ENDED, 1, FINISHES="")
    assert (code != 0, job.requeued) == (True, False)
    assert "FAILED: attempt 1" in log


def test_a_mistake_of_the_user_is_not_started_again_by_the_time_limit(job: Job) -> None:
    mistaken = "trap 'echo error: no such key; exit 2' USR1" + UNTIL_ENDED
    code, log = told(job, mistaken, FINISHES="yes")
    assert (code, job.requeued) == (2, False)
    assert log.splitlines()[-1] == "error: no such key"


@pytest.mark.parametrize(
    ("script", "prefix"),
    [("generate", "GENERATE"), ("tokenize", "TOKENIZE"), ("curate", "CURATE"), ("candidates", "CANDIDATES")],
)
def test_a_task_that_is_tried_again_has_the_share_that_it_had(job: Job, script: str, prefix: str) -> None:
    """A submission of two tasks alone is told of two (SLURM_ARRAY_TASK_COUNT)."""
    settings = job.folder / "settings.sh"
    lines = f"{prefix}_WORKERS=8 {prefix}_OPTIONS=(x) GENERATE_PROMPTS=p GENERATE_OUTPUT=out CANDIDATES=out\n"
    settings.write_text(settings.read_text() + lines + "tokenize_options() { OPTIONS=(x); }\n")
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "2"}
    for number, given in ((8, {}), (16, {"EMU3_WORKERS": "16"})):
        code, log = job.run('echo "$@"', script=script, **array, **given)
        assert code == 0, log
        said = (job.folder / "logs/stage1-7_3/attempt-0/rank-0.log").read_text().replace("_", "-")
        assert f"--worker 3 --num-workers {number}" in said


def clone(folder: Path, package: str) -> Path:
    """A checkout whose package is another one."""
    (folder / "clone").mkdir()
    for name in ("examples", "tools"):
        (folder / "clone" / name).symlink_to(SCRIPTS.parents[1] / name)
    write_package(folder / "clone", package)
    return folder / "clone"


def write_package(folder: Path, program: str) -> None:
    path = folder / "emu3_megatron" / "samples" / "rehearsal.py"
    path.parent.mkdir(parents=True)
    for package in (path.parent, path.parent.parent):
        (package / "__init__.py").touch()
    path.write_text(program)


PYTHON = f'exec "{sys.executable}" "$@"'


def test_a_package_that_is_not_built_is_one_line_and_not_tried_again(job: Job) -> None:
    """Of a clone that comes first on the path and was never built, or was built for another Python."""
    root = clone(job.folder, "from emu3_megatron import _kernels")
    # Without site-packages: an editable installation here would lend its kernels to the clone.
    code, log = job.run(f'exec "{sys.executable}" -S "$@"', script="rehearsal", EMU3_ROOT=str(root))
    assert (code, job.requeued) == (2, False), log
    assert f"error: {root}/emu3_megatron is not built for this Python: run 'make env'" in log.splitlines()[-1]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="older ones always look into the working folder first")
def test_a_container_has_its_own_package_even_where_the_clone_is_the_working_folder(job: Job) -> None:
    root = clone(job.folder, "from emu3_megatron import _kernels")
    write_package(job.folder / "image", "print('of the image')")
    settings = job.folder / "settings.sh"
    settings.write_text(f"{settings.read_text()}CONTAINER=x CONTAINER_MOUNTS=y WORK={root}\ncd $WORK\n")
    given = {"EMU3_ROOT": str(root), "PYTHONPATH": str(job.folder / "image")}
    code, log = job.run(PYTHON, script="rehearsal", **given)
    assert code == 0, log
    rank = next(root.glob("logs/*/attempt-0/rank-0.log"), None) or next(job.folder.rglob("rank-0.log"))
    assert rank.read_text() == "of the image\n"


def test_a_cancelled_job_does_not_pass_for_a_finished_one(job: Job) -> None:
    process = job.start(UNTIL_TOLD)
    wait_for_ranks(job)
    for rank in (job.folder / "ranks").read_text().split():
        os.killpg(int(rank), signal.SIGTERM)
    log, _ = process.communicate(timeout=200)
    assert (process.returncode, job.requeued) == (1, False)
    assert "stopped by SIGTERM" in log
    assert "finished" not in log


def test_an_unfit_node_stops_the_job_before_it_starts(job: Job) -> None:
    settings = job.folder / "settings.sh"
    settings.write_text(settings.read_text() + "GPUS_PER_NODE=8\n")
    (job.folder / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho 'no devices were found'\nexit 9\n")
    (job.folder / "bin" / "nvidia-smi").chmod(0o755)
    code, log = job.run("echo never")
    assert code == 1
    assert not job.requeued
    assert "node n2 is not fit: nvidia-smi: no devices were found" in log
    assert not list(job.folder.glob("logs/*/*/rank-*.log"))

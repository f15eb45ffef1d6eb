"""What can be said of the scripts without a cluster."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "slurm"
PROGRAMS = Path(sys.executable).parent
TOPS = (".ci", "benchmarks", "csrc", "docker", "emu3_megatron", "examples", "tests", "tools")
JOBS = sorted(SCRIPTS.glob("*.sbatch"))


def is_shell(path: Path) -> bool:
    """By its name or its first line."""
    if path.suffix in (".sh", ".sbatch"):
        return True
    if path.suffix or not path.is_file():
        return False
    return re.match(rb"#!.*\b(ba)?sh\n", path.read_bytes()[:100]) is not None


def test_shellcheck_finds_nothing() -> None:
    paths = (path for top in TOPS for path in sorted((ROOT / top).rglob("*")))
    files = [str(path.relative_to(ROOT)) for path in paths if is_shell(path)]
    assert {".ci/run", "examples/slurm/lib.sh", "examples/slurm/stage1.sbatch"} <= set(files)
    done = subprocess.run(
        [PROGRAMS / "shellcheck", "--external-sources", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_hadolint_finds_nothing() -> None:
    files = sorted((ROOT / "docker").glob("*.Dockerfile"))
    assert len(files) == 2
    done = subprocess.run([PROGRAMS / "hadolint", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_every_job_names_itself_requeues_and_keeps_its_log(job: Path) -> None:
    options = re.findall(r"^#SBATCH (\S+)$", job.read_text(), re.MULTILINE)
    assert options == [f"--job-name={job.stem}", "--requeue", "--open-mode=append"]


def test_the_settings_have_what_every_job_reads() -> None:
    settings = (SCRIPTS / "settings.sh").read_text()
    used = {
        name
        for job in JOBS
        for name in re.findall(r"\$\{?([A-Z][A-Z0-9]+_[A-Z]+)", job.read_text())
        if not name.startswith(("SLURM_", "EMU3_", "JOB_"))
    }
    assert used
    for name in used:
        assert re.search(rf"^{name}=", settings, re.MULTILINE), name


def submit(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`submit.sh` with a program in the place of sbatch that prints how it was called."""
    program = folder / "sbatch"
    program.write_text('#!/bin/sh\nprintf \'%s\\n\' "$@" "EMU3_WORKERS=${EMU3_WORKERS-none}"\n')
    program.chmod(0o755)
    return subprocess.run(
        [SCRIPTS / "submit.sh", *arguments],
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "EMU3_WORK": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_options_of_sbatch_and_arguments_of_the_job_are_told_apart(tmp_path: Path) -> None:
    done = submit("stage1", "--nodes=2", "--", "--trainer.steps", "5", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    given = done.stdout.splitlines()
    script = given.index(str(SCRIPTS / "stage1.sbatch"))
    assert given[script + 1 : -1] == ["--trainer.steps", "5"]
    # Later options win in sbatch, so the user's stand after those of the settings.
    assert given.index("--nodes=8") < given.index("--nodes=2") < script
    assert "--signal=B:USR1@600" in given
    assert "--partition=gpu" in given
    assert not [option for option in given if option.startswith("--account")]


def test_an_unknown_job_is_one_line(tmp_path: Path) -> None:
    done = submit("stage9", folder=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: 'stage9' is not a job; the jobs are: candidates convert curate dpo")


@pytest.mark.parametrize(
    ("options", "workers"),
    [
        ([], 8),
        (["--array=3,7"], 8),
        (["--array", "5"], 8),
        (["-a0"], 8),
        (["--array=0-6:2"], 8),
        (["--array=0-15"], 16),
        (["--array", "0-15%4"], 16),
    ],
)
def test_a_range_from_0_is_another_number_of_workers_and_a_list_is_some_of_them(
    tmp_path: Path, options: list[str], workers: int
) -> None:
    done = submit("generate", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"EMU3_WORKERS={workers}"
    assert submit("plan", folder=tmp_path).stdout.splitlines()[-1] == "EMU3_WORKERS=none"


@pytest.mark.parametrize(("job", "gpus"), [("score", 1), ("plan", 0), ("pairs", 0), ("stage1", 8)])
def test_a_reward_model_has_a_gpu_and_what_computes_nothing_has_none(
    tmp_path: Path, job: str, gpus: int
) -> None:
    asked = [line for line in submit(job, folder=tmp_path).stdout.splitlines() if "--gpus" in line]
    assert asked == ([f"--gpus-per-node={gpus}"] if gpus else [])


AS_A_SUBMIT_HOST = {
    "sbatch": """
printf '%s ' "${@##*/}" >>"$NOTES"; echo >>"$NOTES"
for word in "$@"; do case $word in
  --chdir=*) work=${word#*=} ;;
  --job-name=rehearsal-*)
    logs=$work/logs/${word#*=}-5/attempt-0
    mkdir -p "$logs"
    echo ok >"$logs/rank-0.log"
    ;;
esac; done
echo 5
""",
    "squeue": "",
}


def test_a_rehearsal_needs_no_software_where_it_is_submitted(tmp_path: Path) -> None:
    """The interpreter of the settings is that of an image."""
    for name, body in AS_A_SUBMIT_HOST.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (tmp_path / name).chmod(0o755)
    cluster = tmp_path / "settings.sh"
    cluster.write_text(f"source {SCRIPTS}/settings.sh\nCONTAINER=x.sqsh PYTHON=only-in-the-image\n")
    notes = {"NOTES": str(tmp_path / "notes"), "EMU3_CLUSTER": str(cluster)}
    done = subprocess.run(
        [SCRIPTS / "rehearsal.sh", tmp_path / "work", "--scale", "small"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **notes},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "notes").read_text().splitlines()
    assert calls[0].endswith("rehearsal.sbatch prepare work --ranks 16 --scale small ")
    assert calls[-1].endswith("rehearsal.sbatch judge work ")
    assert {"--wait", "--nodes=1", "--partition=gpu"} <= set(calls[0].split())
    asked = {word for call in calls for word in call.split() if word.endswith(".sbatch")}
    assert asked == {path.name for path in JOBS}


def check_node(gpus: int, shared: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPTS / "check_node.sh", str(gpus), shared],
        env={**os.environ, "SLURMD_NODENAME": "n7", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def nvidia_smi(folder: Path, listed: str, errors: str = "0, 0", busy: str = "") -> str:
    """A PATH with a stand-in for nvidia-smi."""
    program = folder / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        f"case $1 in *uuid*) printf '{listed}' ;; *ecc*) printf '{errors}\\n' ;;"
        f" *apps*) printf '{busy}' ;; esac\n"
    )
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_a_sound_node_passes(tmp_path: Path) -> None:
    assert check_node(0, tmp_path).returncode == 0
    done = check_node(2, tmp_path, PATH=nvidia_smi(tmp_path, "GPU-a\\nGPU-b\\n"))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("smi", "fault"),
    [
        ({"listed": "GPU-a\\n"}, "1 of 2 GPUs answer"),
        ({"listed": "GPU-a\\nGPU-b\\n", "errors": "1, 3"}, "uncorrected memory errors (GPU 1: 3)"),
        ({"listed": "GPU-a\\nGPU-b\\n", "busy": "77, python\\n"}, "in use by another process (77, python)"),
    ],
)
def test_a_faulty_gpu_is_named_with_its_node(tmp_path: Path, smi: dict[str, str], fault: str) -> None:
    done = check_node(2, tmp_path, PATH=nvidia_smi(tmp_path, **smi))
    assert done.returncode == 1
    assert done.stderr.startswith("node n7 is not fit: ")
    assert fault in done.stderr


def test_a_missing_shared_folder_is_a_fault(tmp_path: Path) -> None:
    done = check_node(0, tmp_path / "missing")
    assert done.returncode == 1
    assert "mount the shared file system" in done.stderr

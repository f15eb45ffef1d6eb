"""What `.ci/run` does before the tests, with stand-ins for the programs that it starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRIVEN = ("slurmctld", "slurmd", "sbatch", "munged", "chromium")
NOBODY = 65534
STARTED = ("apt-get", "make", "python3.11")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="installing needs root")


def run(
    folder: Path, *present: str, user: int | None = None, browser: str = "true"
) -> subprocess.CompletedProcess[str]:
    """`.ci/run` on a machine that has the programs `present`, and only those.

    Args:
        folder: where they are made.
        present: their names.
        user: who runs it.
        browser: what chromium does, which apt-get installs.
    """
    shell = shutil.which("bash")
    commands = dict.fromkeys((*STARTED, *present), "env | grep ^EMU3_REQUIRE; true")
    chromium = folder / "chromium"
    commands["apt-get"] = (
        f"printf '#!%s\\n%s\\n' {shell} {browser} >{chromium}; {shutil.which('chmod')} +x {chromium}"
    )
    commands.update({name: browser for name in present if name == "chromium"})
    for name, command in commands.items():
        (folder / name).write_text(f'#!{shell}\necho "{name} $*"\n{command}\n')
        (folder / name).chmod(0o755)
    for name in ("dirname", "env", "grep"):
        (folder / name).symlink_to(str(shutil.which(name)))
    # Its own addition to PATH would find what this machine has.
    script = (ROOT / ".ci" / "run").read_text()
    assert script.count("PATH=$PATH:/usr/sbin:/sbin") == 1
    (folder / ".ci").mkdir()
    (folder / ".ci" / "run").write_text(script.replace("PATH=$PATH:/usr/sbin:/sbin", "PATH=$PATH"))
    return subprocess.run(
        [str(shutil.which("bash")), folder / ".ci" / "run"],
        env={"PATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        user=user,
    )


def test_nothing_is_installed_where_all_is_there(tmp_path: Path) -> None:
    done = run(tmp_path, *DRIVEN)
    assert done.returncode == 0, done.stderr
    assert "apt-get" not in done.stdout
    assert "make PYTHON=python3.11 test\n" in done.stdout
    # What the tests would otherwise skip fails.
    last = done.stdout.partition("make PYTHON=python3.11 test\n")[2].split()
    assert set(last) == {"EMU3_REQUIRE_SLURM=1", "EMU3_REQUIRE_CHROMIUM=1"}


@needs_root
@pytest.mark.parametrize(
    ("missing", "packages"), [("sbatch", "slurm-wlm"), ("munged", "munge"), ("chromium", "chromium")]
)
def test_what_is_missing_is_installed_first(tmp_path: Path, missing: str, packages: str) -> None:
    done = run(tmp_path, *(name for name in DRIVEN if name != missing))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("EMU3_")]
    assert lines[0] == "apt-get update --quiet"
    assert lines[1] == f"apt-get install --quiet --yes --no-install-recommends {packages}"


def test_who_may_not_install_is_told_what_to_install() -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)  # for another user to read
        done = run(Path(name), user=None if os.geteuid() else NOBODY)
    assert done.returncode == 2
    assert done.stderr.startswith("error: missing slurm-wlm munge chromium; install them: sudo apt-get")


def test_any_browser_that_the_tests_know_is_enough(tmp_path: Path) -> None:
    done = run(tmp_path, *(name for name in DRIVEN if name != "chromium"), "google-chrome-stable")
    assert done.returncode == 0, done.stderr
    assert "apt-get" not in done.stdout
    assert "google-chrome-stable --version\n" in done.stdout


@pytest.mark.parametrize("present", [True, pytest.param(False, marks=needs_root)])
def test_a_browser_that_does_not_start_is_said_before_the_tests(tmp_path: Path, present: bool) -> None:
    """As the package of some systems, which is a word about a snap."""
    done = run(tmp_path, *(name for name in DRIVEN if present or name != "chromium"), browser="false")
    assert done.returncode == 2
    assert "chromium does not start" in done.stderr
    assert "make" not in done.stdout

"""Make the virtual environment that every `make` target uses: torch first, then the pinned dependencies.

Needs nothing but the standard library. Safe to rerun: it does nothing when the environment already matches
pyproject.toml, constraints.txt, setup.py and csrc/.

Which torch: one that is already installed in the environment, or a CUDA build in the Python that runs this
script (NVIDIA's containers), is kept. Otherwise a machine with an NVIDIA driver gets the registry's CUDA
build and any other machine gets the CPU build, never gigabytes of CUDA packages. EMU3_TORCH=cpu or cuda
overrides.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SUPPORTED = ((3, 10), (3, 12))
ALONE = ["lpips"]
"""Installed without what they ask for: lpips is read for its weights only, and the torchvision that it asks
for breaks transformers beside a torch of another build."""
BUILD_TOOLS = ["setuptools>=68", "wheel", "pybind11"]


class SetupError(RuntimeError):
    """The environment cannot be made; the message says what to do."""


def run(*command: str | Path) -> None:
    """Run a command, echoed; raise `SetupError` when it fails."""
    text = " ".join(str(part) for part in command)
    print(f"+ {text}", flush=True)
    if subprocess.run([str(part) for part in command], cwd=ROOT).returncode:
        raise SetupError(f"this command failed (its output is above): {text}")


def output_of(*command: str | Path) -> str:
    """Standard output of a command, empty when it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else ""


def installed_torch(python: Path | str) -> str:
    """Version of the torch that `python` imports, as pip knows it, such as ``2.13.0+cpu``; empty without one.

    The registry's CUDA build calls itself ``2.13.0+cu130``, which pip holds against its own ``2.13.0``.
    """
    return output_of(python, "-c", "import torch, importlib.metadata as m; print(m.version('torch'))")


def has_cuda_torch(python: str) -> bool:
    """Whether `python` has a torch built with CUDA."""
    return output_of(python, "-c", "import torch; print(torch.version.cuda or '')") != ""


def has_nvidia_driver() -> bool:
    """Whether this machine has an NVIDIA driver."""
    return Path("/proc/driver/nvidia").exists() or Path("/dev/nvidiactl").exists()


def wanted_stamp(extras: str) -> str:
    """Hash of everything the environment is made from."""
    digest = hashlib.sha256(f"{extras} {sys.version_info[:2]}".encode())
    sources = [
        ROOT / "pyproject.toml",
        ROOT / "constraints.txt",
        ROOT / "setup.py",
        *sorted((ROOT / "csrc").glob("*")),
    ]
    for path in sources:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def pinned_torch() -> str:
    """The torch requirement of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def pulls_cuda(pip: list[str | Path], requirement: str) -> bool:
    """Whether installing `requirement` from the configured registry would bring CUDA packages."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        output_of(*pip, "install", "--dry-run", "--no-deps", "--quiet", "--report", report, requirement)
        if not report.exists():
            return True
        items = json.loads(report.read_text())["install"]
        needs = [need for item in items for need in item["metadata"].get("requires_dist", [])]
        return any(need.startswith(("nvidia-", "cuda-")) for need in needs)


def install_torch(pip: list[str | Path], python: Path) -> None:
    """Install torch unless the environment has one; see the module docstring for which."""
    version = installed_torch(python)
    if version:
        print(f"torch {version} is installed and kept", flush=True)
        return
    choice = os.environ.get("EMU3_TORCH") or ("cuda" if has_nvidia_driver() else "cpu")
    if choice not in ("cpu", "cuda"):
        raise SetupError(f"EMU3_TORCH={choice!r} is not known; set it to cpu or cuda, or leave it unset")
    requirement = pinned_torch()
    if choice == "cpu" and pulls_cuda(pip, requirement):
        run(*pip, "install", requirement, "--index-url", CPU_INDEX)
    else:
        run(*pip, "install", requirement)


def write_constraints(python: Path, folder: Path) -> Path:
    """constraints.txt with its torch line replaced by the version installed, so that pip keeps it."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    lines = [f"torch=={installed_torch(python)}" if line.startswith("torch==") else line for line in lines]
    path = folder / "constraints.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def make_environment(folder: Path, extras: str) -> None:
    """Create or complete the environment in `folder` with the optional dependency groups `extras`."""
    if not SUPPORTED[0] <= sys.version_info[:2] <= SUPPORTED[1]:
        raise SetupError(
            f"Python {sys.version_info[0]}.{sys.version_info[1]} runs this script, but 3.10 to 3.12 is "
            "needed; name one with: make PYTHON=python3.11 ..."
        )
    stamp = folder / "emu3-environment"
    if stamp.exists() and stamp.read_text() == wanted_stamp(extras):
        return
    python = folder / "bin" / "python"
    if not python.exists():
        keep = ["--system-site-packages"] if has_cuda_torch(sys.executable) else []
        run(sys.executable, "-m", "venv", *keep, folder)
    pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "--constraint", "constraints.txt", *BUILD_TOOLS)
    install_torch(pip, python)
    with tempfile.TemporaryDirectory() as temporary:
        constraints = write_constraints(python, Path(temporary))
        run(
            *pip,
            "install",
            "--quiet",
            "--constraint",
            constraints,
            "--no-build-isolation",
            "--editable",
            f".[{extras}]",
        )
        run(*pip, "install", "--quiet", "--constraint", constraints, "--no-deps", *ALONE)
    stamp.write_text(wanted_stamp(extras))


def main() -> None:
    """Parse the command line and make the environment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".venv", help="where the environment is (default: .venv)"
    )
    parser.add_argument(
        "--extras", default="test,docs", help="optional dependency groups (default: test,docs)"
    )
    arguments = parser.parse_args()
    try:
        make_environment(arguments.folder, arguments.extras)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

"""Run a benchmark and keep what it printed; write docs/performance.md from all that was kept.

python benchmarks/record.py benchmarks/packing.py --repeats 5    # a result, and the page
python benchmarks/record.py                                      # the page alone

A result is a JSON file in benchmarks/results: program, what it measures, arguments, date, machine, versions,
and the lines of standard output. The same program with the same arguments replaces its last result.
"""

from __future__ import annotations

import ast
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
PACKAGES = ("torch", "megatron-core", "transformers", "numpy")
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
HEAD = """\
# Performance

This page is written by `benchmarks/record.py` from the results in `benchmarks/results`; figures of a guide's
own subject stand in the guide ([packing](packing.md), [vision tokenizer](vision-tokenizer.md),
[generation](inference.md)). Each section is a program, and below it what it printed, on which machine. Ratios
are of rounds that alternate in one process. To add or renew a result:

```
python benchmarks/record.py benchmarks/packing.py --repeats 5
```

On a GPU nothing is recorded yet. These need one CUDA GPU, torch and megatron-core, use Transformer Engine where
it is installed, and print lines of JSON; `--smoke` runs them on a CPU at toy sizes:

| command | what it measures |
|---|---|
| `python benchmarks/gpu/step.py` | a training step of `emu3_1_5b` in windows of 8,192 and 32,768 tokens: tokens/s, MFU, memory |
| `python benchmarks/gpu/attention.py` | attention over packed windows: time, memory, error, with and without dropout |
| `python benchmarks/gpu/generation.py` | guided images of `emu3_8b`, one and 8 at a time: tokens/s, and the share of what reading the weights once a step allows |
| `python benchmarks/gpu/parity.py` | losses in fp32 and bf16 against fp32 on the CPU |
"""  # noqa: E501


def machine() -> dict[str, Any]:
    """What the figures depend on besides the program."""
    processor = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists() and (
        found := re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
    ):
        processor = found.group(1)
    smi = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        gpus = subprocess.run(smi, capture_output=True, text=True, check=False).stdout.split("\n")
    except FileNotFoundError:
        gpus = []
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_gib": round(memory),
        "gpus": [gpu for gpu in gpus if gpu],
        "load_before": round(os.getloadavg()[0], 1),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that do the work."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def record(program: Path, arguments: list[str], results: Path) -> Path:
    """Run `program`, and keep its output in `results`.

    Raises:
        SystemExit: it failed; its own message stands above.
    """
    resolved = program.resolve()
    about = ast.get_docstring(ast.parse(resolved.read_text())) or ""
    result: dict[str, Any] = {
        "program": str(resolved.relative_to(ROOT) if resolved.is_relative_to(ROOT) else resolved),
        "about": about.split("\n\n")[0],
        "arguments": arguments,
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
    }
    done = subprocess.run(
        [sys.executable, program, *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    print(done.stdout, end="")
    if done.returncode:
        sys.exit(f"error: {program} ended with {done.returncode}; nothing was recorded")
    result["output"] = done.stdout.rstrip().splitlines()
    name = re.sub(r"[^\w.]+", "-", " ".join([program.stem, *arguments])).strip("-")
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def page(results: Path) -> str:
    """The text of the page."""
    kept = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    sections = [HEAD]
    for name in sorted({result["program"] for result in kept}):
        of_program = [result for result in kept if result["program"] == name]
        about = f"## `{name}`\n\n{of_program[-1]['about']}\n"
        sections.append("\n".join([about, *map(_section, of_program)]))
    return "\n".join(sections)


def _section(result: dict[str, Any]) -> str:
    """One result: command, machine, output; lines of JSON with the same keys as a table."""
    setting = " ".join(f"{name}={value}" for name, value in result["environment"].items())
    command = f"{setting} python {result['program']} {shlex.join(result['arguments'])}".strip()
    where, packages = result["machine"], result["versions"]
    machine = ", ".join(
        [where["processor"], f"{where['cores']} cores", f"{where['memory_gib']} GiB", *where["gpus"]]
    )
    with_versions = ", ".join(f"{name} {number}" for name, number in packages.items())
    about = f"{result['date']}; {machine}; {with_versions}; load before the run {where['load_before']}:\n"
    return f"```\n{command}\n```\n\n{about}\n{_output(result['output'])}"


def _output(lines: list[str]) -> str:
    try:
        rows = [json.loads(line) for line in lines]
        keys = list(rows[0])
        if not all(isinstance(row, dict) and list(row) == keys for row in rows):
            raise ValueError
    except (ValueError, TypeError, IndexError):
        return "\n".join(["```text", *lines, "```", ""])
    table = [keys, ["---"] * len(keys), *([str(row[key]) for key in keys] for row in rows)]
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in table] + [""])


def main() -> None:
    """Record what the arguments name, if they name anything; write the page."""
    if sys.argv[1:2] in (["--help"], ["-h"]):
        print(__doc__)
        return
    if sys.argv[1:]:
        print(record(Path(sys.argv[1]), sys.argv[2:], RESULTS))
    PAGE.write_text(page(RESULTS))


if __name__ == "__main__":
    main()

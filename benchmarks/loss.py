"""Chunked linear cross entropy against the plain one: memory and time of forward and backward, on the CPU.

Usage: OMP_NUM_THREADS=1 python benchmarks/loss.py [--tokens 2048 --hidden-size 512 --rounds 5]

The plain loss computes all logits at once and calls torch's cross entropy. Memory is the peak resident set of
a process of its own for each, above the weights and their gradient. For time, rounds of both alternate in one
process, and medians are compared. Losses and gradients of both are compared.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F

from emu3_megatron.model.loss import weighted_linear_cross_entropy
from emu3_megatron.vocabulary import Vocabulary

VOCABULARY = Vocabulary.preset("emu3")
MIB = 2**20


class Case:
    """Weights, hidden states and labels of one loss."""

    def __init__(self, tokens: int, hidden_size: int) -> None:
        torch.manual_seed(0)
        self.weight_VH = torch.randn(VOCABULARY.padded_size, hidden_size).mul_(0.02).requires_grad_()
        self.hidden_TH = torch.randn(tokens, hidden_size, requires_grad=True)
        self.labels_T = torch.randint(0, VOCABULARY.size, (tokens,))
        self.weights_T = torch.rand(tokens) / tokens
        self.gradient_VH = torch.zeros_like(self.weight_VH)

    def plain(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All logits at once."""
        logits_TV = self.hidden_TH @ self.weight_VH[: VOCABULARY.size].t()
        loss = (F.cross_entropy(logits_TV, self.labels_T, reduction="none") * self.weights_T).sum()
        hidden, weight = torch.autograd.grad(loss, (self.hidden_TH, self.weight_VH))
        return loss.detach(), hidden, weight

    def chunked(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """This package's."""
        self.gradient_VH.zero_()
        loss = weighted_linear_cross_entropy(
            self.hidden_TH,
            self.weight_VH,
            self.labels_T,
            self.weights_T,
            vocabulary_size=VOCABULARY.size,
            weight_gradient=self.gradient_VH,
        ).total
        (hidden,) = torch.autograd.grad(loss, self.hidden_TH)
        return loss.detach(), hidden, self.gradient_VH


def status(key: str) -> int:
    """Bytes of an entry of /proc/self/status, such as VmRSS and VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def measure_peak(name: str, tokens: int, hidden_size: int, answer: Connection) -> None:
    """Send the peak above weights and gradient, in bytes."""
    case = Case(tokens, hidden_size)
    if name == "chunked":
        case.gradient_VH.fill_(0)  # touched: counted with the weights
        before = status("VmRSS")
    else:
        del case.gradient_VH  # autograd makes its own
        before = status("VmRSS") + case.weight_VH.nbytes
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    getattr(case, name)()
    answer.send(status("VmHWM") - before)


def peak(name: str, tokens: int, hidden_size: int) -> int:
    """Peak of one loss in a fresh process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=measure_peak, args=(name, tokens, hidden_size, there))
    process.start()
    result = here.recv()
    process.join()
    return int(result)


def seconds(function: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative difference (Frobenius)."""
    return float((a - b).norm() / b.norm())


def show_peaks(tokens: int, hidden_size: int) -> None:
    """Print the memory of both."""
    peaks = {name: peak(name, tokens, hidden_size) for name in ("plain", "chunked")}
    shown = ", ".join(f"{name} {value / MIB:.1f} MiB" for name, value in peaks.items())
    print(f"peak: {shown}; ratio {peaks['chunked'] / peaks['plain']:.3f} (bar 0.1)", flush=True)


def show_differences(case: Case) -> None:
    """Print how far losses and gradients of both are apart."""
    for one, two, name in zip(case.chunked(), case.plain(), ("loss", "d hidden", "d weight"), strict=True):
        print(f"relative difference of {name:9s} {relative(one, two):.1e}", flush=True)


def show_times(case: Case, rounds: int) -> None:
    """Print the CPU time of both, round by round."""
    times: dict[str, list[float]] = {"plain": [], "chunked": []}
    for _ in range(rounds):
        for name, found in times.items():
            found.append(seconds(getattr(case, name)))
        print("CPU s: " + ", ".join(f"{name} {found[-1]:.2f}" for name, found in times.items()), flush=True)
    medians = {name: statistics.median(found) for name, found in times.items()}
    shown = ", ".join(f"{name} {value:.2f}" for name, value in medians.items())
    print(f"time: medians {shown}; ratio {medians['chunked'] / medians['plain']:.3f} (bar 1.05)")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5, help="of each loss; medians count")
    parts = ("peaks", "differences", "times")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="default: all")
    arguments = parser.parse_args()
    tokens, hidden_size = arguments.tokens, arguments.hidden_size
    print(f"{tokens} tokens, hidden size {hidden_size}, {VOCABULARY.size:,} ids, torch {torch.__version__}")
    if "peaks" in arguments.parts:
        show_peaks(tokens, hidden_size)
    case = Case(tokens, hidden_size)
    if "differences" in arguments.parts:
        show_differences(case)
    if "times" in arguments.parts:
        show_times(case, arguments.rounds)


if __name__ == "__main__":
    main()

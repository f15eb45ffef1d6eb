"""A training step of a model that fills one card: tokens/s, MFU, memory.

Usage: python benchmarks/gpu/step.py [--windows 8192 32768 --dropout 0.0 --document 4300] [--smoke]

The model is the preset emu3_1_5b (1.56B parameters over Emu3's 184,622 ids) in bf16 with fp32 gradients and
Adam states: about 28 GB before activations. Windows from 32,768 tokens recompute whole layers. MFU counts
attention under its document mask and no recomputation, against the dense bf16 peak of the card.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import common
import torch

from emu3_megatron.model import ModelConfig
from emu3_megatron.training.throughput import device_peak_tflops, training_flops
from emu3_megatron.vocabulary import Vocabulary

RECOMPUTE_FROM = 32_768


def main() -> None:
    """Measure every window size and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=[8192, 32_768])
    parser.add_argument("--document", type=int, default=4300, help="tokens of a document (an image: 4300)")
    parser.add_argument("--dropout", type=float, default=0.0, help="in all four places")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), help="default: by window")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="toy sizes on a CPU")
    arguments = parser.parse_args()
    machine = common.start(smoke=arguments.smoke)
    common.show(**common.environment(machine))
    preset, precision, vocabulary = "emu3_1_5b", "bf16", common.VOCABULARY
    if arguments.smoke:
        preset, precision, vocabulary = "tiny", "fp32", common.SMOKE_VOCABULARY
        arguments.windows, arguments.document = [128, 256], 60
    for size in arguments.windows:
        recompute = arguments.recompute or ("full" if size >= RECOMPUTE_FROM else "none")
        dropout = dict.fromkeys(
            ("embedding_dropout", "attention_dropout", "hidden_dropout"), arguments.dropout
        )
        config = ModelConfig.preset(preset, recompute=recompute, **dropout)
        measure(config, vocabulary, precision, size, arguments, machine.device)


def measure(
    config: ModelConfig,
    vocabulary: Vocabulary,
    precision: str,
    size: int,
    arguments: argparse.Namespace,
    device: torch.device,
) -> None:
    """One window size."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = common.TrainingStep(config, vocabulary, precision)
    windows = [common.random_window(size, arguments.document, vocabulary, device, seed) for seed in range(2)]
    turn = iter(range(10**9))
    spent = common.seconds(lambda: step(windows[next(turn) % 2]), repeats=arguments.repeats, cuda=cuda)
    flops = training_flops(config, vocabulary.size, size, windows[0].attention_pairs)
    peak = device_peak_tflops(torch.cuda.get_device_name()) if cuda else None
    common.show(
        window=size,
        document=arguments.document,
        dropout=arguments.dropout,
        recompute=config.recompute,
        transformer_engine=step.chunk.transformer_engine,
        parameters=config.parameter_count(vocabulary.size),
        step_seconds=spent,
        tokens_per_second=size / spent,
        tflops=flops / spent / 1e12,
        mfu=flops / spent / 1e12 / peak if peak else "no peak known",
        memory_gib=torch.cuda.max_memory_allocated() / 2**30 if cuda else "not measured",
        loss=step(windows[0]).item(),
    )


if __name__ == "__main__":
    main()

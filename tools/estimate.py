"""Predict a run before it starts: parameters, memory of a rank, time of a step; or search layouts for a
cluster.

    python tools/estimate.py --config FILE.yaml --processes 64 --vocabulary emu3 --search

What is not an option of this program is an option of training: `python -m emu3_megatron.training --help`. A
file with a section `dpo` is of preference training.
"""

from __future__ import annotations

import argparse

from emu3_megatron.errors import run_main


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--processes", type=int, required=True, help="devices of the cluster")
    parser.add_argument("--vocabulary", help="preset, where the run's datasets do not exist yet")
    parser.add_argument("--search", action="store_true", help="list the fastest layouts that fit")
    parser.add_argument("--top", type=int, default=10, help="layouts listed (default: 10)")
    parser.add_argument("--document-tokens", type=float, help="typical document; default: a whole window")
    machines = parser.add_argument_group("the machines")
    for name, meaning in (
        ("devices-per-node", "default: 8"),
        ("memory-gib", "of a device; default: 80"),
        ("reserve-gib", "of it, for driver and buffers; default: 6"),
        ("peak-tflops", "of a device; default: 989, an H100 in bf16"),
        ("efficiency", "share of the peak that kernels reach; default: 0.55"),
        ("node-gbytes", "GB/s of a device within its node; default: 350"),
        ("network-gbytes", "GB/s of a device to other nodes; default: 40"),
    ):
        machines.add_argument(f"--{name}", type=int if name.startswith("devices") else float, help=meaning)
    arguments, training = parser.parse_known_args()
    # Slow to import, and not needed for --help.
    from emu3_megatron.posttraining.runs import describe_run
    from emu3_megatron.training.predict import predict

    print(predict(vars(arguments), training, read=lambda given: describe_run(given).config))


if __name__ == "__main__":
    run_main(main)

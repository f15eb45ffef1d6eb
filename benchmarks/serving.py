"""The server: what it costs to show a picture as it grows, and its memory under a crowd.

Usage: OMP_NUM_THREADS=1 python benchmarks/serving.py [--rounds 5] [--crowds 30] [--clients 50] [--cpu-time]

A model of 18M parameters with Emu3's vocabulary and a small vision tokenizer behind the server's application,
without a network. First one guided picture of 32 x 32 tokens, asked for plainly and as a stream, alternately;
medians of tokens/s. Then crowds of clients at once at a queue of 8: how many were served and refused, and the
resident memory after each crowd.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from typing import Any

import httpx
import psutil
import torch

from emu3_megatron.parallel import platform

ADDRESS = "/v1/images/generations"
SIDE = 32
"""Tokens along the side of the picture whose growth is shown."""


def build() -> Any:
    """The generator; process groups must exist."""
    from emu3_megatron.grammar import Dialect
    from emu3_megatron.inference import Generator, ModelBundle
    from emu3_megatron.model import ModelConfig, build_model
    from emu3_megatron.parallel.config import ParallelConfig
    from emu3_megatron.text.bytes import ByteTokenizer
    from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig
    from emu3_megatron.vocabulary import Vocabulary

    vocabulary = Vocabulary.preset("emu3")
    config = ModelConfig.preset(
        "tiny", num_layers=4, hidden_size=48, ffn_hidden_size=192, num_attention_heads=4, num_query_groups=2,
        max_position_embeddings=16_384,
    )  # fmt: skip
    (model,) = build_model(
        config, vocabulary_padded_size=vocabulary.padded_size, vocabulary_size=vocabulary.size,
        parallel=ParallelConfig(), seed=0, precision="fp32",
    )  # fmt: skip
    torch.manual_seed(0)
    vision = VisionTokenizer(
        VisionTokenizerConfig(
            channels=32, channel_multiplier=(1, 1, 1, 1), num_res_blocks=1, attention_resolutions=(3,)
        )
    )
    dialect = Dialect.preset("emu3", vocabulary, ByteTokenizer())
    return Generator(ModelBundle(model.eval(), config, dialect, vision.eval()))


async def ask(client: httpx.AsyncClient, side: int, *, stream: bool) -> tuple[int, int, int]:
    """One picture of `side` pixels: status, new tokens, and how often rows of it were shown."""
    body = {"prompt": "a red circle", "size": f"{side}x{side}", "seed": 1, "stream": stream}
    answer = await client.post(ADDRESS, json=body)
    if answer.status_code != 200:
        return answer.status_code, 0, 0
    if not stream:
        return 200, int(answer.json()["usage"]["output_tokens"]), 0
    parts = answer.text.split("\n\n")
    events = [json.loads(part.removeprefix("data: ")) for part in parts if part.startswith("data: {")]
    shown = sum(str(event.get("type")).endswith("rows") for event in events)
    return 200, int(events[-1]["usage"]["output_tokens"]), shown


async def growth(client: httpx.AsyncClient, factor: int, rounds: int, now: Any) -> None:
    """Plainly and as a stream, alternately."""
    rates: dict[bool, list[float]] = {False: [], True: []}
    shown = 0
    for _ in range(rounds + 1):
        for stream in rates:
            began = now()
            _, tokens, shown = await ask(client, SIDE * factor, stream=stream)
            rates[stream].append(tokens / (now() - began))
            print(f"stream {stream}: {rates[stream][-1]:.1f} tokens/s", file=sys.stderr, flush=True)
    plain, streamed = (statistics.median(values[1:]) for values in rates.values())  # the first warms up
    print(
        f"a picture of {SIDE} x {SIDE} tokens: {plain:.1f} tokens/s, {streamed:.1f} as a stream that "
        f"shows it {shown} times; cost {1 - streamed / plain:+.1%}"
    )


async def crowds(client: httpx.AsyncClient, factor: int, clients: int, count: int) -> None:
    """Many clients at once, again and again."""
    process = psutil.Process()
    resident = []
    for number in range(count):
        answers = await asyncio.gather(
            *(ask(client, 4 * factor, stream=bool(index % 2)) for index in range(clients))
        )
        statuses = [status for status, _, _ in answers]
        resident.append(process.memory_info().rss / 2**20)
        known = ", ".join(f"{statuses.count(status)} x {status}" for status in sorted(set(statuses)))
        print(f"crowd {number + 1}: {known}; {resident[-1]:.1f} MiB resident", flush=True)
    half = len(resident) // 2
    print(f"growth over the second half of the crowds: {resident[-1] - resident[half]:+.1f} MiB")


async def measure(arguments: argparse.Namespace) -> None:
    """Start the application, and measure."""
    from emu3_megatron.inference.server.app import create_app
    from emu3_megatron.inference.server.limits import Limits

    generator = build()
    factor = generator.bundle.vision_tokenizer.spatial_factor
    app = create_app(generator, limits=Limits(jobs=8, length=2048))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost", timeout=None
        ) as client:
            if arguments.rounds:
                now = time.process_time if arguments.cpu_time else time.perf_counter
                await growth(client, factor, arguments.rounds, now)
            if arguments.crowds:
                await crowds(client, factor, arguments.clients, arguments.crowds)


def main() -> None:
    """Read the arguments, and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="pictures each way; 0 leaves this out")
    parser.add_argument("--crowds", type=int, default=30, help="0 leaves this out")
    parser.add_argument("--clients", type=int, default=50, help="of a crowd")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds instead of the clock's")
    arguments = parser.parse_args()
    from emu3_megatron.parallel.config import ParallelConfig
    from emu3_megatron.parallel.groups import initialize_parallel

    initialize_parallel(ParallelConfig(), platform.install("cpu"), seed=0)
    asyncio.run(measure(arguments))


if __name__ == "__main__":
    main()

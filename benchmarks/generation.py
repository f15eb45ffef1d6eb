"""Images by our engine and by transformers' `generate`, same weights, on the CPU.

Usage: OMP_NUM_THREADS=1 python benchmarks/generation.py [--model 20m --rows 16 --columns 16 --rounds 5]

Both sample images with guidance 3 and top-k 2048, transformers with its prefix function (which returns a
tensor made once) and with the negative prompt that ends in the same span head. Rounds alternate in one
process; medians count. The bound is what reading the weights of one step once would take at the bandwidth
measured between the rounds. On a busy machine and with one thread, --cpu-time is steadier than the clock.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from emu3_megatron.parallel import platform

MODELS: dict[str, dict[str, int]] = {
    "20m": {
        "num_layers": 4, "hidden_size": 48, "ffn_hidden_size": 192, "num_attention_heads": 4,
        "num_query_groups": 2,
    },
    "0.5b": {
        "num_layers": 16, "hidden_size": 1024, "ffn_hidden_size": 2816, "num_attention_heads": 16,
        "num_query_groups": 4,
    },
}  # fmt: skip
"""Shapes with Emu3's vocabulary."""

GUIDANCE = 3.0
TOP_K = 2048


def build(name: str, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Our model, transformers' with the same weights, and the dialect."""
    import transformers

    from emu3_megatron.conversion import LAYOUTS, WeightMap
    from emu3_megatron.conversion.configuration import architecture, text_config
    from emu3_megatron.grammar import Dialect
    from emu3_megatron.model import ModelConfig, build_model
    from emu3_megatron.parallel.config import ParallelConfig
    from emu3_megatron.text.bytes import ByteTokenizer
    from emu3_megatron.vocabulary import Vocabulary

    vocabulary = Vocabulary.preset("emu3")
    config = ModelConfig.preset("tiny", **MODELS[name], max_position_embeddings=16_384)
    (ours,) = build_model(
        config, vocabulary_padded_size=vocabulary.padded_size, vocabulary_size=vocabulary.size,
        parallel=ParallelConfig(), seed=0, precision="bf16" if dtype == torch.bfloat16 else "fp32",
    )  # fmt: skip
    ours.eval()
    values = text_config(config, vocabulary, str(dtype).removeprefix("torch."))
    with torch.device("meta"):
        theirs = transformers.Emu3ForCausalLM(transformers.models.emu3.Emu3TextConfig(**values))
    theirs = theirs.to(dtype).to_empty(device="cpu")
    weights = {name.removeprefix("module."): tensor for name, tensor in ours.state_dict().items()}
    named = WeightMap(architecture(config, vocabulary), LAYOUTS["emu3"]).to_hugging_face(weights)
    theirs.load_state_dict(dict(named), assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    theirs.generation_config.eos_token_id = vocabulary.eoi
    return ours, theirs.eval(), Dialect.preset("emu3", vocabulary, ByteTokenizer())


class Case:
    """One batch of images."""

    def __init__(self, ours: Any, theirs: Any, dialect: Any, *, batch: int, rows: int, columns: int) -> None:
        from emu3_megatron.inference.engine import Engine, Request
        from emu3_megatron.inference.sampling import Sampling

        vocabulary = dialect.vocabulary
        span = dialect.open_span(rows, columns)

        def prompt(text: str) -> np.ndarray:
            return np.concatenate([[vocabulary.bos], dialect.encode_text(text), span])

        length = dialect.span_length(rows, columns) - len(span)
        self.tokens = batch * length
        self.requests = [
            Request(
                prompt=prompt(f"circle {index}"), negative_prompt=prompt(""), seed=index,
                sampling=Sampling(guidance=GUIDANCE, top_k=TOP_K), max_new_tokens=length,
                stop=frozenset([vocabulary.eoi]),
            )
            for index in range(batch)
        ]  # fmt: skip
        self._engine = Engine(ours, dialect)
        self._theirs, self._dialect, self._length = theirs, dialect, length
        body = sum(p.numel() * p.element_size() for p in theirs.model.layers.parameters())
        head = theirs.lm_head.weight
        self.bytes_per_step = body + vocabulary.codebook_size * head.shape[1] * head.element_size()
        self.steps = rows * columns

    def ours(self) -> None:
        """Our engine."""
        for completion in self._engine.generate(self.requests):
            if not completion.finished:
                raise RuntimeError("an image of ours is incomplete")

    def theirs(self) -> None:
        """transformers."""
        automaton = self._dialect.automaton()
        allowed: dict[Any, torch.Tensor] = {}
        prompts = torch.from_numpy(np.stack([request.prompt for request in self.requests]))
        negatives = torch.from_numpy(np.stack([request.negative_prompt for request in self.requests]))
        states = [automaton.start(request.prompt) for request in self.requests]
        seen = [prompts.shape[1]] * len(states)

        def allowed_tokens(row: int, ids: torch.Tensor) -> torch.Tensor:
            while seen[row] < len(ids):
                states[row] = automaton.advance(states[row], int(ids[seen[row]]))
                seen[row] += 1
            found = automaton.allowed(states[row])
            if found not in allowed:
                allowed[found] = torch.from_numpy(found.ids())
            return allowed[found]

        with torch.no_grad():
            out = self._theirs.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=TOP_K,
                guidance_scale=GUIDANCE, negative_prompt_ids=negatives,
                negative_prompt_attention_mask=torch.ones_like(negatives),
                prefix_allowed_tokens_fn=allowed_tokens, max_new_tokens=self._length,
            )  # fmt: skip
        if out.shape[1] != prompts.shape[1] + self._length:
            raise RuntimeError("an image of transformers is incomplete")


class Clock:
    """Wall time, or CPU time of this process."""

    def __init__(self, *, cpu: bool) -> None:
        self._now = time.process_time if cpu else time.perf_counter
        self._block = torch.ones(2**26)

    def seconds(self, work: Callable[[], object]) -> float:
        """Duration of one call."""
        began = self._now()
        work()
        return self._now() - began

    def bandwidth(self) -> float:
        """Bytes read per second from memory, best of three sums over 256 MiB."""
        return self._block.nbytes / min(self.seconds(self._block.sum) for _ in range(3))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="20m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="images at a time")
    parser.add_argument("--rows", type=int, default=16, help="rows of vision tokens")
    parser.add_argument("--columns", type=int, default=16, help="columns of vision tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds instead of the clock's")
    parser.add_argument("--ours-only", action="store_true", help="for profiling")
    arguments = parser.parse_args()
    from emu3_megatron.parallel.config import ParallelConfig
    from emu3_megatron.parallel.groups import initialize_parallel

    initialize_parallel(ParallelConfig(), platform.install("cpu"), seed=0)
    ours, theirs, dialect = build(arguments.model, getattr(torch, arguments.dtype))
    size = sum(parameter.numel() for parameter in theirs.parameters())
    print(f"{size / 1e6:.1f}M parameters, {arguments.dtype}, {torch.get_num_threads()} thread(s)")
    clock = Clock(cpu=arguments.cpu_time)
    for batch in arguments.batch:
        case = Case(ours, theirs, dialect, batch=batch, rows=arguments.rows, columns=arguments.columns)
        names = ("ours",) if arguments.ours_only else ("ours", "theirs")
        times: dict[str, list[float]] = {name: [] for name in names}
        speeds = []
        for _ in range(arguments.rounds + 1):
            for name in names:
                times[name].append(clock.seconds(getattr(case, name)))
                print(f"batch {batch}, {name}: {times[name][-1]:.2f} s", file=sys.stderr, flush=True)
            speeds.append(clock.bandwidth())
        median = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first warms up
        bound = case.tokens / (case.steps * case.bytes_per_step / statistics.median(speeds))
        rates = {name: case.tokens / value for name, value in median.items()}
        line = ", ".join(f"{name} {rate:.1f} tokens/s" for name, rate in rates.items())
        print(f"batch {batch}: {line}; reading the weights once a step allows {bound:.1f} tokens/s", end="")
        print(f" ({rates['ours'] / bound:.0%} of it)", end="")
        print(f"; ours / theirs {rates['ours'] / rates['theirs']:.2f}" if "theirs" in rates else "")


if __name__ == "__main__":
    main()

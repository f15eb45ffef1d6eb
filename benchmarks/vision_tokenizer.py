"""Encoding and decoding of images: this package against `transformers.Emu3VQVAE`, in one run.

Usage: OMP_NUM_THREADS=1 python benchmarks/vision_tokenizer.py [--sizes 256 512] [--repeats 5] [...]

Both have the same random weights of the released configuration, batch-norm statistics off their defaults and
a codebook at the latents' scale, one thread. Rounds alternate; a ratio is the median over rounds of the
ratios within a round, of CPU seconds, so that other work on the machine disturbs it little. Peak memory is
what a call adds at most to the process (Linux only). FLOP are counted, not estimated; the ceiling is the best
of three products of 2048x2048 matrices in the same precision in every round. A CPU without AMX is given
Winograd's convolutions for bf16: they do fewer operations than are counted, and the first call makes their
kernels.

At 256x256 a round takes two to three minutes with decoding, at 512x512 about four times as long.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from emu3_megatron.vision import VisionTokenizer, VisionTokenizerConfig, decode_in_stripes, encode_in_stripes
from emu3_megatron.vision.checkpoint import transformers_key

SMALL = VisionTokenizerConfig(channels=32, codebook_size=4096)
CEILING_SIDE = 2048

Work = Callable[[Tensor], Tensor]


@dataclass
class Timings:
    """CPU seconds of every round, and the most memory that a call added."""

    seconds: list[float] = field(default_factory=list)
    mebibytes: float = 0.0

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        before = reset_peak()
        start = time.process_time()
        result = work()
        self.seconds.append(time.process_time() - start)
        self.mebibytes = max(self.mebibytes, memory("VmHWM") - before)
        return result

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio(self, reference: Timings) -> float:
        pairs = zip(reference.seconds, self.seconds, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def memory(name: str) -> float:
    """A line of this process's status, in MiB; 0 where there is none."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), 0.0)


def reset_peak() -> float:
    """Forget the highest use of memory so far; gives the present use in MiB."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")
    return memory("VmRSS")


def build(config: VisionTokenizerConfig) -> tuple[Emu3VQVAE, VisionTokenizer]:
    """The reference and ours, sharing random weights."""
    torch.manual_seed(0)
    values = {k: v for k, v in config.to_transformers().items() if k not in ("architectures", "model_type")}
    model = Emu3VQVAE(Emu3VQVAEConfig(**values)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm3d):
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 2.0)
    with torch.device("meta"):
        ours = VisionTokenizer(config)
    stored = model.state_dict()
    ours.load_state_dict({key: stored[transformers_key(key)] for key in ours.state_dict()}, assign=True)
    with torch.no_grad():
        latents = ours.encode_latents(torch.rand(1, 3, 128, 128) * 2 - 1).movedim(1, -1).flatten(0, -2)
        spread = latents.std(0) * torch.randn(config.codebook_size, config.embed_dim)
        ours.codebook.copy_(latents.mean(0) + spread)
    return model, ours


def flop(config: VisionTokenizerConfig, size: int) -> dict[str, float]:
    """Floating-point operations of encoding and of decoding one image, as this package does it."""
    with torch.device("meta"):
        tokenizer = VisionTokenizer(config)
        pixels = torch.empty(1, config.in_channels, size, size)
    counts = {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        latents = tokenizer.encode_latents(pixels)
    counts["encode"] = counter.get_total_flops() + 2.0 * latents.numel() * config.codebook_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tokenizer.decode_latents(latents, frames=[0])
    counts["decode"] = float(counter.get_total_flops())
    return counts


def ceiling(dtype: torch.dtype) -> float:
    """FLOP/s of products of large matrices."""
    a = torch.randn(CEILING_SIDE, CEILING_SIDE).to(dtype)
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        a @ a
        best = min(best, time.process_time() - start)
    return 2 * CEILING_SIDE**3 / best


@dataclass
class Variant:
    """One way to do the work."""

    name: str
    encode: Work
    decode: Work
    dtype: torch.dtype = torch.float32
    timings: Timings = field(default_factory=Timings)


def reference(model: Emu3VQVAE) -> Variant:
    """The way of transformers."""

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        sizes = torch.tensor([pixels.shape[-2:]] * len(pixels))
        return torch.stack(list(model.encode(pixels, image_sizes=sizes).image_tokens))

    return Variant("transformers", encode, torch.no_grad()(model.decode))


def ours(tokenizer: VisionTokenizer, names: Sequence[str]) -> list[Variant]:
    """The ways of this package: plain, and those of `names`."""
    variants = [Variant("fp32", tokenizer.encode, tokenizer.decode)]
    if "stripes" in names:
        ways = (partial(way, tokenizer) for way in (encode_in_stripes, decode_in_stripes))
        variants.append(Variant("fp32, stripes", *ways))
    if "channels-last" in names:
        fast = copy.deepcopy(tokenizer).for_inference()
        variants.append(Variant("fp32, channels last", fast.encode, fast.decode))
    if "bf16" in names:
        fast = copy.deepcopy(tokenizer).for_inference(dtype=torch.bfloat16)
        rounded = any(weight.dtype == torch.bfloat16 for weight in fast.parameters())
        name, dtype = ("channels last", torch.bfloat16) if rounded else ("Winograd in fp32", torch.float32)
        variants.append(Variant(f"bf16: {name}", fast.encode, fast.decode, dtype))
    return variants


def measure(
    config: VisionTokenizerConfig, size: int, repeats: int, work: str, variants: Sequence[Variant]
) -> None:
    """Time one kind of work at one size; the first variant is the reference. Print a line for each."""
    generator = torch.Generator().manual_seed(size)
    side = size // config.spatial_factor
    given = torch.rand(1, 3, size, size, generator=generator) * 2 - 1
    if work == "decode":
        given = torch.randint(config.codebook_size, (1, side, side), generator=generator)
    results: dict[str, Tensor] = {}
    ceilings = dict.fromkeys((variant.dtype for variant in variants), 0.0)
    for variant in variants:
        variant.timings = Timings()
    for _ in range(repeats):
        for variant in variants:
            results[variant.name] = variant.timings.run(partial(getattr(variant, work), given))
        ceilings = {dtype: max(rate, ceiling(dtype)) for dtype, rate in ceilings.items()}
    operations = flop(config, size)[work]
    rates = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in ceilings.items())
    print(f"\n{work} {size}x{size}, median of {repeats}: {operations / 1e12:.2f} TFLOP without repetition")
    print(f"  products of matrices, GFLOP/s: {rates}")
    wanted = results[variants[0].name]
    for variant in variants:
        one, got = variant.timings, results[variant.name]
        check = (
            f"largest difference {float((got - wanted).abs().max()):.1e}"
            if work == "decode"
            else f"codes equal {float((got == wanted).double().mean()):.4%}"
        )
        share = operations / one.median / ceilings[variant.dtype]
        print(
            f"  {variant.name:22} {one.median:8.2f} s  {one.ratio(variants[0].timings):5.2f} x  "
            f"{one.mebibytes:6.0f} MiB  {operations / one.median / 1e9:5.0f} GFLOP/s, {share:.0%} of products"
            f"  {check}",
            flush=True,
        )


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("stripes", "channels-last", "bf16")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="sides in pixels")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--work", nargs="+", choices=("encode", "decode"), default=["encode", "decode"])
    parser.add_argument("--variants", nargs="*", choices=names, default=names, help="beside plain fp32")
    parser.add_argument("--small", action="store_true", help="a small configuration, to try the program")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = SMALL if options.small else VisionTokenizerConfig()
    model, tokenizer = build(config)
    variants = [reference(model), *ours(tokenizer, options.variants)]
    for size in options.sizes:
        for work in options.work:
            measure(config, size, options.repeats, work, variants)


if __name__ == "__main__":
    main()

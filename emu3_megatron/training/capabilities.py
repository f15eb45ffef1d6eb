"""What this machine has of the things that make training fast, and what each missing one costs."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Capability:
    """One thing that may be present or missing."""

    name: str
    found: str
    """Version or device where present, else empty."""
    used_for: str
    """What it does when present."""
    missing: str
    """What its absence costs."""

    def line(self) -> str:
        """One line for a terminal."""
        if self.found:
            return f"{self.name:22s} yes  {self.found}; used for {self.used_for}"
        return f"{self.name:22s} no   costs: {self.missing}"


def capabilities() -> list[Capability]:
    """What is there, in the order of weight."""
    cuda = _cuda()
    engine = _distribution("transformer_engine", "transformer-engine") if cuda else ""
    return [
        Capability(
            name="CUDA",
            found=cuda,
            used_for="everything; collectives by NCCL",
            missing="training runs on the CPU with gloo: for tests and small models only",
        ),
        Capability(
            name="Transformer Engine",
            found=engine,
            used_for="layers, fused attention over packed windows, context parallelism by its kernels",
            missing="layers are megatron-core's local ones with this package's attention (SDPA, one call for "
            "documents of similar length); norms, rotary positions and SwiGLU are not fused; no FP8",
        ),
        Capability(
            name="FP8",
            found="yes" if engine and torch.cuda.get_device_capability() >= (8, 9) else "",
            used_for="matrix products of the layers, where trainer.fp8 asks for it",
            missing="matrix products in bf16, at half the peak; needs Transformer Engine and compute "
            "capability 8.9 or more",
        ),
        Capability(
            name="apex fused kernels",
            found=_distribution("amp_C", "apex") if cuda else "",
            used_for="fused Adam and gradient norms in megatron-core, where Transformer Engine has none",
            missing="Adam is Transformer Engine's where that is present, else torch's fused one"
            if cuda
            else "none on a CPU: Adam is torch's fused kernel",
        ),
        Capability(
            name="flash-attn",
            found=_distribution("flash_attn", "flash-attn") if cuda else "",
            used_for="attention inside Transformer Engine",
            missing="attention is cuDNN's in Transformer Engine, or torch's SDPA, which has flash kernels of "
            "its own for causal documents",
        ),
        Capability(
            name="NVDEC",
            found=_nvdec() if cuda else "",
            used_for="decoding video on the GPU in tokenization",
            missing="video is decoded on CPU cores by PyAV",
        ),
        Capability(
            name="resiliency extension",
            found=_distribution("nvidia_resiliency_ext", "nvidia-resiliency-ext"),
            used_for="heartbeats to ft_launcher, where that started the run; hangs, signals and checkpoints "
            "are handled without it",
            missing="no restart inside an allocation: after a fault the scheduler, or torchrun, starts the "
            "run again",
        ),
    ]


def report() -> str:
    """Readable lines: torch, megatron-core, then every capability."""
    head = [f"torch {torch.__version__}, megatron-core {_distribution('megatron.core', 'megatron-core')}", ""]
    return "\n".join(head + [each.line() for each in capabilities()])


def _cuda() -> str:
    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, compute capability {major}.{minor}"


def _distribution(module: str, name: str) -> str:
    """Version of an installed distribution whose module can be found, without importing it; else empty."""
    try:
        if importlib.util.find_spec(module) is None:
            return ""
        return importlib.metadata.version(name)
    except (ImportError, ValueError):
        return ""


def _nvdec() -> str:
    """Where the driver's decoder library can be loaded and DALI is installed."""
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        return ""
    return "libnvcuvid" if importlib.util.find_spec("nvidia.dali") else ""

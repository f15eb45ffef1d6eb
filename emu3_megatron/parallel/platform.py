"""Where a run computes: CUDA with NCCL, or CPU with gloo through a short list of redirections.

megatron-core calls `torch.cuda` in about fifty places without asking whether there is a GPU. On CUDA this
module changes nothing. On CPU `install` replaces what would raise there, and nothing else; `REDIRECTIONS`
lists every replacement with its reason. The CPU is chosen, never fallen into: with ``auto``, a machine that
shows signs of an NVIDIA driver but cannot use it is an error.

Call `install` before anything of ``megatron.core`` is imported.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import importlib.metadata
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from emu3_megatron.errors import UserError
from emu3_megatron.parallel.fused_adam import FusedAdam

PlatformName = Literal["auto", "cuda", "cpu"]

_CPU = torch.device("cpu")
_MARK = "_emu3_megatron_cpu_platform"


class PlatformError(UserError):
    """The wanted device cannot be used; the message is one line that says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Platform:
    """The device and the collective backend of this process."""

    device: torch.device
    """``cuda`` (the index is ``LOCAL_RANK``) or ``cpu``."""
    backend: str
    """Backend for `torch.distributed.init_process_group`: ``nccl`` or ``gloo``."""

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"


@dataclass(frozen=True, kw_only=True)
class Redirection:
    """One thing that `install` replaces on CPU."""

    target: str
    """Dotted name of what is replaced."""
    reason: str
    """Why megatron-core needs it."""
    apply: Callable[[], None]
    """Performs the replacement."""


def driver_signs() -> list[str]:
    """Traces of an NVIDIA driver on this machine, as readable names; empty on a machine without one."""
    signs = [path for path in ("/proc/driver/nvidia",) if os.path.exists(path)]
    signs += sorted(glob.glob("/dev/nvidia*"))[:1]
    try:
        ctypes.CDLL("libcuda.so.1")
        signs.append("libcuda.so.1")
    except OSError:
        pass
    return signs


def choose(name: PlatformName = "auto") -> Literal["cuda", "cpu"]:
    """Decide the platform without changing anything.

    Raises:
        ValueError: `name` is not ``auto``, ``cuda`` or ``cpu``.
        PlatformError: CUDA is wanted and cannot be used, or ``auto`` sees a driver that does not work.
    """
    if name not in ("auto", "cuda", "cpu"):
        raise ValueError(f"platform: {name!r} is none of auto, cuda, cpu")
    if name == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    signs = driver_signs()
    why = "this torch has no CUDA" if torch.version.cuda is None else "torch finds no usable GPU"
    if name == "cuda":
        raise PlatformError(
            f"platform: cuda is asked for but {why} (torch {torch.__version__}); "
            "repair the driver or the installation, or set `platform: cpu`"
        )
    if signs:
        raise PlatformError(
            f"platform: auto sees an NVIDIA driver ({', '.join(signs)}) but {why} "
            f"(torch {torch.__version__}); repair it, or set `platform: cpu` to train on the CPU on purpose"
        )
    return "cpu"


def install(name: PlatformName = "auto") -> Platform:
    """Choose the platform and prepare this process for it.

    On CUDA the device ``cuda:$LOCAL_RANK`` is made current. On CPU the `REDIRECTIONS` are applied (once).

    Raises:
        ValueError: `name` is unknown.
        PlatformError: the platform cannot be used, see `choose`, there are more processes than GPUs, or
            megatron-core lacks a package.
    """
    if choose(name) == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        try:
            torch.cuda.set_device(device)
        except RuntimeError as error:
            raise PlatformError(
                f"platform: this process wants {device} (LOCAL_RANK={device.index}), this machine shows "
                f"{torch.cuda.device_count()} GPUs ({str(error).splitlines()[0]}); start no more "
                f"processes on a machine than it has GPUs"
            ) from error
        return Platform(device=device, backend="nccl")
    if not getattr(torch, _MARK, False):
        _require_triton()
        setattr(torch, _MARK, True)
        os.environ["TORCH_COMPILE_DISABLE"] = "1"  # for what other versions compile later
        for redirection in REDIRECTIONS:
            redirection.apply()
    return Platform(device=_CPU, backend="gloo")


def _require_triton() -> None:
    """Name the package that megatron-core imports from 0.18 on, for kernels of experts, and does not ask for.

    torch's CUDA builds bring it along, its CPU builds do not.
    """
    if importlib.util.find_spec("triton") is not None:
        return
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return
    if tuple(int(part) for part in version.split(".")[:2]) >= (0, 18):
        raise PlatformError(
            f"megatron-core {version} imports Triton, which this torch ({torch.__version__}) does not bring; "
            "`pip install triton`, or `pip install 'megatron-core<0.18'`, which needs none"
        )


# ---- replacements ----


class _NullStream:
    """Stands in for streams and events: on CPU the work is done when the call returns."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


_NULL_STREAM = _NullStream()


def _returning(value: object) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _left_as_it_is(function: Any = None, **options: Any) -> Any:
    return function or _left_as_it_is


def _import_uncompiled() -> None:
    if "megatron.core.jit" in sys.modules:  # too late to spare the compiler, not to switch it off
        if "torch._dynamo" in sys.modules:
            sys.modules["torch._dynamo"].config.disable = True
        return
    compiler = torch.compile
    torch.compile = _left_as_it_is  # type: ignore[assignment]
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = compiler


def _set_all(owner: object, replacements: dict[str, object]) -> Callable[[], None]:
    def apply() -> None:
        for attribute, value in replacements.items():
            setattr(owner, attribute, value)

    return apply


def _get_rng_state(device: object = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: object = None, graph_safe: bool = False) -> None:
    torch.set_rng_state(state)


def _redirect_random() -> None:
    cuda: Any = torch.cuda
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = _get_rng_state
    cuda.set_rng_state = cuda.random.set_rng_state = _set_rng_state
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._set_cuda_rng_state = _set_rng_state
    # Its tracker warns when the CPU's random state moves inside a fork; here that state is the tracked one.
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage()
    )


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return create


def _redirect_factories() -> None:
    # `with torch.device("meta")` knows factories by identity from a list made at first use: make it now, or
    # it would list the replacements and miss the originals they call: transformers would load wrong buffers
    from torch.utils._device import _device_constructors

    _device_constructors()
    for name in ("empty", "zeros", "ones", "tensor", "full", "arange"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


_tensor_type: Callable[..., Any] = torch.Tensor.type


def _type_named_as_on_cuda(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if dtype is not None:
        return _tensor_type(self, dtype, *args, **kwargs)
    return _tensor_type(self).replace("torch.", "torch.cuda.", 1)


def _with_cuda_type_names(owner: Any, name: str) -> None:
    function = getattr(owner, name)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        torch.Tensor.type = _type_named_as_on_cuda  # type: ignore[method-assign,assignment]
        try:
            return function(*args, **kwargs)
        finally:
            torch.Tensor.type = _tensor_type  # type: ignore[method-assign]

    setattr(owner, name, call)


def _redirect_type_names() -> None:
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.optimizer.distrib_optimizer as distributed
    import megatron.core.optimizer.optimizer as optimizer

    _with_cuda_type_names(distributed.DistributedOptimizer, "__init__")
    _with_cuda_type_names(optimizer.Float16OptimizerWithFloat16Params, "__init__")
    _with_cuda_type_names(clip_grads, "clip_grad_by_total_norm_fp32")
    optimizer.clip_grad_by_total_norm_fp32 = clip_grads.clip_grad_by_total_norm_fp32


def _redirect_adam() -> None:
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = FusedAdam, False
        distributed.Adam, distributed.HAVE_APEX_OR_TE, distributed.USING_APEX_OPTIMIZER = (
            FusedAdam,
            True,
            True,
        )


REDIRECTIONS: tuple[Redirection, ...] = (
    Redirection(
        target="torch.compile, while megatron.core is imported",
        reason="it wraps small functions in it: on CPU that compiles C++ at the first call, and importing "
        "the compiler takes 40% of a process's start",
        apply=_import_uncompiled,
    ),
    Redirection(
        target="torch.cuda.current_device, set_device, synchronize",
        reason="buffers, rotary embedding, pipeline communication and timers name the current device",
        apply=_set_all(
            torch.cuda,
            {
                "current_device": _returning(_CPU),
                "set_device": _returning(None),
                "synchronize": _returning(None),
            },
        ),
    ),
    Redirection(
        target="torch.cuda.Stream, Event, current_stream, default_stream, stream",
        reason="megatron-core 0.19 orders copies with streams",
        apply=_set_all(
            torch.cuda,
            {
                "Stream": _NullStream,
                "Event": _NullStream,
                "current_stream": _returning(_NULL_STREAM),
                "default_stream": _returning(_NULL_STREAM),
                "stream": _returning(_NULL_STREAM),
            },
        ),
    ),
    Redirection(
        target="torch.Tensor.cuda",
        reason="schedules, optimizer and rotary embedding move small tensors to the GPU by name",
        apply=_set_all(torch.Tensor, {"cuda": lambda self, *args, **kwargs: self}),
    ),
    Redirection(
        target='torch.empty, zeros, ones, tensor, full, arange with device="cuda" or pin_memory=True',
        reason="device literals in schedules, clip_grads, optimizer, rope_utils; pinning needs a driver",
        apply=_redirect_factories,
    ),
    Redirection(
        target="torch.cuda.manual_seed, get_rng_state, set_rng_state; megatron's _set_cuda_rng_state",
        reason="the random tracker keeps GPU states; on CPU the default generator takes their place",
        apply=_redirect_random,
    ),
    Redirection(
        target="torch.Tensor.type(), inside three optimizer functions only",
        reason="they compare it with the literals torch.cuda.FloatTensor and its half-precision siblings",
        apply=_redirect_type_names,
    ),
    Redirection(
        target="megatron.core.optimizer.Adam",
        reason="the fall-back torch.optim.AdamW breaks checkpoints of the distributed optimizer: its `step` "
        "is tied between parameters after loading and advances once per parameter",
        apply=_redirect_adam,
    ),
)
"""Everything that `install` replaces on CPU."""

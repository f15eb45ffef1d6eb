"""Perceptual distance of pictures, LPIPS (Zhang et al. 2018): compared features of a trained network.

The weights of the features come with the package `lpips`, whose files are read without importing it: it would
import torchvision, and a torchvision built for another torch does not load. The backbone is torchvision's
VGG-16 or AlexNet.

Shapes: N pictures, C channels, H W height and width.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from emu3_megatron.errors import UserError, one_line

Network = Literal["vgg", "alex"]

CHANNEL_SHIFT = (-0.030, -0.088, -0.188)
"""Taken from the channels of pixels in [-1, 1], which are then divided by `CHANNEL_SCALE` (LPIPS 0.1)."""
CHANNEL_SCALE = (0.458, 0.448, 0.450)

LEAST_SIDE = 32
"""Least height and width: below it the last features have no pixel."""


def _vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    before = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        layers += [nn.MaxPool2d(2)] if layers else []
        for _ in range(count):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
    return nn.Sequential(*layers)


def _alexnet() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    )


@dataclass(frozen=True)
class _Backbone:
    """A network whose layers are numbered as in torchvision."""

    build: Callable[[], nn.Sequential]
    taps: tuple[int, ...]
    """Layers whose output is compared."""
    address: str
    """Where torchvision publishes the weights."""


_BACKBONES = {
    "vgg": _Backbone(_vgg16, (3, 8, 15, 22, 29), "https://download.pytorch.org/models/vgg16-397923af.pth"),
    "alex": _Backbone(
        _alexnet, (1, 4, 7, 9, 11), "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
    ),
}


class PerceptualDistance(nn.Module):
    """LPIPS 0.1, frozen. Gradients reach the pictures, never the weights.

    Args:
        network: the backbone, as `lpips` names it: ``vgg`` (training losses) or ``alex`` (reported figures).
        weights: file of the backbone's weights, as torchvision publishes it; where None, the file in torch's
            cache, else downloaded.
        key: what the caller calls `weights`, for the error.

    Raises:
        UserError: the package `lpips` is not installed, or the backbone's weights cannot be had.
    """

    def __init__(
        self, network: Network = "vgg", weights: str | Path | None = None, key: str = "weights"
    ) -> None:
        super().__init__()
        backbone = _BACKBONES[network]
        self.features = backbone.build()
        self.taps = backbone.taps
        self.features.load_state_dict(_backbone_weights(self.features, network, weights, key))
        for index, head_1C11 in enumerate(_heads(network)):
            self.register_buffer(f"head{index}", head_1C11)
        self.register_buffer("shift", torch.tensor(CHANNEL_SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(CHANNEL_SCALE)[:, None, None])
        self.eval().requires_grad_(False)

    def forward(self, x_NCHW: Tensor, y_NCHW: Tensor) -> Tensor:
        """Distances [N] of pictures in [-1, 1], of 32 pixels a side or more.

        Raises `ValueError` for smaller ones.
        """
        if min(x_NCHW.shape[-2:]) < LEAST_SIDE:
            raise ValueError(
                f"pictures are {list(x_NCHW.shape[-2:])}: LPIPS needs {LEAST_SIDE} pixels a side; "
                "give larger pictures or crops"
            )
        total_N = x_NCHW.new_zeros(len(x_NCHW))
        both_MCHW = (torch.cat((x_NCHW, y_NCHW)) - self.get_buffer("shift")) / self.get_buffer("scale")
        tapped = 0
        for index, layer in enumerate(self.features):
            both_MCHW = layer(both_MCHW)
            if index in self.taps:
                a_NCHW, b_NCHW = _unit_length(both_MCHW).chunk(2)
                head_1C11 = self.get_buffer(f"head{tapped}")
                total_N = total_N + ((a_NCHW - b_NCHW).square() * head_1C11).sum(1).mean((1, 2))
                tapped += 1
        return total_N


def _unit_length(x_NCHW: Tensor) -> Tensor:
    # The small term under the root keeps its gradient finite where all features are 0.
    return x_NCHW / ((x_NCHW.square().sum(1, keepdim=True) + 1e-24).sqrt() + 1e-10)


def _heads(network: Network) -> list[Tensor]:
    """Weights [1, C, 1, 1] of every tap's features."""
    package = find_spec("lpips")
    if package is None or package.origin is None:
        raise UserError(
            "the package lpips is not installed, and LPIPS takes its weights from it: "
            "pip install --no-deps lpips"
        )
    path = Path(package.origin).parent / "weights" / "v0.1" / f"{network}.pth"
    stored = torch.load(path, map_location="cpu", weights_only=True)
    return [stored[f"lin{index}.model.1.weight"] for index in range(len(_BACKBONES[network].taps))]


def _backbone_weights(
    features: nn.Sequential, network: Network, path: str | Path | None, key: str
) -> dict[str, Tensor]:
    name = _BACKBONES[network].address.rsplit("/", 1)[1]
    stored = _download(network, key) if path is None else _read(Path(path), name, key)
    found = {}
    for ours, like in features.state_dict().items():
        value = stored.get(f"features.{ours}")
        if value is None or value.shape != like.shape:
            seen = "missing" if value is None else f"of shape {list(value.shape)}"
            raise UserError(
                f"{key} {path}: tensor features.{ours} is {seen}, {network} needs {list(like.shape)}; give "
                f"torchvision's file {name}"
            )
        found[ours] = value.float()
    return found


def _read(path: Path, name: str, key: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{key} is {path}: no such file; give the path of torchvision's {name}")
    try:
        stored: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{key} {path}: not a file of weights ({one_line(error)[:80]}); give torchvision's {name}"
        ) from error
    return stored


def _download(network: Network, key: str) -> dict[str, Tensor]:
    address = _BACKBONES[network].address
    try:
        return torch.hub.load_state_dict_from_url(
            address, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except OSError as error:
        raise UserError(
            f"the weights of LPIPS's backbone cannot be downloaded from {address} ({one_line(error)}); fetch "
            f"the file on another machine and set {key} to its path"
        ) from error

"""LPIPS equals the package's own computation on the same weights, and says what it lacks."""

from __future__ import annotations

import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from emu3_megatron.errors import UserError
from emu3_megatron.vision import perceptual
from emu3_megatron.vision.perceptual import Network, PerceptualDistance

VGG = [(0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256), (14, 256, 256)]
VGG += [(17, 256, 512), (19, 512, 512), (21, 512, 512), (24, 512, 512), (26, 512, 512), (28, 512, 512)]
ALEX = [(0, 3, 64, 11), (3, 64, 192, 5), (6, 192, 384), (8, 384, 256), (10, 256, 256)]


def random_backbone(folder: Path, network: Network) -> Path:
    """A file in torchvision's names, with random weights that keep the scale of features."""
    generator = torch.Generator().manual_seed(0)
    stored = {"classifier.1.weight": torch.zeros(2, 2)}
    for index, before, after, *kernel in VGG if network == "vgg" else ALEX:
        side = kernel[0] if kernel else 3
        scale = (2 / (before * side * side)) ** 0.5
        shape = (after, before, side, side)
        stored[f"features.{index}.weight"] = torch.randn(shape, generator=generator) * scale
        stored[f"features.{index}.bias"] = torch.randn(after, generator=generator) * 0.1
    path = folder / f"{network}.pth"
    torch.save(stored, path)
    return path


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`lpips`, with torchvision stood in for: its networks as plain layers, which may not load here."""

    def alexnet(pretrained: bool) -> SimpleNamespace:
        pool, relu = nn.MaxPool2d(3, 2), nn.ReLU
        conv = [nn.Conv2d(3, 64, 11, 4, 2), nn.Conv2d(64, 192, 5, 1, 2)]
        conv += [nn.Conv2d(*widths, 3, 1, 1) for widths in ((192, 384), (384, 256), (256, 256))]
        layers = [
            conv[0],
            relu(),
            pool,
            conv[1],
            relu(),
            pool,
            conv[2],
            relu(),
            conv[3],
            relu(),
            conv[4],
            relu(),
        ]
        return SimpleNamespace(features=nn.Sequential(*layers))

    def vgg16(pretrained: bool) -> SimpleNamespace:
        layers = {index: nn.Conv2d(before, after, 3, 1, 1) for index, before, after in VGG}
        pools = (4, 9, 16, 23, 30)
        rest = {i: nn.MaxPool2d(2, 2) if i in pools else nn.ReLU() for i in range(31) if i not in layers}
        return SimpleNamespace(features=nn.Sequential(*(v for _, v in sorted((layers | rest).items()))))

    models = SimpleNamespace(alexnet=alexnet, vgg16=vgg16)
    torchvision = ModuleType("torchvision")
    torchvision.models = models
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    lpips = pytest.importorskip("lpips")
    yield lpips
    for name in [name for name in sys.modules if name.split(".")[0] == "lpips"]:
        del sys.modules[name]


@pytest.mark.parametrize("network", ["vgg", "alex"])
def test_it_is_the_packages_distance_on_the_same_weights(
    tmp_path: Path, package: ModuleType, network: Network
) -> None:
    path = random_backbone(tmp_path, network)
    theirs = package.LPIPS(net=network, pnet_rand=True, verbose=False)
    stored = torch.load(path, weights_only=True)
    for name, parameter in theirs.net.named_parameters():
        parameter.data = stored["features." + name.split(".", 1)[1]]
    ours = PerceptualDistance(network, path)
    torch.manual_seed(1)
    x, y = torch.rand(2, 2, 3, 40, 64).mul(2).sub(1)
    expected = theirs(x, y).flatten()
    assert expected.min() > 0.01
    torch.testing.assert_close(ours(x, y), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(ours(x, x), torch.zeros(2))


def test_gradients_reach_the_pictures_and_are_finite_where_features_are_nothing(tmp_path: Path) -> None:
    distance = PerceptualDistance("alex", random_backbone(tmp_path, "alex"))
    for layer in distance.features:
        if isinstance(layer, nn.Conv2d):
            layer.bias.data.fill_(-1.0)
    x = torch.zeros(1, 3, 40, 40, requires_grad=True)
    distance(x, torch.zeros(1, 3, 40, 40)).sum().backward()
    assert torch.isfinite(x.grad).all()
    x = torch.rand(1, 3, 40, 40, requires_grad=True)
    distance(x, torch.zeros(1, 3, 40, 40)).sum().backward()
    assert x.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in distance.parameters())


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match=r"cannot be downloaded from .*vgg16.*set loss\.key to its path"):
        PerceptualDistance("vgg", key="loss.key")
    with pytest.raises(UserError, match=r"loss\.key is .*none\.pth: no such file"):
        PerceptualDistance("vgg", tmp_path / "none.pth", key="loss.key")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(UserError, match="not a file of weights"):
        PerceptualDistance("vgg", tmp_path / "text.pth")
    part = {"features.0.weight": torch.zeros(64, 3, 3, 3), "features.0.bias": torch.zeros(64)}
    torch.save(part, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"features\.2\.weight is missing, vgg needs \[64, 64, 3, 3\]"):
        PerceptualDistance("vgg", tmp_path / "part.pth")
    path = random_backbone(tmp_path, "alex")
    with pytest.raises(ValueError, match=r"\[16, 40\]: LPIPS needs 32 pixels"):
        PerceptualDistance("alex", path)(torch.zeros(1, 3, 16, 40), torch.zeros(1, 3, 16, 40))
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps lpips"):
        PerceptualDistance("alex", path)

"""Weights of one byte."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from emu3_megatron.errors import UserError
from emu3_megatron.inference import few_rows
from emu3_megatron.inference.quantized import FORMATS, Quantized, quantize
from emu3_megatron.inference.sampling import Sampling
from tests.inference import worlds
from tests.inference.test_engine import image_request


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with worlds.one_process():
        yield


def widened(matrix: Quantized) -> torch.Tensor:
    """The matrix, fp32."""
    return matrix.values.float() * matrix.scales[:, None]


@pytest.mark.parametrize("name", FORMATS)
def test_entries_are_the_nearest_of_their_row(name: str) -> None:
    """Half a step of the row's largest entry in int8, three bits of mantissa in fp8; a row of zeros stays."""
    weight = (
        torch.randn(50, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 50)[:, None]
    )
    weight[7] = 0
    found = widened(Quantized.of(weight, name))
    largest = weight.abs().amax(dim=1, keepdim=True)
    allowed = largest / 254 if name == "int8" else weight.abs() / 16 + largest * 2e-5
    assert ((found - weight).abs() <= allowed * 1.001).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 17, 32, 40])
@pytest.mark.parametrize(("columns", "width"), [(30, 64), (101, 37), (3, 1)])
def test_products_are_those_of_the_widened_matrix(name: str, rows: int, columns: int, width: int) -> None:
    matrix = Quantized.of(torch.randn(columns, width), name)
    x = torch.randn(2, rows, width) if rows < 9 else torch.randn(rows, width)
    expected = x.double() @ widened(matrix).double().T
    torch.testing.assert_close(matrix.product(x), expected.float(), atol=1e-4, rtol=1e-4)
    some = matrix[1:3]
    torch.testing.assert_close(some.product(x), expected[..., 1:3].float(), atol=1e-4, rtol=1e-4)
    half = matrix.product(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected.float(), atol=0.3, rtol=0.05)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("supported", "biased"), [(True, False), (False, False), (True, True)])
def test_a_model_of_quantized_weights_computes_what_the_widened_ones_do(
    name: str, supported: bool, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are those of a model whose weights were rounded alike, with the kernel (where there is one) and
    without, with biases (of models that began as Qwen2) and without; the weights themselves are gone.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from emu3_megatron.inference.decoder import CachedDecoder
    from emu3_megatron.inference.engine import Engine

    if not supported:
        monkeypatch.setattr(few_rows, "_SUPPORTED", False)
    config = worlds.model_config(qkv_bias=biased)
    rounded, small = worlds.tiny_model(config), worlds.tiny_model(config)
    for model in (rounded, small):
        for layer in model.decoder.layers if biased else ():
            bias = layer.self_attention.linear_qkv.bias
            bias.data = torch.linspace(-2, 2, len(bias))
    for module in rounded.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.weight.data = widened(Quantized.of(module.weight, name))
    before = sum(parameter.nbytes for parameter in small.parameters())
    quantize(small, name)
    assert sum(parameter.nbytes for parameter in small.parameters()) < before / 2
    size = worlds.VOCABULARY.size
    tokens = torch.randint(size, (3, 12), generator=torch.Generator().manual_seed(0))
    decoders = [CachedDecoder(model, max_rows=3, max_length=20) for model in (rounded, small)]
    for first, last in ((0, 10), (10, 11), (11, 12)):  # a prompt, then steps
        starts, counts = torch.full((3,), first), torch.full((3,), last - first)
        expected, found = (
            decoder.logits(decoder.feed(tokens[:, first:last], starts, counts), [(0, size)])
            for decoder in decoders
        )
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    request = image_request("red", 2, 3, sampling=Sampling(guidance=3.0), seed=3)
    (completion,) = Engine(small, worlds.dialect()).generate([request])
    assert completion.ids[-1] == worlds.VOCABULARY.eoi


def test_foreign_projections_are_refused_before_anything_is_changed() -> None:
    """Transformer Engine's layers would keep their weights, and nobody would be told."""
    model = worlds.tiny_model()
    first, last = model.decoder.layers
    last.mlp.linear_fc2 = torch.nn.Linear(48, 32)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.linear_fc2 is a Linear"):
        quantize(model, "int8")
    assert first.self_attention.linear_qkv.weight is not None


def test_another_format_is_refused() -> None:
    with pytest.raises(UserError, match="int4"):
        quantize(torch.nn.Linear(2, 2), "int4")

"""The product of a few rows with a large matrix."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from emu3_megatron import _kernels
from emu3_megatron.inference import few_rows

needs_kernel = pytest.mark.skipif(not _kernels.few_rows_supported(), reason="this machine has no AVX-512")


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 16, 17, 32, 33])
@pytest.mark.parametrize(("columns", "width"), [(4096, 70), (1031, 257), (5, 60_000)])
def test_equal_to_the_exact_product(rows: int, columns: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=generator)
    weight = torch.randn(columns, width, generator=generator)
    expected = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(few_rows.linear(x, weight), expected, atol=1e-5 + 6e-8 * width, rtol=1e-5)


@needs_kernel
@pytest.mark.parametrize("rows", [1, 5, 13, 20, 40])
@pytest.mark.parametrize("threads", [1, 3, 64])
@pytest.mark.parametrize(("columns", "width"), [(1, 1), (2, 17), (25, 16), (53, 40)])
def test_the_kernel_takes_any_size_on_any_number_of_threads(
    rows: int, threads: int, columns: int, width: int
) -> None:
    x, weight = torch.randn(rows, width), torch.randn(columns, width)
    product = torch.full((rows, columns), float("nan"))
    _kernels.few_rows(x.numpy(), weight.numpy(), product.numpy(), threads)
    torch.testing.assert_close(product, x @ weight.T, atol=1e-5, rtol=1e-5)


def test_other_types_devices_and_strides_are_left_to_torch() -> None:
    x, weight = torch.randn(2, 3, 512, requires_grad=True), torch.randn(512, 1024, requires_grad=True)
    with torch.no_grad():
        torch.testing.assert_close(few_rows.linear(x, weight.T), x @ weight)
        plain, wide = few_rows.linear(x, weight.T.contiguous()), (x.double() @ weight.double())
        torch.testing.assert_close(plain.double(), wide, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(few_rows.linear(x.double(), weight.T.double()), wide)


@needs_kernel
def test_arrays_that_do_not_fit_are_refused() -> None:
    x, weight, product = torch.randn(3, 4), torch.randn(5, 4), torch.empty(3, 5)
    for arrays, threads in (
        ((x, weight, torch.empty(3, 6)), 1),
        ((x[:, :3].contiguous(), weight, product), 1),
        ((x[0], weight, product), 1),
        ((x[:0], weight, product[:0]), 1),
        ((x, weight, product), 0),
    ):
        with pytest.raises(ValueError, match="few_rows takes"):
            _kernels.few_rows(*(array.numpy() for array in arrays), threads)
    with pytest.raises(TypeError):
        _kernels.few_rows(x.numpy(), weight.numpy(), torch.empty(5, 3).T.numpy(), 1)


SHORT_OF_MEMORY = """
import resource, sys
import numpy as np
from emu3_megatron import _kernels

rows = int(sys.argv[1])
rng = np.random.default_rng(0)
x, weight = rng.standard_normal((rows, 40), dtype=np.float32), rng.integers(-9, 9, (200, 40)).astype(np.int8)
product = np.empty((rows, 200), dtype=np.float32)
with open("/proc/self/statm") as stream:
    size = int(stream.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 20), resource.RLIM_INFINITY))  # no room for a stack
_kernels.few_rows_int8(x, weight, np.ones(200, dtype=np.float32), product, 64)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert np.allclose(product, x @ weight.T.astype(np.float32), rtol=1e-4, atol=1e-4)
"""


@needs_kernel
@pytest.mark.parametrize("rows", [4, 20])
def test_parts_that_get_no_thread_are_computed_all_the_same(rows: int) -> None:
    subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY, str(rows)], check=True)

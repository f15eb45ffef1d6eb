import numpy as np
import numpy.typing as npt

def pack(
    lengths: npt.NDArray[np.int32],
    splittable: npt.NDArray[np.uint8] | None,
    *,
    capacity: int,
    align: int,
    online: bool,
    open_windows: int,
    fill: bool,
    min_piece: int,
) -> tuple[
    npt.NDArray[np.int64],
    npt.NDArray[np.int32],
    npt.NDArray[np.int32],
    npt.NDArray[np.int32],
    npt.NDArray[np.int32],
]:
    """Pack documents into windows: (window_offsets, document, start, length, dropped)."""

def permute(positions: npt.NDArray[np.int64], size: int, key: int) -> npt.NDArray[np.int64]:
    """Image of each position under the keyed permutation of range(size)."""

def map_file(descriptor: int, size: int) -> npt.NDArray[np.uint8]:
    """Read-only uint8 array over the first `size` bytes of an open file, which may be closed after."""

def describe(
    index: npt.NDArray[np.uint8],
    documents: npt.NDArray[np.int64],
    *,
    num_sequences: int,
    num_documents: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(length, caption, kind) of each document from the bytes of its shard's index."""

def few_rows_supported() -> bool:
    """Whether this machine can run `few_rows`: it needs AVX-512."""

def few_rows(
    x: npt.NDArray[np.float32], w: npt.NDArray[np.float32], y: npt.NDArray[np.float32], threads: int
) -> None:
    """Fill `y` ``[R, C]`` with the product of `x` ``[R, K]`` and the rows of `w` ``[C, K]``, all contiguous.

    For few rows (up to some 32) of a large matrix. The sums of a row do not depend on the other rows' values.
    """

def few_rows_int8(
    x: npt.NDArray[np.float32],
    w: npt.NDArray[np.int8],
    scales: npt.NDArray[np.float32],
    y: npt.NDArray[np.float32],
    threads: int,
) -> None:
    """As `few_rows`, with `w` int8 and a factor for each of its rows."""

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

def convert_420(
    luma: npt.NDArray[np.uint8],
    cb: npt.NDArray[np.uint8],
    cr: npt.NDArray[np.uint8],
    *,
    coefficients: tuple[int, int, int, int, int, int],
    left: bool,
    vertical: int,
) -> npt.NDArray[np.uint8]:
    """A picture of YCbCr 4:2:0 as RGB, uint8 ``[H, W, 3]``, H and W even; planes may have padded rows."""

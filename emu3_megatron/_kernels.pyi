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

def uniform(positions: npt.NDArray[np.int64], key: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each position, the same for the same key and position."""

def take_windows(
    windows: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
    document: npt.NDArray[np.int32],
    start: npt.NDArray[np.int32],
    length: npt.NDArray[np.int32],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Windows of a packing in another order: (window_offsets, document, start, length)."""

class ShardIndices:
    """The indices of a dataset's shards: ``starts`` holds the first document of each, then their number."""

    def __init__(self, starts: npt.NDArray[np.int64]) -> None: ...
    def set(
        self,
        shard: int,
        index: npt.NDArray[np.uint8],
        checksums: npt.NDArray[np.uint8],
        verified: npt.NDArray[np.bool_],
        *,
        num_sequences: int,
        page_bytes: int,
    ) -> None:
        """Give a shard's index, its sequences' checksums, and a flag for each page that may be read.

        The first index given stays.
        """

    def describe(
        self, documents: npt.NDArray[np.int64], chosen: npt.NDArray[np.uint8] | None = None
    ) -> tuple[
        npt.NDArray[np.int64],
        npt.NDArray[np.int64],
        npt.NDArray[np.int64],
        npt.NDArray[np.int32],
        list[tuple[int, int]],
    ]:
        """(length, caption, kind, captions, missing); where anything is missing, nothing else counts.

        What is missing is (shard, page); page -1 says that the shard has no index yet.
        """

    def locate(
        self, documents: npt.NDArray[np.int64], chosen: npt.NDArray[np.uint8] | None = None
    ) -> tuple[
        npt.NDArray[np.int64],
        npt.NDArray[np.int64],
        npt.NDArray[np.int64],
        npt.NDArray[np.int64],
        npt.NDArray[np.int32],
        npt.NDArray[np.int8],
        npt.NDArray[np.uint32],
        list[tuple[int, int]],
    ]:
        """(shard, segments, sequence, byte, lengths, modes, checksums, missing): where documents lie."""

class WindowWriter:
    """Reads documents into a window's arrays, which it keeps and writes in place."""

    def __init__(
        self,
        tokens: npt.NDArray[np.int64],
        labels: npt.NDArray[np.int64],
        modality: npt.NDArray[np.uint8],
        classes: npt.NDArray[np.uint8],
        *,
        vocabulary_size: int,
        bos_id: int,
        eos_id: int,
    ) -> None: ...
    def add(
        self,
        *,
        files: npt.NDArray[np.int32],
        bytes: npt.NDArray[np.int64],
        segments: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int32],
        modes: npt.NDArray[np.int8],
        checksums: npt.NDArray[np.uint32],
        caption_after: npt.NDArray[np.bool_],
        caption_tokens: npt.NDArray[np.int32],
        start: npt.NDArray[np.int32],
        length: npt.NDArray[np.int32],
        at: npt.NDArray[np.int64],
        bos: bool,
        eos: bool,
    ) -> tuple[int, int, int]:
        """Add pieces; (piece, kind of damage, where) of the first that is damaged, kind 0 for none."""

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

def convert_420(
    luma: npt.NDArray[np.uint8],
    cb: npt.NDArray[np.uint8],
    cr: npt.NDArray[np.uint8],
    rgb: npt.NDArray[np.uint8],
    *,
    coefficients: tuple[int, int, int, int, int, int],
    left: bool,
    vertical: int,
) -> None:
    """Fill `rgb`, uint8 ``[H, W, 3]``, H and W even, with a picture of YCbCr 4:2:0; planes may be padded."""

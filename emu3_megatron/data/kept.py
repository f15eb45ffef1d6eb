"""Arrays kept in a cache's folder: published whole, and checked to the last byte before one is used."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Mapping
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt

from emu3_megatron.files import atomic_write


def keep_arrays(path: str | os.PathLike[str], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Publish arrays as one file in numpy's ``.npz`` format, in which each has a CRC-32.

    The file is not flushed to the disk: `read_arrays` gives nothing of one that a power cut damaged.
    """
    contents = BytesIO()
    np.savez(contents, allow_pickle=False, **arrays)
    with atomic_write(path, durable=False) as stream:
        stream.write(contents.getbuffer())


def read_arrays(path: str | os.PathLike[str], names: Iterable[str]) -> dict[str, npt.NDArray[Any]] | None:
    """The arrays of a file by name; None where it is missing, or any byte that matters is damaged.

    Args:
        path: The file.
        names: Of the arrays that it must hold.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # zipfile compares a CRC-32 when the last byte of a member is read, and `numpy.load` reads as many
            # as the array's header asks for: a damaged header would never be found. So each is read whole.
            members = {name: archive.read(f"{name}.npy") for name in names}
        return {
            name: np.lib.format.read_array(BytesIO(data), allow_pickle=False)
            for name, data in members.items()
        }
    except Exception:  # what zipfile raises for a damaged directory depends on the bit; the file is no good
        return None

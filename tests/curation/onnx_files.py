"""ONNX files written by hand (onnx.proto3), so that the tests need no package that writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _node(operator: str, inputs: list[str], output: str) -> bytes:
    names = b"".join(_field(1, name) for name in inputs)
    return _field(1, names + _field(2, output) + _field(4, operator))


def _value(number: int, name: str, shape: list[int | str]) -> bytes:
    dimensions = b"".join(
        _field(1, _field(1, side) if isinstance(side, int) else _field(2, side)) for side in shape
    )
    tensor = _field(1, 1) + _field(2, dimensions)
    return _field(number, _field(1, name) + _field(2, _field(1, tensor)))


def write_features(path: Path, weight: npt.NDArray[np.float32], *, side: int = 32) -> Path:
    """A model from pictures ``[N, 3, side, side]`` to ``[N, D]``: the mean of each channel times `weight`
    ``[3, D]``."""
    initializer = b"".join(_field(1, side_) for side_ in weight.shape) + _field(2, 1) + _field(8, "weight")
    initializer += _field(9, weight.astype("<f4").tobytes())
    graph = (
        _node("GlobalAveragePool", ["pixels"], "pooled")
        + _node("Flatten", ["pooled"], "flat")
        + _node("MatMul", ["flat", "weight"], "features")
        + _field(2, "graph")
        + _field(5, initializer)
        + _value(11, "pixels", ["n", 3, side, side])
        + _value(12, "features", ["n", weight.shape[1]])
    )
    path.write_bytes(_field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 13)))
    return path

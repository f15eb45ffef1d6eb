"""The packer in plain Python: slow, short, and the definition of what csrc/packer_*.cpp must answer."""

from __future__ import annotations

from collections.abc import Sequence

Piece = tuple[int, int, int]
"""Document, first token, tokens."""


class _Window:
    def __init__(self, room: int) -> None:
        self.room, self.touched, self.pieces = room, 0, list[Piece]()


def pack_reference(
    lengths: Sequence[int], capacity: int, *, splittable: Sequence[bool] | None = None, align: int = 1,
    policy: str = "online", open_windows: int = 1024, fill: bool = False, min_piece: int = 64,
) -> tuple[list[list[Piece]], list[int]]:  # fmt: skip
    """The windows as lists of pieces, and the dropped documents; arguments as `packing.pack`."""
    units = [-(-length // align) for length in lengths]
    whole, least = (
        capacity // align,
        max(1, min((min_piece + 2 * (align - 1)) // align, capacity // align // 2)),
    )
    opened: list[_Window] = []  # the open windows, oldest first; offline, all of them
    closed: list[_Window] = []
    clock = iter(range(1 << 60))

    def put(window: _Window | None, document: int, start: int, size: int) -> int:
        if window is None:
            if policy == "online" and len(opened) == open_windows:
                closed.append(opened.pop(0))
            opened.append(window := _Window(whole))
        window.pieces.append((document, start * align, min(size * align, lengths[document] - start * align)))
        window.room, window.touched = window.room - size, next(clock)
        if policy == "online" and window.room == 0:
            opened.remove(window)
            closed.append(window)
        return start + size

    def tightest(size: int) -> _Window | None:  # among equal rooms, the window touched last
        return min((w for w in opened if w.room >= size), key=lambda w: (w.room, -w.touched), default=None)

    def pour(document: int, start: int = 0) -> None:
        while (size := units[document] - start) and tightest(size) is None:
            hole = max((w for w in opened if w.room), key=lambda w: (w.room, w.touched), default=None)
            if hole is not None and hole.room >= least and size >= 2 * least:
                start = put(hole, document, start, min(hole.room, size - least))
            elif size > whole:
                start = put(None, document, start, min(whole, size - least))
            else:
                break
        put(tightest(size), document, start, size)

    may_split = [bool(splittable is not None and splittable[i]) for i in range(len(lengths))]
    dropped = [i for i, size in enumerate(units) if size > whole and not may_split[i]]
    kept = [i for i in range(len(lengths)) if units[i] <= whole or may_split[i]]
    poured = [i for i in kept if fill and may_split[i]]
    items = []  # (document, first unit, units) of what is placed whole
    for document in kept:
        start, parts = 0, [(document, 0, units[document])]
        while not (fill and may_split[document]) and parts[-1][2] > whole:
            size = parts.pop()[2]
            parts.append((document, start, taken := min(whole, size - least)))
            parts.append((document, start := start + taken, size - taken))
        items += [part for part in parts if not (fill and may_split[document])] or [(document, 0, 0)]
    if policy == "offline":
        # Parts of split documents stand after the whole documents of the same size.
        items = [item for item in items if item[2]]
        items.sort(key=lambda item: (-item[2], item[2] != units[item[0]]))
        poured.sort(key=lambda document: -units[document])
    for document, start, size in items:
        if size:
            put(tightest(size), document, start, size)
        else:
            pour(document)
    for document in poured if policy == "offline" else ():
        pour(document)
    return [window.pieces for window in closed + opened], dropped

"""A plan in words, before a run: what windows hold, what is lost and why, and what would help."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from emu3_megatron.data.bounds import least_windows, least_windows_with_cuts
from emu3_megatron.data.mixture import Drawn
from emu3_megatron.data.plan import Plan
from emu3_megatron.data.reader import Kind
from emu3_megatron.grammar import Modality

EXAMINED_BLOCKS = 4
"""Blocks that are packed again to say what block ends cost and what the best fill would be."""

SAMPLED_WINDOWS = 256
"""Default windows read to count tokens by modality."""

FULL = 0.999
"""A fill from which on nothing is to be gained."""


def report(plan: Plan, num_windows: int, *, sampled: int = SAMPLED_WINDOWS) -> Iterator[str]:
    """Lines that describe the first windows of a plan; blocks that are missing are built (and cached).

    Args:
        plan: The plan.
        num_windows: Windows to describe, at least 1.
        sampled: Windows, evenly spaced, that are read to count tokens by modality.
    """
    counted = plan.statistics(num_windows)
    places = num_windows * plan.context_length
    yield f"plan         {plan.fingerprint[:16]}, {plan.policy}{', fill' if plan.fill else ''}"
    yield f"windows      {num_windows:,} of {plan.context_length:,} tokens"
    yield f"fill         {counted.fill:.4%} ({counted.tokens:,} tokens)"
    yield f"padding      {counted.padding_tail / places:.4%} at the ends of windows"
    yield f"             {counted.padding_alignment / places:.4%} by alignment to {plan.alignment}"
    yield f"documents    {counted.documents - counted.splits:,}; texts cut {counted.splits:,} times"
    yield f"too long     {counted.dropped:,} documents fit no window"
    yield from (f"             {name}" for name in counted.dropped_names)
    yield f"captions cut {counted.captions_cut:,}"
    yield from (f"             {name}" for name in counted.captions_cut_names)
    weights = sum(source.weight for source in plan.mixture.sources)
    for source in plan.mixture.sources:
        tokens = counted.tokens_per_source[source.name]
        yield (
            f"source       {source.name}: {tokens:,} tokens, {tokens / max(1, counted.tokens):.2%} (weight "
            f"{source.weight / weights:.2%}), {counted.documents_per_source[source.name]:,} documents, "
            f"{counted.epochs_per_source[source.name]:.3f} epochs"
            + (f", {len(source.taken_down):,} taken down" if len(source.taken_down) else "")
        )
    if plan.mixture.takedown is not None:
        yield f"             {plan.mixture.takedown}"
    yield from _modalities(plan, num_windows, sampled)
    yield from advice(plan)


def _modalities(plan: Plan, num_windows: int, sampled: int) -> Iterator[str]:
    chosen = np.unique(np.linspace(0, num_windows - 1, min(sampled, num_windows)).astype(np.int64))
    counts = np.zeros(len(Modality), dtype=np.int64)
    for index in chosen.tolist():
        counts += np.bincount(plan.window(index).modality, minlength=len(Modality))
    targets = int(counts.sum() - counts[Modality.PADDING])
    for modality in Modality:
        if modality != Modality.PADDING and counts[modality]:
            yield (
                f"modality     {modality.name.lower()}: {counts[modality] / max(1, targets):.3%} of the "
                f"targets of {len(chosen)} windows"
            )


def advice(plan: Plan) -> Iterator[str]:
    """Lines on the fill: what block ends cost, what is possible, which share of text would fill the holes."""
    blocks = [plan.draws(number)[1] for number in range(EXAMINED_BLOCKS)]
    separate = sum(plan.block(number).num_windows for number in range(EXAMINED_BLOCKS))
    together = Drawn.concatenate(blocks)
    joined = plan.pack(together.decided.length, together.kind).num_windows
    yield (
        f"block ends   {max(0.0, 1 - joined / max(1, separate)):.4%} of the windows, for packing every "
        f"{plan.block_draws:,} draws on their own"
    )
    units = plan.context_length // plan.alignment
    size = -(-together.decided.length // plan.alignment)
    text = together.kind == Kind.TEXT
    spans = size[~text & (size <= units)]
    texts = int(size[text].sum())
    total = int(spans.sum()) + texts
    alone = least_windows(spans, units)
    whole = least_windows(np.concatenate([spans, _whole_windows(size[text], units)]), units)
    possible = least_windows_with_cuts(spans, texts, units)
    yield f"possible     {total / (max(1, whole) * units):.4%} fill with whole documents, at most"
    yield f"             {total / (max(1, possible) * units):.4%} if texts may be cut anywhere (`fill`)"
    have, need = texts / max(1, total), 1 - int(spans.sum()) / max(1, alone * units)
    if total / (max(1, possible) * units) < FULL:
        yield (
            f"advice       images and videos alone leave {need:.1%} of their windows empty; a share of text "
            f"of {need:.1%} of the tokens (now {have:.1%}), with `fill`, would fill them"
        )
    elif not plan.fill and total / (max(1, whole) * units) < FULL:
        yield f"advice       there is enough text ({have:.1%} of the tokens): switch `fill` on"


def _whole_windows(sizes: npt.NDArray[np.int64], units: int) -> npt.NDArray[np.int64]:
    """Texts longer than a window as full windows and a rest."""
    rest = sizes % units
    return np.concatenate([np.full(int((sizes // units).sum()), units), rest[rest > 0]])

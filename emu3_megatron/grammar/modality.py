"""The class of every id: what loss weights and metrics are kept by."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from emu3_megatron.grammar.document import Modality
from emu3_megatron.vocabulary import Vocabulary

Modalities = npt.NDArray[np.uint8]


@lru_cache(maxsize=16)
def span_classes(vocabulary: Vocabulary) -> Modalities:
    """Class (uint8 ``[vision_offset]``) of every id below the vision ids, in a span: text is meta text."""
    classes = np.full(vocabulary.vision_offset, Modality.CONTROL, dtype=np.uint8)
    classes[: vocabulary.text_size] = Modality.META
    classes[[vocabulary.eol, vocabulary.eof]] = Modality.BREAK
    classes[vocabulary.pad] = Modality.PADDING
    classes.setflags(write=False)
    return classes


def span_modality(ids: npt.NDArray[np.integer], vocabulary: Vocabulary) -> Modalities:
    """Classes (uint8 ``[N]``, values of `Modality`) of the ids ``[N]`` of one or more whole spans.

    Inside a span text ids stand only between BOI and IMG, so the id alone decides: text ids are META, vision
    ids VISION, EOL and EOF BREAK, the pad id PADDING, all else CONTROL. Raises `ValueError` for an id outside
    the vocabulary.
    """
    ids = np.asarray(ids)
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary.size:
        raise ValueError(
            f"span ids must lie in [0, {vocabulary.size}) of vocabulary {vocabulary.name!r}, "
            f"got {int(ids.min())} to {int(ids.max())}"
        )
    classes = np.full(ids.shape, Modality.VISION, dtype=np.uint8)
    others = np.flatnonzero(ids < vocabulary.vision_offset)
    classes[others] = span_classes(vocabulary)[ids[others]]
    return classes


def text_modality(length: int) -> Modalities:
    """Classes (uint8 ``[length]``) of a text segment: all TEXT."""
    return np.full(length, Modality.TEXT, dtype=np.uint8)

"""What is asked of the engine, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from emu3_megatron.inference.sampling import Sampling

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to continue. Raises `ValueError` when something is missing or out of range."""

    prompt: Ids
    """Token ids from BOS on; must be a prefix of the grammar, but for `history`."""
    history: int = 0
    """Ids of `prompt` that are earlier turns of a conversation, BOS included: each turn is a document that
    ends with EOS, and only the first has a BOS. What follows continues as after BOS."""
    negative_prompt: Ids | None = None
    """Prefix of the unconditional stream; needed exactly when ``sampling.guidance`` is not 1. It must end in
    the same place of the grammar as `prompt` (same span, same size)."""
    sampling: Sampling = field(default_factory=Sampling)
    """How tokens are drawn."""
    seed: int = 0
    """The result depends on prompt, settings and this seed, not on the other requests."""
    max_new_tokens: int = 1024
    """Stop after this many tokens."""
    stop: frozenset[int] = frozenset()
    """Stop after any of these ids; EOS always stops."""
    forbidden: frozenset[int] = frozenset()
    """Ids never to produce, though the grammar allows them (BOI for a caption)."""

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        if len(self.prompt) == 0:
            raise ValueError("a request needs a prompt of at least one token (BOS)")
        if not 0 <= self.history < len(self.prompt):
            raise ValueError(
                f"history={self.history} must be less than the {len(self.prompt)} ids of the prompt"
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.guided and self.negative_prompt is None:
            raise ValueError(
                f"guidance={self.sampling.guidance} needs a negative_prompt; guidance=1 turns it off"
            )

    @property
    def guided(self) -> bool:
        """Whether an unconditional stream is needed."""
        return self.sampling.guidance != 1.0

    @property
    def rows(self) -> int:
        """Cache rows the request occupies."""
        return 2 if self.guided else 1

    @property
    def length(self) -> int:
        """Most positions any of its rows can need."""
        prompts = [len(self.prompt)]
        if self.guided and self.negative_prompt is not None:
            prompts.append(len(self.negative_prompt))
        return max(prompts) + self.max_new_tokens


@dataclass(frozen=True)
class Completion:
    """What a request produced."""

    ids: Ids
    """The new tokens, without the prompt."""
    finished: bool
    """False when it was cut off by ``max_new_tokens``."""
    sampled: int
    """Tokens that were drawn; the others were forced by the grammar."""

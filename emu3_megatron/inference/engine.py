"""The generation engine: many requests through one model, under the document grammar.

What a request may produce next is asked of the grammar's decoding automaton. Forced tokens (row ends, the end
of a span) are never sampled: they are fed together with the token before them. For everything else, logits
are computed for the allowed ids only. A guided request occupies two rows of the same batch, one with its
prompt and one with its negative prompt. Rows that finish are reused for waiting requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from emu3_megatron.grammar import Dialect
from emu3_megatron.inference.decoder import CachedDecoder
from emu3_megatron.inference.memory import Budget
from emu3_megatron.inference.request import Completion, Request
from emu3_megatron.inference.session import Session

__all__ = ["Completion", "Engine", "Request"]


class Engine:
    """Generates with one model; keeps nothing between calls but the model and the grammar's masks.

    Under tensor parallelism every rank of the group makes the same calls and gets the same results.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        dialect: Dialect,
        *,
        max_rows: int = 128,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        """`max_rows` bounds the batch (guided requests count twice); free memory bounds it too.

        `cache_dtype` is that of keys and values, and so of attention; by default the model's.
        """
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows} must be at least 1")
        self.model = model
        self.dialect = dialect
        self.max_rows = max_rows
        self._cache_dtype = cache_dtype
        self._automaton = dialect.automaton()

    def session(self, *, max_rows: int, max_length: int) -> Session:
        """A session that takes requests of up to `max_length` positions at any time, for a server.

        The model must be in evaluation mode for as long as it is used. Raises `UserError` where the memory
        does not hold it.
        """
        Budget(self.model, self._cache_dtype).rows(max_rows, max_rows, max_length)
        return self._session(max_rows, max_length)

    def _session(self, max_rows: int, max_length: int) -> Session:
        return Session(
            CachedDecoder(
                self.model, max_rows=max_rows, max_length=max_length, cache_dtype=self._cache_dtype
            ),
            self._automaton,
            eos=self.dialect.vocabulary.eos,
        )

    def generate(
        self, requests: Sequence[Request], *, progress: Callable[[int], object] | None = None
    ) -> list[Completion]:
        """Run all requests; results come in their order.

        Args:
            requests: any mixture of tasks, sizes and settings.
            progress: called with the number of requests that have just finished.

        Raises:
            ValueError: a prompt is no prefix of the grammar (the grammar's error tells the position), or a
                request alone is more than the free memory holds (`UserError`).
        """
        if not requests:
            return []
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return self._complete(requests, progress)
        finally:
            self.model.train(was_training)

    def _complete(
        self, requests: Sequence[Request], progress: Callable[[int], object] | None
    ) -> list[Completion]:
        """Work until every request has its result, as many at a time as the memory holds."""
        length = max(request.length for request in requests)
        wanted = min(self.max_rows, sum(request.rows for request in requests))
        least = min(wanted, max(request.rows for request in requests))
        rows = Budget(self.model, self._cache_dtype).rows(wanted, least, length)
        session = self._session(rows, length)
        # neighbours of similar length waste the least padding
        order = sorted(range(len(requests)), key=lambda i: (requests[i].length, len(requests[i].prompt)))
        tickets = {index: session.submit(requests[index]) for index in order}
        finished = 0
        while session.busy:
            session.step()
            if progress is not None and (now := sum(ticket.done for ticket in tickets.values())) > finished:
                progress(now - finished)
                finished = now
        return [tickets[index].completion() for index in range(len(requests))]

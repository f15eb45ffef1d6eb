"""A session of the engine: requests come and go, and share the rows of one cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from emu3_megatron.grammar import Allowed, Automaton, State
from emu3_megatron.inference.decoder import MAX_RUN, CachedDecoder, Ranges
from emu3_megatron.inference.memory import PREFILL_SCORES, PREFILL_TOKENS
from emu3_megatron.inference.request import Completion, Ids, Request
from emu3_megatron.inference.sampling import UniformStream, guide, sample

OnTokens = Callable[[list[int]], object]
"""Called with the new tokens of a request, as they come."""


@lru_cache(maxsize=1024)
def allowed_ranges(allowed: Allowed, forbidden: frozenset[int]) -> Ranges:
    """The ids that may come next, as ranges.

    Raises `ValueError` where every allowed id is forbidden.
    """
    ids = allowed.ids()
    ids = ids[~np.isin(ids, list(forbidden))]
    if not len(ids):
        raise ValueError(
            f"the request forbids all of {sorted(forbidden)}, and the grammar allows nothing else"
        )
    cuts = np.flatnonzero(np.diff(ids) != 1) + 1
    return tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(ids, cuts))


class Ticket:
    """A request under way."""

    def __init__(self, request: Request, automaton: Automaton, eos: int, on_tokens: OnTokens | None) -> None:
        self.request = request
        self.done = False
        """Whether there will be no more tokens."""
        self.finished = False
        """Whether it came to an end, and was neither cut off nor cancelled."""
        self.new: list[int] = []
        """New tokens so far."""
        self.pending: list[int] = []
        """Those of them not yet fed."""
        self.state = _start(automaton, request, eos)
        self.prompts = [request.prompt]
        if request.guided and request.negative_prompt is not None:
            automaton.start(request.negative_prompt)
            self.prompts.append(request.negative_prompt)
        self.lengths = [0] * len(self.prompts)
        """Positions of each row that are in the cache."""
        self._sampled = self._reported = 0
        self._automaton = automaton
        self._stop = request.stop | {eos}
        self._on_tokens = on_tokens
        self._uniforms = UniformStream(request.seed)
        self._follow_forced()

    def completion(self) -> Completion:
        """What there is so far."""
        return Completion(np.asarray(self.new, dtype=np.int64), self.finished, self._sampled)

    def uniform(self) -> float:
        """The next random number."""
        return self._uniforms.next()

    def allowed(self) -> Allowed:
        """What may come next."""
        return self._automaton.allowed(self.state)

    def draw(self, token: int) -> None:
        """Take a sampled token and what the grammar forces after it."""
        self._sampled += 1
        self._take(token)
        self._follow_forced()
        self.report()

    def report(self) -> None:
        """Tell of the tokens that have come since the last time."""
        if self._on_tokens is not None and self._reported < len(self.new):
            fresh, self._reported = self.new[self._reported :], len(self.new)
            self._on_tokens(fresh)

    def _follow_forced(self) -> None:
        """Take the tokens that leave no choice."""
        while not self.done:
            run = self._automaton.forced_run(self.state)
            if not run:
                return
            for token in run:
                self._take(token)
                if self.done:
                    return

    def _take(self, token: int) -> None:
        self.new.append(token)
        self.pending.append(token)
        if token in self._stop:
            self.done = self.finished = True
        elif len(self.new) >= self.request.max_new_tokens:
            self.done = True
        else:
            self.state = self._automaton.advance(self.state, token)


def _start(automaton: Automaton, request: Request, eos: int) -> State:
    """Where a prompt ends in the grammar: every turn of a conversation is a document of its own.

    Raises `GrammarError` where the prompt, or a turn, is none.
    """
    if not request.history:
        return automaton.start(request.prompt)
    bos, earlier = request.prompt[:1], request.prompt[1 : request.history]
    if earlier[-1:].tolist() != [eos]:
        raise ValueError(f"the first {request.history} ids of a prompt are earlier turns; they end with EOS")
    for turn in np.split(earlier, np.flatnonzero(earlier[:-1] == eos) + 1):
        automaton.start(np.concatenate([bos, turn]))
    return automaton.start(np.concatenate([bos, request.prompt[request.history :]]))


class Session:
    """Requests in their order of arrival, as many at a time as the cache has rows for.

    One thread calls `submit`, `cancel` and `step`.
    """

    def __init__(self, decoder: CachedDecoder, automaton: Automaton, *, eos: int) -> None:
        self._decoder = decoder
        self._automaton = automaton
        self._eos = eos
        self._queue: deque[Ticket] = deque()
        self._rows: list[tuple[Ticket, int]] = []
        """What every cache row in use holds: a ticket, and 0 for its prompt or 1 for its negative prompt."""

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._queue) or any(not ticket.done for ticket, _ in self._rows)

    def submit(self, request: Request, on_tokens: OnTokens | None = None) -> Ticket:
        """Add a request; `on_tokens` is called within `step`.

        Raises:
            ValueError: it does not fit in the cache, or a prompt is no prefix of the grammar (the grammar's
                error tells the position).
        """
        if request.rows > self._decoder.max_rows or request.length > self._decoder.max_length:
            raise ValueError(
                f"a request of {request.rows} rows of {request.length} positions does not fit in a cache of "
                f"{self._decoder.max_rows} rows of {self._decoder.max_length}; ask for fewer tokens, or "
                "for more rows (a guided request takes two)"
            )
        ticket = Ticket(request, self._automaton, self._eos, on_tokens)
        if ticket.done:
            ticket.report()
        else:
            self._queue.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Give up a request; its rows are free for others from the next step on."""
        ticket.done = True
        if ticket in self._queue:
            self._queue.remove(ticket)

    def clear(self) -> None:
        """Give up all requests, and forget what the cache holds, whatever state a failed step left."""
        for ticket in [*self._queue, *(ticket for ticket, _ in self._rows)]:
            ticket.done = True
        self._queue.clear()
        self._rows = []
        self._decoder.clear()

    @torch.no_grad()
    def step(self) -> None:
        """Admit what fits, and bring every running request one choice further."""
        self._release()
        self._admit()
        if self._rows:
            self._decode()

    def _release(self) -> None:
        """Close the gaps once a quarter of the rows is idle, or the next request needs them."""
        keep = [row for row, (ticket, _) in enumerate(self._rows) if not ticket.done]
        idle = len(self._rows) - len(keep)
        short = self._queue and len(self._rows) + self._queue[0].request.rows > self._decoder.max_rows
        if idle >= max(1, len(self._rows) // 4) or (idle and short):
            longest = max((ticket.lengths[stream] for ticket, stream in self._rows), default=0)
            self._decoder.keep_rows(keep, length=longest)
            self._rows = [self._rows[row] for row in keep]

    def _admit(self) -> None:
        """Give free rows to waiting requests and feed their prompts."""
        first_row = len(self._rows)
        admitted = []
        while self._queue and len(self._rows) + self._queue[0].request.rows <= self._decoder.max_rows:
            ticket = self._queue.popleft()
            admitted.append(ticket)
            self._rows += [(ticket, stream) for stream in range(ticket.request.rows)]
        if admitted:
            self._choose(admitted, self._prefill(first_row), first_row)

    def _prefill(self, first_row: int) -> Tensor:
        """Feed prompts, with the forced tokens after them, in pieces; hidden states of the last tokens."""
        device = self._decoder.device
        prompts = [
            np.concatenate([ticket.prompts[stream], np.asarray(ticket.pending, dtype=np.int64)])
            for ticket, stream in self._rows[first_row:]
        ]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        tokens = np.zeros((len(prompts), longest), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        tokens_BN = torch.from_numpy(tokens).to(device)
        fed = min(PREFILL_TOKENS, PREFILL_SCORES // longest)
        width = max(MAX_RUN, fed // len(prompts))
        last: Tensor | None = None
        for start in range(0, longest, width):
            piece = tokens_BN[:, start : start + width]
            counts = (lengths - start).clamp(0, piece.shape[1])
            hidden = self._decoder.feed(piece, torch.full_like(lengths, start), counts, first_row=first_row)
            last = hidden if last is None else torch.where((counts > 0)[:, None].to(device), hidden, last)
        for (ticket, stream), prompt in zip(self._rows[first_row:], prompts, strict=True):
            ticket.lengths[stream] = len(prompt)
        for ticket, _ in self._rows[first_row:]:
            ticket.pending = []
        if last is None:
            raise RuntimeError("prefill of no tokens")
        return last

    def _decode(self) -> None:
        """Feed every live row its pending tokens and choose the next one."""
        live = [(ticket, stream) for ticket, stream in self._rows if not ticket.done]
        if not live:
            return
        width = min(MAX_RUN, max(len(ticket.pending) for ticket, _ in live))
        tokens = np.zeros((len(self._rows), width), dtype=np.int64)
        # an idle row does whatever its neighbours do; nobody reads it
        starts = np.full(len(self._rows), live[0][0].lengths[live[0][1]], dtype=np.int64)
        counts = np.zeros(len(self._rows), dtype=np.int64)
        for row, (ticket, stream) in enumerate(self._rows):
            if ticket.done:
                continue
            fed = ticket.pending[:width]
            tokens[row, : len(fed)] = fed
            starts[row] = ticket.lengths[stream]
            counts[row] = len(fed)
            ticket.lengths[stream] += len(fed)
        device = self._decoder.device
        hidden = self._decoder.feed(
            torch.from_numpy(tokens).to(device), torch.from_numpy(starts), torch.from_numpy(counts)
        )
        ready = []
        for ticket, stream in live:
            if stream == 0:
                ticket.pending = ticket.pending[width:]
                if not ticket.pending:
                    ready.append(ticket)
        self._choose(ready, hidden, 0)

    def _choose(self, tickets: list[Ticket], hidden_BH: Tensor, first_row: int) -> None:
        """Sample the next token of each request, those with the same allowed ids together."""
        rows: dict[Ticket, list[int]] = {}
        for row, (ticket, _) in enumerate(self._rows[first_row:]):
            rows.setdefault(ticket, []).append(row)
        groups: dict[Ranges, list[Ticket]] = {}
        for ticket in tickets:
            ranges = allowed_ranges(ticket.allowed(), ticket.request.forbidden)
            groups.setdefault(ranges, []).append(ticket)
        for ranges, members in groups.items():
            logits_BV = self._logits(members, rows, hidden_BH, ranges)
            settings = [ticket.request.sampling for ticket in members]
            columns = sample(logits_BV, settings, [ticket.uniform() for ticket in members])
            ids = _ids(ranges)
            for ticket, column in zip(members, columns.tolist(), strict=True):
                ticket.draw(int(ids[column]))

    def _logits(
        self, members: list[Ticket], rows: dict[Ticket, list[int]], hidden_BH: Tensor, ranges: Ranges
    ) -> Tensor:
        """Guided logits of each member, ``[members, ids]`` fp32."""
        device = hidden_BH.device
        conditional = torch.tensor([rows[ticket][0] for ticket in members], device=device)
        unconditional = torch.tensor([rows[ticket][-1] for ticket in members], device=device)
        if bool((conditional == unconditional).all()):
            return self._decoder.logits(hidden_BH[conditional], ranges)
        both = self._decoder.logits(hidden_BH[torch.cat([conditional, unconditional])], ranges)
        conditional_BV, unconditional_BV = both.chunk(2)
        scale_B = torch.tensor([ticket.request.sampling.guidance for ticket in members], device=device)
        return guide(conditional_BV, unconditional_BV, scale_B)


@lru_cache(maxsize=64)
def _ids(ranges: Ranges) -> Ids:
    """The ids of ranges, in order."""
    return np.concatenate([np.arange(low, high) for low, high in ranges])

"""The generation engine: many requests through one model, under the document grammar.

What a request may produce next is asked of the grammar's decoding automaton. Forced tokens (row ends, the end
of a span) are never sampled: they are fed together with the token before them. For everything else, logits
are computed for the allowed ids only. A guided request occupies two rows of the same batch, one with its
prompt and one with its negative prompt. Rows that finish are reused for waiting requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from emu3_megatron.grammar import Allowed, Automaton, Dialect
from emu3_megatron.inference.decoder import MAX_RUN, CachedDecoder, Ranges
from emu3_megatron.inference.sampling import Sampling, UniformStream, guide, sample

Ids = npt.NDArray[np.int64]

_PREFILL_TOKENS = 16_384
"""Most tokens fed in one pass of prefill, over all rows; bounds its memory."""

_PREFILL_SCORES = 1 << 28
"""Most pairs of a fed token and a cache slot in one pass: attention holds a mask of them."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to continue. Raises `ValueError` when something is missing or out of range."""

    prompt: Ids
    """Token ids from BOS on; must be a prefix of the grammar."""
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


class Engine:
    """Generates with one model; keeps nothing between calls but the model and the grammar's masks.

    Under tensor parallelism every rank of the group makes the same calls and gets the same results.
    """

    def __init__(self, model: torch.nn.Module, dialect: Dialect, *, max_rows: int = 128) -> None:
        """`max_rows` bounds the batch (guided requests count twice) and with it the cache's memory."""
        if max_rows < 2:
            raise ValueError(f"max_rows={max_rows} must be at least 2: a guided request needs two")
        self.model = model
        self.dialect = dialect
        self.max_rows = max_rows
        self.automaton: Automaton = dialect.automaton()

    def generate(
        self, requests: Sequence[Request], *, progress: Callable[[int], object] | None = None
    ) -> list[Completion]:
        """Run all requests; results come in their order.

        Args:
            requests: any mixture of tasks, sizes and settings.
            progress: called with the number of requests that have just finished.

        Raises:
            ValueError: a prompt is no prefix of the grammar (the grammar's error tells the position).
        """
        if not requests:
            return []
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return _Run(self, requests, progress).complete()
        finally:
            self.model.train(was_training)


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


class _Sequence:
    """The state of one request under way."""

    def __init__(self, engine: Engine, index: int, request: Request) -> None:
        self.index = index
        self.request = request
        self._automaton = engine.automaton
        self._stop = request.stop | {engine.dialect.vocabulary.eos}
        self.state = self._automaton.start(request.prompt)
        self.prompts = [request.prompt]
        if request.guided and request.negative_prompt is not None:
            self.prompts.append(request.negative_prompt)
        self.lengths = [0] * len(self.prompts)
        self.new: list[int] = []
        self.pending: list[int] = []
        self.sampled = 0
        self.done = self.finished = False
        self._uniforms = UniformStream(request.seed)
        self.follow_forced()

    def uniform(self) -> float:
        """The next random number."""
        return self._uniforms.next()

    def allowed(self) -> Allowed:
        """What may come next."""
        return self._automaton.allowed(self.state)

    def draw(self, token: int) -> None:
        """Take a sampled token and what the grammar forces after it."""
        self.sampled += 1
        self._take(token)
        self.follow_forced()

    def follow_forced(self) -> None:
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

    def completion(self) -> Completion:
        """The result."""
        return Completion(np.asarray(self.new, dtype=np.int64), self.finished, self.sampled)


class _Run:
    """One call of `Engine.generate`: a queue of requests and the rows they pass through."""

    def __init__(
        self, engine: Engine, requests: Sequence[Request], progress: Callable[[int], object] | None
    ) -> None:
        self._engine = engine
        self._progress = progress
        self._results: list[Completion | None] = [None] * len(requests)
        # neighbours of similar length waste the least padding
        order = sorted(range(len(requests)), key=lambda i: (requests[i].length, len(requests[i].prompt)))
        self._queue = deque((index, requests[index]) for index in order)
        rows = min(engine.max_rows, sum(request.rows for request in requests))
        self._decoder = CachedDecoder(
            engine.model, max_rows=rows, max_length=max(request.length for request in requests)
        )
        self._rows: list[tuple[_Sequence, int]] = []
        """What every cache row in use holds: a sequence, and 0 for its prompt or 1 for its negative
        prompt."""

    def complete(self) -> list[Completion]:
        """Work until every request has its result."""
        while self._queue or self._rows:
            self._release()
            self._admit()
            if self._rows:
                self._decode()
        return [result for result in self._results if result is not None]

    def _release(self) -> None:
        """Record what is done, and close the gaps once a quarter of the rows is idle."""
        done = [sequence for sequence, stream in self._rows if sequence.done and stream == 0]
        fresh = [sequence for sequence in done if self._results[sequence.index] is None]
        self._record(fresh)
        keep = [row for row, (sequence, _) in enumerate(self._rows) if not sequence.done]
        if len(self._rows) - len(keep) >= max(1, len(self._rows) // 4):
            self._decoder.keep_rows(keep)
            self._rows = [self._rows[row] for row in keep]

    def _record(self, sequences: Iterable[_Sequence]) -> None:
        for sequence in sequences:
            self._results[sequence.index] = sequence.completion()
            if self._progress is not None:
                self._progress(1)

    def _admit(self) -> None:
        """Give free rows to waiting requests and feed their prompts."""
        first_row = len(self._rows)
        admitted = []
        while self._queue and len(self._rows) + self._queue[0][1].rows <= self._decoder.max_rows:
            index, request = self._queue.popleft()
            sequence = _Sequence(self._engine, index, request)
            if sequence.done:
                self._record([sequence])
                continue
            admitted.append(sequence)
            self._rows += [(sequence, stream) for stream in range(request.rows)]
        if admitted:
            self._choose(admitted, self._prefill(first_row), first_row)

    def _prefill(self, first_row: int) -> Tensor:
        """Feed prompts, with the forced tokens after them, in pieces; hidden states of the last tokens."""
        device = self._decoder.device
        prompts = [
            np.concatenate([sequence.prompts[stream], np.asarray(sequence.pending, dtype=np.int64)])
            for sequence, stream in self._rows[first_row:]
        ]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        tokens = np.zeros((len(prompts), longest), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        tokens_BN = torch.from_numpy(tokens).to(device)
        fed = min(_PREFILL_TOKENS, _PREFILL_SCORES // longest)
        width = max(MAX_RUN, fed // len(prompts))
        last: Tensor | None = None
        for start in range(0, longest, width):
            piece = tokens_BN[:, start : start + width]
            counts = (lengths - start).clamp(0, piece.shape[1])
            hidden = self._decoder.feed(piece, torch.full_like(lengths, start), counts, first_row=first_row)
            last = hidden if last is None else torch.where((counts > 0)[:, None].to(device), hidden, last)
        for (sequence, stream), prompt in zip(self._rows[first_row:], prompts, strict=True):
            sequence.lengths[stream] = len(prompt)
        for sequence, _ in self._rows[first_row:]:
            sequence.pending = []
        if last is None:
            raise RuntimeError("prefill of no tokens")
        return last

    def _decode(self) -> None:
        """Feed every live row its pending tokens and choose the next one."""
        live = [(sequence, stream) for sequence, stream in self._rows if not sequence.done]
        if not live:
            return
        width = min(MAX_RUN, max(len(sequence.pending) for sequence, _ in live))
        tokens = np.zeros((len(self._rows), width), dtype=np.int64)
        # an idle row does whatever its neighbours do; nobody reads it
        starts = np.full(len(self._rows), live[0][0].lengths[live[0][1]], dtype=np.int64)
        counts = np.zeros(len(self._rows), dtype=np.int64)
        for row, (sequence, stream) in enumerate(self._rows):
            if sequence.done:
                continue
            fed = sequence.pending[:width]
            tokens[row, : len(fed)] = fed
            starts[row] = sequence.lengths[stream]
            counts[row] = len(fed)
            sequence.lengths[stream] += len(fed)
        device = self._decoder.device
        hidden = self._decoder.feed(
            torch.from_numpy(tokens).to(device), torch.from_numpy(starts), torch.from_numpy(counts)
        )
        ready = []
        for sequence, stream in live:
            if stream == 0:
                sequence.pending = sequence.pending[width:]
                if not sequence.pending:
                    ready.append(sequence)
        self._choose(ready, hidden, 0)

    def _choose(self, sequences: list[_Sequence], hidden_BH: Tensor, first_row: int) -> None:
        """Sample the next token of each sequence, those with the same allowed ids together."""
        rows: dict[int, list[int]] = {}
        for row, (sequence, _) in enumerate(self._rows[first_row:]):
            rows.setdefault(sequence.index, []).append(row)
        groups: dict[Ranges, list[_Sequence]] = {}
        for sequence in sequences:
            ranges = allowed_ranges(sequence.allowed(), sequence.request.forbidden)
            groups.setdefault(ranges, []).append(sequence)
        for ranges, members in groups.items():
            logits_BV = self._logits(members, rows, hidden_BH, ranges)
            settings = [sequence.request.sampling for sequence in members]
            columns = sample(logits_BV, settings, [sequence.uniform() for sequence in members])
            ids = np.concatenate([np.arange(low, high) for low, high in ranges])
            for sequence, column in zip(members, columns.tolist(), strict=True):
                sequence.draw(int(ids[column]))

    def _logits(
        self, members: list[_Sequence], rows: dict[int, list[int]], hidden_BH: Tensor, ranges: Ranges
    ) -> Tensor:
        """Guided logits of each member, ``[members, ids]`` fp32."""
        device = hidden_BH.device
        conditional = torch.tensor([rows[sequence.index][0] for sequence in members], device=device)
        unconditional = torch.tensor([rows[sequence.index][-1] for sequence in members], device=device)
        if bool((conditional == unconditional).all()):
            return self._decoder.logits(hidden_BH[conditional], ranges)
        both = self._decoder.logits(hidden_BH[torch.cat([conditional, unconditional])], ranges)
        conditional_BV, unconditional_BV = both.chunk(2)
        scale_B = torch.tensor([sequence.request.sampling.guidance for sequence in members], device=device)
        return guide(conditional_BV, unconditional_BV, scale_B)

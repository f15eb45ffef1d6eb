"""A codebook that follows the latents by moving averages, and gives dead codes a new place.

Shapes: R rows (latents), D length of a codebook vector, K codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emu3_megatron.vision.model import nearest_codes
from emu3_megatron.vision.processes import gathered, summed, take_from_first, world_size

DEAD_SHARE = 0.02
"""A code is dead when its average count falls below this share of a uniform code's count."""

UNUSED_COUNT = 1e-3
"""A code of a smaller average count keeps its place, and is unused when training ends."""

OUT_OF_REACH = 1e4
"""Where removed codes are put: no latent is near."""

ROWS_AT_ONCE = 1 << 17
"""Latents whose distances to newly drawn codes are held at a time."""

SPREAD_ROUNDS = 16
"""Rounds in which the first codes are drawn: more spread them better, as in k-means++."""


class EmaCodebook:
    """Keeps a codebook at the moving average of the latents assigned to each code (van den Oord et al. 2017).

    All processes hold the same codebook: counts and sums are added up over them at every update. Each latent
    has a weight, so that plain patches, however many, do not take the codes from the others.

    Args:
        vectors_KD: the codebook itself; overwritten in place.
        decay: of the moving averages, per update.
        seed: of the choices made at initialisation and at revival.
    """

    def __init__(self, vectors_KD: Tensor, *, decay: float, seed: int) -> None:
        self.vectors_KD = vectors_KD.detach()
        self.decay = decay
        self.seed = seed
        self.initialised = False
        self.counts_K = torch.zeros(len(vectors_KD), device=vectors_KD.device)
        self.sums_KD = torch.zeros_like(self.vectors_KD)
        self._moved_K = torch.zeros(len(vectors_KD), dtype=torch.bool, device=vectors_KD.device)

    @torch.no_grad()
    def initialise(
        self, rows_RD: Tensor, weights_R: Tensor, iterations: int = 10, *, step_share: float = 1.0
    ) -> None:
        """Place the codes by weighted k-means on the latents of all processes.

        Args:
            rows_RD: latents of this process.
            weights_R: their weights.
            iterations: of k-means.
            step_share: latents of one training step over those given: the averages begin as if over steps.
        """
        rows_RD, weights_R = gathered(rows_RD.detach().float()), gathered(weights_R)
        generator = torch.Generator().manual_seed(self.seed)
        self.vectors_KD.copy_(_spread(rows_RD, weights_R, len(self.vectors_KD), generator))
        for _ in range(iterations):
            codes_R = nearest_codes(rows_RD, self.vectors_KD)
            counts_K, sums_KD = self._statistics(rows_RD, codes_R, weights_R)
            used = counts_K > 0
            self.vectors_KD[used] = sums_KD[used] / counts_K[used, None]
        self.counts_K.copy_(counts_K * step_share)
        self.sums_KD.copy_(self.vectors_KD * self.counts_K[:, None])
        self.initialised = True
        self._moved_K.fill_(True)
        self._agree()

    @torch.no_grad()
    def adopt(self, known: int) -> None:
        """Take the first `known` vectors as they are, and the others as dead: revival gives them places."""
        self.counts_K.fill_(0)
        self.counts_K[:known] = 1
        self.vectors_KD[known:] = OUT_OF_REACH
        self.sums_KD.copy_(self.vectors_KD * self.counts_K[:, None])
        self.initialised = True

    @torch.no_grad()
    def update(self, rows_RD: Tensor, codes_R: Tensor, weights_R: Tensor) -> None:
        """Move every code towards the weighted mean of the latents that chose it."""
        counts_K, sums_KD = self._statistics(rows_RD.detach().float(), codes_R, weights_R)
        if world_size() > 1:
            both = summed(torch.cat((counts_K[:, None], sums_KD), 1))
            counts_K, sums_KD = both[:, 0], both[:, 1:]
        self.counts_K.lerp_(counts_K, 1 - self.decay)
        self.sums_KD.lerp_(sums_KD, 1 - self.decay)
        alive = self.counts_K > UNUSED_COUNT
        self.vectors_KD[alive] = self.sums_KD[alive] / self.counts_K[alive, None]

    @torch.no_grad()
    def revive(self, rows_RD: Tensor, codes_R: Tensor, weights_R: Tensor, step: int) -> int:
        """Move dead codes to latents, chosen in proportion to weight and squared distance from their code.

        Returns the number of codes moved.
        """
        mean_count = float(self.counts_K.mean())
        dead_K = self.counts_K < DEAD_SHARE * mean_count
        dead = int(dead_K.sum())
        if dead == 0:
            return 0
        rows_RD, codes_R = gathered(rows_RD.detach().float()), gathered(codes_R)
        errors_R = (rows_RD - self.vectors_KD[codes_R]).square().sum(1) * gathered(weights_R) + 1e-12
        generator = torch.Generator().manual_seed(self.seed + step)
        chosen = torch.multinomial(errors_R.cpu(), min(dead, len(rows_RD)), generator=generator)
        places = dead_K.nonzero()[: len(chosen), 0]
        self.vectors_KD[places] = rows_RD[chosen.to(rows_RD.device)]
        self.counts_K[places] = 10 * DEAD_SHARE * mean_count
        self.sums_KD[places] = self.vectors_KD[places] * self.counts_K[places, None]
        self._moved_K[places] = True
        self._agree()
        return len(chosen)

    @torch.no_grad()
    def merge(self, distance: float) -> int:
        """Remove every code that lies close to one of more weight; the latents go to the next code.

        Moving averages put many codes where there are many latents, however alike; a language model would
        have to learn their noise. Removed codes are put out of reach until `compact`.

        Args:
            distance: what is close, in median distances of a code to its nearest neighbour.

        Returns:
            The number of codes that are left.
        """
        alive = (self.counts_K >= DEAD_SHARE * self.counts_K.mean()).nonzero()[:, 0]
        between = torch.cdist(self.vectors_KD[alive], self.vectors_KD[alive])
        nearest = between.clone().fill_diagonal_(torch.inf).amin(1)
        close = between < distance * nearest.median()
        left = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
        for index in self.counts_K[alive].argsort(descending=True).tolist():
            if left[index]:
                left &= ~close[index]
                left[index] = True
        removed = torch.ones_like(self.counts_K, dtype=torch.bool)
        removed[alive[left]] = False
        self.vectors_KD[removed] = OUT_OF_REACH
        self.counts_K[removed] = 0
        self.sums_KD[removed] = 0
        self._moved_K |= removed
        self._agree()
        return int(left.sum())

    @torch.no_grad()
    def compact(self) -> None:
        """Order the codes by weight and make every unused one a copy of the first.

        A copy is never encoded, since the first among equals wins, and is harmless to decode.
        """
        order = self.counts_K.argsort(descending=True, stable=True)
        for tensor in (self.vectors_KD, self.counts_K, self.sums_KD):
            tensor.copy_(tensor[order].clone())
        unused = self.counts_K < UNUSED_COUNT
        unused[0] = False
        self.vectors_KD[unused] = self.vectors_KD[0].clone()

    def take_moved(self) -> Tensor:
        """Which codes were given another place since the last call, bool [K]."""
        moved_K, self._moved_K = self._moved_K, torch.zeros_like(self._moved_K)
        return moved_K

    def state_dict(self) -> dict[str, Tensor | bool]:
        """Everything but the vectors, which belong to the tokenizer."""
        return {"initialised": self.initialised, "counts": self.counts_K, "sums": self.sums_KD}

    def load_state_dict(self, state: dict[str, Tensor | bool]) -> None:
        """Restore what `state_dict` gave."""
        self.initialised = bool(state["initialised"])
        self.counts_K.copy_(torch.as_tensor(state["counts"]))
        self.sums_KD.copy_(torch.as_tensor(state["sums"]))

    def _agree(self) -> None:
        take_from_first((self.vectors_KD, self.counts_K, self.sums_KD))

    def _statistics(self, rows_RD: Tensor, codes_R: Tensor, weights_R: Tensor) -> tuple[Tensor, Tensor]:
        counts_K = torch.zeros_like(self.counts_K).index_add_(0, codes_R, weights_R)
        sums_KD = torch.zeros_like(self.vectors_KD).index_add_(0, codes_R, rows_RD * weights_R[:, None])
        return counts_K, sums_KD


def _spread(rows_RD: Tensor, weights_R: Tensor, codes: int, generator: torch.Generator) -> Tensor:
    """First codes: rows drawn by weight, then in rounds by weight and distance from those already drawn."""
    sizes = torch.full((SPREAD_ROUNDS,), codes // SPREAD_ROUNDS)
    sizes[: codes % SPREAD_ROUNDS] += 1
    chances_R = weights_R
    distance_R = torch.full_like(weights_R, torch.inf)
    drawn = []
    for size in sizes.tolist():
        part = rows_RD[_choose(chances_R, size, generator)]
        drawn.append(part)
        if size:
            nearest = [torch.cdist(rows, part).amin(1) for rows in rows_RD.split(ROWS_AT_ONCE)]
            distance_R = torch.minimum(distance_R, torch.cat(nearest).square())
            chances_R = distance_R * weights_R + 1e-12
    return torch.cat(drawn)


def _choose(weights_R: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=weights_R.device)
    chosen = torch.multinomial(weights_R.cpu(), count, replacement=True, generator=generator)
    return chosen.to(weights_R.device)

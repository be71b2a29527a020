"""What a noise costs whoever takes it, told from samples that came before: the cost "priced" of a pool."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .products import products
from .solver import Solver, noises_of_a_step, sizes

REFERENCES = 1000  # samples that prices are told from; twice as many bring 0.5 % more
FEW = 100  # of these for small pools, but of long samples
LEAST = 16  # by fewer, samples find no nearer noises (CIFAR-10)
DIMENSIONS = 10  # in fewer, squared distance is near the best, and prices told from samples are farther
NUMBERS = 2**23  # that these hold at most, 32 MB
NOISES = 20  # drawn for each of them, while their potentials are found


def references_of(match_size: int, numbers: int) -> int:
    """How many samples of so many numbers tell the prices of a pool's noises; 0: these have none."""
    count = min(REFERENCES, NUMBERS // numbers, max(match_size // 2, min(FEW, 2**18 // numbers)))
    return count if count >= LEAST and numbers >= DIMENSIONS else 0


def bytes_to_learn(match_size: int, numbers: int, size: int) -> int:
    """Bytes of the noises that prices are told with, in float32 and in a type of `size` bytes."""
    references = references_of(match_size, numbers)
    return noises_of_a_step(references) * numbers * (4 if size == 4 else 4 + size) if references else 0


class Prices:
    """Prices of noises by which a pool's last samples find noises nearly as good as its first.

    By ‖x − z‖² alone the first samples take what suits many, and the last get what is left. In the best plan of all
    (`dansm.Semidiscrete`) a noise z goes to the sample of the largest ⟨z, x_j⟩ − b_j, and this maximum is what it is
    worth to that one: the price that anybody else must outbid. So each sample takes the noise of the largest
    ⟨x, z⟩ − price(z). The x_j are the first samples that came, their potentials b_j are found once.

    The maximum is a soft one, T · log Σ exp((⟨z, x_j⟩ − b_j) / T), as other samples lie between the x_j. T is half the
    scale at which values near the largest thin out, ‖x‖ / √(2 ln n), and less in few dimensions.

    Until enough samples have come, noises have no price. They stay without where these are equal, too few as they are
    long, or of fewer than ten numbers.

    match_size  of the pool
    like        (any, D), of the number type and on the device of the noises
    """

    def __init__(self, match_size: int, like: Tensor):
        self.missing = references_of(match_size, like.shape[1])  # samples that are to come yet
        self.references = like[:0].clone()
        exact = torch.promote_types(like.dtype, torch.float32)
        self.potentials = like.new_empty(0, dtype=exact)  # empty until they are found
        self.temperature = 0.0

    @property
    def known(self) -> bool:
        return len(self.potentials) > 0

    def learn(self, samples: Tensor, generator: Callable[[], torch.Generator]) -> bool:
        """Look at samples (B, D), B ≤ `missing`, until that is 0. Returns whether noises have prices from now on.

        generator  is called once, for what the potentials are found with
        """
        if not self.missing:
            return False
        self.references = torch.cat([self.references, samples[samples.isfinite().all(1)]])
        self.missing -= len(samples)
        n = len(self.references)
        if self.missing or n < 2 or not 0 < (size := sizes(self.references).mean().item()) < math.inf:
            return False
        shares = torch.full((n,), 1 / n, device=samples.device)
        solver = Solver(self.references, shares, generator())
        while solver.noises < NOISES:
            solver.step()
        self.potentials = solver.mean.to(self.potentials)
        nearest = 2 * math.log(n)  # the largest of n normal numbers lies near its root
        self.temperature = size / math.sqrt(nearest) / 2 * min(1.0, samples.shape[1] / nearest)
        return True

    def __call__(self, noise: Tensor) -> Tensor:
        """Twice the price of each noise, (M, D) → (M,), as −2⟨x, z⟩ comes to it."""
        parts = noise.split(max(1, 2**20 // len(self.references)))
        values = ((products(part, self.references) - self.potentials) / self.temperature for part in parts)
        return 2 * self.temperature * torch.cat([value.logsumexp(1) for value in values])

    def state_dict(self) -> dict:
        return {"missing": self.missing, "references": self.references.clone(), "potentials": self.potentials.clone(),
                "temperature": self.temperature}

    def are_in(self, state: dict) -> bool:
        """Whether the state of a pool has prices, and what each noise costs."""
        prices, own = state.get("prices"), state.get("own")
        whole = isinstance(prices, dict) and prices.keys() == self.state_dict().keys()
        return whole and isinstance(own, Tensor) and own.shape == state["index"].shape

    def load_state_dict(self, state: dict) -> None:
        self.missing, self.temperature = state["missing"], state["temperature"]
        self.references = state["references"].to(self.references, copy=True)
        self.potentials = state["potentials"].to(self.potentials, copy=True)

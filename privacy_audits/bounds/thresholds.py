"""How many guesses to make, which must not depend on the scores that they are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privacy_audits.bounds.one_run import Guesses, guess

Scores = NDArray[np.float64]
Truth = NDArray[np.bool_]
# From guesses and the probability of a failure to a lower bound on epsilon.
Bound = Callable[[Guesses, float], float]


@dataclass(frozen=True)
class Bonferroni:
    """The best of several numbers of guesses, each at its part of ``alpha``.

    Attributes:
        made: the numbers of guesses.
    """

    made: tuple[int, ...]

    @classmethod
    def halves(cls, canaries: int, count: int = 5) -> Bonferroni:
        """All canaries, half of them, a quarter, and so on: ``count`` numbers."""
        return cls(tuple(max(2, canaries >> k) for k in range(count)))

    def bound(self, scores: Scores, took_part: Truth, bound: Bound, alpha: float) -> float:
        """The lower bound that ``bound`` gives, valid with probability ``1 - alpha`` in all."""
        share = alpha / len(self.made)
        return max(bound(guess(scores, took_part, made), share) for made in self.made)

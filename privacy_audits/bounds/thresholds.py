"""How many guesses to make, which must not depend on the scores that they are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from privacy_audits.bounds.one_run import Guesses, guess

Scores = NDArray[np.float64]
Truth = NDArray[np.bool_]
# From guesses and the probability of a failure to a lower bound on epsilon.
Bound = Callable[[Guesses, float], float]


class Thresholds(Protocol):
    """Chooses the number of guesses, and pays for the choice."""

    def bound(self, scores: Scores, took_part: Truth, bound: Bound, alpha: float) -> float:
        """The lower bound that ``bound`` gives, valid with probability ``1 - alpha`` in all."""
        ...


@dataclass(frozen=True)
class Explicit:
    """So many guesses, named beforehand.

    Attributes:
        made: the number of guesses.
    """

    made: int

    def bound(self, scores: Scores, took_part: Truth, bound: Bound, alpha: float) -> float:
        """See :class:`Thresholds`."""
        return bound(guess(scores, took_part, self.made), alpha)


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
        """See :class:`Thresholds`."""
        share = alpha / len(self.made)
        return max(bound(guess(scores, took_part, made), share) for made in self.made)


@dataclass(frozen=True)
class Split:
    """The number of guesses that is best on one half of the canaries, tried on the other half.

    Canaries are split by position, of which their scores know nothing. Valid for a mechanism in
    which the two halves do not interact more than differential privacy lets them.

    Attributes:
        made: the numbers of guesses, as fractions of the canaries.
    """

    made: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125, 0.0625)

    def bound(self, scores: Scores, took_part: Truth, bound: Bound, alpha: float) -> float:
        """See :class:`Thresholds`."""
        first, second = slice(0, None, 2), slice(1, None, 2)

        def tried(half: slice, fraction: float) -> float:
            count = int(fraction * len(scores[half]))
            return bound(guess(scores[half], took_part[half], count), alpha)

        best = max(self.made, key=lambda fraction: tried(first, fraction))
        return tried(second, best)

"""A site's part of distributed noise: gradient sums on an integer grid, each with a share of
discrete Gaussian noise. Torch-free.

In every step each of n sites adds an independent share of standard deviation sigma C / sqrt(n - t)
to its sum of clipped gradients; of any t sites that pool what they see, the sum keeps noise of at
least sigma C. What one record changes in a rounded sum is at most C (1 + CLIP_MARGIN) + g sqrt(d)
in Euclidean length: clipping overshoots by rounding, and rounding two vectors of d elements to a
grid g moves their difference by at most g in each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privfl.errors import InternalError, PrivflError
from privfl.noise.discrete_gaussian import DiscreteGaussian
from privfl.noise.randomness import Randomness

# Norms are taken in float64; what is left is the rounding of the clip factor, of its product with
# the gradient and of sums in float32, together below 1e-5 for clipping and below 1e-3 for the sums
# of batches of 10^4 records.
CLIP_MARGIN = 2.0**-10
# The sensitivity with which every step is charged, in units of the clipping norm. A plan needs it
# before a grid is known, so it is an upper bound: step_grid refuses a grid whose own sensitivity is
# larger, and StepGrid.check_charged compares the two again before a sum is released.
SENSITIVITY = 1.01
# A share narrower than this many grid steps is refused. A sum of n shares of deviation s is not
# quite discrete Gaussian: the logarithms of its probabilities are off by up to 10 sum_{0 < k < n}
# exp(-2 pi^2 s^2 k / (k + 1)) (Kairouz, Liu, Steinke 2021), which at s = 8 is below 10^-270.
_LEAST_DEVIATION = 8.0
# Wider than this and int64 sums of shares would come near their end.
_LARGEST_DEVIATION = 2.0**40
# The probability that some sum of a run leaves the derived range.
_WRAP = 2.0**-40


@dataclass(frozen=True)
class StepGrid:
    """The grid of one run's sums, the same at all sites.

    The grid knows what one record can change on it. Steps are charged before there is a grid, for
    the fixed :data:`SENSITIVITY`; whoever releases sums calls :meth:`check_charged` with what the
    charged event says.

    Attributes:
        step: g, a number of 16 significant bits, so that sites whose logarithms differ in the last
            bit still agree on it.
        deviation: standard deviation of one share, in grid steps.
        sensitivity: the Euclidean length by which one record changes a site's rounded sum at most,
            in units of the clipping norm; never above :data:`SENSITIVITY`.
    """

    step: float
    deviation: float
    sensitivity: float

    def check_charged(self, sensitivity: float) -> None:
        """Refuse to release sums that one record can change by more than what is charged.

        Args:
            sensitivity: that of the charged event, in units of the clipping norm.

        Raises:
            InternalError: If ``sensitivity`` is below that of this grid.
        """
        if not sensitivity >= self.sensitivity:
            raise InternalError(
                f"steps were to be charged for a sensitivity of {sensitivity:g}, on a grid with "
                f"one of {self.sensitivity:g}"
            )


@dataclass(frozen=True)
class DistributedNoise:
    """One noise, divided between the members of a sum.

    Guarantee: Of any ``collusion`` members that pool what they see, the decrypted sum keeps noise
        of standard deviation at least ``noise_multiplier * max_grad_norm``, if the other members
        add their shares with :class:`Shares`. It is discrete Gaussian but for what the comment at
        ``_LEAST_DEVIATION`` bounds.

    Attributes:
        noise_multiplier: sigma, against ``collusion`` members that pool their shares.
        max_grad_norm: C, the clipping norm.
        members: n, how many sites add a share.
        collusion: t, how many of them may pool what they see, below n.
    """

    noise_multiplier: float
    max_grad_norm: float
    members: int
    collusion: int

    @property
    def share_deviation(self) -> float:
        """Standard deviation of one site's share, sigma C / sqrt(n - t)."""
        return self.noise_multiplier * self.max_grad_norm / math.sqrt(self.members - self.collusion)

    def grid(
        self,
        *,
        value_range: float | None,
        largest_total: int,
        parameters: int,
        expected: float,
        records: int,
        steps: int,
    ) -> StepGrid:
        """The grid of a run's sums of gradients, from public numbers alone.

        Args:
            value_range: the public bound on the size of an element of a sum; None to derive it.
            largest_total: the largest integer that an element of a sum can be.
            parameters: trainable parameters of the model.
            expected: records of all sites together that take part in a step, on average.
            records: records of all sites together.
            steps: steps of the run, at most.

        Raises:
            PrivflError: If a value has too few bits to hold the sums finely enough, or if the
                shares would be too narrow or too wide for the grid.
        """
        if value_range is None:
            value_range = self.derived_range(
                expected=expected, records=records, parameters=parameters, steps=steps
            )
        return self.step_grid(value_range, largest_total, parameters)

    def step_grid(self, value_range: float, largest_total: int, parameters: int) -> StepGrid:
        """The finest grid on which a sum between -``value_range`` and ``value_range`` fits
        integers up to ``largest_total``.

        Raises:
            PrivflError: If this grid is so coarse that rounding would exceed the charged
                sensitivity, or if the shares would be too narrow or too wide for it.
        """
        fraction, exponent = math.frexp(value_range / largest_total)
        step = math.ldexp(math.ceil(math.ldexp(fraction, 16)), exponent - 16)
        moved = step * math.sqrt(parameters) / self.max_grad_norm
        sensitivity = 1.0 + CLIP_MARGIN + moved
        if sensitivity > SENSITIVITY:
            raise PrivflError(
                f"sums of up to {value_range:.3g} (clipping norm {self.max_grad_norm:g}) with "
                f"{parameters} parameters need a finer grid than the bits of a value allow: "
                f"rounding would move a sum by {moved:.2g} clipping norms; raise "
                "secure_aggregation.value_bits (28 at most: one value in a word), lower "
                "sampling_rate, or set secure_aggregation.range to what sums of gradients really "
                "reach"
            )
        deviation = self.share_deviation / step
        if not _LEAST_DEVIATION <= deviation <= _LARGEST_DEVIATION:
            raise PrivflError(
                f"a share of the noise would have a standard deviation of {deviation:.3g} grid "
                f"steps, between {_LEAST_DEVIATION:g} and {_LARGEST_DEVIATION:.3g} are needed; "
                "change the noise multiplier, or secure_aggregation.value_bits or range"
            )
        return StepGrid(step, deviation, sensitivity)

    def derived_range(self, *, expected: float, records: int, parameters: int, steps: int) -> float:
        """A bound on the elements of all sums of a run, which fails with probability below
        2^-40; from public numbers alone.

        Let B records take part in a step; each adds at most the clipping norm to an element. B is a
        sum of independent draws of mean ``expected``, never above ``records``, and bounded by
        Bernstein's inequality. The noise of an element is sub-Gaussian with the variance of all
        shares together (Canonne, Kamath, Steinke 2020, Lemma 22 for a single share). A union bound
        over ``steps`` and ``parameters`` gives the rest. The arguments are those of :meth:`grid`.
        """
        log = math.log(2.0 * steps / _WRAP)
        batch = min(
            float(records), expected + log / 3.0 + math.sqrt(log * log / 9.0 + 2.0 * expected * log)
        )
        deviation = self.share_deviation * math.sqrt(self.members)
        noise = deviation * math.sqrt(2.0 * math.log(4.0 * steps * parameters / _WRAP))
        return (1.0 + CLIP_MARGIN) * self.max_grad_norm * batch + noise


# What an observer of shares is given: the sum before rounding, the share, and both together on the
# grid; each of shape (parameters,).
ObserveShare = Callable[[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]], None]


class Shares:
    """Rounds a site's sums to the grid and adds its share of the noise, a fresh one for every step.

    Args:
        grid: the grid of the run.
        randomness: the source of the shares.
        observe: called with every sum, share and result; for tests and audits.

    Attributes:
        drawn: how many shares were used.
    """

    def __init__(
        self, grid: StepGrid, randomness: Randomness, observe: ObserveShare | None = None
    ) -> None:
        self._grid = grid
        self._noise = DiscreteGaussian(grid.deviation, randomness)
        self._ahead: NDArray[np.int64] | None = None
        self._observe = observe
        self.drawn = 0

    def draw_ahead(self, count: int) -> None:
        """Draw the next share, of shape (count,), now, while the site has time."""
        self._ahead = self._noise.draw(count)

    def add(self, total: NDArray[np.float64]) -> NDArray[np.int64]:
        """``total``, rounded to the nearest grid steps, plus a share of the noise.

        Guarantee: A share is used once.

        Args:
            total: this site's sum of clipped gradients; shape (parameters,).

        Returns:
            The noisy sum in grid steps; same shape.
        """
        if self._ahead is None or len(self._ahead) != len(total):
            self.draw_ahead(len(total))
        share, self._ahead = self._ahead, None
        assert share is not None
        self.drawn += 1
        integers = np.rint(total / self._grid.step).astype(np.int64) + share
        if self._observe is not None:
            self._observe(total, share, integers)
        return integers

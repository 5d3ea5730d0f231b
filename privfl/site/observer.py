"""What happens at a site, for whoever must check it: tests, and the audits of what privfl claims.

An observer runs in the agent's own process and sees what no other process may. It changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from privfl.accounting import Account, Event

if TYPE_CHECKING:
    from privfl.site.algorithms import Algorithm


class Observer:
    """Called by an agent as things happen.

    Every method does nothing here; a subclass takes what it wants.

    Vectors are the agent's own: an observer that keeps one must copy it.
    """

    def began(self, site: str, algorithm: Algorithm) -> None:
        """The run begins with this algorithm; that of fedsgd has the ``grid`` of the sums."""

    def charged(self, site: str, account: Account, event: Event, round_: int) -> None:
        """``event`` is on the disk as a charge to ``account``."""

    def share_added(
        self,
        site: str,
        total: NDArray[np.float64],
        share: NDArray[np.int64],
        integers: NDArray[np.int64],
    ) -> None:
        """A sum of clipped gradients was rounded to the grid, and this site's share of the noise
        added; each of shape (parameters,).
        """

    def measured(
        self, site: str, round_: int, metrics: Mapping[str, tuple[list[float], list[float]]]
    ) -> None:
        """The trainer measured these sums and counts; noise comes after this where the records
        are private.
        """

    def contributed(self, site: str, round_: int, attempt: int, vector: NDArray[Any]) -> None:
        """``vector`` goes into a sum: what is quantised, packed, masked and encrypted next."""

    def summed(self, site: str, round_: int, attempt: int, total: NDArray[Any]) -> None:
        """A sum was decrypted and its checksum fits."""

    def replica(self, site: str, round_: int, replica: NDArray[np.float32]) -> None:
        """The site's replica before the first round (0), and after every round; shape
        (parameters,).
        """

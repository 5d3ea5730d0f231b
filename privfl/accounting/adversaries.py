"""Who could learn what: each possible adversary of a run, as data, with the epsilon for one record
that holds against it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from privfl.accounting.accountants import epsilon_of
from privfl.accounting.events import DiscreteGaussian, Event, PoissonGaussian

Noise = Literal["site", "distributed"]


@dataclass(frozen=True)
class Adversary:
    """An adversary who wants to learn about a record of one site.

    Attributes:
        who: the adversary, in plain words.
        colluders: how many of the other sites pool what they see; 0 for an adversary who sees only
            what is published.
        honest_shares: how many sites' shares of the noise this adversary cannot subtract.
        noise_factor: the noise this adversary cannot subtract, as a multiple of sigma, the noise
            multiplier that stands against ``collusion`` sites.
        sees: what this adversary sees, in plain words.
    """

    who: str
    colluders: int
    honest_shares: int
    noise_factor: float
    sees: str

    def epsilon(self, events: Iterable[Event], delta: float) -> float:
        """An upper bound on what this adversary learns of one record.

        Guarantee: The bound holds for a history whose parameters were fixed in advance.

        Args:
            events: the history, charged for the adversary whose ``noise_factor`` is 1.
            delta: strictly between 0 and 1.

        Raises:
            ValueError: If ``delta`` is not strictly between 0 and 1.
        """
        return _epsilon(tuple(_with(event, self.noise_factor) for event in events), delta)


# Sites of a run often have the same history.
@functools.lru_cache(maxsize=256)
def _epsilon(events: tuple[Event, ...], delta: float) -> float:
    return epsilon_of(events, delta).upper


def _with(event: Event, factor: float) -> Event:
    if isinstance(event, PoissonGaussian | DiscreteGaussian):
        return replace(event, noise_multiplier=event.noise_multiplier * factor)
    return event


def adversaries(noise: Noise, members: int, collusion: int = 0) -> tuple[Adversary, ...]:
    """The adversaries of a run, weakest first.

    With ``site`` noise every site adds all of its noise itself, so that all adversaries face the
    same noise. With ``distributed`` noise each of n sites adds a share of variance
    sigma^2 C^2 / (n - t), with t the ``collusion``; k sites subtract their own shares and face
    noise of sigma sqrt((n - k) / (n - t)) (docs/accounting.md). The charged adversary is the one
    with k = t, which is at least 1.

    Args:
        noise: whether each site adds all noise itself, or a share of one noise.
        members: n, how many sites take part in a sum, 2 or more.
        collusion: t, how many sites may pool what they see; 0 with ``site`` noise.

    Returns:
        One adversary for the public, and one for each number of colluders from 1 to n - 1.

    Raises:
        ValueError: If there are fewer than two sites, or as many colluders as sites.

    Example:
        >>> from privfl.accounting import adversaries
        >>> for adversary in adversaries("distributed", members=4, collusion=1):
        ...     print(adversary.colluders, round(adversary.noise_factor, 3))
        0 1.155
        1 1.0
        2 0.816
        3 0.577
    """
    if members < 2 or not 0 <= collusion < members:
        raise ValueError(
            f"no adversaries can be listed for {members} sites of which {collusion} collude"
        )

    def factor(k: int) -> float:
        return 1.0 if noise == "site" else math.sqrt((members - k) / (members - collusion))

    public = Adversary("the public", 0, members, factor(0), "the finished model, and every report")
    listed = [public]
    for k in range(1, members):
        who = "one other site" if k == 1 else f"{k} other sites together"
        rest = members - k
        sums = (
            "this site's own updates"
            if rest == 1
            else f"sums over {rest} sites, this one among them"
        )
        listed.append(
            Adversary(
                f"{who}, also with the coordinator",
                k,
                members - k,
                factor(k),
                f"the model after every round, and {sums}",
            )
        )
    return tuple(listed)

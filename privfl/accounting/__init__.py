"""What a mechanism costs a record in privacy: pure mathematics, no I/O, no torch."""

from privfl.accounting.accountants import (
    ADJACENCY,
    Accountant,
    Bounds,
    RdpAccountant,
    epsilon_of,
    person_epsilon,
)
from privfl.accounting.adversaries import Adversary, adversaries
from privfl.accounting.calibration import (
    LARGEST_NOISE_MULTIPLIER,
    LEAST_NOISE_MULTIPLIER,
    least_noise_multiplier,
)
from privfl.accounting.events import (
    ACCOUNTS,
    Account,
    DiscreteGaussian,
    Event,
    Gaussian,
    MetricRelease,
    NonPrivate,
    PoissonGaussian,
    account_of,
    event_from_dict,
)
from privfl.accounting.filter import RenyiFilter
from privfl.accounting.renyi import ORDERS, divergences, epsilons

__all__ = [
    "ACCOUNTS",
    "ADJACENCY",
    "LARGEST_NOISE_MULTIPLIER",
    "LEAST_NOISE_MULTIPLIER",
    "ORDERS",
    "Account",
    "Accountant",
    "Adversary",
    "Bounds",
    "DiscreteGaussian",
    "Event",
    "Gaussian",
    "MetricRelease",
    "NonPrivate",
    "PoissonGaussian",
    "RdpAccountant",
    "RenyiFilter",
    "account_of",
    "adversaries",
    "divergences",
    "epsilon_of",
    "epsilons",
    "event_from_dict",
    "least_noise_multiplier",
    "person_epsilon",
]

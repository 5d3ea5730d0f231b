"""What a mechanism costs: pure mathematics, no I/O, no torch."""

from privfl.accounting.events import PoissonGaussian
from privfl.accounting.rdp import ADJACENCY, RdpAccountant, epsilon_of, least_noise_multiplier

__all__ = ["ADJACENCY", "PoissonGaussian", "RdpAccountant", "epsilon_of", "least_noise_multiplier"]

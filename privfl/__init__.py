"""privfl: differentially private federated learning over MPI, with an epsilon for every site.

Nothing heavy is imported here: torch, MPI, TenSEAL, dp-accounting and pydantic load only where they are used.
"""

__version__ = "0.1.0"

"""The encrypted sum alone, for any program whose ranks share a communicator:
`privfl.SecureSum(comm).sum(vector)`.
"""

from __future__ import annotations

import json
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from privfl._group_sum import GroupSum
from privfl._rank_group import RankGroup, transport_of
from privfl.errors import PrivflError
from privfl.secagg import BoundedIntegers, FixedPoint, Parameters
from privfl.secagg.parameters import SumPath, parameters_for
from privfl.secagg.quantise import Quantiser, Rounding


class SecureSum:
    """Sums vectors of all ranks so that no rank sees another rank's vector, only the sum.

    Guarantee: Whatever some ranks pool, rank 0 included, they learn of the other ranks' vectors
        only their sum. Every rank is a site; rank 0 also adds, and holds the key like all others,
        so what protects a vector here are the masks: that rank 0 sees not even the sum is not
        claimed. Keys are not pinned, so rank 0 must run this code unchanged: a single trust domain.
        docs/secure-aggregation.md has the proofs.

    Args:
        comm: an mpi4py communicator of at least 2 ranks, or a privfl transport. Collective, as is
            every :meth:`sum`.
        value_bits: bits of a value, 12 to 28; by default as many, from 16 to 24, as two values can
            share a word with.
        range: for floating-point vectors the public bound on the size of their elements; without it
            vectors are integers.
        rounding: of floating-point values to the grid range / (2^(value_bits - 1) - 1): ``nearest``
            or ``stochastic``.
        path: ``star`` sends contributions to rank 0, ``reduce`` lets the MPI library add them. Same
            result.
        timeout: seconds after which a rank that does not answer is an error.

    Raises:
        PrivflError: If there are too few ranks, ranks have other arguments or versions, or
            parameters do not fit.
    """

    def __init__(
        self,
        comm: Any,
        *,
        value_bits: int | None = None,
        range: float | None = None,  # noqa: A002  (the word of the experiment file)
        rounding: Rounding = "nearest",
        path: SumPath = "star",
        timeout: float = 600.0,
    ) -> None:
        value_range = range
        self._group = RankGroup(transport_of(comm), timeout)
        self._integers = value_range is None

        def choose() -> Parameters:
            _check_arguments(value_range, rounding, path)
            parameters = parameters_for(self._group.size, value_bits, path)
            self._quantiser: Quantiser = BoundedIntegers(parameters)
            if value_range is not None:
                self._quantiser = FixedPoint(parameters, value_range, rounding)
            return parameters

        arguments = json.dumps(
            ["privfl SecureSum 1", self._group.size, value_bits, value_range, path], default=repr
        )
        self._sum = GroupSum(self._group, self._group.join(arguments, choose), path)

    @property
    def parameters(self) -> Parameters:
        """Those of the encrypted sums: members, bits of a value, prime."""
        return self._sum.parameters

    def sum(self, vector: ArrayLike) -> NDArray[Any]:
        """The sum over all ranks, at every rank. Collective.

        Args:
            vector: integers of at most ``value_bits`` bits (with sign), or, if a ``range`` was
                given, numbers within it. Any shape, the same at all ranks.

        Returns:
            int64, exact; with a ``range`` float64, each rank's values rounded to the grid. The
            shape of ``vector``.

        Raises:
            PrivflError: At all ranks, if one rank's vector does not fit or it can sum nothing more;
                nothing of any vector has left then.
            MismatchError: If the sum is not what the ranks sent; this object sums nothing more.
        """
        return self._sum.sum(lambda: self._accept(vector), self._quantiser)

    def _accept(self, vector: ArrayLike) -> NDArray[Any]:
        numbers = np.asarray(vector)
        if self._integers and not np.can_cast(numbers.dtype, np.int64):
            raise PrivflError(
                f"SecureSum sums integers exactly, and was given {numbers.dtype}; for numbers give "
                f"it their public range"
            )
        if not self._integers and not (
            np.issubdtype(numbers.dtype, np.floating) or np.issubdtype(numbers.dtype, np.integer)
        ):
            raise PrivflError(f"SecureSum sums real numbers, and was given {numbers.dtype}")
        return numbers

    def close(self) -> None:
        """Give up receiving. Collective in effect: no rank may sum after another has closed."""
        self._group.close()

    def __enter__(self) -> SecureSum:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check_arguments(value_range: Any, rounding: str, path: str) -> None:
    if rounding not in ("nearest", "stochastic") or path not in ("star", "reduce"):
        raise PrivflError(
            f"SecureSum takes rounding nearest or stochastic and path star or reduce, got "
            f"{rounding!r} and {path!r}"
        )
    if value_range is not None and not isinstance(value_range, int | float):
        raise PrivflError(
            f"SecureSum takes a number as the public range, or none for integers, got "
            f"{value_range!r}"
        )

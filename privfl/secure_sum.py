"""The encrypted sum alone, for any program whose ranks share a communicator:
`privfl.SecureSum(comm).sum(vector)`.
"""

from __future__ import annotations

import json
import math
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from privfl._group_sum import GroupSum
from privfl._rank_group import TIMEOUT, RankGroup, refuse, transport_of
from privfl.errors import PrivflError, is_number, shown, words_checked
from privfl.secagg import BoundedIntegers, FixedPoint, Parameters
from privfl.secagg.parameters import LEAST_BITS, MOST_BITS, SumPath, parameters_for
from privfl.secagg.quantise import Quantiser, Rounding


class SecureSum:
    """Sums vectors of all ranks so that no rank sees another rank's vector, only the sum.

    Guarantee: Whatever some ranks pool, rank 0 included, they learn of the other ranks' vectors
        only their sum. Every rank is a site; rank 0 also adds, and holds the key like all others,
        so what protects a vector here are the masks: that rank 0 sees not even the sum is not
        claimed. Keys are not pinned, so rank 0 must run this code unchanged: a single trust domain.
        docs/secure-aggregation.md has the proofs.

    Making the object is collective, as is every :meth:`sum`: all ranks make the same calls in the
    same order, with the same arguments but for ``timeout``. What is wrong at one rank is one
    sentence at all of them.

    Args:
        comm: an mpi4py communicator of at least 2 ranks, or a privfl transport.
        value_bits: bits of a value with its sign, 12 to 28; by default as many, from 16 to 24, as
            two values can share a word with.
        range: for floating-point vectors the public bound on the size of their elements; without it
            vectors are integers.
        rounding: of floating-point values to the grid range / (2^(value_bits - 1) - 1):
            ``nearest``, or ``stochastic``, whose mean error is zero.
        path: ``star`` sends contributions to rank 0, ``reduce`` lets the MPI library add them. The
            result is the same.
        timeout: seconds after which a rank that does not answer is an error.

    Raises:
        PrivflError: At all ranks, if an argument is wrong at one of them, ranks have other
            arguments or versions, or so many bits do not fit so many ranks; at this rank, if
            ``comm`` is no communicator of 2 ranks or more.
        TypeError: If an argument is unknown or missing; the other ranks get a PrivflError.

    Example::

        with privfl.SecureSum(MPI.COMM_WORLD) as secure:  # at every rank
            total = secure.sum(np.arange(10))
    """

    __module__ = "privfl"

    @words_checked(lambda _, values, problem: refuse(values, problem), "SecureSum")
    def __init__(
        self,
        comm: Any,
        *,
        value_bits: int | None = None,
        range: float | None = None,  # noqa: A002  (the word of the experiment file)
        rounding: Rounding = "nearest",
        path: SumPath = "star",
        timeout: float = TIMEOUT,
    ) -> None:
        problem = _argument_problem(value_bits, range, rounding, path, timeout)
        self._group = RankGroup(transport_of(comm), TIMEOUT if problem else float(timeout))
        self._range, self._path, self._closed = range, path, False
        # A number of numpy would not go into a message.
        bits = None if problem or value_bits is None else int(value_bits)

        def choose() -> Parameters:
            if problem:
                raise PrivflError(problem)
            parameters = parameters_for(self._group.size, bits, path)
            self._quantiser: Quantiser = BoundedIntegers(parameters)
            if range is not None:
                self._quantiser = FixedPoint(parameters, _float_of(range), rounding)
            return parameters

        alike = ["privfl SecureSum 1", self._group.size, bits, range, path]
        arguments = "" if problem else json.dumps(alike, default=_float_of)
        self._sum = GroupSum(self._group, self._group.join(arguments, choose), path)

    @property
    def parameters(self) -> Parameters:
        """The parameters of the encrypted sums: members, bits of a value, prime."""
        return self._sum.parameters

    def sum(self, vector: ArrayLike) -> NDArray[Any]:
        """The sum of all ranks' vectors, at every rank. Collective.

        Args:
            vector: integers of at most ``value_bits`` bits (with sign), or, if a ``range`` was
                given, numbers within it. Any shape, the same at all ranks.

        Returns:
            The sum, of the shape of ``vector``: int64, exact; with a ``range`` float64, each rank's
            values rounded to the grid.

        Raises:
            PrivflError: At all ranks, if one rank's vector does not fit or one of them can sum
                nothing more; nothing of any vector has left its rank then.
            MismatchError: If the decrypted sum is not the sum of what the ranks sent; this object
                sums nothing more.
        """
        if self._closed:
            raise PrivflError("this SecureSum was closed; make another one at all ranks")
        return self._sum.sum(lambda: self._accept(vector), self._quantiser)

    def _accept(self, vector: ArrayLike) -> NDArray[Any]:
        numbers = np.asarray(vector)
        if self._range is None and not np.can_cast(numbers.dtype, np.int64):
            raise PrivflError(
                f"SecureSum sums integers exactly, and was given {numbers.dtype}; for numbers give "
                "it their public range"
            )
        if self._range is not None and not (
            np.issubdtype(numbers.dtype, np.floating) or np.issubdtype(numbers.dtype, np.integer)
        ):
            raise PrivflError(f"SecureSum sums real numbers, and was given {numbers.dtype}")
        return numbers

    def close(self) -> None:
        """End this object. Collective in effect: no rank may sum after another has closed."""
        if not self._closed:
            self._closed = True
            self._group.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        """The rank, the bits and range of a value, and the path."""
        facts = [
            f"rank {self._group.rank} of {self._group.size}",
            f"value_bits={self.parameters.value_bits}",
            f"range={self._range}",
            f"path={self._path!r}",
        ]
        return f"SecureSum({', '.join(facts)}{', closed' * self._closed})"


def _argument_problem(
    value_bits: Any, value_range: Any, rounding: Any, path: Any, timeout: Any
) -> str:
    """What is wrong with the arguments of a :class:`SecureSum`, or nothing."""
    if value_bits is not None and not (
        is_number(value_bits, Integral) and LEAST_BITS <= value_bits <= MOST_BITS
    ):
        return f"value_bits must be between {LEAST_BITS} and {MOST_BITS}, got {shown(value_bits)}"
    words = isinstance(rounding, str) and isinstance(path, str)
    if not words or rounding not in ("nearest", "stochastic") or path not in ("star", "reduce"):
        return (
            "SecureSum takes rounding nearest or stochastic and path star or reduce, got "
            f"{shown(rounding)} and {shown(path)}"
        )
    if value_range is not None and not is_number(value_range, Real):
        return (
            "SecureSum takes a number as the public range, or none for integers, got "
            f"{shown(value_range)}"
        )
    if not (is_number(timeout, Real) and 0.0 < _float_of(timeout) < math.inf):
        return f"timeout must be a number of seconds above 0, got {shown(timeout)}"
    return ""


def _float_of(number: Real | float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf

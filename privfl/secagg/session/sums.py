"""A site's part in the encrypted sums of one run: from a vector to blocks for the wire, and from blocks to the checked sum."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from privfl.errors import PrivflError, ProtocolError
from privfl.federation.messages import Vector
from privfl.secagg import (
    Checksum,
    Decryption,
    ExchangeKey,
    Layout,
    Masks,
    MismatchError,
    Pairs,
    Parameters,
    derive,
    encrypt,
    usual_value_bits,
)
from privfl.secagg.limbs import join, limb_count, split
from privfl.secagg.quantise import Quantiser
from privfl.secagg.session.keys import RunKeys
from privfl.secagg.session.roster import Agreement

# How a sum of words comes about; the results are the same to the last bit.
Path = Literal["star", "reduce"]

# Metrics are summed exactly as multiples of 2^-30 below 2^32 in size, each as several values.
_METRIC_GRID, _LARGEST_METRIC = 2.0**-30, 2.0**32
# Exponents of updates, which are float32, are between -148 and 128.
_LEAST = 256
# Encryptions that are made ahead at most: 32 MiB of them.
_AHEAD = 512


def parameters_for(members: int, value_bits: int | None, path: Path) -> Parameters:
    """The parameters of sums of so many members; the usual ``value_bits`` if none are given.

    Raises:
        PrivflError: so many bits do not fit so many members, or MPI cannot add their words.
    """
    parameters = derive(members, value_bits or usual_value_bits(members))
    if path == "reduce" and members > parameters.additions:
        raise PrivflError(
            f"path reduce adds at most {parameters.additions} contributions at value_bits {parameters.value_bits}, there are {members}; "
            "lower value_bits, or use path star"
        )
    return parameters


def layout_of(vector: Vector, numbers: int, parameters: Parameters) -> Layout:
    """Where a vector of so many numbers lies in the blocks of a contribution."""
    return Layout(numbers if vector == "update" else numbers * _limbs(parameters), parameters)


def _limbs(parameters: Parameters) -> int:
    return limb_count(64, parameters.value_bits - 1)


def metrics_to_integers(numbers: NDArray[np.float64], parameters: Parameters) -> NDArray[np.int64]:
    """Numbers of at most 2^32 / members in size on the grid of metrics.

    Raises:
        PrivflError: a number is not finite or too large.
    """
    if not (np.abs(numbers) <= _LARGEST_METRIC / parameters.members).all():
        raise PrivflError("a metric returned NaN, an infinite number, or one too large to be summed over the sites")
    return np.rint(numbers / _METRIC_GRID).astype(np.int64)


def metrics_from_totals(totals: NDArray[np.int64], parameters: Parameters) -> NDArray[np.float64]:
    """The sums of numbers behind the sums of their limbs."""
    wrapped = [total % (1 << 64) for total in join(totals.tolist(), parameters.value_bits - 1, _limbs(parameters))]
    return np.array(wrapped, dtype=np.uint64).view(np.int64).astype(np.float64) * _METRIC_GRID


class Sums:
    """Opens one sum after another, each for a later (round, attempt), until one does not fit; then the keys are given up."""

    def __init__(self, agreement: Agreement, exchange: ExchangeKey, keys: RunKeys) -> None:
        self._agreement = agreement
        self._keys = keys
        self.key = keys.sums
        self._pairs = Pairs(exchange, [party.exchange_key for party in agreement.members])
        self.given_up = False

    @property
    def masked_members(self) -> int:
        """Between how many members the masks are."""
        return self._pairs.members

    @property
    def parameters(self) -> Parameters:
        return self.key.parameters

    def work_ahead(self, layout: Layout) -> bool:
        """Do a little (about a millisecond) of what the next contribution will need, whatever is in it; False if nothing is left to do."""
        return not self.given_up and self.key.encrypt_ahead(min(_AHEAD, layout.all_ciphertexts))

    def open(self, round_: int, attempt: int, length: int, quantiser: Quantiser, facts: Any) -> OneSum:
        """This site's part in the sum of one attempt.

        Args:
            length: values of the vector.
            facts: whatever else all members must have been told alike, as JSON: if they were not, the sum does not decode.

        Raises:
            ProtocolError: not later than the last one, or the keys were given up.
        """
        if self.given_up:
            raise MismatchError
        names = [party.site for party in self._agreement.members]
        text = json.dumps(["privfl sum 1", self._agreement.digest.hex(), round_, attempt, length, names, facts], sort_keys=True)
        transcript = hashlib.sha256(text.encode()).digest()
        masks = self._pairs.masks(round_, attempt, transcript)
        return OneSum(self, length, quantiser, masks, self._keys.checksum_key(transcript))

    @contextlib.contextmanager
    def until_mismatch(self) -> Iterator[None]:
        """The first sum that does not fit ends the key epoch: nothing is encrypted or decrypted with these keys any more."""
        try:
            yield
        except MismatchError:
            self.given_up = True
            raise


class OneSum:
    """One attempt: the contribution, once, and then the total. Made by :meth:`Sums.open`."""

    def __init__(self, sums: Sums, length: int, quantiser: Quantiser, masks: Masks, check: bytes) -> None:
        self._sums, self._length, self._quantiser, self._check = sums, length, quantiser, check
        self._masks: Masks | None = masks
        self._decryption = Decryption(length, Checksum(check, sums.parameters), sums.key)

    def contribution(self, vector: NDArray[Any]) -> Iterator[NDArray[np.uint64]]:
        """The blocks of this site's contribution, each made when it is asked for.

        Raises:
            PrivflError: the vector does not fit; nothing has been given out.
            ProtocolError: another length, or a second contribution, which would be masked alike.
        """
        masks, self._masks = self._masks, None
        if masks is None or len(vector) != self._length:
            raise ProtocolError(
                f"a second contribution to one attempt, or one of another length than {self._length}, was asked for"
            )
        return encrypt(vector, self._quantiser, Checksum(self._check, self._sums.parameters), masks, self._sums.key)

    def wide_contribution(self, numbers: NDArray[np.int64]) -> Iterator[NDArray[np.uint64]]:
        """As :meth:`contribution`, of numbers modulo 2^64 that take several values each; :func:`metrics_from_totals` is the way back."""
        parameters = self._sums.parameters
        if self._masks is None:
            return self.contribution(numbers)
        hidden = numbers.astype(np.uint64)
        self._masks.apply(hidden)
        return self.contribution(split(hidden, parameters.value_bits - 1, _limbs(parameters)).view(np.int64))

    def collect(self, block: bytes | memoryview) -> None:
        """Take the next block of the total.

        Raises:
            MismatchError: it is none; the keys are given up.
        """
        with self._sums.until_mismatch():
            self._decryption.add(block)

    def total(self) -> NDArray[Any]:
        """The checked sum; shape (length,).

        Raises:
            MismatchError: it is not the sum of what the members sent; the keys are given up.
        """
        with self._sums.until_mismatch():
            return self._quantiser.numbers(self._decryption.totals())


def seal_exponent(keys: RunKeys, vector: NDArray[np.float64], context: bytes) -> str:
    """The least e with |x| < 2^e for all of ``vector``, sealed for all sites; in hexadecimal."""
    largest = float(np.abs(vector).max()) if len(vector) else 0.0
    exponent = int(np.frexp(largest)[1]) if largest else -_LEAST
    return keys.seal_note(min(max(exponent, -_LEAST), _LEAST - 1).to_bytes(2, "big", signed=True), context).hex()


def agreed_span(keys: RunKeys, sealed: Mapping[str, str], sites: Sequence[str], context: Callable[[str], bytes]) -> float:
    """The power of two that bounds the vectors of all sites. ``context``: from a site's name to what its exponent was sealed for.

    Raises:
        ProtocolError: a note was altered, or is of another site or round.
    """
    if set(sealed) != set(sites):
        raise ProtocolError("the coordinator does not relay a range of every site, but they must agree on one")
    exponents = []
    for site, text in sealed.items():
        try:
            note = keys.open_note(bytes.fromhex(text), context(site))
        except ValueError as error:
            raise ProtocolError("a sealed range is not in hexadecimal") from error
        exponents.append(int.from_bytes(note, "big", signed=True))
    return float(2.0 ** max(exponents))

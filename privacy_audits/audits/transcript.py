"""What the coordinator received, byte by byte; and what it learns with a site's key.

On a recorded run: every frame that rank 0 received is tested for traces of what sites sent, its
process memory is searched for the words of the key, and each contribution is opened with the key,
as a coordinator and a colluding site can do together.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privacy_audits.bounds import tests
from privacy_audits.bounds.tests import Outcome
from privacy_audits.levels import LEVEL
from privacy_audits.result import AuditResult, Claim, Statistic
from privacy_audits.targets import orthogonal
from privacy_audits.targets.job import COLLUSION, RecordedRun
from privfl.accounting import Adversary
from privfl.admission.plan import parameters_of
from privfl.config import load_experiment
from privfl.federation.messages import Kind, decode
from privfl.secagg import SumKey
from privfl.secagg.packing import pack
from privfl.secagg.parameters import CIPHERTEXT_WORDS, DEGREE

_N = len(orthogonal.SITES)
COORDINATOR = Adversary(
    who="the coordinator",
    colluders=0,
    honest_shares=_N,
    noise_factor=math.sqrt(_N / (_N - COLLUSION)),
    sees="every message that reaches rank 0, and its own memory",
)
# Rounds of which every contribution is opened or correlated; more add nothing but time.
_ROUNDS = 10


class Transcript:
    """The checks of one recorded run under fedsgd, whose contributions are integers.

    Args:
        run: a complete run.
    """

    def __init__(self, run: RecordedRun) -> None:
        self._run = run
        self._parameters = parameters_of(load_experiment(run.folder / "experiment.yaml"))
        self._received = [
            (event["peer"], decode(bytes.fromhex(event["head"]), bulk))
            for event, bulk in _frames(run)
        ]

    def results(self) -> Iterator[AuditResult]:
        """Every check."""
        yield self._kinds()
        words = [
            np.frombuffer(m.bulk, "<u8") for _, m in self._received if m.kind is Kind.CONTRIBUTION
        ]
        yield self._uniform(words)
        yield self._correlation()
        yield self._memory()
        yield from self._opened()

    def _kinds(self) -> AuditResult:
        """Flat bytes are ciphertexts and sealed keys; nothing else, and no vector in the clear."""
        began = time.perf_counter()
        others = [
            m
            for _, m in self._received
            if m.body is None and m.kind not in (Kind.CONTRIBUTION, Kind.SEALED_KEY)
        ]
        everything = b"\n".join(
            bytes(m.bulk) if m.body is None else _spelled_out(m.body.model_dump(mode="json"))
            for _, m in self._received
        )
        clear = 0
        for site in self._run.sites:
            for name in ("total", "integers", "share", "replica"):
                for vector in site.arrays.get(name, np.empty((0, 0)))[:3]:
                    clear += _in_the_clear(vector, everything)
        return self._result(
            "nothing in the clear",
            "No update, share, sum or model reaches the coordinator in the clear.",
            "searches all that rank 0 received for the bytes of the sites' vectors, also for those "
            "that are spelled as text",
            Statistic.exact(
                "vectors found, and messages of an unknown kind",
                clear + len(others),
                "0",
                holds=clear + len(others) == 0,
            ),
            1.0,
            "a vector sent as it is",
            began,
        )

    def _uniform(self, words: list[NDArray[np.uint64]]) -> AuditResult:
        began = time.perf_counter()
        fractions = np.concatenate(words or [np.zeros(1, np.uint64)]) / self._parameters.prime
        return self._result(
            "uniform",
            "The words of a contribution are uniform below the prime, whatever is in it.",
            f"compares the distribution of {fractions.size} words with the uniform one",
            Statistic.tested(
                "largest distance between distributions",
                tests.uniformity(fractions),
                "about 1 / sqrt(words)",
            ),
            1.0,
            "integers that are not encrypted",
            began,
        )

    def _correlation(self) -> AuditResult:
        began = time.perf_counter()
        pairs = []
        for site, words in self._contributions():
            integers = self._integers(site)
            fractions = words.reshape(len(words), -1, CIPHERTEXT_WORDS) / self._parameters.prime
            for half in (fractions[:, :, :DEGREE], fractions[:, :, DEGREE:]):
                flat = half.reshape(len(words), -1)[:, : integers.shape[1]]
                pairs.append((flat, integers.astype(np.float64)))
        least = min(a.size for a, _ in pairs)
        return self._result(
            "no correlation",
            "The words of a contribution say nothing of the integers in it.",
            "correlates the words of every contribution with the integers that its site sent",
            Statistic.tested(
                "largest correlation", tests.correlation(pairs), "about 1 / sqrt(words)"
            ),
            tests.power_of_correlation(least, len(pairs), 0.1, LEVEL),
            "a correlation of 0.1",
            began,
        )

    def _memory(self) -> AuditResult:
        began = time.perf_counter()
        looks = self._run.ranks[0].facts.get("memory", [])
        found = max((look["found"] for look in looks), default=0)
        able = bool(looks) and all(look["control"] for look in looks)
        return self._result(
            "key in memory",
            "The coordinator never holds a word of the secret key.",
            f"searches the memory of rank 0, {len(looks)} times during the run, for each word of "
            "the key",
            Statistic.exact("words of the key found", found, "0", holds=found == 0),
            1.0 if able else 0.0,
            "a site that sends its key",
            began,
        )

    def _opened(self) -> Iterator[AuditResult]:
        """With the key, a contribution is masked still; only the sum of the honest is plain."""
        began = time.perf_counter()
        secret = (self._run.folder / "secret.bin").read_bytes()
        key = SumKey(self._parameters, secret)
        opened, pairs, uniform = [], [], []
        modulus = 1 << self._parameters.word_bits
        for site, words in self._contributions():
            integers = self._integers(site)
            plain = np.stack([key.decrypt(row) for row in words])[:, : integers.shape[1]]
            plain &= np.uint64(modulus - 1)
            opened.append(plain)
            pairs.append((plain / modulus, (integers % np.uint64(modulus)) / modulus))
            uniform.append(plain / modulus)
            # Masks that serve two rounds cancel in the difference of two contributions.
            apart = (plain[1:] - plain[:-1]) % np.uint64(modulus)
            sent = (integers[1:] - integers[:-1]) % np.uint64(modulus)
            pairs.append((apart / modulus, sent / modulus))
        coalition = self._run.adversaries[COLLUSION]
        correlated, spread = tests.correlation(pairs), tests.uniformity(np.concatenate(uniform))
        worst = min(correlated, spread, key=lambda outcome: outcome.p_value)
        yield self._result(
            "opened with the key",
            "The coordinator with a site's key learns the sum of the other sites, and nothing of "
            "each.",
            "decrypts every contribution alone, and looks for what its site sent, also in the "
            "differences of two rounds",
            Statistic.tested(
                "largest correlation",
                Outcome(correlated.value, min(1.0, 2 * worst.p_value)),
                "about 1 / sqrt(integers)",
            ),
            tests.power_of_correlation(pairs[0][0].size, len(pairs), 0.1, LEVEL / 2),
            "contributions without masks",
            began,
            coalition,
        )
        began = time.perf_counter()
        both = [self._integers(site) for site in range(_N)]
        wrong = int(((np.sum(opened, axis=0) - np.sum(both, axis=0)) % modulus != 0).sum())
        yield self._result(
            "control: the sum opens",
            "The same decryptions add up to the plain sum: this audit reads what it should.",
            "adds the opened contributions, in which the masks cancel",
            Statistic.exact("integers that differ", wrong, "0", holds=wrong == 0),
            1.0,
            "an audit that decrypts wrongly",
            began,
            coalition,
        )
        yield self._wrapping(key, both[0].shape[1], coalition)

    def _wrapping(self, key: SumKey, count: int, adversary: Adversary) -> AuditResult:
        """The sum modulo 2^P is all that a key holder may learn of sites' integers, which are
        uniform under their masks: so how often they wrap is chance.
        """
        began = time.perf_counter()
        words = np.sum([words for _, words in self._contributions()], axis=0)
        words %= np.uint64(self._parameters.prime)
        sums = np.stack([key.coefficients(row)[:count] for row in words])
        unit = 2.0 ** (self._parameters.delta_bits + self._parameters.word_bits)
        return self._result(
            "wrapping of the sum",
            "A key holder learns the sum modulo 2^P, and not how often integers wrapped in it.",
            "decrypts the sums of all contributions, and compares how often they wrapped with what "
            "masks make of it",
            Statistic.tested(
                "measured over expected variance of wraps",
                tests.wrapping(np.rint(sums / unit * 2.0**32) / 2.0**32, _N),
                "1",
            ),
            1.0,
            "masks that are added to the words of ciphertexts",
            began,
            adversary,
        )

    def _contributions(self) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """For every site its contributions of the first rounds; shape (rounds, words)."""
        for site in range(_N):
            rows: dict[int, list[NDArray[np.uint64]]] = {}
            for peer, message in self._received:
                kept = message.kind is Kind.CONTRIBUTION and message.round <= _ROUNDS
                if kept and peer == site + 1:
                    words = np.frombuffer(message.bulk, "<u8")
                    rows.setdefault(message.round, []).append(words)
            yield site, np.stack([np.concatenate(rows[r]) for r in sorted(rows)])

    def _integers(self, site: int) -> NDArray[np.uint64]:
        """The packed integers of a site's contributions of the first rounds."""
        rows = self._run.sites[site].arrays["integers"][:_ROUNDS]
        return np.stack([pack(row, self._parameters) for row in rows])

    def _result(
        self,
        what: str,
        statement: str,
        attack: str,
        statistic: Statistic,
        power: float,
        against: str,
        began: float,
        adversary: Adversary = COORDINATOR,
    ) -> AuditResult:
        return AuditResult(
            name=f"transcript/{what}",
            claim=Claim(statement=statement, adversary=adversary),
            attack=attack,
            statistic=statistic,
            confidence=1.0 - LEVEL,
            power=power,
            power_against=against,
            seconds=time.perf_counter() - began,
        )


def _frames(run: RecordedRun) -> Iterator[tuple[dict[str, Any], bytes]]:
    rank = run.ranks[0]
    bulk, start = rank.arrays["bulk"].tobytes(), 0
    for event in rank.happened("received"):
        yield event, bulk[start : start + event["bytes"]]
        start += event["bytes"]


def _spelled_out(value: Any) -> bytes:
    """The bytes that a JSON value spells: text, also read as hexadecimal and in base64, and numbers
    as float64.
    """
    if isinstance(value, dict):
        return b"\n".join(_spelled_out(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple):
        if value and all(isinstance(number, int | float) for number in value):
            return np.asarray(value, dtype=np.float64).tobytes()
        return b"\n".join(_spelled_out(part) for part in value)
    text = value if isinstance(value, str) else json.dumps(value)
    spelled = [text.encode()]
    with contextlib.suppress(ValueError):
        spelled.append(base64.b64decode(text, validate=True))
    # A vector may follow other digits.
    digits = re.findall(r"(?:[0-9a-f]{2}){16,}", text)
    spelled += [bytes.fromhex(run) for run in digits]
    return b"\n".join(spelled)


def _in_the_clear(vector: NDArray[np.generic], everything: bytes) -> bool:
    """Whether four neighbouring numbers occur, two of which are not 0, in either precision."""
    floats = vector.astype(np.float64)
    pieces = floats[: len(floats) // 4 * 4].reshape(-1, 4)
    places = np.flatnonzero((pieces != 0).sum(axis=1) >= 2)
    if not len(places):
        return False
    # From the start, where whoever sends a part begins, and spread over all.
    for place in np.unique(places[np.linspace(0, len(places) - 1, 4, dtype=int)]):
        piece = slice(4 * place, 4 * place + 4)
        forms = (floats[piece], floats[piece].astype(np.float32), vector[piece])
        if any(form.tobytes() in everything for form in forms):
            return True
    return False

"""The audits by name: the only list of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from privacy_audits.result import AuditResult
from privacy_audits.targets.job import Launch, Mode, RecordedRun, record
from privfl.errors import PrivflError, did_you_mean


@dataclass
class Workshop:
    """What audits share: recorded runs are made once, when the first audit asks for one.

    Args:
        folder: where recorded runs and pictures lie.
        quick: whether long attacks are made shorter.
        through: a module and its arguments that run each rank of a recorded run; see
            :class:`privacy_audits.targets.job.Launch`.
        modes: the algorithms that are audited.
        say: told what is happening, for a person who waits.
    """

    folder: Path
    quick: bool = False
    through: tuple[str, ...] = ()
    modes: tuple[Mode, ...] = ("fedsgd", "fedavg")
    say: Callable[[str], None] = lambda text: None
    _runs: dict[Mode, RecordedRun] = field(default_factory=dict)

    def run(self, mode: Mode) -> RecordedRun:
        """The recorded run of ``mode``.

        Raises:
            PrivflError: If the run fails; then there is nothing to audit.
        """
        if mode not in self._runs:
            self.say(f"recording a run of {mode} with 3 sites under mpiexec ...")
            folder = Path(tempfile.mkdtemp(prefix=f"{mode}-", dir=self.folder))
            self._runs[mode] = record(mode, folder, Launch(through=self.through))
        run = self._runs[mode]
        if not run.complete:
            raise PrivflError(f"the run that was to be audited {run.problem}")
        return run


@dataclass(frozen=True)
class Audit:
    """One audit.

    Attributes:
        name: what it is called on the command line.
        asks: the question it answers, in one sentence.
        quick: whether it belongs to the quick set.
        run: makes its results, one after another.
    """

    name: str
    asks: str
    quick: bool
    run: Callable[[Workshop], Iterator[AuditResult]]


def _conformance(shop: Workshop) -> Iterator[AuditResult]:
    from privacy_audits.audits.conformance import Conformance

    for mode in shop.modes:
        yield from Conformance(shop.run(mode)).results()


def _canaries(shop: Workshop) -> Iterator[AuditResult]:
    from privacy_audits.audits import canaries

    for mode in shop.modes:
        yield from canaries.results(shop.run(mode))


def _transcript(shop: Workshop) -> Iterator[AuditResult]:
    from privacy_audits.audits.transcript import Transcript

    # Contributions of fedavg are not integers before they are quantised; what protects them is the
    # same.
    if "fedsgd" in shop.modes:
        yield from Transcript(shop.run("fedsgd")).results()


def _distinguisher(shop: Workshop) -> Iterator[AuditResult]:
    from privacy_audits.audits import distinguisher

    shop.say(f"training {2 * distinguisher.RUNS} times ...")
    yield from distinguisher.results()


def _membership(shop: Workshop) -> Iterator[AuditResult]:
    from privacy_audits.audits import membership

    shop.say(f"training {2 * (membership.SHADOWS + 1)} models ...")
    yield from membership.results()


def _protocol(shop: Workshop) -> Iterator[AuditResult]:
    from privacy_audits.audits import protocol

    yield from protocol.results(shop.folder, shop.through, shop.say)


def _restarts(shop: Workshop) -> Iterator[AuditResult]:
    from privacy_audits.audits import restarts

    yield from restarts.results(shop.folder, shop.through, shop.say)


def _inversion(shop: Workshop) -> Iterator[AuditResult]:
    from privacy_audits.audits import inversion

    yield from inversion.results()


AUDITS = (
    Audit(
        "conformance",
        "Does a run do what was charged: clip, sample, add noise, keep its ledger?",
        True,
        _conformance,
    ),
    Audit(
        "canaries",
        "How much of epsilon can each adversary show, guessing which of 1800 records took part?",
        True,
        _canaries,
    ),
    Audit(
        "transcript",
        "Does anything that the coordinator receives, or holds, tell what a site sent?",
        True,
        _transcript,
    ),
    Audit(
        "distinguisher",
        "Can many runs with one record be told from many without it?",
        False,
        _distinguisher,
    ),
    Audit(
        "membership",
        "Can members be told from others by the finished model, as a measure of risk?",
        False,
        _membership,
    ),
    Audit(
        "protocol",
        "What does a coordinator get that cheats with keys, members, sums or attempts?",
        False,
        _protocol,
    ),
    Audit(
        "restarts",
        "Does a budget hold over runs, and against an old copy of a ledger?",
        False,
        _restarts,
    ),
    Audit(
        "inversion",
        "Can a picture be read back from what each party sees?",
        False,
        _inversion,
    ),
)
_BY_NAME = {audit.name: audit for audit in AUDITS}


def named(names: tuple[str, ...], quick: bool) -> tuple[Audit, ...]:
    """The audits with these names, in the order of the list; without names, all or the quick ones.

    Raises:
        PrivflError: If there is no audit of that name.
    """
    for name in names:
        if name not in _BY_NAME:
            raise PrivflError(
                f"there is no audit {name!r}{did_you_mean(name, list(_BY_NAME))}; "
                "`privfl audit list` shows all"
            )
    if names:
        return tuple(audit for audit in AUDITS if audit.name in names)
    return tuple(audit for audit in AUDITS if audit.quick or not quick)

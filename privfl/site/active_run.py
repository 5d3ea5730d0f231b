"""A site's part in a run that has begun: everything here is there, from the trainer to the keys,
until the run is over.

It drives trainer, ledger, algorithm and sums, and talks to nobody: what it has to say it returns,
and the agent sends it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfl.errors import InternalError, PrivflError, ProtocolError
from privfl.federation import member, messages, metrics
from privfl.federation.messages import Body
from privfl.noise.metrics import noised
from privfl.secagg import BoundedIntegers
from privfl.secagg.quantise import Quantiser
from privfl.secagg.session import replicas
from privfl.secagg.session.handshake import Handshake
from privfl.secagg.session.metrics import layout_of, metrics_from_totals, metrics_to_integers
from privfl.secagg.session.sums import SumAttempt
from privfl.site.algorithms import Contribution, Replica, algorithm_of
from privfl.site.artifacts import share_model
from privfl.site.observer import Observer
from privfl.site.peer_heads import PeerHeads
from privfl.site.run_ledger import RunLedger
from privfl.site.setup import SiteSetup
from privfl.trainer import requests
from privfl.trainer.process import TrainerProcess
from privfl.trainer.requests import Facts

Blocks = Iterator[NDArray[np.uint64]]
# What a step of the run gives its agent to send: a report, the blocks of a contribution, or nothing
# yet.
Outcome = Body | Blocks | None


@dataclass(frozen=True)
class Prepared:
    """What a site has once its trainer, its keys and its ledger are there.

    Attributes:
        setup: what it brings to the run.
        welcome: the run, and its members.
        output: its folder for results.
        log: the path of its log.
        trainer: the running trainer.
        facts: what the trainer said of model and records.
        handshake: the roster, the keys and the sums of the run.
        ledger: its ledger.
        replica: the initial replica; shape (parameters,).
        note: writes a line to the log.
        observer: told of what happens.
    """

    setup: SiteSetup
    welcome: messages.Welcome
    output: Path
    log: Path
    trainer: TrainerProcess
    facts: Facts
    handshake: Handshake
    ledger: RunLedger
    replica: Replica
    note: Callable[[str], None]
    observer: Observer

    def tag(self, round_: int, begin: messages.Begin | None, replica: Replica) -> str:
        """A keyed digest of all that must be the same at every site: what was agreed, the
        constants of the model, the replica.
        """
        agreed = None if begin is None else begin.model_dump(mode="json")
        return replicas.tag(
            self.handshake.sums.keys,
            [self.welcome.run, round_, self.facts.constants, agreed],
            replica,
        )


class ActiveRun:
    """A run that has begun. States are those of the site's protocol at the moment of the call.

    Args:
        prepared: what the site has.
        state: of the protocol.
        begin: what the sites agreed on.

    Raises:
        ProtocolError: If ``begin`` does not fit this site's own facts, experiment and metrics.
        PrivflError: If the sums of gradients do not fit the bits of a value.
    """

    def __init__(self, prepared: Prepared, state: member.State, begin: messages.Begin) -> None:
        self._prepared, self._begin = prepared, begin
        self._setup, self._trainer, self._ledger = prepared.setup, prepared.trainer, prepared.ledger
        self._sums, self._observer = prepared.handshake.sums, prepared.observer
        self._check_begin(state)
        self._replica = prepared.replica
        # That which the site reported before the run began.
        self._tag = prepared.tag(state.round, None, self._replica)
        run = bytes.fromhex(prepared.welcome.run)
        self._algorithm = algorithm_of(
            self._setup, begin, run, self._trainer, self._sums.keys, self._observer
        )
        identities = {other.site: other.identity for other in prepared.handshake.roster.members}
        self._heads = PeerHeads(prepared.output, prepared.welcome.run, identities)
        self._contribution: Contribution | None = None
        self._sum: SumAttempt | None = None
        noise_multiplier = (
            begin.noise_multiplier if self._setup.noise_in_sums else self._setup.noise_multiplier
        )
        self._ledger.begin(noise_multiplier, prepared.facts.outside)
        self._observer.began(self._setup.site, self._algorithm)
        self._observer.replica(self._setup.site, 0, self._replica)

    def _check_begin(self, state: member.State) -> None:
        begin, facts, evaluation = (
            self._begin,
            self._prepared.facts,
            self._setup.experiment.evaluation,
        )
        fits = (
            begin.parameters == facts.parameters
            and begin.records[self._setup.site] == facts.records
        )
        if begin.layout:
            fits = (
                fits and state.evaluate_every > 0 and set(begin.layout) == set(evaluation.metrics)
            )
            fits = fits and (not facts.layout or begin.layout == facts.layout)
        if not fits:
            raise ProtocolError(
                "the coordinator began a run that does not fit this site's experiment"
            )

    # -- training ----------------------------------------------------------------------------------

    def train(self, state: member.State) -> None:
        """Charge the round, and only then let the trainer work.

        Raises:
            BudgetError: If the budget does not admit the round.
        """
        self._ledger.charge_round(state.round)
        self._algorithm.start(self._replica)

    def take(self, state: member.State, answer: requests.Answer) -> Outcome:
        """Go on with what the trainer answered."""
        match answer:
            case requests.Trained():
                return self._trained(state, answer)
            case requests.Followed():
                return self._move_to(state, self._algorithm.followed())
            case requests.Measured():
                return self._contribute_metrics(state, answer.metrics)
            case requests.Written():
                return self._written(answer)
            case _:
                raise InternalError(f"the trainer answered {answer.kind} during a run")

    def _trained(self, state: member.State, answer: requests.Trained) -> Body:
        ledger = self._ledger
        self._contribution = self._algorithm.trained(answer, ledger.steps("training"), state.round)
        epsilon = ledger.epsilon("training")
        self._prepared.note(f"round {state.round}: trained, epsilon {epsilon:.4g}")
        ledger.make_final("training")
        return messages.Trained(
            event=ledger.event("training", self._setup.experiment.local_steps).to_dict(),
            steps=ledger.steps("training"),
            epsilon=epsilon,
            head=ledger.head(state.round, 0),
            sealed_range=self._contribution.sealed_range,
        )

    # -- sums --------------------------------------------------------------------------------------

    def contribute(self, state: member.State, action: member.Contribute) -> Outcome:
        """This site's part in the sum that was opened; of metrics only once the trainer has
        measured.
        """
        if action.vector == "metrics":
            if self._measures_privately():
                self._ledger.charge_metrics(state.round)
            self._trainer.replica.write(self._replica)
            self._trainer.ask(requests.Measure())
            return None
        self._heads.keep(state.round, 0, action.heads)
        self._ledger.check_release(
            "training", state.round, state.sites, self._protections(state), costs=True
        )
        if self._contribution is None:
            raise InternalError("a contribution was asked for before the trainer had trained")
        vector, quantiser, agreed = self._contribution.summand(action.sealed_ranges)
        self._contribution = None
        attempt = self._open_sum(state, len(self._replica), quantiser, agreed)
        self._observer.contributed(self._setup.site, state.round, state.attempt, vector)
        return attempt.contribution(vector)

    def _measures_privately(self) -> bool:
        """Whether this site has evaluation records whose metrics need noise."""
        return self._setup.plan.metrics is not None and bool(self._prepared.facts.layout)

    def _contribute_metrics(self, state: member.State, measured: metrics.Measured) -> Blocks:
        release, private, setup = self._setup.plan.metrics, self._measures_privately(), self._setup
        self._ledger.check_release(
            "evaluation", state.round, state.sites, self._protections(state), costs=private
        )
        if release is not None and not private and measured:
            raise PrivflError(
                "data() has evaluation records now, and had none when the run began; return the "
                "same data sets throughout"
            )
        self._observer.measured(setup.site, state.round, measured)
        if release is not None and private:
            measured = noised(measured, release.noise_multiplier, setup.randomness())
            self._ledger.make_final("evaluation")
        numbers = metrics.pack(measured, self._begin.layout)
        integers = metrics_to_integers(numbers, setup.parameters)
        length = layout_of(len(numbers), setup.parameters, wide=True).values
        attempt = self._open_sum(state, length, BoundedIntegers(setup.parameters), None)
        self._observer.contributed(setup.site, state.round, state.attempt, numbers)
        return attempt.wide_contribution(integers)

    def _protections(self, state: member.State) -> dict[str, bool]:
        return self._prepared.handshake.protections(len(state.sites))

    def _open_sum(
        self, state: member.State, length: int, quantiser: Quantiser, agreed: float | None
    ) -> SumAttempt:
        # Sites that were told of other records or weights, or whose replicas differ, do not decode,
        # whoever was to compare them.
        facts = [state.vector, agreed, self._begin.model_dump(mode="json"), self._tag]
        self._sum = self._sums.open(state.round, state.attempt, length, quantiser, facts)
        return self._sum

    def collect(self, block: bytes | memoryview) -> None:
        """Decrypt the next block of the total."""
        self._open().collect(block)

    def combine(self, state: member.State, vector: messages.Vector) -> Outcome:
        """Use the total, which is complete."""
        total, self._sum = self._open().total(), None
        self._observer.summed(self._setup.site, state.round, state.attempt, total)
        if vector == "metrics":
            return self._measured(state, total)
        replica = self._algorithm.finish(self._replica, total)
        return None if replica is None else self._move_to(state, replica)

    def _measured(self, state: member.State, total: NDArray[Any]) -> Body:
        values = metrics.unpack(
            metrics_from_totals(total, self._setup.parameters), self._begin.layout
        )
        self._prepared.note(f"round {state.round}: {values}")
        ledger = self._ledger
        event = ledger.event("evaluation", 1).to_dict() if self._measures_privately() else None
        head = ledger.head(state.round, state.attempt)
        return messages.Measured(
            metrics=values, event=event, epsilon=ledger.epsilon("evaluation"), head=head
        )

    def _open(self) -> SumAttempt:
        if self._sum is None:
            raise InternalError("a total came before a sum was opened")
        return self._sum

    # -- replicas ----------------------------------------------------------------------------------

    def _move_to(self, state: member.State, replica: Replica) -> Body:
        self._replica = replica
        if not np.isfinite(replica).all():
            raise PrivflError(
                "the averaged model contains NaN or infinite values; lower optimizer.lr"
            )
        self._observer.replica(self._setup.site, state.round, replica)
        self._tag = self._prepared.tag(state.round, self._begin, replica)
        return messages.Applied(tag=self._tag)

    def lend(self, state: member.State) -> bytes:
        """This site's replica, sealed for the others, whose processors compute a little
        differently.
        """
        return replicas.seal(self._sums.keys, self._replica, _replica_context(state))

    def adopt(self, state: member.State, sealed: bytes | memoryview) -> Outcome:
        """Take the replica of another site.

        Raises:
            PrivflError: If it is too far away for rounding to explain.
        """
        lent = replicas.open_near(
            self._sums.keys, bytes(sealed), self._replica, _replica_context(state)
        )
        self._prepared.note(
            f"round {state.round}: took the replica of site {state.sites[0]}, which differed by "
            "rounding"
        )
        return self._move_to(state, lent)

    # -- the end -----------------------------------------------------------------------------------

    def write(self, state: member.State, heads: dict[str, messages.SignedHead]) -> None:
        """Keep the last heads of all ledgers, and let the trainer write the model."""
        self._heads.keep(state.round, state.attempt if state.measured == state.round else 0, heads)
        self._trainer.replica.write(self._replica)
        self._trainer.ask(requests.Write(path=str(self._prepared.output / "model.safetensors")))

    def _written(self, answer: requests.Written) -> Body:
        # A site that has pinned the others does not trust the coordinator, whose folder it is, with
        # the model.
        if not self._setup.pinned:
            welcome = self._prepared.welcome
            try:
                share_model(Path(answer.path), Path(welcome.folder), welcome.run, self._setup.site)
            except OSError as error:
                self._prepared.note(
                    f"the run folder {welcome.folder} is not shared with this site: {error}"
                )
        return messages.Finished(model=answer.path, log=str(self._prepared.log))


def _replica_context(state: member.State) -> bytes:
    return b"privfl replica 1" + state.run + state.round.to_bytes(4, "big")

"""A site's agent: the MPI rank of a site.

It holds the keys and the ledger, talks to the coordinator, and never loads torch or a record.

It drives the pure protocol of ``federation.member`` over a transport. Until the run has begun it
greets, joins and prepares; from then on it passes what the coordinator and the trainer say to an
:class:`~privfl.site.active_run.ActiveRun`, and sends what that returns.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Literal, TextIO, TypeVar

import numpy as np

from privfl.environment import threads_for, user_id, versions
from privfl.errors import EXIT_OURS, EXIT_USER, InternalError, PrivflError, in_one_line
from privfl.federation import member, messages
from privfl.federation.messages import Body, Kind, Message
from privfl.secagg import Layout
from privfl.secagg.self_test import prove
from privfl.secagg.session.handshake import Handshake
from privfl.secagg.session.metrics import layout_of
from privfl.secagg.session.roster import Member, Roster
from privfl.site.active_run import ActiveRun, Outcome, Prepared
from privfl.site.artifacts import places
from privfl.site.observer import Observer
from privfl.site.run_ledger import RunLedger
from privfl.site.setup import SiteSetup
from privfl.site.upload import Upload
from privfl.trainer.process import TrainerProcess
from privfl.trainer.requests import Answer, Facts
from privfl.transport import Transport, forbid_reading

_T = TypeVar("_T")

_FLUSH_SECONDS = 30.0
# A coordinator that does not answer a failure or a goodbye within this time is gone.
_STOP_SECONDS = 60.0
# How often a site looks whether its trainer still lives: a child of user code may keep the
# trainer's channel open.
_LOOK_SECONDS = 1.0


def serve(
    transport: Transport, prepare: Callable[[], SiteSetup], observer: Observer | None = None
) -> int:
    """Take part in one run as a site; the exit code of the job.

    Args:
        transport: connects this rank to the coordinator.
        prepare: called here, so that whatever it raises reaches the coordinator instead of the
            screen of one rank.
        observer: told of what happens at this site; for tests and audits.
    """
    # Before there is a key: no core file, and no other process reads this one.
    forbid_reading()
    return _Agent(transport, observer or Observer()).run(prepare)


class _Agent:
    def __init__(self, transport: Transport, observer: Observer) -> None:
        self._transport, self._observer = transport, observer
        self._log: TextIO | None = None
        self._trainer: TrainerProcess | None = None
        self._ledger: RunLedger | None = None
        self._facts: Facts | None = None
        self._active: ActiveRun | None = None
        self._upload: Upload | None = None
        self._exit_code: int | None = None
        self._failed_at: float | None = None

    def run(self, prepare: Callable[[], SiteSetup]) -> int:
        try:
            self._greet(prepare)
            while self._exit_code is None:
                try:
                    self._turn()
                except Exception as error:  # whatever it is, the coordinator must hear of it
                    self._fail(error)
            self._leave()
            self._send(Message.of(messages.Bye()))
            if not self._transport.flush(_FLUSH_SECONDS):
                self._transport.abort(EXIT_OURS)
            self._transport.close()
        except Exception:
            # Even reporting failed. A rank that just leaves would keep all others waiting.
            self._write_traceback()
            self._transport.abort(EXIT_OURS)
        with contextlib.suppress(OSError):
            if self._log is not None:
                self._log.close()
        return self._exit_code

    def _leave(self) -> None:
        """End the trainer, and only then refund what never left because others ended the run."""
        if self._trainer is not None:
            self._trainer.stop()
        if self._ledger is not None:
            try:
                if self._failed_at is None and self._exit_code != 0:
                    self._ledger.refund_unreleased()
            except PrivflError as error:  # then it stays charged
                self._note(f"no refund: {error}")
            self._ledger.close()

    # -- talking -----------------------------------------------------------------------------------

    def _greet(self, prepare: Callable[[], SiteSetup]) -> None:
        try:
            setup = self._setup = prepare()
            experiment = setup.experiment
            self._handshake = Handshake(
                setup.site, setup.identity, setup.file.peers, setup.parameters
            )
            self._state = member.State(
                site=setup.site,
                digest=experiment.digest(),
                sites=experiment.sites,
                rounds=experiment.rounds,
                evaluate_every=experiment.evaluate_every,
                steps=experiment.algorithm == "fedsgd",
            )
        except Exception as error:
            self._failed_at = time.monotonic()
            sentence, exit_code = self._explain(error)
            self._send(Message.of(messages.Hello(site=None, error=sentence, exit_code=exit_code)))
            return
        hello = messages.Hello(
            site=setup.site,
            digest=experiment.digest(),
            versions=versions(),
            exchange_key=self._handshake.exchange.public.hex(),
            identity=setup.identity.public,
            user=user_id(),
        )
        self._send(Message.of(hello))

    def _send(self, message: Message) -> None:
        self._transport.send(0, *message.encode())

    def _report(self, body: Body) -> None:
        self._state, message = member.done(self._state, body)
        self._send(message)

    def _fail(self, error: Exception) -> None:
        """Tell the coordinator, once, and then only wait to be told to stop."""
        sentence, exit_code = self._explain(error)
        if self._failed_at is None:
            self._failed_at = time.monotonic()
            self._send(Message.of(messages.Failed(error=sentence, exit_code=exit_code)))
            self._note(f"failed: {sentence}")
            if self._upload is not None:
                self._upload.give_up(self._layout(self._state.vector))

    def _explain(self, error: Exception) -> tuple[str, Literal[1, 2]]:
        """(one sentence, exit code); the traceback of an error of ours goes to the log."""
        if isinstance(error, PrivflError):
            return in_one_line(error), EXIT_OURS if error.exit_code == EXIT_OURS else EXIT_USER
        self._write_traceback()
        return in_one_line(f"internal error: {type(error).__name__}: {error}"), EXIT_OURS

    def _turn(self) -> None:
        """Wait for the coordinator or the trainer, and deal with what comes first."""
        trainer = None if self._failed_at is not None else self._trainer
        if self._failed_at is not None and time.monotonic() - self._failed_at > _STOP_SECONDS:
            self._transport.abort(EXIT_OURS)
        waiting = self._failed_at is not None or trainer is not None
        timeout = 0.0 if self._worked_ahead() else _LOOK_SECONDS if waiting else None
        frame = self._transport.receive(timeout, None if trainer is None else trainer.fileno())
        if frame is None:
            if trainer is not None and trainer.has_answer():
                self._take_answer(trainer.answer())
            return
        message = messages.decode(frame.head, frame.bulk)
        if isinstance(message.body, messages.Stop):
            self._exit_code = message.body.exit_code
        elif self._failed_at is None:
            self._state, actions = member.step(self._state, message, self._blocks_of)
            for action in actions:
                self._act(action)

    def _blocks_of(self, vector: messages.Vector) -> int:
        return self._layout(vector).blocks

    def _layout(self, vector: messages.Vector) -> Layout:
        return layout_of(
            member.length(self._state, vector), self._setup.parameters, wide=vector == "metrics"
        )

    def _worked_ahead(self) -> bool:
        """Whether there was something to do for the next contribution while the trainer, or
        another site's, computes.
        """
        waits = self._failed_at is None and self._state.phase in (
            member.Phase.TRAINING,
            member.Phase.TRAINED,
        )
        return waits and self._handshake.sums.work_ahead(self._layout("update"))

    # -- what the protocol asks for ----------------------------------------------------------------

    def _act(self, action: member.Action) -> None:
        match action:
            case member.Prepare():
                self._prepare(action.welcome)
            case member.Verify():
                self._verify(action)
            case member.Unseal():
                self._handshake.open(bytes(action.sealed))
                self._report_prepared()
            case member.Start():
                self._active = ActiveRun(self._prepared, self._state, action.begin)
            case member.Train():
                self._run().train(self._state)
            case member.Contribute():
                self._open_upload(action.vector)
                self._deliver(self._run().contribute(self._state, action))
            case member.Collect():
                self._run().collect(action.block)
            case member.Combine():
                self._deliver(self._run().combine(self._state, action.vector))
            case member.Lend():
                state, sealed = self._state, self._run().lend(self._state)
                self._send(
                    Message(Kind.REPLICA, state.run, state.round, state.attempt, bulk=sealed)
                )
            case member.Adopt():
                self._deliver(self._run().adopt(self._state, action.sealed))
            case member.Write():
                self._run().write(self._state, action.heads)

    def _deliver(self, outcome: Outcome) -> None:
        """Send what a step of the run returned."""
        if outcome is None:
            return
        if isinstance(outcome, Body):
            self._report(outcome)
            return
        after = member.contributed(self._state)
        _there(self._upload, "an open sum").send(outcome)
        self._state, self._upload = after, None

    def _open_upload(self, vector: messages.Vector) -> None:
        state, ranks = self._state, [other.rank for other in self._welcome.members]
        head = Message(
            Kind.CONTRIBUTION, state.run, state.round, state.attempt, parts=self._blocks_of(vector)
        )
        self._upload = Upload(
            self._transport, ranks, self._setup.experiment.secure_aggregation.path, head
        )

    # -- joining -----------------------------------------------------------------------------------

    def _prepare(self, welcome: messages.Welcome) -> None:
        setup, self._welcome = self._setup, welcome
        self._output, self._log_path, self._log = places(
            setup.file.output, setup.file.log, welcome.folder, setup.site
        )
        self._note(f"run {welcome.run}, site {setup.site}")
        self._sign()
        self._ledger = RunLedger(
            setup, self._handshake.roster, welcome.run, self._output, self._observer
        )
        threads = threads_for(self._transport.sites_here, dict(os.environ))
        first = setup.for_trainer(welcome.run, threads, str(self._log_path))
        self._trainer = TrainerProcess(setup.site, threads, self._log, first)
        self._words_add = prove()

    def _sign(self) -> None:
        setup = self._setup
        members = [
            Member.relayed(other.site, other.exchange_key, other.identity)
            for other in self._welcome.members
        ]
        roster = Roster.of(self._welcome.run, setup.experiment.digest(), setup.parameters, members)
        signature = self._handshake.sign(roster)
        keys = ", ".join(f"{other.site} {other.identity}" for other in members)
        self._note(f"keys: {keys}; {'pinned' if setup.pinned else 'not pinned'}")
        self._report(messages.Signed(signature=signature.hex()))

    def _verify(self, action: member.Verify) -> None:
        for index, sealed in self._handshake.verify(action.signatures, make_key=action.make_key):
            self._send(
                Message(
                    Kind.SEALED_KEY,
                    self._state.run,
                    part=index,
                    parts=len(self._state.sites),
                    bulk=sealed,
                )
            )
        self._report_prepared()

    def _take_answer(self, answer: Answer) -> None:
        if not isinstance(answer, Facts):
            self._deliver(self._run().take(self._state, answer))
            return
        self._facts = answer
        self._report_prepared()

    def _report_prepared(self) -> None:
        """Once both the trainer and the keys are here."""
        if self._facts is None or not self._handshake.ready:
            return
        trainer = _there(self._trainer, "the trainer")
        self._prepared = Prepared(
            setup=self._setup,
            welcome=self._welcome,
            output=self._output,
            log=self._log_path,
            trainer=trainer,
            facts=self._facts,
            handshake=self._handshake,
            ledger=_there(self._ledger, "the ledger"),
            replica=trainer.replica.read(self._facts.parameters, np.float32),
            note=self._note,
            observer=self._observer,
        )
        tag = self._prepared.tag(self._state.round, None, self._prepared.replica)
        self._report(self._setup.prepared(self._facts, tag, self._words_add))

    # -- small things ------------------------------------------------------------------------------

    def _run(self) -> ActiveRun:
        return _there(self._active, "the beginning of the run")

    def _note(self, text: str) -> None:
        # A full disk must not keep a site from reporting.
        with contextlib.suppress(OSError, ValueError):
            if self._log is not None:
                self._log.write(f"agent: {text}\n")

    def _write_traceback(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            traceback.print_exc(file=self._log if self._log is not None else sys.stderr)


def _there(thing: _T | None, what: str) -> _T:
    if thing is None:
        raise InternalError(f"{what} was needed before it was there")
    return thing

"""A site's agent: the MPI rank of a site. It holds the keys and the book, talks to the coordinator, and never loads torch or a record.

It drives the pure protocol of ``federation.member`` over a transport, and asks the trainer, its child, for updates.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from privfl.errors import EXIT_OURS, EXIT_USER, InternalError, PrivflError, ProtocolError, in_one_line
from privfl.federation import member, messages, metrics
from privfl.federation.messages import Body, Kind, Message
from privfl.noise.metrics import noised, randomness_of
from privfl.secagg import Exact, Layout
from privfl.secagg.quantise import Quantiser
from privfl.secagg.self_test import prove
from privfl.secagg.session import replicas, sums
from privfl.secagg.session.handshake import Joining
from privfl.site.algorithms import Updates, updates_for
from privfl.site.artifacts import places, share_model
from privfl.site.run_ledger import Book
from privfl.site.setup import SiteSetup, account, versions
from privfl.site.upload import Outbox
from privfl.trainer.process import Trainer, threads_for
from privfl.transport import Transport, forbid_reading

_Thing = TypeVar("_Thing")

_FLUSH_SECONDS = 30.0
# A coordinator that does not answer a failure or a goodbye within this time is gone.
_STOP_SECONDS = 60.0
# How often a site looks whether its trainer still lives: a child of user code may keep the trainer's link open.
_LOOK_SECONDS = 1.0


def serve(transport: Transport, prepare: Callable[[], SiteSetup]) -> int:
    """Take part in one run as a site; the exit code of the job.

    ``prepare`` is called here so that whatever it raises reaches the coordinator instead of the screen of one rank.
    """
    # Before there is a key: no core file, and no other process reads this one.
    forbid_reading()
    return _Agent(transport).run(prepare)


class _Agent:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._joining = Joining()
        self._sum: sums.OneSum | None = None
        self._outbox: Outbox | None = None
        self._trainer: Trainer | None = None
        self._facts: dict[str, Any] | None = None
        self._log: TextIO | None = None
        self._book: Book | None = None
        self._updates: Updates | None = None
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
        """End the trainer, and only then take back what never left because others ended the run."""
        if self._trainer is not None:
            self._trainer.stop()
        if self._book is not None:
            try:
                if self._failed_at is None and self._exit_code != 0:
                    self._book.refund_unsent()
            except PrivflError as error:  # then it stays charged
                self._note(f"no refund: {error}")
            self._book.close()

    # -- talking -------------------------------------------------------------------------------------------------

    def _greet(self, prepare: Callable[[], SiteSetup]) -> None:
        try:
            setup = self._setup = prepare()
            experiment = setup.experiment
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
        self._send(
            Message.of(
                messages.Hello(
                    site=setup.site,
                    digest=experiment.digest(),
                    versions=versions(),
                    exchange_key=self._joining.exchange.public.hex(),
                    identity=setup.identity.public,
                    account=account(),
                )
            )
        )

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
            if self._outbox is not None:
                self._outbox.give_up(self._layout(self._state.vector))

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
            self._state, actions = member.step(self._state, message, self._blocks())
            for action in actions:
                self._act(action)

    def _blocks(self) -> dict[messages.Vector, int]:
        if self._state.begin is None:
            return {}
        vectors: tuple[messages.Vector, ...] = ("update", "metrics")
        return {vector: self._layout(vector).blocks for vector in vectors}

    def _layout(self, vector: messages.Vector) -> Layout:
        return sums.layout_of(vector, member.length(self._state, vector), self._setup.parameters)

    def _worked_ahead(self) -> bool:
        """Whether there was something to do for the next contribution while the trainer, or another site's, computes."""
        waits = self._failed_at is None and self._state.phase in (member.Phase.TRAINING, member.Phase.TRAINED)
        return waits and self._joining.sums.work_ahead(self._layout("update"))

    # -- what the protocol asks for ------------------------------------------------------------------------------

    def _act(self, action: member.Action) -> None:
        match action:
            case member.Prepare():
                self._prepare(action)
            case member.Verify():
                self._verify(action)
            case member.Unseal():
                self._open_key(action.sealed)
            case member.Start():
                self._check_agreement(action.begin)
            case member.Train():
                self._train()
            case member.Contribute():
                self._contribute(action)
            case member.Collect():
                self._our_sum().collect(action.block)
            case member.Combine():
                self._combine(action.vector)
            case member.Lend():
                self._lend()
            case member.Adopt():
                self._adopt(action.sealed)
            case member.Write():
                state = self._state
                self._our_book().keep_heads(state.round, state.attempt if state.measured == state.round else 0, action.heads)
                self._write_model()

    def _prepare(self, action: member.Prepare) -> None:
        setup, self._welcome = self._setup, action.welcome
        file, folder = setup.file, self._welcome.folder
        self._output, self._log_path, self._log = places(file.output, file.log, folder, setup.site)
        self._note(f"run {self._welcome.run}, site {setup.site}")
        self._sign()
        self._book = Book(setup, self._joining.agreement, self._welcome.run, self._output)
        threads = threads_for(self._transport.sites_here, dict(os.environ))
        settings = setup.for_trainer(self._welcome.run, threads, str(self._log_path))
        self._trainer = Trainer(setup.site, threads, self._log, settings)
        self._words_add = prove()

    def _sign(self) -> None:
        setup = self._setup
        signature = self._joining.sign(setup, self._welcome)
        keys = ", ".join(f"{party.site} {party.identity}" for party in self._joining.agreement.members)
        self._note(f"keys: {keys}; {'pinned' if setup.pinned else 'not pinned'}")
        self._report(messages.Signed(signature=signature.hex()))

    def _verify(self, action: member.Verify) -> None:
        for index, sealed in self._joining.verify(action.signatures, make_key=action.make_key):
            self._send(Message(Kind.SEALED_KEY, self._state.run, part=index, parts=len(self._state.sites), bulk=sealed))
        self._report_prepared()

    def _open_key(self, sealed: bytes | memoryview) -> None:
        self._joining.open(bytes(sealed))
        self._report_prepared()

    def _take_answer(self, answer: dict[str, Any]) -> None:
        if self._facts is None:
            self._facts = answer
            self._replica = self._our_trainer().replica.read(int(answer["parameters"]), np.float32)
            self._report_prepared()
        elif "draws" in answer:
            self._trained(answer)
        elif "followed" in answer:
            self._move_to(self._our_updates().applied(self._our_trainer(), len(self._replica)))
        elif "measured" in answer:
            self._contribute_metrics(answer["measured"])
        else:
            self._written(answer)

    def _report_prepared(self) -> None:
        """Once both the trainer and the keys are here."""
        if self._facts is None or not self._joining.ready:
            return
        self._replica_tag = self._tag()
        self._report(self._setup.prepared(self._facts, self._replica_tag, self._words_add))

    def _check_agreement(self, begin: messages.Begin) -> None:
        """What the coordinator says the sites agreed on must fit this site's own facts, experiment and metrics."""
        evaluation, own = self._setup.experiment.evaluation, (self._facts or {})
        fits = begin.parameters == own["parameters"] and begin.records[self._setup.site] == own["records"]
        if begin.layout:
            fits = fits and self._state.evaluate_every > 0 and set(begin.layout) == set(evaluation.metrics)
            fits = fits and (not own["layout"] or begin.layout == own["layout"])
        if not fits:
            raise ProtocolError("the coordinator began a run that does not fit this site's experiment")
        shared = self._setup.experiment.privacy.noise == "distributed"
        noise_multiplier = begin.noise_multiplier if shared else self._setup.noise_multiplier
        self._updates = updates_for(self._setup, begin, noise_multiplier)
        self._our_book().begin(noise_multiplier, own["outside"])

    def _train(self) -> None:
        self._our_book().charge_round(self._state.round)
        self._our_updates().ask(self._our_trainer(), self._replica)

    def _trained(self, answer: dict[str, Any]) -> None:
        book, updates = self._our_book(), self._our_updates()
        updates.take(self._our_trainer(), answer, book.steps("training"))
        epsilon = book.epsilon("training")
        self._note(f"round {self._state.round}: trained, epsilon {epsilon:.4g}")
        book.leaves("training")
        self._report(
            messages.Trained(
                event=book.event("training", self._setup.experiment.local_steps).to_dict(),
                steps=book.steps("training"),
                epsilon=epsilon,
                head=book.head(self._state.round, 0),
                span=updates.note(self._joining.keys, self._span_context(self._setup.site)),
            )
        )

    def _span_context(self, site: str) -> bytes:
        return f"privfl range 1 {self._state.run.hex()} {self._state.round} {site}".encode()

    def _contribute(self, action: member.Contribute) -> None:
        path, book = self._setup.experiment.secure_aggregation.path, self._our_book()
        blocks = self._blocks()[action.vector]
        head = Message(Kind.CONTRIBUTION, self._state.run, self._state.round, self._state.attempt, parts=blocks)
        self._outbox = Outbox(self._transport, [m.rank for m in self._welcome.members], path, head)
        if action.vector == "metrics":
            if self._measures_privately():
                book.charge_metrics(self._state.round)
            self._our_trainer().replica.write(self._replica)
            self._our_trainer().ask({"do": "measure"})
            return
        book.keep_heads(self._state.round, 0, action.heads)
        book.check_release("training", self._state.round, self._state.sites, self._protections(), costs=True)
        updates = self._our_updates()
        quantiser, span = updates.grid(self._joining.keys, action.spans, self._state.sites, self._span_context)
        self._open_sum(len(self._replica), quantiser, span)
        self._send_blocks(self._our_sum().contribution(updates.vector()))

    def _measures_privately(self) -> bool:
        """Whether this site has held-out records whose metrics need noise."""
        return self._setup.allowance.metrics is not None and bool(_there(self._facts, "the model")["layout"])

    def _contribute_metrics(self, measured: metrics.Measured) -> None:
        book, release, private = self._our_book(), self._setup.allowance.metrics, self._measures_privately()
        book.check_release("evaluation", self._state.round, self._state.sites, self._protections(), costs=private)
        if release is not None and not private and measured:
            raise PrivflError(
                "data() has held-out records now, and had none when the run began; return the same data sets throughout"
            )
        if release is not None and private:
            measured = noised(measured, release.noise_multiplier, randomness_of(self._setup.experiment, self._setup.site))
            book.leaves("evaluation")
        numbers = metrics.pack(measured, self._begin().layout)
        integers = sums.metrics_to_integers(numbers, self._setup.parameters)
        length = sums.layout_of("metrics", len(numbers), self._setup.parameters).values
        self._open_sum(length, Exact(self._setup.parameters), None)
        self._send_blocks(self._our_sum().wide_contribution(integers))

    def _protections(self) -> dict[str, bool]:
        return self._joining.protections(len(self._state.sites))

    def _open_sum(self, length: int, quantiser: Quantiser, span: float | None) -> None:
        state = self._state
        # Sites that were told of other records or weights, or whose replicas differ, do not decode, whoever was to compare them.
        facts = [state.vector, span, self._begin().model_dump(mode="json"), self._replica_tag]
        self._sum = self._joining.sums.open(state.round, state.attempt, length, quantiser, facts)

    def _send_blocks(self, blocks: Iterator[NDArray[np.uint64]]) -> None:
        after = member.contributed(self._state)
        _there(self._outbox, "an open sum").send(blocks)
        self._state, self._outbox = after, None

    def _combine(self, vector: messages.Vector) -> None:
        total, self._sum = self._our_sum().total(), None
        if vector == "metrics":
            numbers = sums.metrics_from_totals(total, self._setup.parameters)
            values = metrics.unpack(numbers, self._begin().layout)
            self._note(f"round {self._state.round}: {values}")
            book = self._our_book()
            event = book.event("evaluation", 1).to_dict() if self._measures_privately() else None
            head = book.head(self._state.round, self._state.attempt)
            self._report(messages.Measured(metrics=values, event=event, epsilon=book.epsilon("evaluation"), head=head))
            return
        moved = self._our_updates().apply(self._our_trainer(), self._replica, total)
        if moved is not None:
            self._move_to(moved)

    def _move_to(self, replica: NDArray[np.float32]) -> None:
        self._replica = replica
        if not np.isfinite(self._replica).all():
            raise PrivflError("the averaged model contains NaN or infinite values; lower optimizer.lr")
        self._replica_tag = self._tag()
        self._report(messages.Applied(tag=self._replica_tag))

    def _lend(self) -> None:
        sealed = replicas.seal(self._joining.keys, self._replica, self._replica_context())
        state = self._state
        self._send(Message(Kind.REPLICA, state.run, state.round, state.attempt, bulk=sealed))

    def _adopt(self, sealed: bytes | memoryview) -> None:
        """Take the replica of another site, whose processor computes a little differently."""
        lent = replicas.open_near(self._joining.keys, bytes(sealed), self._replica, self._replica_context())
        self._note(f"round {self._state.round}: took the replica of site {self._state.sites[0]}, which differed by rounding")
        self._move_to(lent)

    def _replica_context(self) -> bytes:
        return b"privfl replica 1" + self._state.run + self._state.round.to_bytes(4, "big")

    def _tag(self) -> str:
        """A keyed digest of all that must be the same at every site: the agreement, the constants of the model, the replica."""
        facts = _there(self._facts, "the model")
        begin = self._state.begin
        agreement = begin.model_dump(mode="json") if begin is not None else None
        text = json.dumps([self._welcome.run, self._state.round, facts["constants"], agreement])
        return self._joining.keys.tag(text, self._replica.tobytes())

    def _write_model(self) -> None:
        self._our_trainer().replica.write(self._replica)
        self._our_trainer().ask({"do": "write", "path": str(self._output / "model.safetensors")})

    def _written(self, answer: dict[str, Any]) -> None:
        # A site that has pinned the others does not trust the coordinator, whose folder it is, with the model.
        if not self._setup.pinned:
            try:
                share_model(Path(answer["written"]), Path(self._welcome.folder), self._welcome.run, self._setup.site)
            except OSError as error:
                self._note(f"the run folder {self._welcome.folder} is not shared with this site: {error}")
        self._report(messages.Finished(model=answer["written"], log=str(self._log_path)))

    # -- small things --------------------------------------------------------------------------------------------

    def _our_trainer(self) -> Trainer:
        return _there(self._trainer, "the trainer")

    def _our_book(self) -> Book:
        return _there(self._book, "the book")

    def _our_updates(self) -> Updates:
        return _there(self._updates, "the beginning of the run")

    def _our_sum(self) -> sums.OneSum:
        return _there(self._sum, "an open sum")

    def _begin(self) -> messages.Begin:
        return _there(self._state.begin, "the beginning of the run")

    def _note(self, text: str) -> None:
        # A full disk must not keep a site from reporting.
        with contextlib.suppress(OSError, ValueError):
            if self._log is not None:
                self._log.write(f"agent: {text}\n")

    def _write_traceback(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            traceback.print_exc(file=self._log if self._log is not None else sys.stderr)


def _there(thing: _Thing | None, what: str) -> _Thing:
    if thing is None:
        raise InternalError(f"{what} was needed before it was there")
    return thing

"""A site's agent: the MPI rank of a site. It holds the keys and the book, talks to the coordinator, and never loads torch or a record.

It drives the pure protocol of ``federation.member`` over a transport, and asks the trainer, its child, for updates.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
from numpy.typing import NDArray

from privfl import __version__
from privfl.accounting import PoissonGaussian, RdpAccountant, epsilon_of, least_noise_multiplier
from privfl.config import Experiment, SiteFile
from privfl.errors import EXIT_OURS, EXIT_USER, InternalError, PrivflError, ProtocolError, in_one_line
from privfl.federation import member, messages, metrics
from privfl.federation.messages import Body, Kind, Message
from privfl.federation.strategies import fedavg
from privfl.secagg import SealingKey, SumKey
from privfl.secagg.ckks import BLOCK_VALUES, block_count
from privfl.site.child import Trainer, threads_for
from privfl.site.keys import RunKeys
from privfl.transport import Transport

_FLUSH_SECONDS = 30.0
# A coordinator that does not answer a failure or a goodbye within this time is gone.
_STOP_SECONDS = 60.0
# How often a site looks whether its trainer still lives: a child of user code may keep the trainer's link open.
_LOOK_SECONDS = 1.0


def versions() -> dict[str, str]:
    """What must be the same at all ranks: ciphertexts and messages do not travel between versions."""
    return {"privfl": __version__, "tenseal": version("tenseal")}


@dataclass(frozen=True)
class SiteSetup:
    """What one site brings to a run. ``folder`` is the one user functions are relative to."""

    site: str
    experiment: Experiment
    folder: Path
    file: SiteFile
    noise_multiplier: float
    planned_epsilon: float


def prepare_site(site: str, experiment: Experiment, folder: Path, file: SiteFile) -> SiteSetup:
    """Everything a site can decide by itself before the run, above all how much noise its records need.

    Raises:
        PrivflError: the target epsilon cannot be reached, or the noise bounds nothing.
    """
    privacy, rate = experiment.privacy, experiment.rate(site)
    noise = privacy.noise_multiplier
    if noise is None:
        if privacy.target_epsilon is None:
            raise InternalError("an experiment without a target and without a noise multiplier passed validation")
        noise = least_noise_multiplier(privacy.target_epsilon, privacy.delta, rate, experiment.steps)
    planned = epsilon_of([PoissonGaussian(rate, noise, experiment.steps)], privacy.delta)
    if not math.isfinite(planned):
        raise PrivflError(f"privacy.noise_multiplier {noise:g} is too little for any finite epsilon; raise it")
    return SiteSetup(site, experiment, folder, file, noise, planned)


def serve(transport: Transport, prepare: Callable[[], SiteSetup]) -> int:
    """Take part in one run as a site; the exit code of the job.

    ``prepare`` is called here so that whatever it raises reaches the coordinator instead of the screen of one rank.
    """
    return _Agent(transport).run(prepare)


class _Agent:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._sealing = SealingKey()
        self._keys: RunKeys | None = None
        self._trainer: Trainer | None = None
        self._facts: dict[str, Any] | None = None
        self._log: TextIO | None = None
        self._accountant = RdpAccountant()
        self._charged_steps = 0
        self._exit_code: int | None = None
        self._failed_at: float | None = None
        self._total: list[NDArray[np.float64]] = []

    def run(self, prepare: Callable[[], SiteSetup]) -> int:
        try:
            self._greet(prepare)
            while self._exit_code is None:
                try:
                    self._turn()
                except Exception as error:  # whatever it is, the coordinator must hear of it
                    self._fail(error)
            if self._trainer is not None:
                self._trainer.stop()
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
            )
        except Exception as error:
            self._failed_at = time.monotonic()
            sentence, exit_code = self._explain(error)
            self._send(Message.of(messages.Hello(site=None, error=sentence, exit_code=exit_code)))
            return
        self._send(
            Message.of(
                messages.Hello(
                    site=setup.site, digest=experiment.digest(), versions=versions(), exchange_key=self._sealing.public.hex()
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
        frame = self._transport.receive(_LOOK_SECONDS if waiting else None, None if trainer is None else trainer.fileno())
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
        return {vector: block_count(member.length(self._state, vector)) for vector in vectors}

    # -- what the protocol asks for ------------------------------------------------------------------------------

    def _act(self, action: member.Action) -> None:
        match action:
            case member.Prepare():
                self._prepare(action)
            case member.Unseal():
                self._open_key(action.sealed)
            case member.Start():
                self._check_agreement(action.begin)
            case member.Train():
                self._train()
            case member.Contribute():
                self._contribute(action)
            case member.Collect():
                self._collect(action)
            case member.Combine():
                self._combine(action.vector)
            case member.Write():
                self._write_model()

    def _prepare(self, action: member.Prepare) -> None:
        setup, self._welcome = self._setup, action.welcome
        self._output = Path(setup.file.output or Path(self._welcome.folder) / "sites" / setup.site)
        self._log_path = Path(setup.file.log or self._output / "site.log")
        try:
            self._output.mkdir(parents=True, exist_ok=True)
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            self._log = open(  # noqa: SIM115  (open as long as the run)
                self._log_path, "a", buffering=1, encoding="utf-8", errors="backslashreplace"
            )
        except OSError as error:
            raise PrivflError(f"cannot write {error.filename}: {error.strerror}; set output and log in the site file") from error
        self._note(f"run {self._welcome.run}, site {setup.site}")
        threads = threads_for(self._transport.sites_here, dict(os.environ))
        self._trainer = Trainer(
            setup.site,
            threads,
            self._log,
            {
                "experiment": setup.experiment.model_dump_json(),
                "folder": str(setup.folder),
                "data_options": setup.experiment.data_options | setup.file.data_options,
                "device": setup.file.device,
                "threads": threads,
                "log": str(self._log_path),
                "noise_multiplier": setup.noise_multiplier,
                "run": self._welcome.run,
            },
        )
        if action.make_key:
            self._make_key()

    def _make_key(self) -> None:
        """Make the keys that all sites share for this run, seal them to each, give the coordinator what adding needs."""
        self._keys = RunKeys.make()
        run, members = self._state.run, self._welcome.members
        self._send(Message(Kind.ADDING_CONTEXT, run, bulk=self._keys.sums["update"].adding_context()))
        secret = self._keys.secret_bytes()
        for index, receiver in enumerate(members):
            if index:
                sealed = self._sealing.seal(_public_key(receiver.exchange_key), secret, self._seal_context(receiver.site))
                self._send(Message(Kind.SEALED_KEY, run, part=index, parts=len(members), bulk=sealed))

    def _open_key(self, sealed: bytes | memoryview) -> None:
        sender = _public_key(self._welcome.members[0].exchange_key)
        self._keys = RunKeys.from_secret_bytes(self._sealing.open(sender, bytes(sealed), self._seal_context(self._setup.site)))
        self._report_prepared()

    def _seal_context(self, receiver: str) -> bytes:
        return f"privfl sum key {self._welcome.run} {self._welcome.digest} {receiver}".encode()

    def _take_answer(self, answer: dict[str, Any]) -> None:
        if self._facts is None:
            self._facts = answer
            self._replica = self._our_trainer().replica.read(int(answer["parameters"]), np.float32)
            self._report_prepared()
        elif "draws" in answer:
            self._trained(answer)
        elif "measured" in answer:
            self._send_vector(metrics.pack(answer["measured"], self._begin().layout), len(self._state.sites))
        else:
            self._written(answer)

    def _report_prepared(self) -> None:
        """Once both the trainer and the keys are here."""
        if self._facts is None or self._keys is None:
            return
        self._report(
            messages.Prepared(
                records=self._facts["records"],
                parameters=self._facts["parameters"],
                layout=self._facts["layout"] if self._state.evaluate_every else {},
                noise_multiplier=self._setup.noise_multiplier,
                sampling_rate=self._setup.experiment.rate(self._setup.site),
                planned_epsilon=self._setup.planned_epsilon,
                tag=self._tag(),
            )
        )

    def _check_agreement(self, begin: messages.Begin) -> None:
        """What the coordinator says the sites agreed on must fit this site's own facts, experiment and metrics."""
        evaluation, own = self._setup.experiment.evaluation, (self._facts or {})
        fits = begin.parameters == own["parameters"] and begin.records[self._setup.site] == own["records"]
        if begin.layout:
            fits = fits and self._state.evaluate_every > 0 and set(begin.layout) == set(evaluation.metrics)
            fits = fits and (not own["layout"] or begin.layout == own["layout"])
        if not fits:
            raise ProtocolError("the coordinator began a run that does not fit this site's experiment")

    def _train(self) -> None:
        experiment = self._setup.experiment
        # Charged before the trainer starts: a round that dies half way was spent.
        self._event = PoissonGaussian(experiment.rate(self._setup.site), self._setup.noise_multiplier, experiment.local_steps)
        self._accountant.compose(self._event)
        self._charged_steps += self._event.steps
        self._our_trainer().replica.write(self._replica)
        self._our_trainer().ask({"do": "train"})

    def _trained(self, answer: dict[str, Any]) -> None:
        if answer["draws"] != self._charged_steps:
            raise InternalError(
                f"noise was drawn {answer['draws']} times for {self._charged_steps} charged steps; nothing of this round is sent"
            )
        self._update = self._our_trainer().update.read(len(self._replica), np.float32).astype(np.float64)
        if not np.isfinite(self._update).all():
            raise InternalError("the trainer's update contains NaN or infinite values; nothing of this round is sent")
        epsilon = self._accountant.epsilon(self._setup.experiment.privacy.delta)
        self._note(f"round {self._state.round}: trained, epsilon {epsilon:.4g}")
        self._report(
            messages.Trained(
                event=self._event.to_dict(),
                steps=self._charged_steps,
                epsilon=epsilon,
            )
        )

    def _contribute(self, action: member.Contribute) -> None:
        self._total = []
        if action.vector == "metrics":
            self._our_trainer().replica.write(self._replica)
            self._our_trainer().ask({"do": "measure"})
        else:
            weight = messages.weights_of(self._setup.experiment.weights, self._begin())[self._setup.site]
            self._send_vector(self._update * weight, action.contributors)

    def _send_vector(self, vector: NDArray[np.float64], contributors: int) -> None:
        state = self._state
        after = member.contributed(state)
        parts = block_count(len(vector))
        for part, block in enumerate(self._sum_key().encrypt(vector, contributors)):
            self._send(Message(Kind.CONTRIBUTION, state.run, state.round, state.attempt, part, parts, bulk=block))
        self._state = after

    def _collect(self, action: member.Collect) -> None:
        values = member.length(self._state, self._state.vector)
        start = action.part * BLOCK_VALUES
        self._total.append(self._sum_key().decrypt(action.block, min(BLOCK_VALUES, values - start)))

    def _combine(self, vector: messages.Vector) -> None:
        total, self._total = np.concatenate(self._total), []
        if vector == "metrics":
            values = metrics.unpack(total, self._begin().layout)
            self._note(f"round {self._state.round}: {values}")
            self._report(messages.Measured(metrics=values))
            return
        self._replica = fedavg(self._replica, total)
        if not np.isfinite(self._replica).all():
            raise PrivflError("the averaged model contains NaN or infinite values; lower optimizer.lr")
        self._report(messages.Applied(tag=self._tag()))

    def _tag(self) -> str:
        """A keyed digest of all that must be the same at every site: the agreement, the constants of the model, the replica."""
        if self._keys is None or self._facts is None:
            raise InternalError("a digest was asked for before keys and model were there")
        begin = self._state.begin
        agreement = begin.model_dump(mode="json") if begin is not None else None
        text = json.dumps([self._welcome.run, self._state.round, self._facts["constants"], agreement])
        return self._keys.tag(text, self._replica.tobytes())

    def _write_model(self) -> None:
        self._our_trainer().replica.write(self._replica)
        self._our_trainer().ask({"do": "write", "path": str(self._output / "model.safetensors")})

    def _written(self, answer: dict[str, Any]) -> None:
        self._share_model(Path(answer["written"]))
        self._report(messages.Finished(model=answer["written"], log=str(self._log_path)))

    def _share_model(self, model: Path) -> None:
        """Put the model into the run folder where this site shares it; the first site to come does it, all have the same."""
        folder = Path(self._welcome.folder)
        try:
            same_run = self._welcome.run in (folder / "experiment.yaml").read_text(encoding="utf-8")
            if same_run:
                copy = folder / f".model.{self._setup.site}"
                copy.write_bytes(model.read_bytes())
                copy.chmod(0o600)
                try:
                    os.link(copy, folder / "model.safetensors")
                finally:
                    copy.unlink()
        except FileExistsError:
            pass
        except OSError as error:
            self._note(f"the run folder {folder} is not shared with this site: {error}")

    # -- small things --------------------------------------------------------------------------------------------

    def _our_trainer(self) -> Trainer:
        if self._trainer is None:
            raise InternalError("the trainer is not running")
        return self._trainer

    def _sum_key(self) -> SumKey:
        if self._keys is None:
            raise InternalError("the shared keys have not arrived")
        return self._keys.sums[self._state.vector]

    def _begin(self) -> messages.Begin:
        if self._state.begin is None:
            raise InternalError("the run has not begun")
        return self._state.begin

    def _note(self, text: str) -> None:
        # A full disk must not keep a site from reporting.
        with contextlib.suppress(OSError, ValueError):
            if self._log is not None:
                self._log.write(f"agent: {text}\n")

    def _write_traceback(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            traceback.print_exc(file=self._log if self._log is not None else sys.stderr)


def _public_key(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise ProtocolError("a public key is not in hexadecimal") from error

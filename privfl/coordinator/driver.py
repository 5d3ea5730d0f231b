"""Rank 0: drives the pure protocol of ``federation.coordinator`` over a transport and adds
ciphertexts. It never holds a key or a model.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from privfl.errors import (
    EXIT_OURS,
    EXIT_USER,
    InternalError,
    PrivflError,
    ProtocolError,
    in_one_line,
)
from privfl.federation import coordinator, messages
from privfl.federation.coordinator import Phase
from privfl.federation.messages import Kind, Message
from privfl.federation.news import News
from privfl.secagg import Adder, EvaluatorAdder, Layout, Parameters, WordAdder
from privfl.secagg.adders import reduce_words
from privfl.secagg.parameters import CIPHERTEXT_WORDS
from privfl.secagg.session.metrics import layout_of
from privfl.transport import Reduction, Transport, finish

# Called with what happened, and the seconds spent in each phase since the last call.
Tell = Callable[[News, dict[str, float]], None]

_GREETING_SECONDS = 180.0
_GOODBYE_SECONDS = 20.0
# Phases whose time is reported, and under which name.
_CLOCKS = {
    Phase.GREETING: "start",
    Phase.SIGNING: "start",
    Phase.PREPARING: "start",
    Phase.TRAINING: "training",
    Phase.SUMMING: "aggregation",
    Phase.APPLYING: "aggregation",
    Phase.SETTLING: "aggregation",
    Phase.MEASURING: "evaluation",
    Phase.FINISHING: "writing",
}


def coordinate(
    transport: Transport, plan: coordinator.Plan, parameters: Parameters, tell: Tell, trace: TextIO
) -> int:
    """Lead one run; the exit code of the job.

    Args:
        transport: connects rank 0 to the sites.
        plan: what does not change during the run.
        parameters: those of the encrypted sums.
        tell: called with everything that a person or the run folder should know.
        trace: where the traceback of an error of ours goes.
    """
    return _Driver(transport, plan, parameters, tell, trace).run()


def dismiss(transport: Transport, exit_code: int) -> int:
    """Tell every rank to end with ``exit_code`` and wait for their goodbyes; Abort only if one
    does not answer.
    """
    stop = Message.of(messages.Stop(exit_code=exit_code)).encode()
    waiting = set(range(1, transport.size))
    for rank in waiting:
        transport.send(rank, *stop)
    deadline = time.monotonic() + _GOODBYE_SECONDS
    while waiting and time.monotonic() < deadline:
        try:
            frame = transport.receive(deadline - time.monotonic())
        except ProtocolError:  # the run is over; what is damaged now concerns nobody
            continue
        if frame is not None and messages.is_kind(frame.head, Kind.BYE):
            waiting.discard(frame.peer)
    if waiting or not transport.flush(_GOODBYE_SECONDS):
        transport.abort(exit_code or EXIT_OURS)
    transport.close()
    return exit_code


class _Driver:
    def __init__(
        self,
        transport: Transport,
        plan: coordinator.Plan,
        parameters: Parameters,
        tell: Tell,
        trace: TextIO,
    ) -> None:
        self._transport = transport
        self._plan = plan
        self._parameters = parameters
        self._tell = tell
        self._trace = trace
        self._state = coordinator.State()
        self._adder: Adder | None = None
        self._exit_code: int | None = None
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def run(self) -> int:
        started = time.monotonic()
        while self._exit_code is None:
            try:
                frame = self._transport.receive(1.0)
                if frame is not None:
                    message = messages.decode(frame.head, frame.bulk)
                    self._follow(coordinator.step(self._plan, self._state, frame.peer, message))
                elif (
                    self._state.phase is Phase.GREETING
                    and time.monotonic() - started > _GREETING_SECONDS
                ):
                    missing = sorted(set(range(1, self._transport.size)) - set(self._state.hellos))
                    raise PrivflError(
                        f"rank {missing[0]} did not report within {_GREETING_SECONDS:.0f} s; look "
                        "at its machine"
                    )
            except PrivflError as error:
                self._fail(str(error), error.exit_code)
            except Exception as error:  # whatever it is, the sites must be told
                traceback.print_exc(file=self._trace)
                self._fail(
                    in_one_line(
                        f"internal error of the coordinator: {type(error).__name__}: {error}"
                    ),
                    EXIT_OURS,
                )
        return dismiss(self._transport, self._exit_code)

    def _fail(self, error: str, exit_code: int) -> None:
        """End the run; nothing here may raise again."""
        try:
            self._follow(coordinator.fail(self._state, error, exit_code))
        except Exception:  # the run folder may be what is broken
            traceback.print_exc(file=self._trace)
            self._exit_code = exit_code or EXIT_USER

    def _follow(self, result: coordinator.Result) -> None:
        before = self._state.phase
        self._state, outputs = result
        if self._state.phase is not before and before in _CLOCKS:
            now = time.perf_counter()
            self._seconds[_CLOCKS[before]] = (
                self._seconds.get(_CLOCKS[before], 0.0) + now - self._since
            )
            self._since = now
        for output in outputs:
            self._perform(output)

    def _perform(self, output: coordinator.Output) -> None:
        match output:
            case coordinator.Send():
                self._transport.send(output.rank, *output.message.encode())
            case coordinator.SetAdder():
                self._adder = self._make_adder(output.words_add)
            case coordinator.OpenSum():
                self._our_adder().open(
                    layout_of(output.numbers, self._parameters, wide=output.vector == "metrics")
                )
            case coordinator.Fold():
                self._our_adder().add(output.part, output.block)
            case coordinator.Release():
                self._release(output)
            case coordinator.Tell():
                seconds, self._seconds = self._seconds, {}
                self._tell(output.news, seconds)
            case coordinator.Dismiss():
                self._exit_code = output.exit_code

    def _make_adder(self, words_add: bool) -> Adder:
        if self._plan.path == "reduce":
            if not words_add:
                raise PrivflError(
                    "secure_aggregation.path reduce adds words, which this TenSEAL is not proven "
                    "to allow; use path star"
                )
            return ReducingAdder(
                self._transport, tuple(sorted(self._state.hellos)), self._parameters
            )
        return WordAdder(self._parameters) if words_add else EvaluatorAdder(self._parameters)

    def _release(self, output: coordinator.Release) -> None:
        for part in range(output.blocks):
            total = self._our_adder().block(part)
            head = output.message
            message = Message(
                head.kind, head.run, head.round, head.attempt, part, output.blocks, bulk=total
            )
            for rank in output.ranks:
                self._transport.send(rank, *message.encode())
        self._our_adder().close()

    def _our_adder(self) -> Adder:
        if self._adder is None:
            raise InternalError("a sum was opened before the sites were prepared")
        return self._adder


class ReducingAdder:
    """Lets the transport add: all blocks of a sum are under way at once, and this program sees
    nothing but their sums.
    """

    def __init__(
        self, transport: Transport, members: tuple[int, ...], parameters: Parameters
    ) -> None:
        self._transport, self._members, self._parameters = transport, members, parameters
        self._sums: list[tuple[NDArray[np.uint64], Reduction]] = []

    def open(self, layout: Layout) -> None:
        sums = [
            np.zeros(layout.ciphertexts(i) * CIPHERTEXT_WORDS, dtype=np.uint64)
            for i in range(layout.blocks)
        ]
        self._sums = [(words, self._transport.reduce(self._members, words)) for words in sums]

    def add(self, index: int, block: bytes | memoryview) -> None:
        raise InternalError("a contribution came as a message although the transport adds")

    def block(self, index: int) -> memoryview:
        words, part = self._sums[index]
        finish(part)
        reduce_words(words, self._parameters.prime, len(self._members))
        return words.data.cast("B")

    def close(self) -> None:
        self._sums = []

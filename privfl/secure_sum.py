"""The encrypted sum alone, for any program whose ranks share a communicator: `privfl.SecureSum(comm).sum(vector)`."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from privfl.errors import PrivflError, ProtocolError, in_one_line
from privfl.federation import messages
from privfl.federation.messages import Body, Kind, Message
from privfl.secagg import Exact, ExchangeKey, Grid, Identity, Layout, MismatchError, WordAdder
from privfl.secagg.adders import reduce_words
from privfl.secagg.quantise import Quantiser, Rounding
from privfl.secagg.self_test import prove
from privfl.secagg.session.keys import RunKeys, open_keys, seal_keys
from privfl.secagg.session.roster import Agreement
from privfl.secagg.session.sums import OneSum, Path, Sums, parameters_for
from privfl.site.setup import versions
from privfl.site.upload import Outbox, finish
from privfl.transport import Transport


class SecureSum:
    """Sums vectors of all ranks so that no rank sees another rank's vector, only the sum.

    Every rank is a site; rank 0 also adds, and holds the key like all others. So what a vector is protected by here are the masks: whatever some
    ranks pool, rank 0 included, they learn of the other ranks' vectors only their sum. That rank 0 sees not even the sum is not
    claimed here, and keys are not pinned, so rank 0 must run this code unchanged: a single trust domain. docs/secure-aggregation.md has the proofs.

    Args:
        comm: an mpi4py communicator of at least 2 ranks, or a privfl transport. Collective, as is every :meth:`sum`.
        value_bits: bits of a value, 12 to 28; by default as many, from 16 to 24, as two values can share a word with.
        range: for floating-point vectors the public bound on the size of their elements; without it vectors are integers.
        rounding: of floating-point values to the grid range / (2^(value_bits - 1) - 1): ``nearest`` or ``stochastic``.
        path: ``star`` sends contributions to rank 0, ``reduce`` lets the MPI library add them. Same result.
        timeout: seconds after which a rank that does not answer is an error.

    Raises:
        PrivflError: too few ranks, ranks with other arguments or versions, parameters that do not fit.
    """

    def __init__(
        self,
        comm: Any,
        *,
        value_bits: int | None = None,
        range: float | None = None,  # noqa: A002  (the word of the experiment file)
        rounding: Rounding = "nearest",
        path: Path = "star",
        timeout: float = 600.0,
    ) -> None:
        self._transport = _transport(comm)
        self._timeout, self._path = timeout, path
        self._round = 0
        self._run = messages.NO_RUN
        self._site = f"rank{self._transport.rank}"
        if self._transport.size < 2:
            raise PrivflError(
                "SecureSum needs at least 2 ranks, this communicator has 1; start the program with: mpiexec -n 4 python ..."
            )
        self._sums = self._set_up(value_bits, range, rounding)

    # -- the sum ---------------------------------------------------------------------------------------------------

    def sum(self, vector: ArrayLike) -> NDArray[Any]:
        """The sum over all ranks, at every rank. Collective.

        Args:
            vector: integers of at most ``value_bits`` bits (with sign), or, if a ``range`` was given, numbers within it. Any shape, the same
                at all ranks.

        Returns:
            int64, exact; with a ``range`` float64, each rank's values rounded to the grid.

        Raises:
            PrivflError: at all ranks, if one rank's vector does not fit or it can sum nothing more; nothing of any vector has left then.
            MismatchError: the sum is not what the ranks sent; this object sums nothing more.
        """
        return self._sum(vector, "")

    def _sum(self, vector: ArrayLike, state: str) -> NDArray[Any]:
        """The sum, if ``state`` is the same at all ranks."""
        self._round += 1
        given = self._agree(vector, state)
        flat = given.reshape(-1)
        one = self._sums.open(self._round, 1, len(flat), self._quantiser, [])
        layout = Layout(len(flat), self.parameters)
        head = Message(Kind.CONTRIBUTION, self._run, self._round, 1, parts=layout.blocks)
        blocks = one.contribution(flat)
        if self._transport.rank:
            Outbox(self._transport, [*_others(self._transport)], self._path, head).send(blocks)
        totals = self._add(layout, blocks) if self._transport.rank == 0 else self._receive_totals(layout)
        for block in totals:
            one.collect(block)
        return self._finish(one).reshape(given.shape)

    def tell(self, text: str) -> tuple[str, ...]:
        """What every rank says, in the clear, by rank. Collective.

        Raises:
            PrivflError: a rank does not answer.
        """
        self._round += 1
        if self._transport.rank:
            self._send(0, messages.Told(texts=(text,)))
            body = self._expect(Kind.TOLD).body
            assert isinstance(body, messages.Told)
            return body.texts
        texts = [text]
        for message in self._from_all(Kind.TOLD).values():
            assert isinstance(message.body, messages.Told)
            texts += message.body.texts
        told = messages.Told(texts=tuple(texts))
        self._to_all(told)
        return told.texts

    def _agree(self, vector: ArrayLike, state: str) -> NDArray[Any]:
        """The vector as an array, once every rank has said that its own fits; the same sentence at all ranks if one does not."""
        problem, given = "", np.empty(0)
        try:
            given = self._accept(vector)
        except PrivflError as error:
            problem = str(error)
        except Exception as error:  # whatever numpy makes of it, the other ranks must not wait
            problem = in_one_line(f"no vector of numbers was given ({type(error).__name__}: {error})")
        self._all(messages.Failed(error=problem, exit_code=2) if problem else messages.Ready(shape=given.shape, state=state))
        return given

    def all_well(self, problem: str = "") -> None:
        """Go on only if no rank has a problem. Collective; also where the others are about to make a sum.

        Raises:
            PrivflError: at all ranks, the first problem.
        """
        self._round += 1
        self._all(messages.Failed(error=problem, exit_code=2) if problem else messages.Ready(shape=(), state=""))

    def _all(self, answer: Body) -> None:
        if self._transport.rank:
            self._send(0, answer)
            self._expect(Kind.ROUND)
            return
        answers = {0: answer} | {rank: m.body for rank, m in self._from_all(Kind.READY, Kind.FAILED).items()}
        self._settle(answers, messages.Round())

    def _settle(self, answers: Mapping[int, Body | None], go: Body) -> None:
        """On rank 0: tell all to go on, or, if not all answers are alike, why not."""
        problem = ""
        for rank, body in answers.items():
            if isinstance(body, messages.Failed):
                problem = problem or f"rank {rank}: {body.error}"
        for rank, body in answers.items():
            first = answers[0]
            if isinstance(body, messages.Ready) and isinstance(first, messages.Ready) and body.state != first.state:
                problem = problem or (
                    f"the model of rank {rank} is not that of rank 0: start all from the same parameters (torch.manual_seed before it is made), "
                    "and change them by optimizer.step() only"
                )
            if isinstance(body, messages.Ready) and body != first:
                problem = problem or f"rank {rank} has a vector of shape {body.shape}, rank 0 another one; they must be alike"
        self._to_all(messages.Failed(error=problem, exit_code=2) if problem else go)
        if problem:
            raise PrivflError(problem)

    def _accept(self, vector: ArrayLike) -> NDArray[Any]:
        given = np.asarray(vector)
        if self._sums.given_up:
            raise MismatchError
        if self._integers and not np.can_cast(given.dtype, np.int64):
            raise PrivflError(
                f"SecureSum sums integers exactly, and was given {given.dtype}; for numbers give it their public range"
            )
        if not self._integers and not (np.issubdtype(given.dtype, np.floating) or np.issubdtype(given.dtype, np.integer)):
            raise PrivflError(f"SecureSum sums real numbers, and was given {given.dtype}")
        self._quantiser.check(given)
        return given

    def _add(self, layout: Layout, blocks: Iterator[NDArray[np.uint64]]) -> Iterator[memoryview]:
        """On rank 0: the sums of all blocks, each sent to everybody as soon as it is there."""
        totals = self._reduced(blocks) if self._path == "reduce" else self._added(layout, blocks)
        for part, total in enumerate(totals):
            message = Message(Kind.TOTAL, self._run, self._round, 1, part, layout.blocks, bulk=total)
            for rank in _others(self._transport):
                self._transport.send(rank, *message.encode())
            yield total

    def _reduced(self, blocks: Iterator[NDArray[np.uint64]]) -> Iterator[memoryview]:
        under_way = [(words, self._transport.reduce([*_others(self._transport)], words)) for words in blocks]
        for words, part in under_way:
            finish(part)
            reduce_words(words, self.parameters.prime, self._transport.size)
        # Each says that it has handed over all of its part before anybody gets a total and goes on to the next sum.
        self._from_all(Kind.CONTRIBUTION)
        for words, _ in under_way:
            yield words.data.cast("B")

    def _added(self, layout: Layout, blocks: Iterator[NDArray[np.uint64]]) -> Iterator[memoryview]:
        adder = WordAdder(self.parameters)
        adder.open(layout)
        parts = dict.fromkeys(_others(self._transport), 0)
        for own, words in enumerate(blocks):
            adder.add(own, words.data.cast("B"))
            while self._take(adder, parts, layout, 0.0):
                pass
        while any(part < layout.blocks for part in parts.values()):
            if not self._take(adder, parts, layout, self._timeout):
                raise PrivflError(f"no contribution arrived within {self._timeout:.0f} s; another rank is gone or stuck")
        for part in range(layout.blocks):
            yield adder.block(part)

    def _take(self, adder: WordAdder, parts: dict[int, int], layout: Layout, timeout: float) -> bool:
        frame = self._transport.receive(timeout)
        if frame is None:
            return False
        message = messages.decode(frame.head, frame.bulk)
        here = (message.kind, message.run, message.round, message.part, message.parts)
        if here != (Kind.CONTRIBUTION, self._run, self._round, parts[frame.peer], layout.blocks):
            raise ProtocolError(
                f"rank {frame.peer} sent a {message.kind.name} message where the next block of its contribution was due"
            )
        adder.add(message.part, message.bulk)
        parts[frame.peer] += 1
        return True

    def _receive_totals(self, layout: Layout) -> Iterator[memoryview | bytes]:
        for part in range(layout.blocks):
            message = self._expect(Kind.TOTAL)
            if (message.part, message.parts) != (part, layout.blocks):
                raise ProtocolError(
                    f"rank 0 sent block {message.part} of {message.parts} of a sum, expected {part} of {layout.blocks}"
                )
            yield message.bulk

    def _finish(self, one: OneSum) -> NDArray[Any]:
        if not self._transport.flush(self._timeout):
            raise PrivflError(f"a sum could not be sent within {self._timeout:.0f} s; another rank is gone or stuck")
        return one.total()

    # -- keys ------------------------------------------------------------------------------------------------------

    def _set_up(self, value_bits: int | None, span: float | None, rounding: Rounding) -> Sums:
        """Exchange and sign keys; rank 0 makes those of the sums and seals them to the others."""
        exchange, identity = ExchangeKey(), Identity()
        arguments = json.dumps(["privfl SecureSum 1", self._transport.size, value_bits, span, self._path])
        hello = messages.Hello(
            site=self._site,
            digest=hashlib.sha256(arguments.encode()).hexdigest(),
            versions=versions(),
            exchange_key=exchange.public.hex(),
            identity=identity.public,
        )
        try:
            self._choose(value_bits, span, rounding)
        except PrivflError as error:
            hello = messages.Hello(site=self._site, error=str(error), exit_code=2)
        welcome = self._greet(hello)
        agreement = Agreement.relayed(welcome, hello.digest, self.parameters)
        agreement.check(self._site, exchange, identity, {})
        agreement.check_signatures(self._exchange_signatures(identity.sign(agreement.digest)))
        if self._transport.rank:
            sealed = bytes(self._expect(Kind.SEALED_KEY).bulk)
            return Sums(agreement, exchange, open_keys(sealed, exchange, agreement, self._site, self.parameters))
        keys = RunKeys.make(self.parameters)
        for rank, sealed in seal_keys(keys, exchange, agreement):
            message = Message(Kind.SEALED_KEY, self._run, part=rank, parts=self._transport.size, bulk=sealed)
            self._transport.send(rank, *message.encode())
        return Sums(agreement, exchange, keys)

    def _choose(self, value_bits: int | None, span: float | None, rounding: Rounding) -> None:
        """Turn the arguments into parameters and a quantiser, and prove that the encryption works here."""
        if rounding not in ("nearest", "stochastic") or self._path not in ("star", "reduce"):
            raise PrivflError(
                f"SecureSum takes rounding nearest or stochastic and path star or reduce, got {rounding!r} and {self._path!r}"
            )
        self.parameters = parameters_for(self._transport.size, value_bits, self._path)
        if span is not None and not isinstance(span, int | float):
            raise PrivflError(f"SecureSum takes a number as the public range, or none for integers, got {span!r}")
        self._integers = span is None
        self._quantiser: Quantiser = Exact(self.parameters) if span is None else Grid(self.parameters, span, rounding)
        if not prove():
            raise PrivflError(
                "this TenSEAL is not proven to let ciphertexts be added as words, which SecureSum needs; see `privfl doctor`"
            )

    def _greet(self, hello: messages.Hello) -> messages.Welcome:
        if self._transport.rank:
            self._send(0, hello)
            message = self._expect(Kind.WELCOME)
            assert isinstance(message.body, messages.Welcome)
            self._run = message.run
            return message.body
        hellos = {0: hello} | {r: m.body for r, m in self._from_all(Kind.HELLO).items() if isinstance(m.body, messages.Hello)}
        self._run = os.urandom(16)
        members = tuple(
            messages.Member(site=f"rank{rank}", rank=rank, exchange_key=other.exchange_key, identity=other.identity)
            for rank, other in sorted(hellos.items())
        )
        welcome = messages.Welcome(run=self._run.hex(), folder="", digest=hello.digest, members=members)
        odd = "calls SecureSum with other arguments than rank 0, or runs other versions of privfl or tenseal"
        problems = {
            rank: other.error or ("" if (other.digest, other.versions) == (hello.digest, hello.versions) else odd)
            for rank, other in hellos.items()
        }
        self._settle({rank: messages.Failed(error=p, exit_code=2) if p else None for rank, p in problems.items()}, welcome)
        return welcome

    def _exchange_signatures(self, own: bytes) -> dict[str, str]:
        if self._transport.rank:
            self._send(0, messages.Signed(signature=own.hex()))
            body = self._expect(Kind.AGREED).body
            assert isinstance(body, messages.Agreed)
            return body.signatures
        signatures = {"rank0": own.hex()}
        for rank, message in self._from_all(Kind.SIGNED).items():
            assert isinstance(message.body, messages.Signed)
            signatures[f"rank{rank}"] = message.body.signature
        self._to_all(messages.Agreed(signatures=signatures))
        return signatures

    # -- messages --------------------------------------------------------------------------------------------------

    def _send(self, to: int, body: Body) -> None:
        self._transport.send(to, *Message.of(body, self._run, self._round).encode())

    def _to_all(self, body: Body) -> None:
        for rank in _others(self._transport):
            self._send(rank, body)

    def _expect(self, kind: Kind) -> Message:
        """The next message of rank 0, which must be of this kind."""
        message = self._next()[1]
        if isinstance(message.body, messages.Failed):
            raise PrivflError(message.body.error)
        if message.kind is not kind or message.round != self._round:
            raise ProtocolError(
                f"rank 0 sent a {message.kind.name} message of sum {message.round}, expected {kind.name} of sum {self._round}"
            )
        return message

    def _from_all(self, *kinds: Kind) -> dict[int, Message]:
        """One message of each other rank, by rank."""
        got: dict[int, Message] = {}
        while len(got) < self._transport.size - 1:
            rank, message = self._next()
            if message.kind not in kinds or rank in got or message.round != self._round:
                raise ProtocolError(
                    f"rank {rank} sent a {message.kind.name} message, expected {' or '.join(k.name for k in kinds)}"
                )
            got[rank] = message
        return dict(sorted(got.items()))

    def _next(self) -> tuple[int, Message]:
        frame = self._transport.receive(self._timeout)
        if frame is None:
            raise PrivflError(
                f"no message arrived within {self._timeout:.0f} s; another rank is gone, stuck, or makes no call of SecureSum"
            )
        return frame.peer, messages.decode(frame.head, frame.bulk)

    def close(self) -> None:
        """Give up receiving. Collective in effect: no rank may sum after another has closed."""
        deadline = time.monotonic() + self._timeout
        self._transport.flush(max(0.0, deadline - time.monotonic()))
        self._transport.close()

    def __enter__(self) -> SecureSum:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _transport(comm: Any) -> Transport:
    if hasattr(comm, "Get_rank"):
        from privfl.transport import mpi

        return mpi.over(comm)
    return comm  # type: ignore[no-any-return]


def _others(transport: Transport) -> range:
    return range(1, transport.size)

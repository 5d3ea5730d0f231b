"""How the ranks of a communicator talk among themselves, where every rank is a site: rank 0 relays.

Everything is collective: every rank makes the same calls in the same order.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfl.environment import versions
from privfl.errors import PrivflError, ProtocolError, in_one_line, shown
from privfl.federation import messages
from privfl.federation.messages import Body, Kind, Message
from privfl.identity import Identity
from privfl.secagg import Parameters
from privfl.secagg.self_test import prove
from privfl.secagg.session.handshake import Handshake
from privfl.secagg.session.roster import Member, Roster
from privfl.secagg.session.sums import SumSession
from privfl.transport import Transport

# Seconds after which a rank that does not answer is an error, if the user says nothing else.
TIMEOUT = 600.0


def transport_of(comm: Any) -> Transport:
    """The transport over an mpi4py communicator; a transport as it is.

    Raises:
        PrivflError: If ``comm`` is neither, or a communicator that this rank is no member of.
    """
    if not _connects(comm):
        raise PrivflError(
            "comm must be an mpi4py communicator, for example MPI.COMM_WORLD, or a transport of "
            f"privfl, got {shown(comm)}"
        )
    if not hasattr(comm, "Get_rank"):
        return comm  # type: ignore[no-any-return]
    if not comm or comm.Is_inter():
        raise PrivflError(
            "comm must be a communicator within one group that this rank is a member of, got "
            f"{'an intercommunicator' if comm else 'MPI.COMM_NULL'}"
        )
    from privfl.transport import mpi

    return mpi.over(comm)


def _connects(value: Any) -> bool:
    """Whether ``value`` looks like a communicator or a transport."""
    transport = ("rank", "size", "send", "receive", "reduce", "flush")
    return not isinstance(value, type) and (
        hasattr(value, "Get_rank") or all(hasattr(value, name) for name in transport)
    )


def refuse(values: Sequence[Any], problem: PrivflError) -> None:
    """Make a call that cannot begin at this rank fail at all ranks, which would wait for it.

    Args:
        values: the arguments of the call; without a communicator among them nobody waits.
        problem: what is wrong with the call at this rank.
    """

    def fail() -> Parameters:
        raise problem

    for comm in filter(_connects, values):
        with contextlib.suppress(PrivflError):  # which says the same
            RankGroup(transport_of(comm), TIMEOUT).join("", fail)


class RankGroup:
    """All ranks of a transport, which must be at least two.

    Args:
        transport: connects rank 0 with every other rank.
        timeout: seconds after which a rank that does not answer is an error.

    Attributes:
        run: 16 random bytes that rank 0 chose in :meth:`join`; zeros before.
        round: how many collective calls were made; every message has it, so that ranks which do
            not make the same calls are noticed.

    Raises:
        PrivflError: If there is one rank only.
    """

    def __init__(self, transport: Transport, timeout: float) -> None:
        if transport.size < 2:
            raise PrivflError(
                "a sum over ranks needs at least 2 of them, this communicator has 1; start the "
                "program with: mpiexec -n 4 python ..."
            )
        self.transport, self.timeout = transport, timeout
        self.rank, self.size = transport.rank, transport.size
        self.run, self.round = messages.NO_RUN, 0

    @property
    def others(self) -> range:
        """All ranks but 0."""
        return range(1, self.size)

    # -- what all ranks learn ----------------------------------------------------------------------

    def tell(self, text: str) -> tuple[str, ...]:
        """Say ``text`` to all ranks, in the clear.

        Returns:
            What each rank said, in order of rank.

        Raises:
            PrivflError: If a rank does not answer in time.
        """
        self.round += 1
        if self.rank:
            self._send(0, messages.Texts(texts=(text,)))
            body = self.expect(Kind.TEXTS).body
            assert isinstance(body, messages.Texts)
            return body.texts
        texts = [text]
        for message in self.from_all(Kind.TEXTS).values():
            assert isinstance(message.body, messages.Texts)
            texts += message.body.texts
        everything = messages.Texts(texts=tuple(texts))
        self._to_all(everything)
        return everything.texts

    def all_well(self, problem: str = "") -> None:
        """Go on only if no rank has a problem; also understood by ranks that begin a sum.

        Raises:
            PrivflError: At all ranks, if one of them has a problem: the sentence of the first.
        """
        self.round += 1
        self._agree(
            messages.Failed(error=problem, exit_code=2)
            if problem
            else messages.Ready(shape=(), state="")
        )

    def agree_on(self, accept: Callable[[], NDArray[Any]], state: str) -> NDArray[Any]:
        """This rank's vector, once every rank has said that its own fits.

        Args:
            accept: returns this rank's vector, of the same shape at all ranks, or raises what is
                wrong with it.
            state: a text that must be the same at all ranks.

        Returns:
            What ``accept`` returned.

        Raises:
            PrivflError: At all ranks, if one rank's vector or state does not fit: the sentence of
                the first.
        """
        self.round += 1
        problem, vector = "", np.empty(0)
        try:
            vector = accept()
        except PrivflError as error:
            problem = str(error)
        except Exception as error:  # whatever numpy makes of it, the other ranks must not wait
            problem = in_one_line(
                f"no vector of numbers was given ({type(error).__name__}: {error})"
            )
        self._agree(
            messages.Failed(error=problem, exit_code=2)
            if problem
            else messages.Ready(shape=vector.shape, state=state)
        )
        return vector

    def _agree(self, answer: Body) -> None:
        if self.rank:
            self._send(0, answer)
            self.expect(Kind.ROUND)
            return
        answers = {0: answer} | {
            rank: m.body for rank, m in self.from_all(Kind.READY, Kind.FAILED).items()
        }
        self._go_on(_problem(answers), messages.Round())

    def _go_on(self, problem: str, go: Body) -> None:
        """On rank 0: tell all to go on, or why they cannot."""
        self._to_all(messages.Failed(error=problem, exit_code=2) if problem else go)
        if problem:
            raise PrivflError(problem)

    # -- keys --------------------------------------------------------------------------------------

    def join(self, arguments: str, choose: Callable[[], Parameters]) -> SumSession:
        """Exchange and sign keys; rank 0 makes the keys of the sums and seals them to the others.

        Guarantee: No key is used before the signatures of all ranks under the same roster were
            checked. Identities live for one run and are not pinned.

        Args:
            arguments: what all ranks must have been called with alike, as text.
            choose: the parameters of the sums that follow, or raises what is wrong with this rank's
                arguments.

        Returns:
            What opens the encrypted sums of these ranks.

        Raises:
            PrivflError: At all ranks, if a rank was called with other arguments, runs other
                versions, or has a problem of its own.
        """
        parameters, problem, site = None, "", f"rank{self.rank}"
        identity = Identity()
        try:
            parameters = choose()
            if not prove():
                problem = (
                    "this TenSEAL is not proven to let ciphertexts be added as words, which sums "
                    "over ranks need; see `privfl doctor`"
                )
        except PrivflError as error:
            problem = str(error)
        hello = messages.Hello(site=site, error=problem, exit_code=2)
        handshake = None
        if parameters is not None and not problem:
            handshake = Handshake(site, identity, {}, parameters)
            hello = messages.Hello(
                site=site,
                digest=hashlib.sha256(arguments.encode()).hexdigest(),
                versions=versions(),
                exchange_key=handshake.exchange.public.hex(),
                identity=identity.public,
            )
        welcome = self._greet(hello)
        assert handshake is not None
        assert parameters is not None
        members = [
            Member.relayed(other.site, other.exchange_key, other.identity)
            for other in welcome.members
        ]
        signature = handshake.sign(Roster.of(welcome.run, hello.digest, parameters, members))
        sealed = handshake.verify(self._exchange_signatures(signature), make_key=self.rank == 0)
        for rank, keys in sealed:
            message = Message(Kind.SEALED_KEY, self.run, part=rank, parts=self.size, bulk=keys)
            self.transport.send(rank, *message.encode())
        if self.rank:
            handshake.open(bytes(self.expect(Kind.SEALED_KEY).bulk))
        return handshake.sums

    def _greet(self, hello: messages.Hello) -> messages.Welcome:
        if self.rank:
            self._send(0, hello)
            message = self.expect(Kind.WELCOME)
            assert isinstance(message.body, messages.Welcome)
            self.run = message.run
            return message.body
        hellos = {0: hello} | {
            r: m.body
            for r, m in self.from_all(Kind.HELLO).items()
            if isinstance(m.body, messages.Hello)
        }
        self.run = os.urandom(16)
        members = tuple(
            messages.Member(
                site=f"rank{rank}",
                rank=rank,
                exchange_key=other.exchange_key,
                identity=other.identity,
            )
            for rank, other in sorted(hellos.items())
        )
        welcome = messages.Welcome(
            run=self.run.hex(), folder="", digest=hello.digest, members=members
        )
        problems = [(rank, _difference(other, hello)) for rank, other in sorted(hellos.items())]
        self._go_on(next((f"rank {rank}: {text}" for rank, text in problems if text), ""), welcome)
        return welcome

    def _exchange_signatures(self, own: bytes) -> dict[str, str]:
        if self.rank:
            self._send(0, messages.Signed(signature=own.hex()))
            body = self.expect(Kind.AGREED).body
            assert isinstance(body, messages.Agreed)
            return body.signatures
        signatures = {"rank0": own.hex()}
        for rank, message in self.from_all(Kind.SIGNED).items():
            assert isinstance(message.body, messages.Signed)
            signatures[f"rank{rank}"] = message.body.signature
        self._to_all(messages.Agreed(signatures=signatures))
        return signatures

    # -- messages ----------------------------------------------------------------------------------

    def _send(self, to: int, body: Body) -> None:
        self.transport.send(to, *Message.of(body, self.run, self.round).encode())

    def _to_all(self, body: Body) -> None:
        for rank in self.others:
            self._send(rank, body)

    def expect(self, kind: Kind) -> Message:
        """The next message of rank 0, which must be of this kind and belong to this call.

        Raises:
            PrivflError: If rank 0 says that a rank failed, or nothing arrives in time.
            ProtocolError: If rank 0 sent another message.
        """
        message = self._next()[1]
        if isinstance(message.body, messages.Failed):
            raise PrivflError(message.body.error)
        if message.kind is not kind or message.round != self.round:
            raise ProtocolError(
                f"rank 0 sent a {message.kind.name} message of sum {message.round}, expected "
                f"{kind.name} of sum {self.round}"
            )
        return message

    def from_all(self, *kinds: Kind) -> dict[int, Message]:
        """On rank 0: one message of each other rank, in order of rank.

        Raises:
            PrivflError: If the message of a rank does not arrive in time.
            ProtocolError: If a message is of another kind, or belongs to another call.
        """
        received: dict[int, Message] = {}
        while len(received) < self.size - 1:
            rank, message = self._next()
            if message.kind not in kinds or rank in received or message.round != self.round:
                raise ProtocolError(
                    f"rank {rank} sent a {message.kind.name} message, expected "
                    f"{' or '.join(k.name for k in kinds)}"
                )
            received[rank] = message
        return dict(sorted(received.items()))

    def _next(self) -> tuple[int, Message]:
        frame = self.transport.receive(self.timeout)
        if frame is None:
            raise PrivflError(
                f"no message arrived within {self.timeout:.0f} s; another rank is gone, stuck, or "
                "does not make the same calls"
            )
        return frame.peer, messages.decode(frame.head, frame.bulk)

    def close(self) -> None:
        """Send what is waiting and stop receiving. No rank may talk after another has closed."""
        self.transport.flush(self.timeout)
        self.transport.close()


def _problem(answers: Mapping[int, Body | None]) -> str:
    """Why the ranks cannot go on, from the answers of all; empty if they can."""
    for rank, body in answers.items():
        if isinstance(body, messages.Failed):
            return f"rank {rank}: {body.error}"
    first = answers[0]
    for rank, body in answers.items():
        if (
            isinstance(body, messages.Ready)
            and isinstance(first, messages.Ready)
            and body.state != first.state
        ):
            return (
                f"the model of rank {rank} is not that of rank 0: start all from the same "
                "parameters (torch.manual_seed before it is made), and change them by "
                "optimizer.step() only"
            )
        if isinstance(body, messages.Ready) and body != first:
            return (
                f"rank {rank} has a vector of shape {body.shape}, rank 0 another one; they must be "
                "alike"
            )
    return ""


def _difference(hello: messages.Hello, first: messages.Hello) -> str:
    """What is wrong with a rank, or different from rank 0; empty if nothing is."""
    if hello.error:
        return hello.error
    if first.error or (hello.digest, hello.versions) == (first.digest, first.versions):
        return ""
    return "calls with other arguments than rank 0, or runs other versions of privfl or tenseal"

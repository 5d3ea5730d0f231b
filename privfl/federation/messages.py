"""Every message of the protocol, and its bytes.

A message is a head of fixed size (kind, run, round, attempt, part, parts) and a payload: a JSON
body checked against the dataclass of its kind, or flat bytes (ciphertexts, sealed keys) that this
package only passes on.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from privfl.errors import ProtocolError

_HEAD = struct.Struct("<B16sIIII")
NO_RUN = b"\0" * 16
BODY_LIMIT = 16 << 20

Vector = Literal["update", "metrics"]


# How many ratios each metric has.
Layout = dict[str, Annotated[int, Field(ge=1, le=100_000)]]


class Body(BaseModel):
    """A JSON body: unknown fields, wrong types and numbers that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Hello(Body):
    """Site to coordinator, first of all: who I am, and whether I can take part at all."""

    site: str | None
    digest: str = ""
    versions: dict[str, str] = {}
    exchange_key: str = ""
    identity: str = ""
    user: str = ""
    error: str | None = None
    exit_code: int = 0


class Member(Body):
    """One site as the coordinator presents it to the others: its rank, and the public keys it
    greeted with.
    """

    site: str
    rank: int = Field(ge=0)
    exchange_key: str
    identity: str


class Welcome(Body):
    """Coordinator to sites: the run exists, these are the sites in order of the experiment,
    start.
    """

    run: str
    folder: str
    digest: str
    members: tuple[Member, ...]


class Signed(Body):
    """Site to coordinator: my signature under what the members of this run must agree on, above
    all their public keys.
    """

    signature: str


class Agreed(Body):
    """Coordinator to sites: all signatures. Only when they have been checked a key is used."""

    signatures: dict[str, str]


class Prepared(Body):
    """Site to coordinator: the trainer is up and the model made; public facts only.

    ``tag`` is the keyed digest of the replica; ``layout`` the number of ratios in each metric
    (empty: no held-out records); ``pinned`` whether this site has pinned the identities of all
    others; ``words_add`` whether its self-proof allows to add ciphertexts as words; ``accountant``
    how its epsilons are meant; ``ledger`` whether it keeps one across runs, and whether that begins
    now; ``evaluation_epsilon`` what all releases of metrics will have cost the held-out records,
    whose noise is ``metrics_noise`` times what one record can change; ``outside`` what its data()
    says that no epsilon covers.
    """

    records: int = Field(ge=1)
    parameters: int = Field(ge=1)
    layout: Layout
    noise_multiplier: float
    sampling_rate: float
    planned_epsilon: float
    evaluation_epsilon: float
    metrics_noise: float
    accountant: Literal["rdp", "filter"]
    ledger: Literal["none", "new", "kept"]
    tag: str
    pinned: bool
    words_add: bool
    outside: tuple[str, ...]


class Begin(Body):
    """Coordinator to sites: everybody is prepared; what they agreed on, and how many records
    each site has.

    ``noise_multiplier``: where every site adds a share of the noise, the largest that a site asked
    for; else 0.
    """

    parameters: int = Field(ge=1)
    layout: Layout
    records: dict[str, Annotated[int, Field(ge=1)]]
    noise_multiplier: float = Field(ge=0.0)


def vector_length(begin: Begin, vector: Vector) -> int:
    """How many values a contribution has: the parameters, or for each metric its sums, its
    counts, one ratio and one indicator.
    """
    if vector == "update":
        return begin.parameters
    return sum(2 * ratios + 2 for ratios in begin.layout.values())


def weights_of(scheme: Literal["uniform", "records"], begin: Begin) -> dict[str, float]:
    """Each site's weight in the mean; they add up to 1. Every site computes them for itself."""
    shares = begin.records if scheme == "records" else dict.fromkeys(begin.records, 1)
    total = sum(shares.values())
    return {site: share / total for site, share in shares.items()}


class Round(Body):
    """Coordinator to sites: train."""


class SignedHead(Body):
    """The head of a site's ledger (number of rows, hash in hexadecimal) with the site's
    signature, for one round after so many sums in it.
    """

    attempt: int = Field(ge=0)
    ledger: str
    rows: int = Field(ge=1)
    hash: str
    signature: str


class Trained(Body):
    """Site to coordinator: local steps are done and charged; ready for the sum.

    ``head`` is that of the ledger after the charge; ``sealed_range`` is what the sites need to
    agree on the range of their updates, sealed between them; empty if the range is fixed.
    """

    event: dict[str, Any]
    steps: int
    epsilon: float
    head: SignedHead
    sealed_range: str = ""


class Sum(Body):
    """Coordinator to sites: contribute ``vector`` to the sum of exactly these members, whose
    ``sealed_ranges`` and ``heads`` are relayed.
    """

    vector: Vector
    members: tuple[str, ...]
    sealed_ranges: dict[str, str]
    heads: dict[str, SignedHead]


class Applied(Body):
    """Site to coordinator: the mean is part of my replica, whose keyed digest is ``tag``."""

    tag: str


class Lend(Body):
    """Coordinator to one site: replicas differ after this step; seal yours for the others."""


class Measured(Body):
    """Site to coordinator: the summed held-out metrics, exact or with noise, and what this
    site's part of them cost its held-out records.

    ``head`` is that of the ledger after that charge.
    """

    metrics: dict[str, float]
    event: dict[str, Any] | None
    epsilon: float
    head: SignedHead


class Finish(Body):
    """Coordinator to sites: the last round is over; write the model.

    ``heads`` are the last ones of all ledgers.
    """

    heads: dict[str, SignedHead]


class Finished(Body):
    """Site to coordinator: what I wrote, as paths on my machine."""

    model: str
    log: str


class Failed(Body):
    """Site to coordinator, at any time: one sentence, and the exit code it calls for."""

    error: str
    exit_code: Literal[1, 2]


class Stop(Body):
    """Coordinator to all: end with this exit code."""

    exit_code: int


class Bye(Body):
    """Site to coordinator: the trainer is gone, this was my last message."""


class Ready(Body):
    """Rank to rank 0, in a sum on its own (``SecureSum``): my vector has this shape and fits;
    ``state`` is what must be alike at all ranks.
    """

    shape: tuple[Annotated[int, Field(ge=0)], ...]
    state: str = ""


class Texts(Body):
    """What ranks that sum on their own tell each other in the clear: one text to rank 0, or
    those of all ranks from there.
    """

    texts: tuple[str, ...]


class Kind(enum.IntEnum):
    """What a message is. Kinds without a body carry flat bytes."""

    HELLO = 1
    WELCOME = 2
    SIGNED = 3
    AGREED = 4
    SEALED_KEY = 5
    PREPARED = 6
    BEGIN = 7
    ROUND = 8
    TRAINED = 9
    SUM = 10
    CONTRIBUTION = 11
    TOTAL = 12
    APPLIED = 13
    MEASURED = 14
    FINISH = 15
    FINISHED = 16
    FAILED = 17
    STOP = 18
    BYE = 19
    READY = 20
    TEXTS = 21
    LEND = 22
    REPLICA = 23


_BODIES: dict[Kind, type[Body]] = {
    Kind.HELLO: Hello,
    Kind.WELCOME: Welcome,
    Kind.SIGNED: Signed,
    Kind.AGREED: Agreed,
    Kind.PREPARED: Prepared,
    Kind.BEGIN: Begin,
    Kind.ROUND: Round,
    Kind.TRAINED: Trained,
    Kind.SUM: Sum,
    Kind.APPLIED: Applied,
    Kind.MEASURED: Measured,
    Kind.FINISH: Finish,
    Kind.FINISHED: Finished,
    Kind.FAILED: Failed,
    Kind.STOP: Stop,
    Kind.BYE: Bye,
    Kind.READY: Ready,
    Kind.TEXTS: Texts,
    Kind.LEND: Lend,
}
_KINDS = {body: kind for kind, body in _BODIES.items()}


@dataclass(frozen=True)
class Message:
    """One message.

    ``part`` counts the pieces of flat bytes from 0; for a sealed key it is the index of the site it
    is for.
    """

    kind: Kind
    run: bytes = NO_RUN
    round: int = 0
    attempt: int = 0
    part: int = 0
    parts: int = 1
    body: Body | None = None
    bulk: bytes | memoryview = field(default=b"", repr=False)

    @classmethod
    def of(cls, body: Body, run: bytes = NO_RUN, round: int = 0, attempt: int = 0) -> Message:  # noqa: A002
        """The message with this JSON body."""
        return cls(_KINDS[type(body)], run, round, attempt, body=body)

    def encode(self) -> tuple[bytes, bytes | memoryview]:
        """(head, payload)."""
        head = _HEAD.pack(self.kind, self.run, self.round, self.attempt, self.part, self.parts)
        return head, self.bulk if self.body is None else self.body.model_dump_json().encode()


def decode(head: bytes, payload: bytes | memoryview) -> Message:
    """The message that :meth:`Message.encode` wrote.

    Raises:
        ProtocolError: anything else.
    """
    if len(head) != _HEAD.size:
        raise ProtocolError(f"a message head has {len(head)} bytes, expected {_HEAD.size}")
    number, run, round_, attempt, part, parts = _HEAD.unpack(head)
    try:
        kind = Kind(number)
    except ValueError as error:
        raise ProtocolError(
            f"a message has the unknown kind {number}; do all ranks run one version of privfl?"
        ) from error
    if part >= parts:
        raise ProtocolError(f"a {kind.name} message says it is part {part} of {parts}")
    if kind not in _BODIES:
        return Message(kind, run, round_, attempt, part, parts, bulk=payload)
    if len(payload) > BODY_LIMIT:
        raise ProtocolError(f"a {kind.name} message has a body of {len(payload)} bytes")
    try:
        body = _BODIES[kind].model_validate_json(bytes(payload))
    except ValidationError as error:
        raise ProtocolError(
            f"a {kind.name} message is malformed ({error.error_count()} wrong fields)"
        ) from error
    return Message(kind, run, round_, attempt, part, parts, body=body)


def is_kind(head: bytes, kind: Kind) -> bool:
    """Whether a frame's head announces this kind; for a receiver that ignores everything else."""
    return len(head) == _HEAD.size and head[0] == kind

"""Every message of the protocol, and its bytes.

A message is a head of fixed size (kind, run, round, attempt, part, parts) and a payload: a JSON
body checked against the model of its kind, or flat bytes (ciphertexts, sealed keys) that this
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
    """A JSON body. Unknown fields, wrong types and numbers that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Hello(Body):
    """Site to coordinator, first of all: who this is, and whether it can take part at all."""

    site: str | None = Field(description="Name of the site; null if it failed before it knew.")
    digest: str = Field(default="", description="Digest of the experiment that the site read.")
    versions: dict[str, str] = Field(
        default={}, description="Versions that must be the same at all ranks, by package."
    )
    exchange_key: str = Field(
        default="", description="X25519 public key of the site for this run, in hexadecimal."
    )
    identity: str = Field(default="", description="Ed25519 public key of the site.")
    user: str = Field(default="", description="Number of the user under whom the site runs.")
    error: str | None = Field(
        default=None, description="One sentence why the site cannot take part; null if it can."
    )
    exit_code: int = Field(default=0, description="Exit code that the error calls for.")


class Member(Body):
    """One site as the coordinator presents it to the others."""

    site: str
    rank: int = Field(ge=0)
    exchange_key: str = Field(description="As in the site's greeting.")
    identity: str = Field(description="As in the site's greeting.")


class Welcome(Body):
    """Coordinator to sites: the run exists; start."""

    run: str = Field(description="Identifier of the run, in hexadecimal.")
    folder: str = Field(description="Run folder of the coordinator.")
    digest: str = Field(description="Digest of the experiment that the coordinator read.")
    members: tuple[Member, ...] = Field(description="The sites, in the order of the experiment.")


class Signed(Body):
    """Site to coordinator: it has checked what the members of this run must agree on."""

    signature: str = Field(
        description="Signature under the digest of all of it, above all the public keys, in "
        "hexadecimal."
    )


class Agreed(Body):
    """Coordinator to sites: all signatures. Only when they have been checked a key is used."""

    signatures: dict[str, str] = Field(description="By site.")


class Prepared(Body):
    """Site to coordinator: its trainer is up and the model made; public facts only."""

    records: int = Field(ge=1, description="Number of training records.")
    parameters: int = Field(ge=1, description="Number of trainable parameters of the model.")
    layout: Layout = Field(
        description="Number of ratios in each metric; empty without evaluation records."
    )
    noise_multiplier: float = Field(description="That of training, as this site needs it.")
    sampling_rate: float
    planned_epsilon: float = Field(
        description="Epsilon of the training records at the end of the run."
    )
    evaluation_epsilon: float = Field(
        description="Epsilon of the evaluation records at the end of the run; 0 without noise."
    )
    metrics_noise: float = Field(
        description="Standard deviation of the noise of a release of metrics, in units of what "
        "one record can change; 0 without noise."
    )
    accountant: Literal["rdp", "filter"] = Field(description="That of the epsilons.")
    ledger: Literal["none", "new", "kept"] = Field(
        description="Whether a ledger is kept across runs, and whether it begins with this one."
    )
    rules: str | None = Field(
        description="Path of the site file, as the site names it; none without one."
    )
    tag: str = Field(description="Keyed digest of the replica.")
    pinned: bool = Field(description="Whether this site has pinned the keys of all others.")
    words_add: bool = Field(
        description="Whether the self-test of this site allows adding ciphertexts as words."
    )
    outside: tuple[str, ...] = Field(description="What data() says that no epsilon covers.")


class Begin(Body):
    """Coordinator to sites: everybody is prepared, and this is what they agreed on."""

    parameters: int = Field(ge=1, description="As at every site.")
    layout: Layout = Field(description="As at every site that has evaluation records.")
    records: dict[str, Annotated[int, Field(ge=1)]] = Field(
        description="Number of training records, by site."
    )
    noise_multiplier: float = Field(
        ge=0.0,
        description="With distributed noise the largest that a site asked for; else 0.",
    )


def vector_length(begin: Begin, vector: Vector) -> int:
    """How many values a contribution has.

    An update has one for each parameter. Metrics have for each metric its sums, its counts, its
    own value, and 1 if there is one.
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
    """The head of a site's ledger in one round, with the site's signature."""

    attempt: int = Field(ge=0, description="Number of sums in this round so far.")
    ledger: str = Field(description="Identifier of the ledger.")
    rows: int = Field(ge=1, description="Number of its rows.")
    hash: str = Field(description="Hash of its last row, in hexadecimal.")
    signature: str = Field(description="In hexadecimal.")


class Trained(Body):
    """Site to coordinator: local steps are done and charged; ready for the sum."""

    event: dict[str, Any] = Field(description="Mechanism event of this round.")
    steps: int = Field(description="Steps of this run so far.")
    epsilon: float = Field(description="Epsilon of the training records in this run so far.")
    head: SignedHead = Field(description="Head of the ledger after the charge.")
    sealed_range: str = Field(
        default="",
        description="What the sites need to agree on the range of their updates, sealed between "
        "them; empty if the range is fixed.",
    )


class Sum(Body):
    """Coordinator to sites: contribute to the sum of exactly these members."""

    vector: Vector = Field(description="What is to be summed.")
    members: tuple[str, ...]
    sealed_ranges: dict[str, str] = Field(
        description="Sealed for the range of the updates, by site."
    )
    heads: dict[str, SignedHead] = Field(description="Heads of the ledgers, by site.")


class Applied(Body):
    """Site to coordinator: the sum is part of its replica."""

    tag: str = Field(description="Keyed digest of the replica.")


class Lend(Body):
    """Coordinator to one site: replicas differ after this step; seal yours for the others."""


class Measured(Body):
    """Site to coordinator: the summed metrics, and what they cost this site's records."""

    metrics: dict[str, float] = Field(description="Exact or with noise, by name.")
    event: dict[str, Any] | None = Field(
        description="Mechanism event of the release; null if it was not charged."
    )
    epsilon: float = Field(description="Epsilon of the evaluation records in this run so far.")
    head: SignedHead = Field(description="Head of the ledger after the charge.")


class Finish(Body):
    """Coordinator to sites: the last round is over; write the model."""

    heads: dict[str, SignedHead] = Field(description="Last heads of all ledgers, by site.")


class Finished(Body):
    """Site to coordinator: it wrote the model."""

    model: str = Field(description="Path of the model on the site's machine.")
    log: str = Field(description="Path of the log on the site's machine.")


class Failed(Body):
    """Site to coordinator, at any time: it cannot go on."""

    error: str = Field(description="One sentence.")
    exit_code: Literal[1, 2] = Field(description="Exit code that the error calls for.")


class Stop(Body):
    """Coordinator to all: end."""

    exit_code: int


class Bye(Body):
    """Site to coordinator: the trainer is gone, and this is the last message."""


class Ready(Body):
    """Rank to rank 0, in a sum without a coordinator (``SecureSum``): its vector fits."""

    shape: tuple[Annotated[int, Field(ge=0)], ...] = Field(description="Shape of the vector.")
    state: str = Field(default="", description="What must be alike at all ranks.")


class Texts(Body):
    """What ranks that sum without a coordinator tell each other in the clear."""

    texts: tuple[str, ...] = Field(description="To rank 0 one text; from there those of all ranks.")


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

    ``part`` counts the pieces of flat bytes from 0; for a sealed key it is the index of the site
    that the key is for.
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
    def of(
        cls,
        body: Body,
        run: bytes = NO_RUN,
        round: int = 0,  # noqa: A002
        attempt: int = 0,
    ) -> Message:
        """The message with this JSON body."""
        return cls(_KINDS[type(body)], run, round, attempt, body=body)

    def encode(self) -> tuple[bytes, bytes | memoryview]:
        """(head, payload)."""
        head = _HEAD.pack(self.kind, self.run, self.round, self.attempt, self.part, self.parts)
        return head, self.bulk if self.body is None else self.body.model_dump_json().encode()


def decode(head: bytes, payload: bytes | memoryview) -> Message:
    """The message that :meth:`Message.encode` wrote.

    Raises:
        ProtocolError: If head or payload are not those of a message.
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

"""What an agent asks its trainer, and what the trainer answers: every message of their channel,
as types.

Vectors do not travel in messages: they lie in the two shared vectors, `replica` towards the trainer
and `update` back.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class _Message(BaseModel):
    """One message: unknown fields and wrong types are refused.

    A metric that is NaN must arrive as such, to be refused by name.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, ser_json_inf_nan="constants"
    )


# -- requests of the agent -------------------------------------------------------------------------


class Prepare(_Message):
    """The first request: make the model, read the records, try both. Nothing in it is secret."""

    kind: Literal["prepare"] = "prepare"
    experiment: str = Field(description="the experiment, as JSON")
    folder: str = Field(description="the folder that user functions are relative to")
    data_options: dict[str, Any] = Field(description="keyword arguments of data()")
    device: str = Field(description="a torch device")
    threads: int = Field(description="threads of torch")
    log: str = Field(description="the site's log, which failures refer to")
    noise_multiplier: float | None = Field(
        description="of the trainer's own noise; None where the agent adds noise to sums"
    )
    run: str = Field(description="the run, in hexadecimal")


class Train(_Message):
    """Work on the records from the replica: one round of local steps, or the gradient sum of one
    batch.
    """

    kind: Literal["train"] = "train"


class Follow(_Message):
    """Make one step of the optimizer along the mean gradient, which lies in the replica vector
    as float64.
    """

    kind: Literal["follow"] = "follow"


class Measure(_Message):
    """Evaluate the replica on the evaluation records."""

    kind: Literal["measure"] = "measure"


class Write(_Message):
    """Write the replica as a model file."""

    kind: Literal["write"] = "write"
    path: str


Request = Prepare | Train | Follow | Measure | Write

# -- answers of the trainer ------------------------------------------------------------------------


class Facts(_Message):
    """The answer to :class:`Prepare`: public numbers only.

    The initial replica lies in the replica vector.
    """

    kind: Literal["facts"] = "facts"
    records: int = Field(description="training records")
    parameters: int = Field(description="trainable parameters")
    layout: dict[str, int] = Field(
        description="how many ratios each metric has; empty without evaluation records"
    )
    constants: str = Field(description="digest of everything in the model that is not trained")
    outside: tuple[str, ...] = Field(description="what data() says that no epsilon covers")


class Trained(_Message):
    """The answer to :class:`Train`: an update (float32) or a gradient sum (float64) lies in the
    update vector.
    """

    kind: Literal["trained"] = "trained"
    draws: int = Field(
        description=(
            "how often noise, or a batch where the agent adds the noise, was drawn in this run"
        )
    )


class Followed(_Message):
    """The answer to :class:`Follow`: the new replica lies in the update vector."""

    kind: Literal["followed"] = "followed"


class Measured(_Message):
    """The answer to :class:`Measure`."""

    kind: Literal["measured"] = "measured"
    metrics: dict[str, tuple[list[float], list[float]]] = Field(
        description="by metric, its sums and its counts"
    )


class Written(_Message):
    """The answer to :class:`Write`."""

    kind: Literal["written"] = "written"
    path: str


class Failed(_Message):
    """The answer to any request that failed."""

    kind: Literal["failed"] = "failed"
    error: str = Field(
        description="one sentence, which leaves the site in the clear and quotes no record"
    )
    exit_code: Literal[1, 2]


Answer = Facts | Trained | Followed | Measured | Written | Failed

REQUESTS: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="kind")])
ANSWERS: TypeAdapter[Answer] = TypeAdapter(Annotated[Answer, Field(discriminator="kind")])

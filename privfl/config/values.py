"""The kinds of value that configuration files hold, with their constraints."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue


def _no_bool(value: Any) -> Any:
    # YAML reads yes, no, on and off as booleans, and a boolean would pass for 1 or 0.
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got {str(value).lower()}")
    return value


def _site_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", value):
        raise ValueError("must be a name of letters, digits, '-' and '_'")
    return value


def _function(value: str) -> str:
    if not re.fullmatch(r"([\w./~-]+\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*", value):
        raise ValueError("must look like file.py:function or package.module:function")
    return value


def _metric_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", value):
        raise ValueError("must be a name of letters, digits and '_'")
    if value.endswith("_mean_over_sites"):
        raise ValueError("must not end in _mean_over_sites, which privfl adds itself")
    return value


def _device(value: str) -> str:
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", value):
        raise ValueError(f"must be cpu, mps, cuda or cuda:N, got {value!r}")
    return value


def _public_key(value: str) -> str:
    if not re.fullmatch(r"ed25519:[A-Za-z0-9_-]{43}", value):
        raise ValueError(
            f"must be 'ed25519:' and 43 characters, as `privfl keys show` prints it, got {value!r}"
        )
    return value


def _format(words: str) -> Any:
    """What a text must look like, in words, for the reference of keys."""
    return Field(json_schema_extra={"format": words})


class Section(BaseModel):
    """A mapping with known keys only."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
Positive = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, allow_inf_nan=False)]
# Less noise than this bounds nothing, more leaves nothing to learn.
Noise = Annotated[float, BeforeValidator(_no_bool), Field(ge=0.01, le=2**14)]
# What the encrypted sums hold.
ValueBits = Annotated[int, BeforeValidator(_no_bool), Field(ge=12, le=28)]
# Wider than any update, and narrower than what float32 tells from 0.
Range = Annotated[float, BeforeValidator(_no_bool), Field(ge=1e-6, le=1e9)]
Options = dict[str, JsonValue]
Below1 = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, lt=1)]
Probability = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, lt=1)]
Rate = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, le=1)]
SiteName = Annotated[str, AfterValidator(_site_name), _format("name of a site")]
FunctionName = Annotated[
    str,
    AfterValidator(_function),
    _format("`file.py:function` or `package.module:function`"),
]
MetricName = Annotated[str, AfterValidator(_metric_name), _format("name of a metric")]
Device = Annotated[str, AfterValidator(_device), _format("`cpu`, `mps`, `cuda` or `cuda:N`")]
PublicKey = Annotated[str, AfterValidator(_public_key), _format("public key, `ed25519:...`")]

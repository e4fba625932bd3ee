"""What the parts of a job are made of: a strict base, and durations."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator

_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(ms|s|m|min|h|d)\s*$")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(value: object) -> float:
    """Seconds from ``"30s"``, ``"10min"``, ``"1.5h"`` or a plain number of seconds.

    Raises:
        ValueError: the text is no duration, or it is negative.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value < 0:
            raise ValueError("a duration cannot be negative")
        return float(value)
    match = _DURATION.match(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is no duration: write a number of seconds, or like '30s', '10min', '1.5h'")
    return float(match[1]) * _SECONDS[match[2]]


Duration = Annotated[float, PlainValidator(parse_duration, json_schema_input_type=float | str), PlainSerializer(float)]


class Spec(BaseModel):
    """Base of the job's parts: immutable, strict about types, refusing unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

"""``--option key=value``: storage options of the URLs that a command names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.document import parse_value
from ..core.errors import JobError, Problem
from ..core.formats import is_url

_WHERE = "--option"


def parse_options(words: Sequence[str], places: Sequence[str]) -> dict[str, Any]:
    """The options by name; ``client_kwargs.endpoint_url=…`` is one within another. Values are as in a job file.

    Args:
        places: what the command names: the options are for those that are URLs, or run directories, whose checkpoints
            may be at one.

    Raises:
        JobError: a word is no option, or nothing takes it.
    """
    options: dict[str, Any] = {}
    for word in words:
        name, separator, text = word.partition("=")
        *parents, last = name.split(".")
        if not separator or not all((*parents, last)):
            raise JobError(Problem(f"'{word}' sets nothing", _WHERE, "write KEY=VALUE, as anon=true"))
        place = options
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise JobError(Problem(f"'{parent}' has a value already", _WHERE))
        place[last] = parse_value(text)
    if options and not any(is_url(place) or (Path(place) / "run.json").is_file() for place in places):
        raise JobError(Problem("a local folder takes no options", _WHERE, "they are for URLs"))
    return options


def options_for(place: str, options: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """``options`` where ``place`` is a URL."""
    return options if is_url(place) else None

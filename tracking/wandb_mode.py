"""Whether W&B is fed online, offline, or not at all, and whether a key is there. wandb is not imported for it."""

from __future__ import annotations

import configparser
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from ..core.errors import JobError, Problem

Mode = Literal["online", "offline", "disabled"]

# W&B's own server: the name that wandb goes to by default, and the older one whose key it takes for it too.
_PUBLIC_HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")


def resolve_mode(spec_mode: Literal["auto"] | Mode, api_key_present: bool, *, env_mode: str = "") -> Mode:
    """The mode to run in: ``auto`` follows ``WANDB_MODE`` if that says one, else it is online with a key.

    Args:
        spec_mode: ``tracking.wandb.mode`` of the job.
        api_key_present: see :func:`api_key_present`.
        env_mode: what the environment variable ``WANDB_MODE`` holds.

    Raises:
        JobError: online, but there is no key; or ``env_mode`` is none.
    """
    mode, where = spec_mode, "tracking.wandb.mode"
    if mode == "auto":
        where = "WANDB_MODE"
        match env_mode:
            case "online" | "offline" | "disabled":
                mode = env_mode
            case "dryrun":  # wandb's older words
                mode = "offline"
            case "run":
                mode = "online"
            case "":
                mode = "online" if api_key_present else "offline"
            case _:
                raise JobError(Problem(f"expected online, offline or disabled, not '{env_mode}'", where))
    if mode == "online" and not api_key_present:
        hint = "run 'wandb login', set WANDB_API_KEY, or use 'offline'"
        raise JobError(Problem("there is no W&B API key to be online with", where, hint))
    return mode


def api_key_present(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether wandb would find a key: in the environment, its settings file, or netrc for the server's host."""
    return bool(environ.get("WANDB_IDENTITY_TOKEN_FILE")) or bool(find_key(environ))


def find_key(environ: Mapping[str, str]) -> str:
    """The API key that wandb would find; empty if there is none. It must not be shown or written."""
    if key := environ.get("WANDB_API_KEY") or _settings(environ).get("api_key"):
        return key
    host = urlsplit(server_url(environ)).netloc
    hosts = _PUBLIC_HOSTS if host == _PUBLIC_HOSTS[0] else (host,)
    try:
        file = netrc.netrc(_netrc_path(environ))
    except (OSError, netrc.NetrcParseError):
        return ""
    return next((entry[2] for entry in map(file.authenticators, hosts) if entry is not None and entry[2]), "")


def server_url(environ: Mapping[str, str]) -> str:
    """The server that wandb would talk to."""
    url = environ.get("WANDB_BASE_URL") or _settings(environ).get("base_url")
    return url or f"https://{_PUBLIC_HOSTS[0]}"


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ["HOME"]) if environ.get("HOME") else Path.home()


def _netrc_path(environ: Mapping[str, str]) -> Path:
    if named := environ.get("NETRC"):
        return Path(named).expanduser()
    usual, other = _home(environ) / ".netrc", _home(environ) / "_netrc"
    return other if other.exists() and not usual.exists() else usual


def _settings(environ: Mapping[str, str]) -> dict[str, str]:
    """wandb's settings: the user's file, and over it the one that ``wandb init`` leaves in the working directory."""
    folder = environ.get("WANDB_CONFIG_DIR")
    user = (Path(folder).expanduser() if folder else _home(environ) / ".config" / "wandb") / "settings"
    parser = configparser.ConfigParser(interpolation=None)
    for file in (user, Path("wandb", "settings")):
        try:
            parser.read(file)
        except (OSError, configparser.Error, UnicodeDecodeError):
            continue
    return dict(parser.items("default")) if parser.has_section("default") else {}

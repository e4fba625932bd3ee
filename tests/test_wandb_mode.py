"""Whether W&B is written online, offline or not at all, and where a key may be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from dltrain.core.errors import JobError
from dltrain.tracking.wandb import api_key_present, resolve_mode

KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    ("mode", "key", "env", "resolved"),
    [
        ("auto", True, "", "online"),
        ("auto", False, "", "offline"),
        ("auto", True, "disabled", "disabled"),
        ("auto", True, "offline", "offline"),
        ("auto", True, "dryrun", "offline"),
        ("auto", True, "run", "online"),
        ("online", True, "disabled", "online"),
        ("offline", True, "", "offline"),
        ("disabled", True, "online", "disabled"),
    ],
)
def test_mode(mode: Any, key: bool, env: str, resolved: str) -> None:
    assert resolve_mode(mode, key, env_mode=env) == resolved


@pytest.mark.parametrize(("mode", "env"), [("online", ""), ("auto", "online")])
def test_online_without_a_key_is_refused(mode: Any, env: str) -> None:
    with pytest.raises(JobError, match="no W&B API key"):
        resolve_mode(mode, False, env_mode=env)


def test_a_mode_that_is_none_is_refused() -> None:
    with pytest.raises(JobError, match="WANDB_MODE: expected online, offline or disabled, not 'of'"):
        resolve_mode("auto", True, env_mode="of")


def test_a_key_in_netrc_counts_for_its_server_as_wandb_sees_it(tmp_path: Path) -> None:
    machines = ["api.wandb.ai", "api.forge.coreweave.com", "wandb.example.org", "wandb.example.org:8080", "github.com"]
    urls = [
        "",
        "https://api.wandb.ai",
        "https://api.forge.coreweave.com",
        "https://wandb.example.org:8080",
        "http://wandb.example.org/",
    ]
    program = (
        "import sys; from wandb.sdk import wandb_setup; from wandb.sdk.lib import wbauth\n"
        "for url in sys.argv[1:]:\n"
        "    url = url or wandb_setup.singleton().settings.base_url\n"
        "    print(wbauth.read_netrc_auth(host=url) is not None)\n"
    )
    home = {"HOME": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path), "NETRC": str(tmp_path / "keys")}
    environ = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    for machine in machines:
        (tmp_path / "keys").write_text(f"machine {machine}\n  login user\n  password {KEY}\n")
        command = [sys.executable, "-c", program, *urls]
        said = subprocess.run(command, env=environ | home, capture_output=True, text=True, cwd=tmp_path, check=True)
        ours = [api_key_present(home | ({"WANDB_BASE_URL": url} if url else {})) for url in urls]
        assert [str(found) for found in ours] == said.stdout.split(), machine


def test_where_else_a_key_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    home = {"HOME": str(tmp_path)}
    assert not api_key_present(home)
    assert api_key_present(home | {"WANDB_API_KEY": KEY})
    assert api_key_present(home | {"WANDB_IDENTITY_TOKEN_FILE": "token"})
    config = tmp_path / ".config" / "wandb"
    config.mkdir(parents=True)
    (config / "settings").write_text("[default]\nbase_url = https://wandb.example.org\n")
    (tmp_path / "keys").write_text(f"machine wandb.example.org login user password {KEY}\n")
    assert api_key_present(home | {"NETRC": str(tmp_path / "keys")})
    assert not api_key_present(home | {"NETRC": str(tmp_path / "keys"), "WANDB_BASE_URL": "https://api.wandb.ai"})
    (tmp_path / "keys").write_text("machine machine machine")
    assert not api_key_present(cast("dict[str, str]", home | {"NETRC": str(tmp_path / "keys")}))

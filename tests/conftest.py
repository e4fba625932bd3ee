"""Fixtures of several files: a sandbox whose leftovers fail the test, an S3 server, storage folders."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # support modules beside the tests

from dltrain.core.storage import Storage
from launching import Sandbox
from runs import RunFolder
from stage import uninterrupted

if TYPE_CHECKING:
    from s3_server import S3Server

# The same examples in every run of CI; elsewhere new ones, which find more. No example is timed: machines are busy.
settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("default")

# A shell has what it starts in the background ignore the first two, nohup the third, and every process inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-goldens", action="store_true", help="write tests/goldens anew from what the code gives")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with the file of that name in ``tests/goldens``; ``--write-goldens`` writes the file."""

    def compare(name: str, text: str) -> None:
        path = Path(__file__).parent / "goldens" / name
        if request.config.getoption("--write-goldens"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8"), f"differs from {path}; --write-goldens takes it"

    return compare


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory of this process."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    """An empty working directory to launch from. After the test nothing of what it started may be left."""
    box = Sandbox(tmp_path)
    try:
        yield box
        left = box.leftovers()
    finally:
        box.close()
    assert not left, f"left behind: {left}"


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The staged job's run on two ranks that nothing happened to."""
    return uninterrupted(tmp_path_factory.mktemp("uninterrupted"))


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    from s3_server import S3Server  # takes a second, which only tests that use it should pay

    with S3Server.running() as server:
        yield server


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket, on the server that this process's AWS environment points to."""
    return s3.new_bucket(monkeypatch)


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty folder, local and in S3."""
    if request.param == "local":
        return Storage(str(tmp_path / "run"))
    return Storage(f"s3://{request.getfixturevalue('bucket')}/run")


@pytest.fixture
def local(tmp_path: Path) -> Storage:
    """An empty local folder."""
    return Storage(str(tmp_path / "run"))

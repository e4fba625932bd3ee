"""The code of a job on its way to machines that do not share the working directory: its files, and dltrain itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import JobError, Problem, RunFailed

_SHOWN = 5
_GIT = 120  # seconds that git may take
_SKIPPED = ("__pycache__", ".git")
_PACKAGE = Path(__file__).parents[2]


@dataclass(frozen=True)
class Code:
    """Files of a folder.

    Attributes:
        folder: where they are.
        files: relative to it, sorted.
        size: bytes of all.
    """

    folder: Path
    files: tuple[Path, ...]
    size: int

    def copy_to(self, target: Path) -> None:
        """Copy the files into ``target``, which is made."""
        target.mkdir(parents=True)
        for file in self.files:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.folder / file, target / file)

    def __str__(self) -> str:
        return f"{len(self.files)} files, {self.size / 1e6:.1f} MB"


def code_of(folder: Path, *, without: Path, limit_mb: float) -> Code:
    """The files of a working directory that git would not ignore, but for the runs in ``without``.

    Raises:
        JobError: they are more than ``limit_mb`` megabytes.
    """
    folder = folder.absolute()
    sizes: dict[Path, int] = {}
    for name in _listed(folder):
        path = folder / name
        if path.is_file() and not path.is_relative_to(without) and not set(name.parts) & set(_SKIPPED):
            sizes[name] = path.stat().st_size
    size = sum(sizes.values())
    if size > limit_mb * 1e6:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:_SHOWN]
        shown = ", ".join(f"{name} ({sizes[name] / 1e6:.1f} MB)" for name in largest)
        what = f"{len(sizes)} files, {size / 1e6:.0f} MB, are more than the limit of {limit_mb:g} MB"
        raise JobError(Problem(what, str(folder), f"name in .gitignore what the job does not need; largest: {shown}"))
    return Code(folder, tuple(sorted(sizes)), size)


def dltrain_code() -> Code:
    """dltrain's own package, without what lies beside it in a checkout."""
    rooms = [path for path in sorted(_PACKAGE.iterdir()) if (path / "__init__.py").is_file()]
    files = [path for room in rooms for path in sorted(room.rglob("*")) if path.suffix == ".py"]
    files += [*_PACKAGE.glob("*.py"), *sorted((_PACKAGE / "cluster_configs").iterdir())]
    names = tuple(path.relative_to(_PACKAGE) for path in files if path.is_file())
    return Code(_PACKAGE, names, sum((_PACKAGE / name).stat().st_size for name in names))


def _listed(folder: Path) -> list[Path]:
    """What git would not ignore in a folder, of a repository or not; all of it where there is no git."""
    if shutil.which("git") is None:
        return list(_walked(folder))
    listing = ("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    done = _git(folder, listing)
    if done.returncode:  # no repository: an empty one elsewhere knows how to read .gitignore
        with tempfile.TemporaryDirectory(prefix="dltrain-") as empty:
            _git(folder, ("init", "--quiet", "--bare", empty))
            done = _git(folder, (f"--git-dir={empty}", f"--work-tree={folder}", *listing))
    if done.returncode:
        return list(_walked(folder))
    return [Path(os.fsdecode(name)) for name in done.stdout.split(b"\0") if name]


def _git(folder: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    command = ("git", "-c", "core.fsmonitor=false", "-C", str(folder), *arguments)
    try:
        return subprocess.run(command, capture_output=True, timeout=_GIT, check=False)
    except subprocess.TimeoutExpired:
        raise RunFailed(f"git did not list the files of {folder} within {_GIT} s") from None


def _walked(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        yield path.relative_to(folder)

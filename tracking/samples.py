"""Pictures that a recipe draws as it learns: files in the run directory, and their place on the report."""

from __future__ import annotations

import re
from base64 import b64encode
from html import escape
from pathlib import Path

from .files import write_whole

_FOLDER = "samples"
_FILE = re.compile(r"step-(\d{8,})-(.+)\.png")
_SHOWN = 6


def keep(run_dir: Path, *, step: int, name: str, png: bytes) -> Path:
    """Write ``<run_dir>/samples/step-<step>-<name>.png``; its path.

    Raises:
        OSError: it cannot be written.
    """
    folder = run_dir / _FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.png"
    write_whole(path, png)
    return path


def section(run_dir: Path) -> str:
    """HTML that shows, for every name, pictures from the first to the newest; empty where there are none."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted((run_dir / _FOLDER).glob("*.png")):
        match = _FILE.fullmatch(path.name)
        if match is not None:
            found.setdefault(match[2], []).append((int(match[1]), path))
    figures = [_figure(name, step, path) for name in sorted(found) for step, path in _spaced(found[name])]
    return f'<h2>Samples</h2><div class="samples">{"".join(figures)}</div>' if figures else ""


def _spaced(pictures: list[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """At most ``_SHOWN``, evenly spaced, the first and the last among them."""
    if len(pictures) <= _SHOWN:
        return pictures
    return [pictures[round(i * (len(pictures) - 1) / (_SHOWN - 1))] for i in range(_SHOWN)]


def _figure(name: str, step: int, path: Path) -> str:
    caption = escape(f"{name} after step {step:,}")
    source = f"data:image/png;base64,{b64encode(path.read_bytes()).decode()}"
    return f'<figure><figcaption>{caption}</figcaption><img alt="{caption}" src="{source}"></figure>'

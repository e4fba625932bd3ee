"""The documents: what they tell to type can be typed, what they link to is there, and they name no machine of ours."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import checkpoints
import pytest
import torch
from dltrain.cli.options import parse_launch
from dltrain.core.config import load_job
from dltrain.core.job import Job
from dltrain.core.storage import Storage
from dltrain.data.prepare import prepare
from dltrain.launcher.rundir import Record, RunDir
from dltrain.launcher.submit.clusters import TEMPLATES, read_cluster, template
from dltrain.models.registry import RECIPES
from launching import Sandbox

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
BIN = Path(sys.executable).parent
NAMED = ("books",)  # folders of text that examples name
PEERS = {  # files of other launchers that examples name
    "default_config.yaml": "distributed_type: MULTI_GPU\nnum_processes: 8\n",
    "ds_config.json": '{"zero_optimization": {"stage": 2}}',
    "hosts": "node1 slots=8\nnode2 slots=8\n",
}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fences(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> Iterator[str]:
    """The ``dltrain`` command lines that pages tell to type."""
    for page in PAGES:
        for block in fences(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.strip().removeprefix(".venv/bin/")
                if words.startswith("dltrain "):
                    yield words


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with the files of the README's examples."""
    monkeypatch.chdir(tmp_path)
    for name, code in named_files():
        Path(name).write_text(code, encoding="utf-8")
    return tmp_path


def write_run(path: Path) -> None:
    """A run directory with a checkpoint that has what the examples ask for."""
    path.mkdir(parents=True, exist_ok=True)
    record = Record("0000", "digits", job={"checkpoint": {"to": None, "options": {}}})
    (path / "run.json").write_text(json.dumps(asdict(record)), encoding="utf-8")
    names = [f"{kind}.cnn.hidden.{name}" for kind in ("model", "ema") for name in ("weight", "bias")]
    checkpoints.save(Storage(str(path / "checkpoints")), 100, checkpoints.whole({n: torch.ones(2) for n in names}, 1))


def named_files() -> Iterator[tuple[str, str]]:
    """The README's Python blocks that begin with a file's name."""
    for code in fences(ROOT / "README.md", "python"):
        name = re.match(r"# (\w+\.py)\n", code)
        if name:
            yield name[1], code


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_commands_can_be_typed(line: str, folder: Path) -> None:
    words = shlex.split(line, comments=True)
    words = words[1 : words.index(">") if ">" in words else None]
    for before, word in zip(["", *words], words, strict=False):  # what an example names is there
        if before == "-o":  # and what it writes is not
            continue
        if word in NAMED:
            Path(word).mkdir()
            Path(word, "a.txt").write_text("text " * 500, encoding="utf-8")
        elif word.removeprefix("data.source=").endswith(".tokens") and words[1] == "show":
            Path("a.txt").write_text("text " * 500, encoding="utf-8")
            prepare(["a.txt"], word.removeprefix("data.source="))
        elif word in PEERS:
            Path(word).write_text(PEERS[word], encoding="utf-8")
        elif word in TEMPLATES.values():
            if words[1] != "init":
                Path(word).write_text(template(Path(word).stem), encoding="utf-8")
        elif word.endswith((".py", ".yaml")) and not Path(word).exists():
            Path(word).parent.mkdir(parents=True, exist_ok=True)
            Path(word).touch()
        elif word.startswith("runs/") and words[0] == "checkpoint":
            write_run(Path("/".join(Path(word).parts[:3])))
        elif word.startswith("runs/"):
            Path(word).mkdir(parents=True, exist_ok=True)
    if words[0] in ("status", "logs", "stop"):
        run = RunDir.create(Path("runs"), "digits", Job().model_dump(mode="json"))
        run.update(state="finished")
        run.close()
    if words[0] in ("doctor", "chaos", "plan") or ("--address" in words and words[0] != "launch"):
        # they want a cluster, or minutes: only their options are looked at
        words.append("--help")
    if words[0] != "launch":
        done = subprocess.run([BIN / "dltrain", *words], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return
    request = parse_launch(words[1:])
    if request.kind == "job":
        load_job(request.job_file, request.overrides, request.job_flags(), {}, recipes=RECIPES)


def test_there_are_commands() -> None:
    """A guard against a pattern that finds nothing."""
    top = {
        "launch",
        "config",
        "data",
        "checkpoint",
        "status",
        "logs",
        "stop",
        "doctor",
        "chaos",
        "plan",
        "submit",
        "cluster",
        "runs",
    }
    assert {line.split()[1] for line in commands()} == top
    assert len(list(commands())) > 15


def test_shown_refusals_are_what_is_printed(folder: Path) -> None:
    shown = [block for block in fences(ROOT / "README.md", "text") if block.startswith("$ dltrain")]
    assert shown
    for block in shown:
        line, _, output = block.partition("\n")
        words = shlex.split(line.removeprefix("$ dltrain"))
        environ = {k: v for k, v in os.environ.items() if not k.startswith("DLTRAIN_")}
        command = [BIN / "dltrain", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ, check=False)
        assert (done.stderr, done.returncode) == (output, 2)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    broken: list[str] = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+://", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert not broken


def test_the_readme_leads_to_every_page() -> None:
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name}" not in README] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_of_the_code_that_a_page_names_are_there(page: Path) -> None:
    named = re.findall(r"`([a-z]+(?:/[a-z_]+)*/[a-z_]+\.py)`", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).is_file()] == []


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as links write them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_no_registry_and_no_place_on_a_machine_is_named() -> None:
    """Installation goes to whatever index pip is set up for; paths are the reader's own."""
    hosts = r"pypi\.org|pythonhosted|download\.pytorch|anaconda|ghcr\.io|docker\.io|quay\.io|nvcr\.io|artifactory"
    options = r"--(extra-)?index-url|--find-links|--trusted-host"
    places = r"(?<![\w.~…/:*}])/(home|root|work|tmp|opt|mnt|srv|var|Users)/"
    files = [*PAGES, *(ROOT / name for name in ("Makefile", ".ci/run", ".pre-commit-config.yaml", "pyproject.toml"))]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        for match in re.finditer(f"{hosts}|{options}|{places}", line)
    ]
    assert not found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_of_job_files_are_jobs_and_python_is_python(page: Path, folder: Path) -> None:
    for block in fences(page, "yaml"):
        Path("example.yaml").write_text(block, encoding="utf-8")
        for path in re.findall(r"^  source: ([\w./-]+)(?:\s|$)", block, re.MULTILINE):  # what it names is there
            Path(path).touch() if Path(path).suffix else Path(path).mkdir()
        if block.startswith("kind:"):
            read_cluster(Path("example.yaml"))
        else:
            load_job(Path("example.yaml"), recipes=RECIPES)
    for block in fences(page, "python"):
        compile(block, str(page), "exec")


def test_the_reference_of_job_files_follows_the_schema() -> None:
    subprocess.run([sys.executable, ROOT / "docs/generate_jobs.py", "--check"], timeout=60, check=True)


def test_torch_is_bounded_alike_everywhere() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    (bounds,) = [dependency for dependency in dependencies if dependency.startswith("torch")]
    assert f'pip install "{bounds}"' in README
    assert f"TORCH := {bounds}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_readmes_own_model_trains(sandbox: Sandbox) -> None:
    for name, code in named_files():
        (sandbox.folder / name).write_text(code, encoding="utf-8")
    (line,) = [line for line in commands() if "recipe=my_recipe:Mlp" in line]
    done = sandbox.run(*shlex.split(line)[1:])
    assert done.returncode == 0, done.stderr
    assert "mlp: finished after 114 steps" in done.stdout

"""What ``dltrain launch`` was asked to do: its own options, the target, and what belongs to the script.

The first positional decides. A job file or ``key.path=value`` makes it a job, and options may stand anywhere; a script
(or a module after ``-m``, a program after ``--no-python``) ends dltrain's options, and everything after it is the
script's, untouched. Options are spelled with ``-`` or ``_``, as torchrun's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..core.errors import JobError, Problem
from ..core.suggest import JOB_SUFFIXES, nearest, similar_files
from .translate import HELP, Streams, translate

Kind = Literal["job", "file", "module", "program"]

DEFAULT_JOB = Path("dltrain.yaml")
_OVERRIDE = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*=")
_SCRIPT_FLAGS = ("-m", "--module", "--no-python", "--run-path")
_RUNNABLE = (*JOB_SUFFIXES, ".py")
_UNSUPPORTED = (
    "--duplicate-stderr-filters",
    "--duplicate-stdout-filters",
    "--event-log-handler",
    "--logs-specs",
    "--shutdown-timeout",
    "--signals-to-handle",
    "--virtual-local-rank",
)


@dataclass(frozen=True)
class LaunchRequest:
    """One parsed ``dltrain launch``. What was not given is None (or empty, where no value means the same).

    Attributes:
        kind: a job, or a script that is a Python file, a module or any program.
        job_file: the job file of a job; None runs the built-in job.
        overrides: the job's ``key.path=value`` arguments.
        script: path, module name or program, as given; empty for a job.
        script_args: what follows the script, untouched.
        nodes: number of nodes, or the least and the most.
        nproc_per_node: ranks per node.
        address: Ray cluster to join.
        network_interface: interface that ranks talk over.
        placement: how nodes are placed on machines.
        strategy: the job's ``parallel.strategy``.
        run_dir: parent of the run directories.
        resume: ``"auto"`` goes on with the unfinished run, ``"never"`` starts afresh; or a run or checkpoint folder.
        init_from: run or checkpoint folder, or its URL, to take the first weights from; empty for none.
        keep_warm: seconds that fork servers stay for the next launch.
        max_restarts: restarts of the ranks after a failure; "auto" is after what came from outside.
        start_method: ``"fork"`` from the warm server, or ``"spawn"`` for a fresh interpreter.
        log_dir: folder for the ranks' logs instead of the run directory's.
        redirects: streams that go to log files only: 1 stdout, 2 stderr, 3 both; for all ranks, or by local rank.
        tee: streams that go to log files and to the console, in the same form.
        local_ranks_filter: local ranks whose output is shown.
        master_addr: host of the rendezvous store.
        master_port: port of the rendezvous store.
        role: role of the ranks, as ``ROLE_NAME`` tells the script.
        rdzv_id: id of the run, as ``TORCHELASTIC_RUN_ID`` tells the script.
        submission: key of the submitted job that this launch belongs to; ``dltrain submit`` writes the option.
        standalone: always start an embedded cluster.
        quiet: no progress display.
        preflight: look at the nodes first, and refuse to start on a sick one.
        notes: sentences to print before the launch.
    """

    kind: Kind
    job_file: Path | None = None
    overrides: tuple[str, ...] = ()
    script: str = ""
    script_args: tuple[str, ...] = ()
    nodes: int | tuple[int, int] | None = None
    nproc_per_node: int | Literal["auto", "cpu", "gpu"] | None = None
    address: str | None = None
    network_interface: str | None = None
    placement: Literal["auto", "spread", "pack"] | None = None
    strategy: str | None = None
    run_dir: Path = Path("runs")
    resume: str = "auto"
    init_from: str = ""
    keep_warm: float = 0.0
    max_restarts: int | Literal["auto"] | None = None
    start_method: Literal["fork", "spawn"] | None = None
    log_dir: Path | None = None
    redirects: Streams | None = None
    tee: Streams | None = None
    local_ranks_filter: tuple[int, ...] | None = None
    master_addr: str | None = None
    master_port: int | None = None
    role: str | None = None
    rdzv_id: str | None = None
    submission: str = ""
    standalone: bool = False
    quiet: bool = False
    preflight: bool = False
    notes: tuple[str, ...] = ()

    def job_flags(self) -> dict[str, Any]:
        """The options that are values of a job, by dotted key: the ``flags`` of :func:`~..core.config.load_job`."""
        nodes = self.nodes
        values = {
            "resources.nodes": nodes[1] if isinstance(nodes, tuple) else nodes,
            "recovery.nodes": f"{nodes[0]}:{nodes[1]}" if isinstance(nodes, tuple) else None,
            "resources.nproc_per_node": self.nproc_per_node,
            "resources.network_interface": self.network_interface,
            "resources.placement": self.placement,
            "parallel.strategy": self.strategy,
            "recovery.max_restarts": self.max_restarts,
        }
        return {key: value for key, value in values.items() if value is not None}

    def job_words(self) -> tuple[str, ...]:
        """The job, without what is said of nodes, as other commands take it too."""
        words = (*((str(self.job_file),) if self.job_file else ()), *self.overrides)
        return words if self.strategy is None else (*words, "--strategy", self.strategy)


def split(argv: Sequence[str], takes_value: Mapping[str, bool]) -> tuple[list[str], list[str]]:
    """Separate dltrain's options from the target.

    Args:
        argv: what follows ``dltrain launch``.
        takes_value: by each option's every spelling (``--nodes``, ``-q``), whether a value follows it.

    Returns:
        The options, spelled ``--name``, ``--name=value``, ``-q`` or ``-r``, ``value``; and the positionals: a job file
        and overrides, or a script and all that follows it.

    Raises:
        JobError: an unknown option, or one without its value.
    """
    options: list[str] = []
    target: list[str] = []
    rest = list(argv)
    ended = False
    while rest:
        word = rest.pop(0)
        if ended or word == "-" or not word.startswith("-"):
            target.append(word)
            if len(target) == 1 and _is_script(word, options):
                return options, [*target, *rest]
        elif word == "--":
            ended = True
        elif word.startswith("--"):
            options.append(_long(word, rest, takes_value))
        else:
            options += _short(word, rest, takes_value)
    flag = next((option for option in options if option in _SCRIPT_FLAGS), None)
    if flag is not None and not _asks_help(options):
        what = f"{flag} comes before what it runs" if target else f"{flag} needs something to run"
        raise JobError(Problem(what, hint=f"dltrain launch [options] {flag} TARGET args…"))
    return options, target


def _is_script(first: str, options: Sequence[str]) -> bool:
    """Whether the first positional ends dltrain's options.

    Raises:
        JobError: it is neither a script nor anything that a job takes.
    """
    kind = "script" if any(flag in options for flag in _SCRIPT_FLAGS) else classify(first)
    if kind == "unknown" and not _asks_help(options):
        raise JobError(_stray(first))
    return kind == "script"


def _asks_help(options: Sequence[str]) -> bool:
    return "--help" in options or "-h" in options


def _long(word: str, rest: list[str], takes_value: Mapping[str, bool]) -> str:
    name, equals, value = word.partition("=")
    name = "--" + name[2:].replace("_", "-")
    if name not in takes_value:
        raise JobError(_unknown_option(name, takes_value))
    if not takes_value[name]:
        if equals:
            raise JobError(Problem(f"{name} takes no value", hint=HELP))
        return name
    return f"{name}={value if equals else _value(name, rest)}"


def _short(word: str, rest: list[str], takes_value: Mapping[str, bool]) -> list[str]:
    """The options of a word such as ``-q``, ``-r3``, ``-r=3``, ``-qr3``."""
    options: list[str] = []
    for i, letter in enumerate(word[1:], start=2):
        name = f"-{letter}"
        if name not in takes_value:
            raise JobError(_unknown_option(word if i == 2 else name, takes_value))
        if takes_value[name]:
            attached = word[i:].removeprefix("=")
            return [*options, name, attached or _value(name, rest)]
        options.append(name)
    return options


def _value(name: str, rest: list[str]) -> str:
    if not rest or (rest[0].startswith("-") and not re.fullmatch(r"-\d+", rest[0])):
        raise JobError(Problem(f"{name} needs a value", hint=HELP))
    return rest.pop(0)


def _unknown_option(name: str, known: Mapping[str, bool]) -> Problem:
    if name in _UNSUPPORTED:
        return Problem(f"torchrun's {name} is not supported", hint=HELP)
    long = [option for option in known if option.startswith("--")] if name.startswith("--") else []
    near = next((option for option in long if option.startswith(name)), None) or nearest(name, long)
    return Problem(f"no option {name}", hint=f"did you mean {near}?" if near else HELP)


def classify(word: str) -> Literal["job", "override", "script", "unknown"]:
    """What a positional is by its form: a job file, ``key=value``, a script (``.py`` or any other file), or neither."""
    if _OVERRIDE.match(word):
        return "override"
    if word.endswith(JOB_SUFFIXES):
        return "job"
    return "script" if word.endswith(".py") or Path(word).is_file() else "unknown"


@dataclass
class JobTarget:
    """A job as positionals name it: at most one job file, and overrides."""

    job_file: Path | None = None
    overrides: list[str] = field(default_factory=list)
    note: str = ""
    problems: list[Problem] = field(default_factory=list)


def job_target(positionals: Sequence[str]) -> JobTarget:
    """Read ``[job.yaml] [key.path=value …]``; without a file it is ``./dltrain.yaml`` if that exists."""
    target = JobTarget()
    for word in positionals:
        kind = classify(word)
        if kind == "override":
            target.overrides.append(word)
        elif kind == "job" and target.job_file is None:
            target.job_file = Path(word)
        elif kind == "job":
            target.problems.append(Problem(f"a second job file, '{word}'", hint=f"the first is '{target.job_file}'"))
        elif kind == "script":
            hint = "a script comes first, and takes no job file or overrides"
            target.problems.append(Problem(f"'{word}' is a script, in the arguments of a job", hint=hint))
        else:
            target.problems.append(_stray(word))
    if target.job_file is None and not target.problems:
        target.job_file = DEFAULT_JOB if DEFAULT_JOB.exists() else None
        target.note = f"job file: {DEFAULT_JOB}" if target.job_file else "no job file: this is the built-in digits job"
    return target


def _stray(word: str) -> Problem:
    path = Path(word)
    if word.startswith("-"):
        return Problem(f"'{word}' is no job file, override or script", hint=HELP)
    if path.is_dir():
        hint = similar_files(path / "train.py", _RUNNABLE)
        return Problem(f"'{word}' is a folder", hint=hint or "name a job file or a script in it")
    if Path(f"{word.replace('.', '/')}.py").is_file() and not Path(f"{word}.py").is_file():
        return Problem(f"'{word}' is no job file, override or script", hint=f"did you mean -m {word}?")
    hint = similar_files(path, _RUNNABLE)
    what = f"'{word}' is no job file, override or script"
    return Problem(what, hint=hint or "write job.yaml, key.path=value or train.py")


def build_request(params: Mapping[str, Any]) -> LaunchRequest:
    """The request of ``params``: the options by parameter name, as text or None, and the positionals as ``target``.

    Raises:
        JobError: with every problem found.
    """
    positionals: list[str] = list(params["target"] or ())
    kind = _kind(positionals, params)
    translated = translate(params, is_job=kind == "job")
    values, notes, problems = dict(translated.values), list(translated.notes), list(translated.problems)
    if kind == "job":
        job = job_target(positionals)
        values |= {"job_file": job.job_file, "overrides": tuple(job.overrides)}
        notes += [job.note] if job.note else []
        problems += job.problems
    else:
        values |= {"script": positionals[0], "script_args": tuple(positionals[1:])}
        if kind == "file" and not Path(positionals[0]).exists():
            problems.append(
                Problem(f"no such file: '{positionals[0]}'", hint=similar_files(Path(positionals[0]), (".py",)))
            )
    if problems:
        raise JobError(*problems)
    return LaunchRequest(kind=kind, notes=tuple(notes), **values)


def _kind(positionals: Sequence[str], params: Mapping[str, Any]) -> Kind:
    if params["module"] and params["no_python"]:
        raise JobError(Problem("--module and --no-python exclude each other"))
    if params["module"]:
        return "module"
    if params["no_python"] and not params["run_path"]:  # torchrun lets --run-path win
        return "program"
    return "file" if params["run_path"] or (positionals and classify(positionals[0]) == "script") else "job"

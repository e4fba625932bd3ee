"""Checks across a job's values that need no torch and start nothing: files, modules, packages, mesh arithmetic."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .elastic import legal_nodes
from .errors import JobError, Problem, did_you_mean
from .formats import KNOWN, format_of, is_object, is_url, missing_package, no_such_source
from .importing import find_object
from .job import Job
from .numerics import check_numerics
from .parallel import microbatches_per_step
from .recovery import RecoverySpec
from .zero import check_zero

_BUILT_IN_SOURCES = ("digits", "digits_scan", "iris", "wine", "breast_cancer", "diabetes", "stdlib_text")
_EXTRAS = {"s3": "s3", "s3a": "s3"}


Place = Callable[[str], str]


def check_job(
    job: Job, place: Place = str, *, recipes: Collection[str] = (), world: int | None = None
) -> list[Problem]:
    """What is wrong with ``job`` beyond the types of its values.

    Args:
        place: from a dotted key to where its value was set, as messages name it.
        recipes: names of the built-in recipes; empty leaves the name of a recipe without ``:`` unchecked.
        world: the number of ranks where it is known; else it is taken from ``resources`` where that gives numbers.
    """
    per_node = job.resources.nproc_per_node
    if world is None and isinstance(per_node, int):
        world = job.resources.nodes * per_node
    problems = [*_evaluation(job), *_watching(job), *check_nodes(job.resources.nodes, job.recovery)]
    if not job.parallel.is_open:  # else these decide what can be chosen
        problems += [*_optimizers(job), *_overflows(job), *check_numerics(job), *check_zero(job, world)]
        if world is not None:
            problems += [*_batch(job, world), *_elastic(job, world // job.resources.nodes)]
    return [*check_references(job, place, recipes=recipes), *_placed(problems, place)]


def check_references(job: Job, place: Place = str, *, recipes: Collection[str] = ()) -> list[Problem]:
    """What is wrong with the things outside that ``job`` names: modules, files, filesystems, packages."""
    return _placed([*_recipe(job, recipes), *_source(job), *_urls(job), *_extras(job)], place)


def _placed(problems: Iterable[Problem], place: Place) -> list[Problem]:
    return [Problem(problem.what, place(problem.where), problem.hint) for problem in problems]


def _recipe(job: Job, recipes: Collection[str]) -> Iterator[Problem]:
    if ":" in job.recipe:
        yield from _object(job.recipe, "recipe")
    elif recipes and job.recipe not in recipes:
        hint = did_you_mean(job.recipe, recipes)
        yield Problem(f"no built-in recipe '{job.recipe}'", "recipe", f"{hint}; your own is 'module:Class'")


def _source(job: Job) -> Iterator[Problem]:
    source, where = job.data.source, "data.source"
    built_in, named = source in _BUILT_IN_SOURCES, is_object(source)
    if built_in or named or not is_url(source):
        yield from _pointless(job, is_file=not (built_in or named))
    if built_in:
        return
    if named:
        yield from _object(source, where)
    else:
        yield from _file(job)


def _pointless(job: Job, *, is_file: bool) -> Iterator[Problem]:
    """Keys that say something about files, or about a filesystem, where there is none."""
    if job.data.storage:
        yield Problem("only a URL has storage options", "data.storage", f"data.source is '{job.data.source}'")
    if job.data.format != "auto" and not is_file:
        yield Problem("only a file or folder has a format", "data.format", f"data.source is '{job.data.source}'")


def _file(job: Job) -> Iterator[Problem]:
    """What is wrong with a source that is a path or URL, as far as its name and the local disk tell."""
    source, where = job.data.source, "data.source"
    path = Path(source).expanduser()
    format = format_of(source) if job.data.format == "auto" else job.data.format
    if not is_url(source) and not path.exists():
        yield no_such_source(source, _BUILT_IN_SOURCES, where)
    elif format is None and path.is_file():
        yield Problem(f"the ending of '{source}' tells no format", where, f"known: {KNOWN}; or set data.format")
    elif format is not None:
        yield from (replace(problem, where=where) for problem in missing_package(format))


def _object(spec: str, where: str) -> Iterator[Problem]:
    try:
        find_object(spec, where)
    except JobError as error:
        yield from error.problems


def _urls(job: Job) -> Iterator[Problem]:
    for where, text in (("data.source", job.data.source), ("checkpoint.to", job.checkpoint.to or "")):
        if is_url(text):
            yield from _protocols(text, where)


def _protocols(url: str, where: str) -> Iterator[Problem]:
    """Whether every filesystem that ``url`` goes through is known to fsspec, and installed."""
    registry: Any = importlib.import_module("fsspec.registry")  # it has no type stubs
    for link in url.split("::"):
        protocol = link.partition("://")[0]
        if protocol not in registry.available_protocols():
            yield Problem(f"unknown protocol '{protocol}://'", where, did_you_mean(protocol, ("file", "gs", "s3")))
        elif protocol in registry.known_implementations:
            package = registry.known_implementations[protocol]["class"].partition(".")[0]
            if importlib.util.find_spec(package) is None:
                extra = _EXTRAS.get(protocol)
                install = f"'dltrain[{extra}]'" if extra else package
                yield Problem(f"'{protocol}://' needs the package {package}", where, f"pip install {install}")


def _batch(job: Job, world: int) -> Iterator[Problem]:
    try:
        train = job.train
        microbatches_per_step(train.microbatches, global_batch=train.global_batch, world=world, parallel=job.parallel)
    except JobError as error:
        yield from error.problems


def check_nodes(nodes: int, recovery: RecoverySpec) -> Iterator[Problem]:
    """What is wrong with a start on ``nodes`` nodes where their number may change."""
    least, most = recovery.node_range or (nodes, nodes)
    if not least <= nodes <= most:
        what = f"the run is to start with {nodes} nodes, which is not within {recovery.nodes}"
        yield Problem(what, "recovery.nodes", f"resources.nodes may be {least} to {most}")


def _elastic(job: Job, ranks_per_node: int) -> Iterator[Problem]:
    """Whether a job whose number of nodes may change can be dealt to the most, and to those that it starts with."""
    if job.recovery.node_range is None:
        return
    try:
        legal = legal_nodes(job, ranks_per_node)
    except JobError as error:
        yield from error.problems
        return
    if job.resources.nodes not in legal:
        what = f"{job.resources.nodes} nodes cannot be dealt the microbatches of {job.recovery.node_range[1]}"
        could = " or ".join(map(str, legal))
        yield Problem(what, "recovery.nodes", f"{could} can; or set train.microbatches" if legal else "")


def _evaluation(job: Job) -> Iterator[Problem]:
    if job.train.evaluate_every is not None and job.data.split.val == 0:
        yield Problem("there is nothing to evaluate on", "train.evaluate_every", "data.split.val is 0")


def _watching(job: Job) -> Iterator[Problem]:
    """What waits for evaluations that never come, or for metrics that they never give."""
    train, kept = job.train, job.checkpoint.keep_best
    if train.early_stop.patience is not None:
        yield from _watched(job, "train.early_stop.patience", "train.early_stop.metric", train.early_stop.metric)
    if train.schedule.name == "plateau":
        yield from _watched(job, "train.schedule.name", "train.schedule.metric", train.schedule.metric)
    if kept is not None:
        yield from _watched(job, "checkpoint.keep_best", "checkpoint.keep_best", kept)


def _watched(job: Job, asked: str, named: str, metric: str) -> Iterator[Problem]:
    """What is wrong with watching ``metric``, for which the job's key ``asked``, and which its key ``named`` names."""
    if job.data.split.val == 0:
        yield Problem("there is no validation part to watch a metric on", asked, "data.split.val is 0")
    elif not metric.startswith("val/"):
        what = f"'{metric}' is no metric of the validation part"
        yield Problem(what, named, f"such as 'val/{metric.rpartition('/')[2]}'")


def _optimizers(job: Job) -> Iterator[Problem]:
    """Update rules that look at whole matrices, where ranks hold pieces of them."""
    if not job.parallel.cuts_weights:
        return
    named = [("train.optimizer.name", job.train.optimizer.name)]
    named += [(f"train.parts.{part}", job.train.optimizer_of(part).name) for part in job.train.parts]
    for where, name in named:
        if name in ("adafactor", "muon"):
            what = f"'{name}' needs whole matrices, and all of them, which this strategy shares out to the ranks"
            yield Problem(what, where, "adamw would do, or parallel.strategy: ddp without tensor and pipeline")


def _overflows(job: Job) -> Iterator[Problem]:
    """What an infinite gradient would spoil for good."""
    if job.parallel.compress != "powersgd":
        return
    if job.train.precision == "fp16":
        what = "PowerSGD would remember the infinite gradients of a step that float16 has to skip"
        yield Problem(what, "parallel.compress", "bf16 would do, or train.precision: bf16")
    elif job.train.nonfinite == "skip":
        what = "PowerSGD would remember the gradients of a step that is skipped since they are not finite"
        yield Problem(what, "parallel.compress", "bf16 would do, or train.nonfinite: stop")


def _extras(job: Job) -> Iterator[Problem]:
    if job.tracking.tensorboard and importlib.util.find_spec("tensorboard") is None:
        hint = "pip install 'dltrain[tensorboard]'"
        yield Problem("TensorBoard is not installed", "tracking.tensorboard", hint)

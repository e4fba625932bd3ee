"""The library way to launch: ``dltrain.launch(Job(...))`` for a job, :func:`launch_script` for a script."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Callable, Generator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint.export import export_weights
from ..checkpoint.reader import catalogue, open_manifest
from ..core.checks import check_job, check_nodes
from ..core.config import load_job
from ..core.elastic import legal_nodes
from ..core.errors import JobError, Problem, RunFailed
from ..core.formats import is_url
from ..core.job import CheckpointSpec, Job, Resources, TrackingSpec
from ..core.memory import remedies
from ..core.parallel import Parallel
from ..core.recovery import RecoverySpec
from ..tracking.wandb_mode import api_key_present, resolve_mode
from .auto import Choice, choose
from .carry import RunResult, Work, carry_out
from .cluster import ClusterError
from .demand import Demand, demand_here, demand_on
from .doctor import check_first
from .generation import Program
from .goodput import Goodput
from .hardware import Machines, machines_of
from .host import HostError
from .interrupt import StopRequests
from .messages import Target
from .resume import HeldLease, Start, checkpoint_url, decide_start, leased, open_storage
from .rundir import RunDir, check_parent
from .session import Options, Session
from .view import OutputRules, View, make_view
from .vitals import Vitals

_AS_OFTEN_AS_IT_TAKES = 2**31 - 1  # who reads it as a number gets one


def launch(
    job: Job | Mapping[str, Any] | None = None, *, options: Options | None = None, began: float | None = None
) -> RunResult:
    """Train a job on its nodes and wait for the end.

    Args:
        job: the job, or its dotted keys and values (``{"train.epochs": 3}``); None is the built-in digits job.
        options: how to launch.
        began: Unix time in seconds at which the command started, for the goodput; now if not given.

    Raises:
        JobError: the job or the request is wrong; nothing was trained.
        RunFailed: the run failed; the message and ``report`` say how.
        Interrupted: Ctrl-C, SIGTERM or a closed terminal; the same call goes on from the last checkpoint.
    """
    job = job if isinstance(job, Job) else load_job(None, flags=dict(job or {})).job
    options = options or Options()
    runs = Path(options.runs)
    demand = demand_here(job.resources, job.recovery.spares) if options.address is None else None
    _refuse(check_job(job, world=demand.world if demand else None))
    _check_tracking(job.tracking)
    check_parent(runs)
    goodput = Goodput(time.time() if began is None else began)
    notes: list[str] = []
    start = decide_start(job, runs=runs, resume=options.resume, init_from=options.init_from, on_message=notes.append)
    with contextlib.closing(start):
        view = make_view(script=False, rules=OutputRules(), quiet=options.quiet)
        sizes = partial(legal_nodes, job)
        with _session(options, job.resources, job.recovery, demand, view, sizes) as (session, stop):
            for note in notes:
                view.note(note)
            # of a strategy that is yet to be chosen there is nothing to be tried
            tried = job.model_copy(update={"parallel": Parallel()}) if job.parallel.is_open else job
            tried_data = tried.model_dump(mode="json")
            session.begin_check(tried_data)
            session.connect(view.phase)
            if demand is None:  # only now is the number of ranks known
                _refuse(check_job(job, world=job.resources.nodes * session.demand.ranks))
            session.place(view.phase)
            _refuse(session.check(tried_data))
            _preflight(session, job.checkpoint, job.tracking, runs, view)
            choice = _settle(job, start, session, view)
            job, session.sizes = choice.job, partial(legal_nodes, choice.job)
            data = job.model_dump(mode="json")
            run = start.open(job, runs, _yaml(data), choice.values)
            url = checkpoint_url(job, run)
            try:
                if not is_url(url):
                    session.check_shared(Path(url))
                with leased(open_storage(job, url), run, view.note) as lease:
                    work = _work(job, data, run, (url, *filter(None, [start.origin])), options, lease, session)
                    return carry_out(work, session, view, stop, goodput)
            except JobError:
                start.take_back()
                raise


def launch_script(
    target: Target,
    *,
    resources: Resources,
    recovery: RecoverySpec,
    tracking: TrackingSpec,
    options: Options,
    rules: OutputRules,
    logs: Path | None = None,
    role: str = "default",
    run_id: str | None = None,
) -> RunResult:
    """Run a torchrun-compatible program on every rank and wait for the end.

    Args:
        target: the program and its arguments.
        resources: nodes and ranks.
        recovery: restarts, of which "auto" means none here, and deadlines.
        tracking: where the rows of ``dltrain.context().log`` go.
        options: how to launch.
        rules: which output is shown.
        logs: parent of the ranks' logs; the run directory if not given.
        role: as ``ROLE_NAME`` tells the program.
        run_id: as ``TORCHELASTIC_RUN_ID`` tells the program.

    Raises: as :func:`launch`.
    """
    _check_tracking(tracking)
    runs = Path(options.runs)
    check_parent(runs)
    view = make_view(script=True, rules=rules, quiet=options.quiet)
    goodput = Goodput(time.time())
    recovery = recovery.for_script()
    name = script_name(target)
    _refuse(list(check_nodes(resources.nodes, recovery)))
    demand = demand_here(resources, recovery.spares) if options.address is None else None
    least, most = recovery.node_range or (resources.nodes, resources.nodes)
    sizes = tuple(range(least, most + 1))
    with _session(options, resources, recovery, demand, view, lambda _: sizes) as (session, stop):
        session.connect(view.phase)
        session.place(view.phase)
        _preflight(session, CheckpointSpec(), tracking, runs, view)
        with contextlib.closing(RunDir.create(runs, name, {})) as run:
            body = {
                "target": {"kind": target.kind, "name": target.name, "args": list(target.args)},
                "run_dir": str(run.path),
            }
            program = Program(
                kind="script",
                body=body,
                cwd=str(Path.cwd()),
                run_id=run_id or run.record.id,
                role=role,
                fresh=options.fresh or target.kind == "program",
                max_restarts=_number(recovery),
                cpus_per_rank=resources.cpus_per_rank,
            )
            work = Work(
                run=run,
                program=program,
                recovery=recovery,
                tracking=tracking,
                config={"script": str(target), "args": list(target.args)},
                logs=(logs / f"{name}-{run.number}").absolute() if logs else run.path / "logs",
                facts={"script": str(target)},
            )
            return carry_out(work, session, view, stop, goodput)


@contextlib.contextmanager
def _session(
    options: Options,
    resources: Resources,
    recovery: RecoverySpec,
    demand: Demand | None,
    view: View,
    sizes: Callable[[int], tuple[int, ...]],
) -> Generator[tuple[Session, StopRequests]]:
    """A session with Ctrl-C and its like turned into requests; infrastructure trouble is a failed run."""
    ask = partial(demand_on, spares=recovery.spares, sizes=sizes if recovery.node_range else lambda _: ())
    try:
        with StopRequests() as stop:
            session = Session(options, resources, recovery, stop, demand, ask=ask, sizes=sizes)
            with session:
                yield session, stop
    except (ClusterError, HostError) as error:
        raise RunFailed(str(error)) from error
    finally:
        view.close()


def _settle(job: Job, start: Start, session: Session, view: View) -> Choice:
    """The job with a strategy, chosen for the nodes where it names none."""

    def machines() -> Machines:
        view.phase("choosing a strategy")
        runs, none = str(Path(session.options.runs).absolute()), dict[str, object]()
        waiting_for = "looking at the nodes' memory"
        vitals: list[Vitals] = session.cluster.call("examine", runs, "", none, waiting_for=waiting_for)
        return machines_of(session.demand, session.cluster.nodes, vitals)

    choice = choose(
        job,
        demand=session.demand,
        before=start.chosen,
        machines=machines,
        target=session.options.job_words,
        meanwhile=session.stop.leave_if_asked,
    )
    if choice.why:
        view.note(choice.why)
    return choice


def _refuse(problems: list[Problem]) -> None:
    if problems:
        raise JobError(*problems)


def _preflight(session: Session, checkpoint: CheckpointSpec, tracking: TrackingSpec, runs: Path, view: View) -> None:
    if session.options.preflight:
        check_first(session.cluster, checkpoint=checkpoint, tracking=tracking, runs=runs, phase=view.phase)


def _check_tracking(tracking: TrackingSpec) -> None:
    """Refuse, before anything is started, what the trackers would refuse later."""
    resolve_mode(tracking.wandb.mode, api_key_present(), env_mode=os.environ.get("WANDB_MODE", ""))


def _work(
    job: Job,
    data: dict[str, Any],
    run: RunDir,
    urls: tuple[str, ...],
    options: Options,
    lease: HeldLease,
    session: Session,
) -> Work:
    """The job as a run to carry out; its checkpoints go to the first of ``urls``."""
    program = Program(
        kind="worker",
        body={
            "job": data,
            "run_dir": str(run.path),
            "checkpoint_url": urls[0],
            "restore_urls": list(urls),
            "tracking": {"wandb_run_id": run.record.id},
            "lease": lease.token,
            "init_from": run.record.init,
        },
        cwd=str(Path.cwd()),
        run_id=run.record.id,
        fresh=options.fresh,
        max_restarts=_number(job.recovery),
        cpus_per_rank=job.resources.cpus_per_rank,
        remedies=tuple(remedies(job)),
    )
    return Work(
        run=run,
        program=program,
        recovery=job.recovery,
        tracking=job.tracking,
        config=data,
        logs=run.path / "logs",
        facts={
            "recipe": job.recipe,
            "data": job.data.source,
            "ranks": f"{session.demand.nodes} nodes × {session.demand.ranks}",
        },
        again="without '--resume never' it" if options.resume == "never" else "the same command",
        fence=lease.fence,
        after=lambda: _export(job, urls[0], run),
    )


def _number(recovery: RecoverySpec) -> int:
    """The restarts that are allowed, as torchrun's environment tells them."""
    return _AS_OFTEN_AS_IT_TAKES if recovery.max_restarts == "auto" else recovery.max_restarts


def _export(job: Job, url: str, run: RunDir) -> None:
    """Write the last checkpoint's weights as one safetensors file.

    Raises:
        RunFailed: it could not be read, or the file not be written.
    """
    try:
        storage = open_storage(job, url)
        newest = catalogue(storage)[0]
        export_weights(storage, open_manifest(storage, newest.step), run.path / "weights.safetensors")
    except (OSError, JobError) as error:
        what = f"training is complete, but its weights could not be written: {error}"
        raise RunFailed(f"{what}; the last checkpoint is in {url}") from error


def script_name(target: Target) -> str:
    """The script's name as the name of its runs."""
    stem = target.name.rpartition(".")[2] if target.kind == "module" else Path(target.name).stem
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in stem).lstrip("._-") or "script"


def _yaml(data: dict[str, Any]) -> str:
    from ruamel.yaml import YAML

    out = io.StringIO()
    YAML().dump(data, out)  # pyright: ignore[reportUnknownMemberType]  # ruamel.yaml is partly typed
    return out.getvalue()

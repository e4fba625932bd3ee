"""The rank program: train a job's recipe. No Ray in it.

    torchrun --nproc-per-node 4 -m dltrain.training.worker job.yaml [key.path=value …] [--init-from URL]

runs it under plain torchrun; ``dltrain launch`` calls :func:`run_ranked` in ranks that it has forked.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..checkpoint.lease import release, take, torchrun_owner
from ..checkpoint.locate import choose, locate
from ..core.config import load_job
from ..core.errors import JobError, NonFiniteLoss, Problem
from ..core.formats import is_url
from ..core.job import Job
from ..core.pulse import Pulse
from ..core.storage import Storage
from ..core.wire import Channel
from .connections import is_broken_connection
from .context import Context, adopt, context
from .hold import Given, Hold, images_of
from .loop import Remembered, Trainer
from .memory import Memory
from .numerics import make_reproducible
from .persistence import Persister
from .reporter import ChannelReporter, Reporter, StandaloneReporter
from .scarcity import go_first, out_of_memory


@dataclass(frozen=True)
class Assignment:
    """What the launcher tells a rank beside the environment: the job, and where its files are."""

    job: Job
    run_dir: Path
    checkpoint_url: str
    restore_urls: tuple[str, ...]
    tracking: dict[str, Any]
    lease: str
    """The token of this run's lease on the checkpoints."""
    init_from: str = ""
    """Folder of checkpoints to take the weights from where there is nothing to restore; or empty."""
    generation: int = 0
    """Number of this start of all ranks."""
    saved: int = -1
    """Step of the run's newest checkpoint, as far as is known."""
    interrupted: bool = False
    """A checkpoint was being written when the ranks before were lost."""
    copies: bool = False
    """Other nodes are to have copies of snapshots."""


def run_ranked(
    body: dict[str, Any], *, channel: Channel, pulse: Pulse, news: socket.socket, memory: socket.socket
) -> int:
    """Train as one rank of ``dltrain launch``; the exit code. Failures are told before they end the rank.

    ``news`` is the persister's socket to the agent, ``memory`` the one over which the agent holds on to snapshots.
    """
    persister = Persister(news)  # before this process has threads
    go_first()  # and not the persister, which has what was trained
    ctx = adopt(channel=channel, pulse=pulse, run_dir=body["run_dir"])
    reporter = ChannelReporter(channel)
    sys.path.insert(0, str(Path.cwd()))
    job: Job | None = None
    try:
        job = Job.model_validate(body["job"])
        assignment = Assignment(
            job=job,
            run_dir=Path(body["run_dir"]),
            checkpoint_url=body["checkpoint_url"],
            restore_urls=tuple(body["restore_urls"]),
            tracking=body["tracking"],
            lease=body["lease"],
            init_from=body["init_from"],
            generation=body["generation"],
            saved=body["saved"],
            interrupted=body["interrupted"],
            copies=body["copies"],
        )
        _train(assignment, ctx, persister, reporter, pulse, Hold(memory))
        reporter.send("done")
    except JobError as error:
        if pulse.step >= 0:
            return _fail(error, reporter, pulse, job, ctx)
        problems = [{"what": p.what, "where": p.where, "hint": p.hint} for p in error.problems]
        reporter.send("refused", problems=problems)
        return 2
    except BaseException as error:  # the rank's last word, whatever it was
        return _fail(error, reporter, pulse, job, ctx)
    finally:
        reporter.close(10)
    return 0


def _fail(error: BaseException, reporter: Reporter, pulse: Pulse, job: Job | None, ctx: Context) -> int:
    """Tell of the exception that is being handled, then print it; the exit code."""
    beat = pulse.read()
    text = traceback.format_exc()
    scarce = out_of_memory(error, job, ctx.device) if job is not None else None
    reporter.send(
        "failed",
        error=type(error).__name__,
        what=str(error) if scarce is None else scarce.what,
        hints=[] if scarce is None else scarce.hints,
        traceback=text,
        final=isinstance(error, NonFiniteLoss),
        witness=error.witness if isinstance(error, NonFiniteLoss) else is_broken_connection(error),
        details={"samples": error.samples} if isinstance(error, NonFiniteLoss) else {},
        step=beat.step,
        phase=beat.phase,
        at=time.time(),
    )
    reporter.close(10)
    sys.stderr.write(text)
    return 1


def _train(
    assignment: Assignment,
    ctx: Context,
    persister: Persister,
    reporter: Reporter,
    pulse: Pulse,
    hold: Hold | None = None,
) -> None:
    for signum in (signal.SIGTERM, signal.SIGINT):  # the launcher sends none: they tell that the node is taken away
        signal.signal(signum, lambda number, _: reporter.preempt(signal.Signals(number).name))
    pulse.mark("setup")
    if assignment.job.numerics == "reproducible":
        make_reproducible()
    device = _device(ctx)
    if ctx.world_size > 1:
        # CPU collectives carry control messages beside NCCL's gradients
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    spec, url = assignment.job.checkpoint, assignment.checkpoint_url
    lease = assignment.lease if ctx.rank == 0 else ""
    best = {"metric": spec.keep_best, "goal": spec.keep_best_goal}
    persister.open(url=url, options=spec.options, rank=ctx.rank, keep=spec.keep, best=best, lease=lease)
    given = hold.given() if hold is not None else []
    keeper = hold if assignment.job.recovery.snapshot != "never" else None
    generation, copies = assignment.generation, assignment.copies
    memory = Memory(assignment.job, ctx, hold=keeper, generation=generation, copies=copies)
    memory.adopt(given)
    trainer = Trainer(
        assignment.job,
        ctx=ctx,
        device=device,
        storage=Storage(url, spec.options),
        persister=persister,
        memory=memory,
        reporter=reporter,
        pulse=pulse,
    )
    trainer.run(
        restore_urls=assignment.restore_urls,
        tracking=assignment.tracking,
        init_from=assignment.init_from,
        remembered=_remembered(given, assignment),
    )
    if ctx.world_size > 1:
        dist.barrier()  # nobody leaves while another still needs it
    pulse.mark("end")


def _remembered(given: list[Given], assignment: Assignment) -> Remembered | None:
    """What the agent has handed over to go on from; its descriptors are closed, except those of this rank's memory."""
    images = images_of(given)
    for item in given:
        if not item.mine:
            os.close(item.fd)
    return None if images is None else Remembered(images, assignment.saved, assignment.interrupted)


def _device(ctx: Context) -> torch.device:
    device = ctx.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def main(argv: list[str]) -> int:
    """Entry under torchrun; arguments are those of ``dltrain launch``: a job file, overrides and ``--init-from``."""
    parser = argparse.ArgumentParser(prog="dltrain.training.worker", allow_abbrev=False)
    parser.add_argument("words", nargs="*", metavar="FILE|KEY=VALUE", help="a job file, and overrides")
    parser.add_argument("--init-from", metavar="URL", help="take the first weights from these checkpoints")
    given = parser.parse_intermixed_args(argv)
    files = [word for word in given.words if "=" not in word]
    if len(files) > 1:
        parser.error(f"one job file, not {len(files)}: {' '.join(files)}")
    ctx = context()
    persister = Persister()  # before this process has threads
    try:
        overrides = [word for word in given.words if "=" in word]
        job = load_job(Path(files[0]) if files else None, overrides, {}, os.environ).job
        run_dir = Path("runs", job.name, "torchrun")
        run_dir.mkdir(parents=True, exist_ok=True)
        ctx.run_dir = run_dir
        reporter = StandaloneReporter(rank=ctx.rank, world=ctx.world_size, run_dir=run_dir)
        url = job.checkpoint.to or str(run_dir.absolute() / "checkpoints")
        init = _weights_folder(given.init_from, job) if given.init_from else ""
        with _leased(url, job) if ctx.rank == 0 else nullcontext("") as lease:
            assignment = Assignment(job, run_dir, url, restore_urls=(url,), tracking={}, lease=lease, init_from=init)
            _train(assignment, ctx, persister, reporter, Pulse.create())
    except JobError as error:
        print(error, file=sys.stderr)  # noqa: T201  # the user typed this command
        return 2
    reporter.close(10)
    return 0


def _weights_folder(named: str, job: Job) -> str:
    """The folder of checkpoints that a run directory, a folder or a URL means.

    Raises:
        JobError: there is no complete checkpoint.
    """
    place = locate(named, job.checkpoint.options if is_url(named) else None)
    choose(place)
    if place.named is not None:
        raise JobError(Problem("this is one checkpoint", "--init-from", f"name {place.storage}: its newest is taken"))
    return str(place.storage)


@contextmanager
def _leased(url: str, job: Job) -> Generator[str]:
    """Hold the lease of the checkpoints; its token."""
    storage = Storage(url, job.checkpoint.options)
    run, pid = torchrun_owner()
    token = take(storage, run, pid=pid, on_message=partial(print, flush=True), where="checkpoint.to")
    try:
        yield token
    finally:
        with suppress(OSError):
            release(storage, token)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # interpreter teardown can hang in gloo's threads

"""``dltrain status``, ``logs`` and ``stop``: runs looked at, and ended, from another shell."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..launcher.logs import Logs, Pick
from ..launcher.runs import RunStatus, find_run, look, stop_run
from ..launcher.view import duration
from .summary import shown

_CODES = {"running": 0, "finished": 0, "failed": 1, "died": 1, "stopped": 3}


def show_status(run: str | None, runs: Path, *, as_json: bool) -> int:
    """Print how a run stands; 0 if it is running or finished, 1 if it failed or died, 3 if it is stopped.

    Raises:
        JobError: there is no such run.
    """
    status = look(find_run(runs, run))
    if as_json:
        sys.stdout.write(json.dumps(status.to_json(), indent=2) + "\n")
    else:
        rows = _rows(status)
        width = max(len(name) for name, _ in rows)
        sys.stdout.write("".join(f"{name:<{width}}  {text}\n" for name, text in rows))
    return _CODES[status.state]


def _rows(status: RunStatus) -> list[tuple[str, str]]:
    state = {"died": "died: its driver is gone without a word"}.get(status.state, status.state)
    if status.state == "running" and status.stop_requests:
        state += ", asked to stop"
    rows = [(status.name, state + (f" ({status.phase})" if status.phase else ""))]
    rows.append(("step", f"{status.step} of {status.total_steps}" if status.total_steps else str(status.step)))
    losses = [f"{name} {value:.4g}" for name, value in status.metrics.items() if _is_loss(name, value)]
    if losses:
        rows.append(("loss", "  ".join(losses)))
    if status.world:
        nodes = f"{len(status.nodes)} nodes: {', '.join(dict.fromkeys(status.nodes))}"
        rows.append(("ranks", f"{status.world} on {nodes}"))
    rows += [(f"  rank {r['rank']}", _place(r)) for r in status.ranks]
    restarts = f", {status.restarts} restarts since the last launch" if status.restarts else ""
    rows.append(("generation", f"{status.generation}{restarts}" if status.generation >= 0 else "none yet"))
    if status.checkpoint is not None:
        rows.append(("checkpoint", f"step {status.checkpoint}"))
    if status.seconds:
        spent = ", ".join(f"{name} {duration(seconds)}" for name, seconds in status.seconds.items())
        rows.append(("goodput", f"{status.goodput:.0%} ({spent})"))
    if status.pid:
        heard = f", heard of {duration(status.heard)} ago" if status.heard is not None else ""
        living = heard if status.state == "running" else ""
        rows.append(("driver", f"process {status.pid} on {status.host}{living}"))
    rows.append(("run", str(shown(status.run))))
    return rows


def _is_loss(name: str, value: object) -> bool:
    return name.endswith("loss") and isinstance(value, (int, float))


def _place(rank: Mapping[str, Any]) -> str:
    step = f"step {rank['step']}" if rank["step"] >= 0 else "before the first step"
    return f"node {rank['node']}, {step}, in {rank['phase']} for {rank['seconds']} s"


def show_logs(run: str | None, runs: Path, *, pick: Pick, follow: bool) -> int:
    """Print what a run's ranks printed; 130 when Ctrl-C ended it.

    Raises:
        JobError: there is no such run.
    """
    logs = Logs(find_run(runs, run), pick)
    out = sys.stdout.buffer
    try:
        for line in logs.follow() if follow else logs.read():
            out.write(line)
            out.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough; Python would complain once more when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def ask_to_stop(run: str | None, runs: Path, *, now: bool) -> int:
    """Have a run end, and say how it did; 0 when it is not running any more, also when it was not before.

    Raises:
        JobError: there is no such run, or its driver is on another machine.
        RunFailed: it did not end in time.
    """
    status = stop_run(find_run(runs, run), now=now, say=_say)
    _say(f"{status.name}: {status.state} after step {status.step}")
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()

"""Where am I: the rank's view of the job, for recipes and for scripts.

    ctx = dltrain.context()
    ctx.log({"loss": 0.1}, step=7)

Inside ``dltrain launch`` metrics reach the run directory and the trackers. Under ``torchrun`` or plain ``python`` the
same script works, and ``log`` does nothing.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.pulse import Pulse
from ..core.wire import Channel

if TYPE_CHECKING:
    import torch


@dataclass
class Context:
    """This process among the ranks, read from torchrun's environment variables.

    Attributes:
        rank: index among all ranks.
        local_rank: index among the ranks of this node; also the index of its GPU.
        world_size: number of ranks.
        local_world_size: number of ranks on this node.
        node_rank: index of this node.
        restart: how often the ranks have been started again.
        run_dir: the run's folder on the launching machine; None outside ``dltrain launch``.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int
    restart: int
    run_dir: Path | None
    channel: Channel | None = field(default=None, repr=False)
    pulse: Pulse | None = field(default=None, repr=False)
    _last_step: int = field(default=-1, repr=False)

    @property
    def device(self) -> torch.device:
        """The GPU of this local rank, else the CPU."""
        import torch

        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def launched(self) -> bool:
        """Whether ``dltrain launch`` is listening."""
        return self.channel is not None

    def log(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Add a row to the run's metrics. Never blocks. Only rank 0's rows count, so every rank may call it.

        Args:
            metrics: numbers (or one-element tensors) by name, such as ``{"train/loss": 0.1}``.
            step: the optimizer step; the default counts the calls. Steps must rise; a repeated one is left out.

        Raises:
            TypeError: a value is no number, or the step no whole one.
        """
        self._last_step = operator.index(step) if step is not None else self._last_step + 1
        if self.channel is None or self.rank != 0:
            return
        row = {name: _number(name, value) for name, value in metrics.items()}
        self.channel.send({"t": "log", "step": self._last_step, "metrics": row})
        if self.pulse is not None:
            self.pulse.mark("user", self._last_step)


def _number(name: str, value: Any) -> float:
    try:
        return float(value.item() if hasattr(value, "item") else value)  # float() of a tensor with a gradient warns
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"metric {name!r} must be a number, not {type(value).__name__}") from None


def from_environment(environ: Mapping[str, str]) -> Context:
    """The context that torchrun's variables describe; one rank alone when there are none."""

    def number(name: str, default: int) -> int:
        return int(environ.get(name, default))

    world = number("WORLD_SIZE", 1)
    return Context(
        rank=number("RANK", 0),
        local_rank=number("LOCAL_RANK", 0),
        world_size=world,
        local_world_size=number("LOCAL_WORLD_SIZE", world),
        node_rank=number("GROUP_RANK", 0),
        restart=number("TORCHELASTIC_RESTART_COUNT", 0),
        run_dir=None,
    )


class _Here:
    """The one context of this process: a process is one rank for its whole life."""

    context: Context | None = None


def context() -> Context:
    """This process's context. Cheap; call it anywhere."""
    if _Here.context is None:
        _Here.context = from_environment(os.environ)
    return _Here.context


def adopt(*, channel: Channel, pulse: Pulse, run_dir: str) -> Context:
    """Connect this process's context to its node agent. For the launcher, before user code runs."""
    ctx = context()
    ctx.channel, ctx.pulse, ctx.run_dir = channel, pulse, Path(run_dir)
    return ctx

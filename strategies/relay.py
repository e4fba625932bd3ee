"""What passes from one stage of a pipeline to the next beside the values: their form, and the random numbers' state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8)
_DTYPES += (torch.int8, torch.int16, torch.bool)
_AXES = 12


@dataclass(frozen=True)
class Form:
    """What a tensor looks like before it is there."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    has_gradient: bool

    @classmethod
    def of(cls, value: Tensor) -> Form:
        return cls(tuple(value.shape), value.dtype, value.requires_grad)

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=device)


def generator_states(device: torch.device) -> list[Tensor]:
    """Of torch's default generators: the host's, and ``device``'s where that is a GPU. uint8, in host memory."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_generators(states: Sequence[Tensor], device: torch.device) -> None:
    """Put the generators where they were when :func:`generator_states` gave ``states``."""
    host, *others = states
    torch.set_rng_state(host)
    for state in others:
        torch.cuda.set_rng_state(state, device)


class Notes:
    """Small messages in host memory, each of the same length: a :class:`Form`, and the generators' states.

    In one process the forward pass of a microbatch draws its random numbers one after another. So each stage goes on
    where the one before has stopped.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None) -> None:
        self._device, self._group = device, group
        self._states = [len(state) for state in generator_states(device)]

    def send(self, form: Form, peer: int, tag: int) -> dist.Work:
        """Tell rank ``peer`` of the group of a tensor to come, and of the generators as they are now."""
        return _started(dist.isend(self.write(form), group=self._group, group_dst=peer, tag=tag))

    def write(self, form: Form) -> Tensor:
        """What :meth:`send` sends."""
        if len(form.shape) > _AXES or form.dtype not in _DTYPES:
            what = f"{form.dtype} with {len(form.shape)} axes"
            raise TypeError(f"a pipeline's stages cannot send each other a tensor of {what}")
        head = [_DTYPES.index(form.dtype), int(form.has_gradient), len(form.shape), *form.shape]
        head += [0] * (3 + _AXES - len(head))
        return torch.cat([torch.tensor(head).view(torch.uint8), *generator_states(self._device)])

    def receive(self, peer: int, tag: int) -> Note:
        """Begin to wait for what ``peer`` sends."""
        content = torch.empty(8 * (3 + _AXES) + sum(self._states), dtype=torch.uint8)
        work = _started(dist.irecv(content, group=self._group, group_src=peer, tag=tag))
        return Note(content, work, self._states, self._device)


class Note:
    """A message that may still be on its way. Reading it waits for it."""

    def __init__(self, content: Tensor, work: dist.Work, states: list[int], device: torch.device) -> None:
        self._content, self._work, self._states, self._device = content, work, states, device
        self._here = False

    def _wait(self) -> Tensor:
        if not self._here:
            self._work.wait()
            self._here = True
        return self._content

    def form(self) -> Form:
        dtype, gradient, axes, *shape = self._wait()[: 8 * (3 + _AXES)].view(torch.int64).tolist()
        return Form(tuple(shape[:axes]), _DTYPES[dtype], bool(gradient))

    def seed(self) -> None:
        """Put the generators where the sender's were."""
        set_generators([state.clone() for state in self._wait()[8 * (3 + _AXES) :].split(self._states)], self._device)


class _Left(BaseException):
    """Ends a recipe's function where the rest of it is another stage's. No user code is to catch it."""


class _StandIn(nn.Module):
    """In the place of a part: what the recipe calls computes one stage only."""

    def __init__(self, compute: Callable[..., Tensor], *, last: bool, training: bool) -> None:
        super().__init__()
        self._compute, self._last = compute, last
        self.training = training
        self.called = False

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        if self.called:
            raise RuntimeError("in a pipeline, a recipe's function can call its part only once")
        self.called = True
        value = self._compute(*inputs, **named)
        if not self._last:
            raise _Left
        return value

    def _refuse(self, *args: Any, **options: Any) -> Any:
        raise RuntimeError("in a pipeline, a recipe's function can only call its part: its weights are on other ranks")

    named_parameters = named_buffers = named_modules = named_children = state_dict = _refuse


def as_called(
    part: str,
    compute: Callable[..., Tensor],
    use: Callable[[Mapping[str, nn.Module]], T],
    *,
    last: bool,
    training: bool,
) -> T | None:
    """Call ``use``, a recipe's function of its parts, with ``compute`` in the place of ``part``.

    What ``compute`` is called with are the part's inputs. Only in the ``last`` stage does the function go on with what
    it returns, and is its result returned; and wherever it does not call the part at all.
    """
    try:
        return use({part: _StandIn(compute, last=last, training=training)})
    except _Left:
        return None


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank is not in the group"
    return work

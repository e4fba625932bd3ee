"""One stage of a pipeline, as torch's schedules drive it: forward and backward of a microbatch, and what is sent.

GPipe (Huang et al. 2019), 1F1B (Narayanan et al. 2019, "PipeDream"; as a flush schedule in Narayanan et al. 2021), and
interleaved stages (Narayanan et al. 2021, "Efficient large-scale language model training on GPU clusters").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.stage import _PipelineStageBase  # pyright: ignore[reportPrivateUsage]  # torch's own stages take one shape only

from ..core.contracts import Batch
from ..core.parallel import Parallel
from .finite import beginning
from .passes import Passes
from .relay import Form, Note, Notes, as_called
from .spread import Spread

Schedule = ScheduleGPipe | Schedule1F1B | ScheduleInterleaved1F1B


@dataclass(frozen=True)
class Spot:
    """Where a stage stands.

    Attributes:
        index: which of the stages it is.
        stages: how many there are.
        group: the ranks of the pipeline; stage ``i`` is on its rank ``i`` modulo their number.
        device: where its values lie.
    """

    index: int
    stages: int
    group: dist.ProcessGroup
    device: torch.device


class Piped(_PipelineStageBase):
    """A stage whose values may be of another shape in each microbatch.

    The form of what it receives is told by its sender in the first microbatch of its kind, and remembered: it depends
    on the shapes of the batch's fields alone.

    Args:
        part: the name of the part that it is a stage of.
        spread: the stage's module, under its data-parallel strategy.

    Attributes:
        losses: of the last stage: by microbatch, this rank's share of the step's mean loss.
    """

    def __init__(self, passes: Passes, part: str, spread: Spread, spot: Spot) -> None:
        super().__init__(nn.Module(), spot.index, spot.stages, spot.device, spot.group)  # schedules look into no module
        self.spread = spread
        self.losses: dict[int, Tensor] = {}
        self._passes, self._part = passes, part
        self._batches: Sequence[Batch] = ()
        self._factor = 1.0
        self._pipe, self._notes = spot.group, Notes(spot.device, spot.group)
        self._before = (spot.index - 1) % self.group_size
        self._after = (spot.index + 1) % self.group_size
        self._came: dict[object, Form] = {}
        self._went: dict[object, Form] = {}
        self._incoming: dict[int, tuple[Note, Tensor]] = {}
        self._computed: dict[int, tuple[Tensor | None, Tensor]] = {}
        self._grads: dict[int, Tensor] = {}
        self._sent: list[dist.Work] = []
        self._done = 0
        self.args_recv_info = {0: ()}

    def begin(self, microbatches: Sequence[Batch], factor: float) -> None:
        """Before the schedule goes through ``microbatches``, whose losses are multiplied by ``factor``."""
        self._batches, self._factor, self._done, self.losses = microbatches, factor, 0, {}

    def end(self) -> None:
        """When the schedule has gone through them: wait for what was sent."""
        while self._sent:
            self._sent.pop().wait()
        self._batches = ()
        self.spread.rest()

    # What schedules call: first the receive operations, then forward or backward, then the send operations.

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_first:
            return []
        note, value = self._expect(self._batches[fwd_chunk_id])
        self._incoming[fwd_chunk_id] = note, value
        return [self._operation(dist.irecv, value, self._before, _VALUE, self.stage_index)]

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Tensor:
        """The value for the next stage; of the last stage the microbatch's mean loss."""
        batch, passes = self._batches[fwd_chunk_id], self._passes
        note, value = self._incoming.pop(fwd_chunk_id, (None, None))
        outputs: list[Tensor] = []

        def compute(*inputs: Any, **named: Any) -> Tensor:
            if note is not None and value is not None:
                note.seed()
                inputs, named = (value.requires_grad_(self._known(batch).has_gradient),), {}
            outputs.append(self.spread.trained(*inputs, **named))
            return outputs[0]

        passes.reseed(batch.step, batch.index, 0)
        passes.mark("forward")
        with passes.precision():
            loss = as_called(
                self._part,
                compute,
                lambda parts: passes.recipe.loss(self._part, parts, batch),
                last=self.is_last,
                training=True,
            )
        if not outputs:
            raise RuntimeError(f"the loss of part '{self._part}' does not call it, and so cannot be pipelined")
        output = outputs[0] if loss is None else loss
        self._computed[fwd_chunk_id] = value, output
        if not self.is_last:
            self._tell(batch, Form.of(output))
        return output

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_last:
            return []
        _, output = self._computed[fwd_chunk_id]
        return [self._operation(dist.isend, output.detach(), self._after, _VALUE, self.stage_index + 1)]

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        _, output = self._computed[bwd_chunk_id]
        if self.is_last or not output.requires_grad:
            return []
        self._grads[bwd_chunk_id] = grad = torch.empty_like(output)
        return [self._operation(dist.irecv, grad, self._after, _GRADIENT, self.stage_index + 1)]

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        batch, passes = self._batches[bwd_chunk_id], self._passes
        value, output = self._computed.pop(bwd_chunk_id)
        grad = self._grads.pop(bwd_chunk_id, None)
        passes.mark("backward")
        self._done += 1
        with self.spread.reducing(self._done == len(self._batches)):
            if self.is_last:
                output = output.float()  # a float16 may not hold the factor
                output.backward(beginning(output, batch.weight * passes.ranks * self._factor))
                self.losses[batch.index] = output.detach() * (batch.weight if passes.counts else 0.0)
            elif grad is not None:
                output.backward(grad)
        if value is not None and value.requires_grad:
            self._grads[bwd_chunk_id] = torch.zeros_like(value) if value.grad is None else value.grad

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        grad = self._grads.pop(bwd_chunk_id, None)
        if self.is_first or grad is None:
            return []
        return [self._operation(dist.isend, grad.contiguous(), self._before, _GRADIENT, self.stage_index)]

    def evaluate(self, batch: Batch, use: Callable[[Mapping[str, nn.Module]], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``use``, a recipe's function of its parts, returns: in the last stage; nothing in others."""

        def compute(*inputs: Any, **named: Any) -> Tensor:
            if not self.is_first:
                note, value = self._expect(batch)
                self._start(self._operation(dist.irecv, value, self._before, _VALUE, self.stage_index)).wait()
                note.seed()
                inputs, named = (value,), {}
            output = self.spread.helping(*inputs, **named)
            if not self.is_last:
                while len(self._sent) > _AHEAD:
                    self._sent.pop(0).wait()
                self._tell(batch, Form.of(output))
                self._sent.append(
                    self._start(self._operation(dist.isend, output, self._after, _VALUE, self.stage_index + 1))
                )
            return output

        return as_called(self._part, compute, use, last=self.is_last, training=False) or {}

    def _expect(self, batch: Batch) -> tuple[Note, Tensor]:
        """The note that comes with ``batch``, and memory for the value that it tells of."""
        note = self._notes.receive(self._before, self._tag(_NOTE, self.stage_index))
        form = self._came.get(_kind(batch))
        if form is None:
            form = self._came[_kind(batch)] = note.form()
        return note, form.empty(self.device)

    def _known(self, batch: Batch) -> Form:
        return self._came[_kind(batch)]

    def _tell(self, batch: Batch, form: Form) -> None:
        known = self._went.setdefault(_kind(batch), form)
        if known != form:
            what = f"{list(known.shape)}, then {list(form.shape)}"
            raise RuntimeError(f"what a pipeline's stages send must depend on the shapes of a batch alone: {what}")
        self._sent.append(self._notes.send(form, self._after, self._tag(_NOTE, self.stage_index + 1)))

    def _operation(self, op: Callable[..., Any], tensor: Tensor, peer: int, kind: int, boundary: int) -> dist.P2POp:
        return dist.P2POp(op, tensor, group=self._pipe, group_peer=peer, tag=self._tag(kind, boundary))

    @staticmethod
    def _start(operation: dist.P2POp) -> dist.Work:
        key = "group_dst" if operation.op is dist.isend else "group_src"
        peer = {key: operation.group_peer}
        return operation.op(operation.tensor, group=operation.group, tag=operation.tag, **peer)

    @staticmethod
    def _tag(kind: int, boundary: int) -> int:
        return 3 * boundary + kind

    # What torch's own stages do before the first step: find out shapes, allocate for all microbatches.

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: forms are told as microbatches come."""

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, as above."""

    def _create_grad_recv_info(self, act_send_info: dict[Any, Any]) -> tuple[Any, ...]:
        return ()


_NOTE, _VALUE, _GRADIENT = range(3)
_AHEAD = 8  # messages that a stage may be ahead of the next one in an evaluation


def _kind(batch: Batch) -> object:
    """What the form of values depends on."""
    shapes = tuple((name, field.shape, field.dtype) for name, field in sorted(batch.fields.items()))
    return torch.is_grad_enabled(), shapes


def schedule(parallel: Parallel, stages: Sequence[Piped], microbatches: int) -> Schedule:
    """The order in which a rank goes through the ``microbatches`` of a step with its ``stages``."""
    match parallel.pipeline_schedule:
        case "gpipe":
            return ScheduleGPipe(stages[0], microbatches, loss_fn=_computed_already, scale_grads=False)
        case "1f1b":
            return Schedule1F1B(stages[0], microbatches, loss_fn=_computed_already, scale_grads=False)
        case "interleaved":
            return ScheduleInterleaved1F1B(list(stages), microbatches, loss_fn=_computed_already, scale_grads=False)


def _computed_already(output: Tensor, target: Tensor) -> Tensor:
    """The loss is what the last stage returns: the recipe computes it from more than the last module's output."""
    return output

"""One rank's build, step and evaluation on tensors without memory, with the books open."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.distributed.fake_pg import FakeStore

from ..core.contracts import Batch, DrawsSamples, Engine, Recipe
from ..core.job import Job
from ..core.parallel import microbatches_per_step
from ..strategies.attention import Fused
from ..strategies.bucketing import Bucketed
from ..strategies.build import assemble, autocast
from ..strategies.ledger import KINDS, Ledger, Section
from ..strategies.relay import Form, Notes
from ..strategies.shallow import without_memory
from ..strategies.stages import divide
from .standin import Course, Setting, StandIn


def follow(recipe: Recipe, modules: Mapping[str, nn.Module], world: StandIn) -> Course:
    """Build the engine and make a step and an evaluation, with the books open."""
    job = _without_compiler(world.job)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        copies = without_memory(modules)
    run = _Run(job, recipe, world.setting, fake, copies)
    with _process_group(world.setting), _own_linear(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return world.renamed(run.course())


class _Run:
    """One dry run."""

    def __init__(
        self, job: Job, recipe: Recipe, setting: Setting, fake: FakeTensorMode, modules: Mapping[str, nn.Module]
    ) -> None:
        self._job, self._recipe, self._setting, self._fake, self._modules = job, recipe, setting, fake, modules
        gpu = setting.device.gpu
        world, parallel, train = setting.world, job.parallel, job.train
        self._count = microbatches_per_step(
            train.microbatches, global_batch=train.global_batch, world=world, parallel=parallel
        )
        self._own = self._count // parallel.axes(world)["data"]
        self._samples = -(-train.global_batch // self._count)
        most = 3 if parallel.pipeline == 1 else 2 * parallel.pipeline
        if parallel.pipeline_schedule == "1f1b" and parallel.pipeline > 1:
            most = parallel.pipeline + 2  # a stage has no more than its pipeline's length under way
        if parallel.pipeline_schedule == "gpipe" and parallel.pipeline > 1:
            most = self._own  # all of them are under way at once
        self._followed = min(self._own, most)
        if parallel.pipeline > 1:  # whose schedule is made for so many
            data = parallel.axes(world)["data"]
            fewer = {"microbatches": self._followed * data, "global_batch": self._samples * self._followed * data}
            self._job = job.model_copy(update={"train": train.model_copy(update=fewer)})
        self._forms: list[Form] = []
        self._evaluated: list[Form] = []
        self._ledger = Ledger(setting.device.rates, per_node=setting.per_node, gloo=not gpu, deliver=self._deliver)
        self._times: list[float] = []
        self._repeat = 1.0

    def course(self) -> Course:
        setting, ledger, fake = self._setting, self._ledger, self._fake
        with fake:
            batches = [self._batch(self._samples, index) for index in range(self._followed)]
            evaluated = self._batch(setting.evaluated, 0) if setting.evaluated else None
            if self._job.parallel.pipeline > 1:
                self._forms = self._told(batches[0], self._recipe.loss)
                if evaluated is not None:
                    self._evaluated = self._told(evaluated, lambda _, *given: self._recipe.metrics(*given))
        device = torch.device("cpu")  # fake GPUs need a build of torch that has them
        self._place()
        attention = Fused(setting.device.fused, setting.device.grouped) if setting.device.gpu else nullcontext()
        with fake, ledger, attention, self._optimizers():
            engine = assemble(
                self._job,
                self._recipe,
                self._modules,
                rank=setting.rank,
                world=setting.world,
                device=device,
                reseed=self._reseed,
                mark=self._mark,
                ddp=Bucketed,
            )
            self._label()
            ledger.see(tensor for batch in batches for tensor in batch.fields.values())
            begin = 0
            steps = 2 if self._job.parallel.strategy == "zero3" else 1  # it learns in the first what to gather ahead
            for step in range(steps):
                self._mark("between")
                begin = len(ledger.sections)
                engine.step([Batch(b.fields, step, b.index, b.weight) for b in batches], 1.0)
            self._mark("between")
            end, held = len(ledger.sections), [float(ledger.now[kind]) for kind in KINDS]
            self._add_state(begin, end)
            if evaluated is not None:
                self._evaluate(engine, evaluated)
        return self._result(begin, end, held)

    def _add_state(self, begin: int, end: int) -> None:
        """Have the optimizer's state be there from the start of the step: the one that was followed has made it."""
        which = KINDS.index("optimizer")
        state = self._ledger.now["optimizer"]
        for section in self._ledger.sections[begin:end]:
            if section.name in ("forward", "backward"):
                section.peak[which] = max(section.peak[which], state)

    def _result(self, begin: int, end: int, held: list[float]) -> Course:
        """Sections of the last step, and what came before and after it for their peaks alone."""
        sections: list[tuple[Section, float]] = []
        for number, section in enumerate(self._ledger.sections):
            counted = begin <= number < end
            if section.name == "between" or (section.name == "build" and self._is_dealt()):
                continue
            sections.append((section, self._times[number] if counted else 0.0))
        return Course(sections, held)

    def _evaluate(self, engine: Engine, batch: Batch) -> None:
        self._ledger.see(batch.fields.values())
        self._mark("evaluate")
        self._forms = self._evaluated
        with engine.evaluating():
            engine.evaluate(batch)
            if isinstance(self._recipe, DrawsSamples):
                engine.samples()
        self._mark("between")

    def _is_dealt(self) -> bool:
        return self._job.parallel.deals_weights and self._setting.world > 1

    def _place(self) -> None:
        """Have the modules stay where they are, and enter the books when they would be moved to the device.

        Ranks of a job without GPUs have the whole model in memory from the start, unless it is dealt to them.
        """
        held = [tensor for module in self._modules.values() for tensor in (*module.parameters(), *module.buffers())]
        if not self._setting.device.gpu and not self._is_dealt():
            with self._fake:
                self._ledger.see(held)

        def stay(module: nn.Module, *_: Any, **__: Any) -> nn.Module:
            if not self._is_dealt():
                self._ledger.see((*module.parameters(), *module.buffers()))
            return module

        for module in self._modules.values():
            setattr(module, "to", partial(stay, module))  # noqa: B010  # torch refuses to swap tensors without memory

    def _label(self) -> None:
        """Say what the books hold after the engine is built."""
        ledger, parallel = self._ledger, self._job.parallel
        weights = [weight for module in self._modules.values() for weight in module.parameters()]
        buffers = [buffer for module in self._modules.values() for buffer in module.buffers()]
        ledger.tag([*weights, *buffers, *(getattr(weight, "ds_tensor", None) for weight in weights)], "weights")
        ledger.tag_rest("optimizer" if parallel.zero_stage or self._job.train.ema else "gradients")
        for weight in weights:
            if weight.requires_grad and parallel.strategy != "fsdp" and not parallel.zero_stage:
                weight.register_post_accumulate_grad_hook(lambda weight: ledger.tag([weight.grad], "gradients"))

    @contextmanager
    def _optimizers(self) -> Generator[None]:
        """Have optimizers work as on the device, and enter their state in the books."""

        def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            grads = [weight.grad for group in optimizer.param_groups for weight in group["params"]]
            self._ledger.tag(grads, "gradients", over=("other", "communication"))
            for group in optimizer.param_groups:
                if self._setting.device.gpu and group.get("foreach", False) is None:
                    group["foreach"] = True  # torch's own choice on a GPU

        def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            states = (value for state in optimizer.state.values() for value in state.values())
            self._ledger.tag([value for value in states if isinstance(value, Tensor)], "optimizer")

        hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _batch(self, samples: int, index: int) -> Batch:
        fields = {
            name: torch.empty((samples, *sample.shape), dtype=getattr(torch, sample.dtype))
            for name, sample in self._setting.samples.items()
        }
        return Batch(fields, 0, index, 1 / self._count)

    def _mark(self, name: str) -> None:
        before = len(self._ledger.sections)
        times = self._repeat if self._ledger.phase in ("forward", "backward") else 1.0
        self._ledger.begin(name)
        self._times += [times] * (len(self._ledger.sections) - before)

    def _reseed(self, step: int, index: int, part: int) -> None:
        """A forward pass of microbatch ``index`` is about to begin. Of three the middle one stands for all but two."""
        self._mark("between")
        if self._job.parallel.pipeline > 1:
            self._repeat = self._own / self._followed
        else:
            self._repeat = float(self._own - 2) if index == 1 and self._followed == 3 else 1.0

    def _told(self, batch: Batch, use: Callable[..., object]) -> list[Form]:
        """What goes from each stage to the next where ``use`` calls the part: from a forward pass of the whole."""
        ((name, module),) = self._modules.items()
        runs = divide(module, self._recipe.layout(name).pipeline, self._job.parallel.stages)
        seen: dict[str, Form] = {}

        def note(last: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[last] = Form.of(output)

        hooks = [module.get_submodule(run[-1]).register_forward_hook(partial(note, run[-1])) for run in runs]
        with autocast(self._job, torch.device("cpu"))():
            use(name, self._modules, batch)
        for hook in hooks:
            hook.remove()
        return [seen[run[-1]] for run in runs]

    def _deliver(self, message: Tensor, tag: int) -> None:
        """A stage is told what it will receive."""
        message.copy_(Notes(torch.device("cpu"), None).write(self._forms[tag // 3 - 1]))


@contextmanager
def _own_linear() -> Generator[None]:
    """Take back torch's linear, in whose place zero3 puts one that is computed again as a whole, for good."""
    linear = functional.linear
    try:
        yield
    finally:
        functional.linear = linear


@contextmanager
def _process_group(setting: Setting) -> Generator[None]:
    """A process group of the world, whose collectives do nothing."""
    dist.init_process_group("fake", rank=setting.rank, world_size=setting.world, store=FakeStore())
    try:
        yield
    finally:
        deepspeed = sys.modules.get("deepspeed")
        destroy = dist.destroy_process_group if deepspeed is None else deepspeed.comm.destroy_process_group
        destroy()


def _without_compiler(job: Job) -> Job:
    return job.model_copy(update={"train": job.train.model_copy(update={"compile": False})})

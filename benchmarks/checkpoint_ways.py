"""Ways to write a checkpoint of one state, and to read it back: dltrain's, torch's, DeepSpeed's.

    torchrun --nproc-per-node 2 benchmarks/checkpoint_ways.py '{"state": "rows", "parameters": 1000000, …}'

What ``checkpoint.py`` runs; rank 0 prints the figures of each repeat as JSON. They are written to the working folder.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from dltrain.checkpoint.reader import open_manifest
from dltrain.core.contracts import Shard
from dltrain.core.job import Job
from dltrain.core.storage import Storage
from dltrain.training.context import context
from dltrain.training.filling import fill_all
from dltrain.training.memory import Memory, Position
from dltrain.training.persistence import Persister
from dltrain.training.reporter import StandaloneReporter
from dltrain.training.snapshot import Snapshots
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ByRows

TENSORS, COLUMNS = 100, 100
KINDS = ("model", "optimizer", "moment")
Finish = Callable[[], object]


class State:
    """AdamW's state, 12 bytes a parameter: on every rank, or cut along the first axis.

    Attributes:
        whole: whether every rank holds all of it.
        shapes: of the whole tensors, by name.
        local: what this rank holds.
        half: half as many ranks, and whether this one is of them.
    """

    def __init__(self, parameters: int, *, whole: bool) -> None:
        self.rank, self.world, self.whole = dist.get_rank(), dist.get_world_size(), whole
        rows = parameters // TENSORS // COLUMNS // self.world * self.world
        self.shapes = {f"{kind}.net.{i}": (rows, COLUMNS) for kind in KINDS for i in range(TENSORS)}
        torch.manual_seed(0 if whole else self.rank)
        self.local = {name: torch.randn(self._share(self.world), COLUMNS) for name in self.shapes}
        self.half = dist.new_group(list(range(self.world // 2)))
        self.in_half = self.rank < self.world // 2

    def _share(self, world: int) -> int:
        """Rows of a tensor that one of ``world`` ranks holds."""
        rows = next(iter(self.shapes.values()))[0]
        return rows if self.whole else rows // world

    def bytes(self) -> int:
        return sum(4 * rows * columns for rows, columns in self.shapes.values())

    def other(self) -> dict[str, Tensor]:
        """Memory for what a rank of half the world holds; it has been touched."""
        return {name: torch.ones(self._share(self.world // 2), COLUMNS) for name in self.shapes}

    def shards(self, local: dict[str, Tensor]) -> dict[str, Shard]:
        return {
            name: Shard(self.shapes[name], (0 if self.whole else self.rank * len(tensor), 0), tensor)
            for name, tensor in local.items()
        }

    def dtensors(self, local: dict[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
        """As torch's checkpoints take it."""
        if self.whole:
            return local
        return {name: DTensor.from_local(tensor, mesh, [ByRows(0)]) for name, tensor in local.items()}


class Way(ABC):
    """One way. ``save`` returns what waits until the checkpoint is durable."""

    def __init__(self, name: str, state: State) -> None:
        self.name, self.state = name, state

    def folder(self, step: int) -> Path:
        return Path.cwd() / f"{self.name}-{step}"

    @abstractmethod
    def save(self, step: int) -> Finish: ...

    @abstractmethod
    def load(self, step: int) -> None: ...

    @abstractmethod
    def load_other(self, step: int, local: dict[str, Tensor]) -> None:
        """Into ``local``, on half of the ranks only."""


class Ours(Way):
    def __init__(self, name: str, state: State, persister: Persister) -> None:
        super().__init__(name, state)
        where = str(Path.cwd() / name)
        best = {"metric": None, "goal": "min"}
        persister.open(url=where, options={}, rank=state.rank, keep=2, best=best, lease="")
        reporter = StandaloneReporter(rank=state.rank, world=state.world, run_dir=Path.cwd())
        self.storage = Storage(where)
        memory = Memory(Job.model_validate({}), context(), hold=None)
        self.snapshots = Snapshots(persister, memory, rank=state.rank, world=state.world, reporter=reporter)

    def folder(self, step: int) -> Path:
        return Path.cwd() / self.name / f"step-{step:08d}"

    def save(self, step: int) -> Finish:
        shards = self.state.shards(self.state.local)

        class Engine:
            def state(self) -> dict[str, Shard]:
                return shards

        engine: Any = Engine()
        self.snapshots.save(engine, Position(step, step, 1000, {}), {})
        return lambda: self.snapshots.finish(600)

    def load(self, step: int) -> None:
        fill_all(self.storage, open_manifest(self.storage, step), self.state.shards(self.state.local))

    def load_other(self, step: int, local: dict[str, Tensor]) -> None:
        fill_all(self.storage, open_manifest(self.storage, step), self.state.shards(local))


class Dcp(Way):
    """torch.distributed.checkpoint."""

    def __init__(self, name: str, state: State) -> None:
        super().__init__(name, state)
        self.mesh = DeviceMesh("cpu", list(range(state.world)))

    def save(self, step: int) -> Finish:
        tensors = self.state.dtensors(self.state.local, self.mesh)
        if self.name == "dcp.async_save":
            future: Any = dcp.async_save(tensors, checkpoint_id=self.folder(step))
            return future.result
        dcp.save(tensors, checkpoint_id=self.folder(step))
        return lambda: None

    def load(self, step: int) -> None:
        dcp.load(self.state.dtensors(self.state.local, self.mesh), checkpoint_id=self.folder(step))

    def load_other(self, step: int, local: dict[str, Tensor]) -> None:
        half = self.state.half
        tensors = self.state.dtensors(local, DeviceMesh.from_group(half, "cpu"))
        dcp.load(tensors, checkpoint_id=self.folder(step), process_group=half)


class Plain(Way):
    """torch.save of the whole state by rank 0, which syncs it: torch does not."""

    def save(self, step: int) -> Finish:
        state = self.state
        whole = state.local if state.whole else {}
        for name, tensor in ({} if state.whole else state.local).items():
            parts = [torch.empty_like(tensor) for _ in range(state.world)] if state.rank == 0 else None
            dist.gather(tensor, parts)
            whole |= {name: torch.cat(parts)} if parts else {}
        if state.rank == 0:
            with self.folder(step).open("wb") as file:
                torch.save(whole, file)
                os.fsync(file.fileno())
        dist.barrier()
        return lambda: None

    def load(self, step: int) -> None:
        self.load_other(step, self.state.local)

    def load_other(self, step: int, local: dict[str, Tensor]) -> None:
        found = torch.load(self.folder(step), mmap=True)
        for name, tensor in local.items():
            first = 0 if self.state.whole else self.state.rank * len(tensor)
            tensor.copy_(found[name][first : first + len(tensor)])


class Refused(Exception):
    """This way cannot do that, and says why."""


class DeepSpeed(Way):
    """save_checkpoint of ZeRO stage 1 with a state of the same size. It syncs nothing: that is done after it."""

    def __init__(self, name: str, state: State) -> None:
        super().__init__(name, state)
        import deepspeed
        import deepspeed.ops

        model = nn.Module()
        shapes = [shape for fqn, shape in state.shapes.items() if fqn.startswith("model.")]
        for number, shape in enumerate(shapes):
            model.register_parameter(f"w{number}", nn.Parameter(torch.randn(shape)))
        model.forward = lambda: torch.stack([w.sum() for w in model.parameters()]).sum()
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 1},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.AdamW(model.parameters())
        self.engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
        self.engine.backward(self.engine())
        self.engine.step()

    def save(self, step: int) -> Finish:
        self.engine.save_checkpoint(str(self.folder(step)), tag="t")

        def sync() -> None:
            for file in self.folder(step).rglob("*"):
                fd = os.open(file, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)

        return sync

    def load(self, step: int) -> None:
        self.engine.load_checkpoint(str(self.folder(step)), tag="t")

    def load_other(self, step: int, local: dict[str, Tensor]) -> None:
        raise Refused("DeepSpeed loads ZeRO's optimizer state at the world size that wrote it only")


def measure(way: Way, step: int, other: dict[str, Tensor]) -> dict[str, float]:
    """This rank's figures: seconds, and bytes written per byte of state."""
    figures: dict[str, float] = {}
    os.sync()
    dist.barrier()
    begin = time.perf_counter()
    finish = way.save(step)
    figures["stall"] = time.perf_counter() - begin
    finish()
    figures["durable"] = time.perf_counter() - begin
    dist.barrier()
    begin = time.perf_counter()
    way.load(step)
    figures["load"] = time.perf_counter() - begin
    dist.barrier()
    if way.state.in_half:
        begin = time.perf_counter()
        try:
            way.load_other(step, other)
            figures["load by half"] = time.perf_counter() - begin
        except Refused:
            pass
    written = way.folder(step)
    files = written.rglob("*") if written.is_dir() else [written]
    figures["bytes"] = sum(file.stat().st_size for file in files if file.is_file()) / way.state.bytes()
    dist.barrier()
    if way.state.rank == 0:
        shutil.rmtree(written) if written.is_dir() else written.unlink()
    return figures


def main(state: str, parameters: int, repeats: int, ways: list[str]) -> None:
    persister = Persister()  # before there are threads
    dist.init_process_group("gloo")
    held = State(parameters, whole=state == "replicas")
    other = held.other() if held.in_half else {}
    make: dict[str, Callable[[], Way]] = {
        "dltrain": lambda: Ours("dltrain", held, persister),
        "dcp.save": lambda: Dcp("dcp.save", held),
        "dcp.async_save": lambda: Dcp("dcp.async_save", held),
        "torch.save": lambda: Plain("torch.save", held),
        "deepspeed": lambda: DeepSpeed("deepspeed", held),
    }
    built = [make[name]() for name in ways]
    for step in range(1, repeats + 2):
        turn = step % len(built)
        mine = {way.name: measure(way, step, other) for way in built[turn:] + built[:turn]}
        everyone: list[Any] = [None] * held.world
        dist.all_gather_object(everyone, mine)
        if held.rank == 0 and step > 1:
            slowest = {
                name: {key: max(rank[name].get(key, 0.0) for rank in everyone) for key in figures}
                for name, figures in mine.items()
            }
            print(json.dumps(slowest), flush=True)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

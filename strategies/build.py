"""The one place where a recipe becomes an engine: the order in which strategies compose."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..core.contracts import Engine, Layout, Recipe
from ..core.errors import JobError, Problem, did_you_mean
from ..core.job import Job
from ..core.parallel import Parallel, microbatches_per_step
from .buffers import Buffers
from .ddp import Ddp
from .dealing import Dealer
from .ema import Ema, trainable
from .fsdp import Fsdp
from .optimizers import build_optimizers
from .passes import Mark, Passes, Precision, Reseed
from .pipeline import Piped, Spot, schedule
from .pipeline_engine import Held, Peers, PipelineEngine
from .recompute import recompute
from .reduce import Statistics, Tree
from .shards import Weight
from .spread import Alone, Spread
from .stages import Stage, check_pipeline, divide, first_names, holders, keep
from .tensor import check_cut, cut
from .torch_engine import TorchEngine, Trained

#: Makes the spread of a part of which every rank holds a copy.
Copies = Callable[[nn.Module, Parallel, torch.device], Spread]

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def build_engine(
    job: Job, recipe: Recipe, *, rank: int, world: int, device: torch.device, reseed: Reseed, mark: Mark
) -> Engine:
    """The engine that ``job.parallel`` asks for, on a process group of ``world`` ranks (none is needed for one).

    Every rank must have seeded torch alike, so that all start from the same weights.

    Raises:
        JobError: the job does not fit the recipe's parts.
    """
    parallel = job.parallel
    dealer = Dealer(rank=rank, world=world) if parallel.deals_weights and world > 1 else None
    with dealer or contextlib.nullcontext():
        modules = recipe.parts()
    if dealer is not None:
        dealer.check(modules)
        dealer.move(device)
    return assemble(
        job, recipe, modules, rank=rank, world=world, device=device, reseed=reseed, mark=mark, dealer=dealer
    )


def assemble(
    job: Job,
    recipe: Recipe,
    modules: Mapping[str, nn.Module],
    *,
    rank: int,
    world: int,
    device: torch.device,
    reseed: Reseed,
    mark: Mark,
    dealer: Dealer | None = None,
    ddp: Copies = Ddp,
) -> Engine:
    """As :func:`build_engine`, of the recipe's ``modules``, which ``dealer`` has dealt to the ranks if there is one.

    ``ddp`` spreads a part that every rank holds whole.
    """
    parallel = job.parallel
    check_parts(job, recipe, modules)
    if job.train.precision == "fp16":
        _check_float16(modules, device)
    passes = Passes(
        recipe,
        1 if job.numerics == "reproducible" else parallel.axes(world)["data"],
        counts=parallel.counts(rank, world),
        precision=autocast(job, device),
        reseed=reseed,
        mark=mark,
    )
    parameters = sum(weight.numel() for module in modules.values() for weight in module.parameters())
    if parallel.pipeline > 1:
        engine = _pipeline(passes, modules, job, world=world, device=device)
    elif parallel.zero_stage:
        engine = _zero(passes, modules, job, world=world, device=device, dealer=dealer)
    else:
        engine = _torch(passes, modules, job, world=world, device=device, dealer=dealer, ddp=ddp)
    engine.parameters = parameters
    return engine


def _torch(
    passes: Passes,
    modules: Mapping[str, nn.Module],
    job: Job,
    *,
    world: int,
    device: torch.device,
    dealer: Dealer | None,
    ddp: Copies,
) -> Engine:
    parallel = job.parallel
    mesh = _mesh(parallel, world, device)
    peers = _peers(parallel, world, device) if parallel.tensor > 1 else None
    parts: dict[str, Trained] = {}
    for name, module in modules.items():
        layout = passes.recipe.layout(name)
        module.to(device).train()
        if mesh is not None and peers is not None:
            cut(module, layout, mesh["tensor"], sequence=parallel.sequence)
            _share_statistics(module, peers)
        if job.train.recompute:
            recompute(module, layout.units)
        if job.train.compile:
            _compile(module, layout.units if mesh is not None else ())
        spread = _spread(job, module, layout.units, parallel.axes(world)["data"], mesh, device, dealer, ddp)
        weights = [Weight(parameter) for parameter in module.parameters() if parameter.requires_grad]
        spec = job.train.optimizer_of(name)
        optimizers = build_optimizers(module, spec, [weight.piece for weight in weights])
        parts[name] = Trained(spread, weights, optimizers, spec.every)
    ema = Ema(trainable(modules), job.train.ema) if job.train.ema is not None else None
    return TorchEngine(
        passes,
        parts,
        world=world,
        clip_norm=job.train.clip_norm,
        ema=ema,
        scaled=job.train.precision == "fp16",
        statistics=Statistics(modules.values(), ranks=world) if job.numerics == "reproducible" else None,
        buffers=Buffers.at_stake(job, modules.values()),
    )


def _check_float16(modules: Mapping[str, nn.Module], device: torch.device) -> None:
    """Refuse an LSTM where torch has none in float16, as on most processors."""
    if not any(isinstance(layer, nn.LSTM) for module in modules.values() for layer in module.modules()):
        return
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), torch.autocast(device.type, torch.float16):
            nn.LSTM(1, 1, device=device)(torch.zeros(1, 1, 1, device=device))
    except RuntimeError as error:
        what = f"torch has no LSTM in float16 for this {device.type}: {error}"
        raise JobError(Problem(what, "train.precision", "bf16 would do, or model.cell: gru")) from error


def _pipeline(
    passes: Passes, modules: Mapping[str, nn.Module], job: Job, *, world: int, device: torch.device
) -> Engine:
    parallel, train, ((name, module),) = job.parallel, job.train, modules.items()
    peers = _peers(parallel, world, device)
    runs = divide(module, passes.recipe.layout(name).pipeline, parallel.stages)
    names = first_names(module)
    stages = _stages(passes, name, module, runs, peers, job, world=world, device=device)
    weights = {names[fqn]: Weight(p) for fqn, p in module.named_parameters() if p.requires_grad}
    spec = train.optimizer_of(name)
    pieces = [weight.piece for weight in weights.values()]
    optimizers = build_optimizers(module, spec, pieces) if pieces else []
    held = Held(name, module, weights, optimizers, spec.every, holders(names, runs, parallel.pipeline))
    averaged = {f"{name}.{fqn}": weight.whole for fqn, weight in weights.items()}
    ema = Ema(averaged, train.ema) if train.ema is not None else None
    count = microbatches_per_step(train.microbatches, global_batch=train.global_batch, world=world, parallel=parallel)
    order = schedule(parallel, stages, count // passes.ranks)
    parked = _offloads(parallel, device) and passes.ranks > 1
    zero = torch.zeros((), device="cpu" if parked else device)
    return PipelineEngine(
        passes,
        held,
        stages,
        order,
        peers,
        zero=zero,
        clip_norm=train.clip_norm,
        ema=ema,
        scaled=train.precision == "fp16",
        buffers=Buffers.at_stake(job, [module]),
    )


def _peers(parallel: Parallel, world: int, device: torch.device) -> Peers:
    axes = parallel.axes(world)
    ranks = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    peers = Peers(ranks.get_group("pipeline"), ranks.get_group("data"), ranks.get_group("tensor"))
    # NCCL wants all of a group to meet before two of them send to each other.
    dist.all_reduce(torch.zeros((), device=device), group=peers.pipeline)
    return peers


def _share_statistics(module: nn.Module, peers: Peers) -> None:
    """Have norms of the whole batch take each sample once: of the ranks that compute the same ones, one."""
    for submodule in module.modules():
        if hasattr(submodule, "process_group"):  # as torch's SyncBatchNorm has it
            setattr(submodule, "process_group", peers.data)  # noqa: B010  # a module's attributes are typed as tensors


def _stages(
    passes: Passes,
    name: str,
    module: nn.Module,
    runs: Sequence[Sequence[str]],
    peers: Peers,
    job: Job,
    *,
    world: int,
    device: torch.device,
) -> list[Piped]:
    """This rank's stages of ``module``, which keeps nothing else."""
    parallel, layout = job.parallel, passes.recipe.layout(name)
    places = range(dist.get_rank(peers.pipeline), parallel.stages, parallel.pipeline)
    keep(module, layout.pipeline, [step for place in places for step in runs[place]])
    module.to(device).train()
    _share_statistics(module, peers)
    mesh = _mesh(parallel, world, device) if passes.ranks * parallel.tensor > 1 else None
    if mesh is not None and parallel.tensor > 1:
        cut(module, layout, mesh["tensor"], sequence=parallel.sequence)
    stages: list[Piped] = []
    for place in places:
        stage = Stage(module, runs[place], sends=place < parallel.stages - 1)
        units = stage.own(layout.units)
        if job.train.recompute:
            recompute(stage, units)
        if job.train.compile:
            _compile(stage, units if mesh is not None else ())
        spread = _spread(job, stage, units, passes.ranks, mesh, device)
        stages.append(Piped(passes, name, spread, Spot(place, parallel.stages, peers.pipeline, device)))
    return stages


def _zero(
    passes: Passes,
    modules: Mapping[str, nn.Module],
    job: Job,
    *,
    world: int,
    device: torch.device,
    dealer: Dealer | None,
) -> Engine:
    from .deepspeed_engine import ZeroEngine  # DeepSpeed is an extra

    for name, module in modules.items():
        module.to(device).train()
        if job.train.recompute:
            recompute(module, passes.recipe.layout(name).units)
    return ZeroEngine(passes, modules, job, world=world, device=device, dealer=dealer)


def check_parts(job: Job, recipe: Recipe, modules: Mapping[str, nn.Module]) -> None:
    """Refuse what does not fit the recipe's parts, which may be on the meta device.

    Raises:
        JobError: optimizers for parts that there are not, or a way to cut parts that they do not allow; or the strategy
            is still open.
    """
    if job.parallel.is_open:
        hint = "name one; dltrain plan tells which would do"
        raise JobError(Problem("only dltrain launch chooses a strategy", "parallel.strategy", hint))
    for name in job.train.parts:
        if name not in modules:
            hint = did_you_mean(name, modules)
            raise JobError(Problem(f"{job.recipe} has no part '{name}'", "train.parts", hint))
    if job.numerics == "reproducible":
        _check_reproducible(modules)
    if job.parallel.cuts_weights or job.parallel.static_graph or job.train.recompute:
        _check_layouts(job, recipe, {name: (module, recipe.layout(name)) for name, module in modules.items()})


def _check_reproducible(modules: Mapping[str, nn.Module]) -> None:
    """Refuse layers whose gradients or statistics the tree over microbatches does not cover."""
    for part, module in modules.items():
        for name, layer in module.named_modules():
            if hasattr(layer, "process_group"):  # as torch's SyncBatchNorm has it
                what = f"'{name}' of part '{part}' takes statistics over the microbatches of as many ranks as there are"
                raise JobError(Problem(what, "numerics", "a norm over one microbatch would do"))
            if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.sparse:
                what = f"'{name}' of part '{part}' has sparse gradients, which have no place in the tree"
                raise JobError(Problem(what, "numerics", "sparse=False would do"))


def _check_layouts(job: Job, recipe: Recipe, parts: Mapping[str, tuple[nn.Module, Layout]]) -> None:
    parallel = job.parallel
    if parallel.tensor > 1 and not any(layout.tensor for _, layout in parts.values()):
        what = f"the layout of {job.recipe} has no rules for tensor parallelism"
        raise JobError(Problem(what, "parallel.tensor", "1 would do"))
    if parallel.sequence and not any(layout.sequence for _, layout in parts.values()):
        what = f"the layout of {job.recipe} has no rules for sequence parallelism"
        raise JobError(Problem(what, "parallel.sequence", "false would do"))
    for name, (module, layout) in parts.items():
        if layout.double_backward and (parallel.cuts_weights or parallel.static_graph):
            what = f"the loss of part '{name}' differentiates through gradients: weights must be whole, the graph free"
            raise JobError(
                Problem(what, "parallel", "strategy: ddp without static_graph, tensor and pipeline would do")
            )
        submodules = {found for found, _ in module.named_modules()}
        for unit in layout.units:
            if unit not in submodules:
                what = f"the layout of part '{name}' has a unit '{unit}', which is no submodule"
                raise JobError(Problem(what, "recipe", did_you_mean(unit, submodules - {""})))
        if parallel.tensor > 1:
            check_cut(name, module, layout, parallel)
    if parallel.pipeline > 1:
        check_pipeline(job, recipe, {name: module for name, (module, _) in parts.items()})


def _mesh(parallel: Parallel, world: int, device: torch.device) -> DeviceMesh | None:
    """The ranks as (pipeline, replica, shard, tensor), where weights are cut; None where every rank holds all of them.

    Copies of a model that is cut over tensor groups are replicas with a single shard each: DistributedDataParallel does
    not take pieces.
    """
    if world == 1 or not parallel.cuts_weights:
        return None
    data = parallel.axes(world)["data"]
    replicas = parallel.replicas if parallel.strategy == "fsdp" else data
    sizes = (parallel.pipeline, replicas, data // replicas, parallel.tensor)
    return init_device_mesh(device.type, sizes, mesh_dim_names=("pipeline", "replica", "shard", "tensor"))


def _spread(
    job: Job,
    module: nn.Module,
    units: Sequence[str],
    data: int,
    mesh: DeviceMesh | None,
    device: torch.device,
    dealer: Dealer | None = None,
    ddp: Copies = Ddp,
) -> Spread:
    parallel = job.parallel
    if job.numerics == "reproducible":
        return Tree(module, ranks=data, bucket_mb=parallel.bucket_mb)
    if data == 1:
        return Alone(module)
    if mesh is None:
        return ddp(module, parallel, device)
    cut_in_two = parallel.replicas > 1 or parallel.strategy == "ddp"
    return Fsdp(
        module,
        mesh["replica", "shard"] if cut_in_two else mesh["shard"],
        units=units,
        reshard=parallel.reshard and parallel.strategy == "fsdp",
        every_microbatch=parallel.reduce == "microbatch",
        offload=_offloads(parallel, device),
        half=_HALF.get(job.train.precision),
        dealer=dealer,
    )


def _offloads(parallel: Parallel, device: torch.device) -> bool:
    return parallel.offload == "cpu" and device.type == "cuda"


def _compile(module: nn.Module, units: Sequence[str]) -> None:
    """Compile ``units`` one by one, as what is gathered between them cannot be; else the whole."""
    for part in [module.get_submodule(name) for name in units] or [module]:
        part.compile()


def autocast(job: Job, device: torch.device) -> Precision:
    """Makes the context that a forward pass of the job runs in."""
    half = _HALF.get(job.train.precision)
    if half is None:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, half)

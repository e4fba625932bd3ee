"""Models that are dealt to the ranks while they are built: the weights of a model that is built whole."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import dltrain
import pytest
import ranks
import torch
import torch.distributed as dist
import zero_recipes
from dltrain.checkpoint.reader import catalogue, open_manifest, read
from dltrain.core.job import Job
from dltrain.core.storage import Storage
from dltrain.models.cnn import CnnRecipe
from dltrain.models.gan import GanRecipe
from dltrain.models.rnn import RnnRecipe
from dltrain.models.transformer import TransformerRecipe
from dltrain.strategies.build import build_engine
from dltrain.strategies.dealing import Dealer
from ranks import run_ranks, train_ranks
from torch import nn

ranks.preload("deepspeed", "deepspeed.runtime.zero.muon.original_muon", "dltrain.models.transformer")

WIDTH = 64


class Awkward(nn.Module):
    """Touches weights in every way that we could think of, after they have become part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: torch.Tensor = torch.zeros(WIDTH, WIDTH)
        early = nn.Linear(WIDTH, WIDTH)
        early.weight = nn.Parameter(self.kept)
        self.early = early
        self.kept.fill_(0.25)  # through a tensor that was there before
        layers = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
        self.layers = nn.ModuleList(layers)
        self.twin = copy.deepcopy(layers[0])
        self.loaded = nn.Linear(WIDTH, WIDTH)
        self.loaded.load_state_dict(layers[1].state_dict())
        first, second, third, fourth = (layer.weight for layer in layers)
        nn.init.orthogonal_(first)
        second.data.mul_(3).clamp_(-0.1, 0.1)
        with torch.no_grad():
            third[3, 5:9] = torch.randn(4)
            third.copy_(third + fourth * math.sqrt(third.shape[0] / third.numel()))
            row = fourth[2]
            fourth.fill_(1)
            row.fill_(7)  # a view that outlives another change
        self.root = nn.Parameter(torch.cat([first.detach(), torch.stack([third, fourth]).flatten(0, 1)]))
        self.tied = nn.Linear(WIDTH, WIDTH)
        self.tied.weight = third
        self.register_buffer("total", torch.stack([p.sum() for p in self.parameters()]).detach())
        nn.init.normal_(tensor=self.tied.weight, std=0.5)
        self.register_buffer("twice", torch.add(self.twin.weight, self.twin.weight).detach())
        self.apply(_with_ones)


def _with_ones(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.ones_(module.bias)


BUILDERS: dict[str, Callable[[], dict[str, nn.Module]]] = {
    "awkward": lambda: {"net": Awkward()},
    "cnn": CnnRecipe(widths=[16, 32], residual=True).parts,
    "gan": GanRecipe().parts,
    "rnn": RnnRecipe(cell="lstm").parts,
    "transformer": TransformerRecipe(preset="tiny").parts,
    "tied and frozen": zero_recipes.LanguageRecipe().parts,
}


def _build(name: str) -> int:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    torch.manual_seed(7)
    whole = {part: module.state_dict() for part, module in BUILDERS[name]().items()}
    after = torch.rand(1)
    torch.manual_seed(7)
    dealer = Dealer(rank=rank, world=dist.get_world_size())
    with dealer:
        modules = BUILDERS[name]()
    assert torch.equal(torch.rand(1), after), "the same random numbers were drawn"
    dealt = 0
    for part, module in modules.items():
        assert {n: p.shape for n, p in module.named_parameters()} == {
            n: whole[part][n].shape for n, _ in module.named_parameters()
        }
        dealt += sum(p.untyped_storage().nbytes() == p.element_size() for p in module.parameters())
        dealer.make_whole(module.parameters())
        state = module.state_dict()
        assert state.keys() == whole[part].keys()
        assert [n for n in state if not torch.equal(state[n], whole[part][n])] == []
    assert dealt >= (0 if name == "tied and frozen" else 2)
    return 0


@pytest.mark.parametrize("name", BUILDERS)
def test_weights_are_those_of_a_model_that_is_built_whole(tmp_path: Path, name: str) -> None:
    ended = run_ranks(_build, 2, tmp_path, name)
    assert ended == [0, 0], (tmp_path / "rank0.log").read_text()


class Aliased(dltrain.Recipe):
    def parts(self) -> dict[str, nn.Module]:
        first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        net = nn.Sequential(first, second)
        second.weight = nn.Parameter(first.weight)  # of which torch tells nobody
        return {"net": net}


def test_a_weight_made_of_a_dealt_ones_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"'1\.weight' of part 'net' was made of a weight"):
        train_ranks(tmp_path, 2, "recipe=test_dealing:Aliased", "parallel.strategy=fsdp")


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_a_run_begins_with_the_weights_of_one_process(tmp_path: Path, strategy: str) -> None:
    if strategy == "zero3":
        pytest.importorskip("deepspeed")
    model = ("recipe=transformer", "model.task=classify", "model.inputs=8")
    split = ("data.split.train=1", "data.split.val=0", "data.split.test=0")
    job = (*model, *split, "train.steps=1", "train.optimizer.lr=1e-60")
    states: list[dict[str, torch.Tensor]] = []
    for name, world in (("ddp", 1), (strategy, 2)):
        (tmp_path / name).mkdir()
        run = train_ranks(tmp_path / name, world, *job, f"parallel.strategy={name}")
        storage = Storage(str(run.path / "checkpoints"))
        saved = read(storage, open_manifest(storage, catalogue(storage)[0].step))
        states.append({name: tensor for name, tensor in saved.items() if name.startswith("model.")})
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


LAYERS, BROAD = 64, 1024  # 256 MiB


class Deep(dltrain.Recipe):
    def parts(self) -> dict[str, nn.Module]:
        layers = (nn.Sequential(nn.Linear(BROAD, BROAD), nn.GELU()) for _ in range(LAYERS))
        return {"deep": nn.Sequential(*layers)}

    def layout(self, part: str) -> dltrain.Layout:
        return dltrain.Layout(units=tuple(map(str, range(LAYERS))))

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: dltrain.Batch) -> torch.Tensor:
        return parts[part](batch["x"]).square().mean()


def _resident(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _peak(strategy: str, file: str) -> int:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    job = Job.model_validate({"parallel": {"strategy": strategy}})
    device = torch.device("cpu")
    build_engine(job, Deep(), rank=rank, world=world, device=device, reseed=lambda *_: None, mark=lambda _: None)
    peak = torch.tensor(_resident("VmHWM") - before)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    Path(file).write_text(str(int(peak)))
    return 0


@pytest.mark.slow
def test_no_rank_holds_the_whole_model_while_it_is_built(tmp_path: Path) -> None:
    ended = run_ranks(_peak, 4, tmp_path, "fsdp", "peak")
    assert ended == [0] * 4, (tmp_path / "rank0.log").read_text()
    whole = 4 * LAYERS * BROAD * BROAD
    assert int((tmp_path / "peak").read_text()) < 0.8 * whole

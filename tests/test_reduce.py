"""The tree over microbatches: what is added to what, on one rank; and what the tree refuses."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from dltrain.core.errors import JobError
from dltrain.core.job import Job
from dltrain.core.tree import tree_sum
from dltrain.models.normalization import SynchronisedBatchNorm2d
from dltrain.strategies.build import check_parts
from dltrain.strategies.reduce import Statistics, Tree
from dltrain.training.recipes import load_recipe
from jobfiles import problem
from torch import Tensor, nn


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_equal_runs_may_be_added_up_on_their_own(ranks: int) -> None:
    drawn = random.Random(0)
    for _ in range(100):
        terms = [drawn.uniform(-1, 1) * 10 ** drawn.randint(-9, 9) for _ in range(16)]
        own = 16 // ranks
        runs = [terms[first : first + own] for first in range(0, 16, own)]
        assert tree_sum([tree_sum(run) for run in runs]) == tree_sum(terms)


def test_a_sum_takes_every_term_once() -> None:
    for count in range(1, 20):
        assert tree_sum(list(range(count))) == sum(range(count))


def gradients(tree: Tree, inputs: Tensor, around: AbstractContextManager[object] | None = None) -> list[Tensor]:
    """Those of one step with a microbatch for each of ``inputs``."""
    for number, x in enumerate(inputs):
        with tree.reducing(number == len(inputs) - 1), around or nullcontext():
            tree.trained(x).square().sum().backward()
    found = [weight.grad for weight in tree.module.parameters()]
    assert all(grad is not None for grad in found)
    return [grad.clone() for grad in found if grad is not None]


@pytest.mark.parametrize("count", [1, 2, 4, 16])
@pytest.mark.parametrize("bucket_mb", [1e-6, 25])
def test_a_rank_adds_up_its_microbatches_along_the_tree(count: int, bucket_mb: float) -> None:
    torch.manual_seed(count)
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    weights = list(module.parameters())
    inputs = torch.randn(count, 4, 5)
    leaves = [torch.autograd.grad(module(x).square().sum(), weights) for x in inputs]
    expected = [tree_sum(terms) for terms in zip(*leaves, strict=True)]
    tree = Tree(module, ranks=1, bucket_mb=bucket_mb)
    for _ in range(2):  # steps
        for grad, wanted in zip(gradients(tree, inputs), expected, strict=True):
            assert torch.equal(grad, wanted)


def test_a_weight_that_is_not_used_has_the_gradient_zero() -> None:
    module = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    tree = Tree(module, ranks=1, bucket_mb=25)
    with tree.reducing(True):
        module["used"](torch.ones(1, 2)).sum().backward()
    assert [float(weight.grad.abs().sum()) for weight in module["unused"].parameters()] == [0.0, 0.0]


def test_a_gradient_that_arrives_twice_is_an_error() -> None:
    module = nn.Linear(2, 2)
    tree = Tree(module, ranks=1, bucket_mb=25)
    with tree.reducing(True):
        module(torch.ones(1, 2)).sum().backward()
        again = module(torch.ones(1, 2)).sum()
        with pytest.raises(RuntimeError, match="arrived twice"):
            again.backward()


def test_running_averages_are_the_mean_over_microbatches() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3)
    norm.register_buffer("mask", torch.tensor([True, False]))
    before = norm.running_mean.clone()
    inputs = torch.randn(4, 6, 3, dtype=torch.float64).float() + 2
    statistics = Statistics([norm], ranks=1)
    for x in inputs:
        with statistics.of_microbatch():
            norm(x)
        assert torch.equal(norm.running_mean, before)
    statistics.settle()
    torch.testing.assert_close(norm.running_mean, 0.1 * inputs.mean((0, 1)))
    assert norm.num_batches_tracked == 1
    assert norm.mask.tolist() == [True, False]


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (SynchronisedBatchNorm2d(1), "'0' of part 'cnn' takes statistics over the microbatches of as many ranks"),
        (nn.Embedding(2, 2, sparse=True), "'0' of part 'cnn' has sparse gradients"),
    ],
)
def test_layers_that_the_tree_does_not_cover_are_refused(layer: nn.Module, says: str) -> None:
    job = Job.model_validate({"numerics": "reproducible", "train": {"microbatches": 4}})
    with pytest.raises(JobError, match=says):
        check_parts(job, load_recipe(job), {"cnn": nn.Sequential(layer)})


@pytest.mark.usefixtures("empty_folder")
@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.microbatches=auto", "train.microbatches: 'auto' makes as many microbatches as there are ranks"),
        (
            "train.microbatches=12",
            "with numerics: reproducible 12 microbatches make no binary tree",
        ),
        ("parallel.strategy=fsdp", "parallel.strategy: fsdp adds up gradients in an order of its own"),
        ("parallel.tensor=2", "parallel.tensor: numerics: reproducible needs whole copies"),
        ("parallel.pipeline=2", "parallel.pipeline: numerics: reproducible needs whole copies"),
        ("parallel.compress=bf16", "parallel.compress: 'bf16' rounds what ranks send each other"),
        ("parallel.static_graph=true", "parallel.static_graph: numerics: reproducible does without"),
        ("train.compile=true", "train.compile: torch.compile may choose kernels"),
    ],
)
def test_what_cannot_be_reproducible_is_refused(override: str, says: str) -> None:
    assert says in str(JobError(problem("numerics: reproducible\ntrain: {microbatches: 8}\n", override)))

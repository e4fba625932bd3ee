"""Pipelines beside their numbers, which test_parity.py and test_strategies_parity.py have: cuts, state, refusals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from dltrain.core.checks import check_job
from dltrain.core.errors import Problem
from dltrain.core.job import Job
from dltrain.core.parallel import Parallel, microbatches_per_step
from dltrain.models.transformer import TransformerRecipe
from dltrain.strategies.stages import Stage, divide, first_names, holders, keep
from dltrain.training import worker
from dltrain.training.check import check_job as check_recipe
from held import say_what_is_held
from hypothesis import given
from hypothesis import strategies as st
from pipeline_recipes import CHAIN, Noisy
from ranks import preload, run_ranks, train_ranks
from runs import RunFolder
from torch import nn

preload("dltrain.models.transformer")
PIPELINE = "parallel.pipeline=2"
INTERLEAVED = (PIPELINE, "parallel.pipeline_schedule=interleaved")


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=7), stages=st.integers(1, 7))
def test_the_largest_stage_is_as_small_as_can_be(sizes: list[int], stages: int) -> None:
    stages = min(stages, len(sizes))
    module = nn.ModuleList(nn.ParameterList([torch.zeros(size)]) for size in sizes)
    names = [str(i) for i in range(len(sizes))]
    runs = divide(module, names, stages)
    assert [name for run in runs for name in run] == names
    assert all(runs)
    cuts = [(0, *inner, len(sizes)) for inner in itertools.combinations(range(1, len(sizes)), stages - 1)]
    best = min(max(sum(sizes[a:b]) for a, b in itertools.pairwise(cut)) for cut in cuts)
    assert max(sum(sizes[int(name)] for name in run) for run in runs) == best


def test_what_has_no_weights_stays_behind_what_it_follows() -> None:
    net = Noisy().parts()["net"]
    runs = divide(net, CHAIN, 4)
    assert runs == [("entry", "between"), ("second", "between"), ("norm",), ("third",)]


def test_stages_of_a_transformer_compute_what_it_does_and_keep_its_names() -> None:
    recipe = TransformerRecipe(dim=16, heads=2, kv_heads=1, feedforward=24, vocabulary=11, layers=3)
    chain = recipe.layout("transformer").pipeline
    whole = recipe.parts()["transformer"]
    tokens = torch.randint(11, (2, 5))
    wanted, value, found = whole(tokens), tokens, set[str]()
    names = first_names(whole)
    assert (names["head.weight"], names["embedding.weight"]) == ("embedding.weight", "embedding.weight")
    runs = divide(whole, chain, 4)
    assert holders(names, runs, 4)["embedding.weight"] == (0, 3)
    for index, run in enumerate(runs):
        part = recipe.parts()["transformer"]
        part.load_state_dict(whole.state_dict())
        keep(part, chain, run)
        value = Stage(part, run, sends=index < 3)(value)
        assert not found & part.state_dict().keys()
        found |= part.state_dict().keys()
    torch.testing.assert_close(value, wanted)
    assert found == whole.state_dict().keys()


def both(folder: Path, *job: str, ranks: int = 2, how: tuple[str, ...] = (PIPELINE,)) -> tuple[RunFolder, RunFolder]:
    """A run of one process, and one of a pipeline."""
    runs: list[RunFolder] = []
    common = ("train.steps=6", "train.global_batch=24", "train.microbatches=4", "train.evaluate_every=3", *job)
    for name, world, parallel in (("one", 1, ()), ("pipeline", ranks, how)):
        (folder / name).mkdir()
        runs.append(train_ranks(folder / name, world, *common, *parallel))
    return runs[0], runs[1]


def check_alike(one: RunFolder, pipeline: RunFolder) -> None:
    for expected, row in zip(one.rows(), pipeline.rows(), strict=True):
        for name in expected:
            if not name.startswith("train/") or name in ("train/loss", "train/grad_norm"):
                assert row[name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize("how", [INTERLEAVED, pytest.param((PIPELINE,), marks=pytest.mark.slow)])
def test_a_recipe_that_draws_around_its_model_and_frozen_layers(tmp_path: Path, how: tuple[str, ...]) -> None:
    one, pipeline = both(tmp_path, "recipe=pipeline_recipes:Noisy", "train.clip_norm=0.05", how=how)
    check_alike(one, pipeline)
    assert {"val/accuracy", "val/noise", "val/more"} <= pipeline.rows()[2].keys()


def test_metrics_that_do_without_the_model(tmp_path: Path) -> None:
    check_alike(*both(tmp_path, "recipe=pipeline_recipes:Blind", "model.frozen=false"))


def test_running_statistics_lie_with_their_stage(tmp_path: Path) -> None:
    one, pipeline = both(tmp_path, "model.norm=batch", "model.widths=[8, 16]", "train.ema=0.9", "train.precision=bf16")
    for expected, row in zip(one.rows(), pipeline.rows(), strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
    assert pipeline.rows()[-1]["test/loss"] == pytest.approx(one.rows()[-1]["test/loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["microbatch", "synchronised"])
def test_statistics_are_shared_within_a_stage_as_without_a_pipeline(tmp_path: Path, kind: str) -> None:
    job = ("model.norm=batch", f"model.batch_norm={kind}", "model.widths=[8, 16]", "train.microbatches=4")
    runs: list[RunFolder] = []
    for name, world, how in (("ddp", 2, ()), ("pipeline", 4, (PIPELINE,))):
        (tmp_path / name).mkdir()
        runs.append(train_ranks(tmp_path / name, world, "train.steps=6", "train.evaluate_every=3", *job, *how))
    check_alike(*runs)


def test_ranks_hold_their_stages_only_and_know_the_size_of_the_whole(tmp_path: Path) -> None:
    job = ("recipe=transformer", "model.layers=4", "model.vocabulary=24")
    said: list[dict[str, int]] = []
    for world, how in ((1, ()), (2, (PIPELINE,))):
        assert run_ranks(say_what_is_held, world, tmp_path, *job, *how) == [0] * world
        said += [json.loads((tmp_path / f"rank{rank}.log").read_text()) for rank in range(world)]
    one, *stages = said
    assert stages[0]["parameters"] == stages[1]["parameters"] == one["parameters"]
    assert max(stage["held"] for stage in stages) < 0.55 * one["held"]
    twice = sum(stage["held"] for stage in stages) - one["held"]  # the matrix at both ends, and steps of optimizers
    assert 0 <= twice - 2 * 24 * 64 < 100


def test_a_loss_that_calls_its_part_twice_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a recipe's function can call its part only once"):
        train_ranks(tmp_path, 2, "recipe=pipeline_recipes:Twice", "train.steps=1", PIPELINE)


def test_a_loss_that_looks_into_its_part_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a recipe's function can only call its part"):
        train_ranks(tmp_path, 2, "recipe=pipeline_recipes:Looking", "train.steps=1", PIPELINE)


@pytest.mark.slow
def test_stages_may_share_different_weights_with_different_others(tmp_path: Path) -> None:
    job = ("recipe=pipeline_recipes:Linked", "train.clip_norm=0.5")
    check_alike(*both(tmp_path, *job, ranks=3, how=("parallel.pipeline=3",)))


TO_SHARD = ("parallel.pipeline", "1 would do, with strategy: fsdp where memory is short")
NOISY = "pipeline_recipes:Noisy"
REFUSED = {
    "gan": ({}, "gan trains 2 parts in turn, and a pipeline has the stages of one", *TO_SHARD),
    "rnn": (
        {},
        "the layout of rnn names no submodules that run one after another, to be cut into stages",
        *TO_SHARD,
    ),
    "pipeline_recipes:Drawing": (
        {},
        "pipeline_recipes:Drawing draws samples, for which a rank needs the whole model",
        *("parallel.pipeline", "1 would do, or a recipe without 'samples'"),
    ),
    "mlp": (
        {"pipeline_schedule": "interleaved"},
        "4 stages need as many submodules with weights, and the layout's pipeline has 3",
        *("parallel.pipeline_chunks", "parallel.pipeline_schedule: 1f1b would do"),
    ),
    "cnn": (
        {"pipeline": 5},
        "5 stages need as many submodules with weights, and the layout's pipeline has 4",
        *("parallel.pipeline", "at most 4"),
    ),
}


@pytest.mark.parametrize("recipe", REFUSED)
def test_what_cannot_be_cut_into_stages_is_refused(recipe: str) -> None:
    parallel, *expected = REFUSED[recipe]
    job = Job.model_validate({"recipe": recipe, "parallel": {"pipeline": 2, **parallel}})
    assert check_recipe(job.model_dump(mode="json")) == [Problem(*expected)]


@pytest.mark.parametrize(
    ("chain", "what", "hint"),
    [
        (
            CHAIN[:-1],
            "'third.weight' of part 'net' lies in none of the submodules of its layout's pipeline",
            "they must hold all weights and buffers, each once",
        ),
        (
            (*CHAIN, "entry.linear"),
            "'entry.linear.weight' of part 'net' lies in 2 of the submodules of its layout's pipeline",
            "they must hold all weights and buffers, each once",
        ),
        (
            (*CHAIN, "forth"),
            "the pipeline of part 'net' has a submodule 'forth', which there is not",
            "known: between, between.0, between.1, entry, entry.linear, norm, second, third",
        ),
    ],
)
def test_a_chain_that_is_not_the_model_is_refused(chain: tuple[str, ...], what: str, hint: str) -> None:
    job = Job.model_validate({"recipe": NOISY, "model": {"chain": chain}, "parallel": {"pipeline": 2}})
    assert check_recipe(job.model_dump(mode="json"))[0] == Problem(what, "recipe", hint)


def test_one_weight_in_two_stages_of_a_rank_is_refused() -> None:
    model = {"tied": True, "chain": ["embedding", "blocks.0", "head", "norm", "blocks.1"]}  # cut into four: 0 and 2
    interleaved = {"pipeline": 2, "pipeline_schedule": "interleaved"}
    job = {"recipe": "small_transformer:Recipe", "data": {"source": "small_transformer:corpus"}, "model": model}
    (found,) = check_recipe(Job.model_validate({**job, "parallel": interleaved}).model_dump(mode="json"))
    what = "'embedding.weight' and 'head.weight' are one weight in two stages of the same rank"
    assert found == Problem(what, "parallel.pipeline_schedule", "1f1b would do")
    assert check_recipe(Job.model_validate({**job, "parallel": {"pipeline": 2}}).model_dump(mode="json")) == []


@pytest.mark.parametrize(
    ("microbatches", "parallel", "data", "expected"),
    [
        ("auto", {}, 1, 2),
        ("auto", {}, 3, 6),
        ("auto", {"pipeline_schedule": "interleaved"}, 1, 2),
        (6, {}, 3, 6),
        (3, {"pipeline_schedule": "gpipe"}, 3, 3),
        (6, {"pipeline": 4, "pipeline_schedule": "interleaved"}, 2, 6),
    ],
)
def test_microbatches_that_a_schedule_takes(
    microbatches: object, parallel: dict[str, object], data: int, expected: int
) -> None:
    spread = Parallel.model_validate({"pipeline": 2, **parallel})
    world = data * spread.pipeline
    count = microbatches_per_step(microbatches, global_batch=64, world=world, parallel=spread)  # pyright: ignore[reportArgumentType]  # 'auto' or a number
    assert count == expected


@pytest.mark.parametrize(
    ("microbatches", "parallel", "what", "hint"),
    [
        (
            *(2, {"pipeline": 4}, "2 microbatches are 1 for each pipeline, fewer than its 4 stages"),
            "8 would do, or parallel.pipeline_schedule: gpipe",
        ),
        (
            *(10, {"pipeline": 2, "pipeline_schedule": "interleaved"}),
            *("5 microbatches for each pipeline cannot be dealt evenly to 2 rounds of 2 stages", "8 would do"),
        ),
        (3, {"pipeline": 2}, "3 microbatches cannot be dealt evenly to 2 ranks", "4 would do"),
    ],
)
def test_microbatches_that_a_schedule_does_not_take(
    microbatches: int, parallel: dict[str, object], what: str, hint: str
) -> None:
    spread = Parallel.model_validate(parallel)
    job = Job.model_validate({"parallel": parallel, "train": {"microbatches": microbatches}})
    assert check_job(job, world=2 * spread.pipeline) == [Problem(what, "train.microbatches", hint)]


def _train(*job: str) -> int:
    return worker.main(list(job))


def test_what_one_stage_refuses_every_rank_refuses(tmp_path: Path) -> None:
    """The head, which is not what the checkpoint has, is in the last stage: the ranks of the first hear of it."""
    job = ("recipe=mlp", "model.inputs=13", "data.source=wine", "model.hidden=[16, 16, 16]", "train.steps=4")
    spread = (PIPELINE, "parallel.strategy=fsdp", "train.microbatches=4", "tracking.wandb.mode=disabled")
    train_ranks(tmp_path, 4, *job, *spread)
    assert run_ranks(_train, 4, tmp_path, *job, *spread, "model.classes=5") == [2, 2, 2, 2]
    said = {(tmp_path / f"rank{rank}.log").read_text() for rank in range(4)}
    assert all("the model has model.mlp.head.weight (5, 16)" in text for text in said), said

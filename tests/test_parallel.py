"""The arithmetic of meshes, and ways to spread a job that are refused before anything starts."""

from __future__ import annotations

import pytest
from dltrain.core.checks import check_job
from dltrain.core.errors import JobError, Problem
from dltrain.core.job import Job
from dltrain.core.parallel import Parallel
from dltrain.training.check import check_job as check_recipe
from hypothesis import given
from hypothesis import strategies as st
from jobfiles import problem


@given(pipeline=st.integers(1, 4), data=st.integers(1, 6), tensor=st.integers(1, 6), replicas=st.integers(1, 6))
def test_every_place_on_the_mesh_has_one_rank(pipeline: int, data: int, tensor: int, replicas: int) -> None:
    parallel = Parallel(strategy="fsdp", pipeline=pipeline, tensor=tensor, replicas=replicas)
    copies = data * replicas
    world = pipeline * copies * tensor
    assert parallel.axes(world) == {"pipeline": pipeline, "data": copies, "tensor": tensor}
    places = [parallel.place(rank, world) for rank in range(world)]
    found = [(place["pipeline"] * copies + place["data"]) * tensor + place["tensor"] for place in places]
    assert found == list(range(world))
    assert all(place["data"] < copies and place["tensor"] < tensor for place in places)
    counting = [place for rank, place in enumerate(places) if parallel.counts(rank, world)]
    assert counting == [{"pipeline": pipeline - 1, "data": d, "tensor": 0} for d in range(copies)]


@pytest.mark.parametrize(
    ("parallel", "world", "expected"),
    [
        ({"tensor": 4}, 6, Problem("6 ranks cannot be dealt to groups of 4", "parallel.tensor", "3 would do")),
        ({"pipeline": 4}, 6, Problem("6 ranks cannot be dealt to 4 stages", "parallel.pipeline", "3 would do")),
        (
            {"pipeline": 2, "tensor": 2},
            6,
            Problem("3 ranks cannot be dealt to groups of 2", "parallel.tensor", "1 would do"),
        ),
        ({"tensor": 8}, 4, Problem("4 ranks cannot be dealt to groups of 8", "parallel.tensor", "4 would do")),
        (
            {"strategy": "fsdp", "tensor": 2, "replicas": 3},
            8,
            Problem("4 data-parallel ranks cannot be dealt to 3 replicas", "parallel.replicas", "2 would do"),
        ),
        ({}, 0, Problem("a world needs at least one rank, not 0", "resources")),
    ],
)
def test_a_world_that_the_axes_do_not_divide(parallel: dict[str, object], world: int, expected: Problem) -> None:
    with pytest.raises(JobError) as caught:
        Parallel.model_validate(parallel).axes(world)
    assert caught.value.problems == (expected,)


@pytest.mark.usefixtures("empty_folder")
@pytest.mark.parametrize(
    ("parallel", "what"),
    [
        ("{replicas: 2}", "'replicas' is for the strategy 'fsdp'"),
        ("{reduce: microbatch}", "'reduce' is for the strategy 'fsdp'"),
        ("{strategy: fsdp, bucket_mb: 4}", "'bucket_mb' is for the strategy 'ddp' without 'tensor'"),
        ("{tensor: 2, compress: bf16}", "'compress' is for the strategy 'ddp' without 'tensor'"),
        ("{pipeline: 2, compress: bf16}", "'compress' is for the strategy 'ddp' without 'tensor' and 'pipeline'"),
        ("{strategy: zero2, pipeline: 2}", "'pipeline' is for the strategies ddp and fsdp; fsdp shares out what ZeRO"),
        ("{pipeline_schedule: gpipe}", "'pipeline_schedule' needs 'pipeline' above 1"),
        ("{pipeline: 2, pipeline_chunks: 3}", "'pipeline_chunks' is for pipeline_schedule 'interleaved'"),
        ("{sequence: true}", "'sequence' needs 'tensor' above 1"),
        ("{compress: bf16, powersgd_rank: 2}", "'powersgd_rank' is for compress 'powersgd'"),
    ],
)
def test_options_of_another_strategy_are_refused(parallel: str, what: str) -> None:
    found = problem(f"parallel: {parallel}\n")
    assert what in found.what
    assert found.where == "dltrain.yaml:1: parallel"


def test_update_rules_that_need_whole_matrices_are_refused_where_they_are_cut() -> None:
    def where(parallel: dict[str, object]) -> list[str]:
        parts = {"critic": {"name": "muon"}}
        train = {"optimizer": {"name": "adafactor"}, "parts": parts}
        return [found.where for found in check_job(Job.model_validate({"parallel": parallel, "train": train}))]

    assert where({}) == []
    assert (
        where({"strategy": "fsdp"})
        == where({"tensor": 2})
        == where({"pipeline": 2})
        == ["train.optimizer.name", "train.parts.critic"]
    )


def recipe_problem(**job: object) -> Problem:
    (found,) = check_recipe(Job.model_validate(job).model_dump(mode="json"))
    return found


def test_what_a_recipe_cannot_share_is_refused_with_what_it_can() -> None:
    found = recipe_problem(parallel={"tensor": 3}, model={"hidden": 40})
    assert found == Problem("40 outputs of 'hidden' cannot be shared by 3 ranks", "parallel.tensor", "2 would do")
    words = {"recipe": "small_transformer:Recipe", "data": {"source": "small_transformer:corpus"}}
    found = recipe_problem(parallel={"tensor": 4}, **words)
    assert found == Problem("2 groups of heads cannot be shared by 4 ranks", "parallel.tensor", "2 would do")
    found = recipe_problem(parallel={"tensor": 2, "sequence": True})
    assert found.what == "the layout of cnn has no rules for sequence parallelism"
    found = recipe_problem(parallel={"tensor": 2}, recipe="gan")
    assert found == Problem("the layout of gan has no rules for tensor parallelism", "parallel.tensor", "1 would do")


@pytest.mark.parametrize("parallel", [{"strategy": "fsdp"}, {"static_graph": True}])
def test_a_loss_that_differentiates_through_gradients_is_not_sharded(parallel: dict[str, object]) -> None:
    found = recipe_problem(parallel=parallel, recipe="gan", model={"loss": "wasserstein"})
    assert "part 'discriminator' differentiates through gradients" in found.what
    assert check_recipe(Job.model_validate({"parallel": parallel, "recipe": "gan"}).model_dump(mode="json")) == []


def test_a_layout_that_names_what_is_not_there() -> None:
    words = {"recipe": "small_transformer:Recipe", "data": {"source": "small_transformer:corpus"}}
    found = recipe_problem(parallel={"strategy": "fsdp"}, model={"unit": "blocks.2"}, **words)
    assert found.what == "the layout of part 'net' has a unit 'blocks.2', which is no submodule"
    found = recipe_problem(parallel={"tensor": 2}, model={"row": "norm"}, **words)
    assert found.what == "the rule 'row' of part 'net' is for a Linear, and 'norm' names none"

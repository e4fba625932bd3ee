"""Snapshots in memory: what counts, what is gone on from, and that ranks that are killed cost at most a step."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from checkpoints import make_state, rows
from dltrain.checkpoint.image import Image, Images, copy_image, read_head
from dltrain.checkpoint.manifest import CorruptCheckpoint
from dltrain.checkpoint.reader import read
from dltrain.checkpoint.writer import PieceKey, assign, held
from dltrain.core.contracts import ShardedState
from dltrain.launcher.held_images import HeldImages
from dltrain.launcher.messages import HeldImage, Point
from dltrain.launcher.points import complete_points, in_place, newest_row
from dltrain.training.hold import Hold, images_of
from dltrain.training.pace import Pace
from dltrain.training.staging import Holdings, ImagePlan, Stage
from launching import Sandbox
from ranks import train_ranks
from runs import RunFolder
from stage import JOB, LAUNCH, assert_same_run, run_of

POSITION = {"samples": 7, "total_steps": 9, "extra": {}}


def an_image(shards: ShardedState, mine: list[PieceKey], *, rank: int, world: int, generation: int) -> Stage:
    """A rank's image of a snapshot, in memory."""
    facts = {"job": {"name": "mine"}, "rng": {}, "tracking": {}}
    plan = ImagePlan(shards, mine[:1], mine, save="feed", facts=facts)
    holdings = Holdings()
    assert holdings.refresh(shards)
    assert not holdings.refresh(shards)
    stage = Stage.of_size(plan.size)
    stage.fill(plan, holdings)
    lines = [plan.text, json.dumps(POSITION).encode(), b'[{"step": 5}]']
    stage.commit(plan, b"\n".join(lines), generation=generation, step=5, rank=rank, world=world, row=5)
    return stage


def images(world: int = 2, generation: int = 1) -> list[Stage]:
    """Every rank's image of the awkward tensors, cut by rows."""
    shards = rows(make_state(3), world)
    mine = assign([held(each) for each in shards])
    return [an_image(shards[rank], mine[rank], rank=rank, world=world, generation=generation) for rank in range(world)]


# ---- images


def test_images_are_read_as_a_checkpoint_is_by_any_slices() -> None:
    found = Images([Image(stage.fd) for stage in images()])
    assert (found.manifest.step, found.manifest.cursor.samples, found.manifest.job) == (5, 7, {"name": "mine"})
    whole = read(found, found.manifest)
    assert whole.keys() == make_state(3).keys()
    for name, tensor in make_state(3).items():
        assert whole[name].dtype == tensor.dtype
        torch.testing.assert_close(whole[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_a_part_of_the_images_is_not_taken_for_the_whole() -> None:
    found = Images([Image(images()[0].fd)])
    with pytest.raises(CorruptCheckpoint, match="elements are held here"):
        found.check_holds(
            {name: [((0,) * tensor.dim(), tuple(tensor.shape))] for name, tensor in make_state(3).items()}
        )


def test_a_rank_whose_pieces_others_copy_has_an_image_of_nothing() -> None:
    shards = rows(make_state(3), 1)[0]
    stages = [an_image(shards, mine, rank=rank, world=2, generation=1) for rank, mine in enumerate((held(shards), []))]
    found = Images([Image(stage.fd) for stage in stages])
    assert found.whole
    assert read(found, found.manifest).keys() == shards.keys()


def test_an_image_does_not_count_while_it_is_written() -> None:
    stage = images(1)[0]
    raw = copy_image(stage.fd)
    assert raw is not None
    holdings = Holdings()
    shards = rows(make_state(4), 1)[0]
    holdings.refresh(shards)
    plan = ImagePlan(shards, held(shards), held(shards), save="feed", facts={})
    stage.fill(plan, holdings)
    found = read_head(stage.fd)
    assert found is not None
    assert not found[1]
    assert copy_image(stage.fd) is None
    with pytest.raises(ValueError, match="no complete image"):
        Image(stage.fd)


# ---- what a node holds


def test_an_agent_holds_images_when_the_rank_is_gone_and_hands_them_on() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agent, hold = HeldImages(), Hold(theirs)
    ours.setblocking(False)
    stages = images()
    for stage in stages:
        hold.keep(stage.fd)
        os.close(stage.fd)
    theirs.close()
    agent.hear(0, ours)
    ours.close()
    point = Point(1, 5, 2)
    assert sorted((image.rank, image.point) for image in agent.all()) == [(0, point), (1, point)]
    assert agent.rows(point) == {0: [{"step": 5}], 1: [{"step": 5}]}
    copies = HeldImages()
    raw = agent.copy(point, 1)
    assert raw is not None
    copies.put(raw)
    assert [image.rank for image in copies.all()] == [1]
    copies.drop_copies([point])
    assert copies.all()
    copies.drop_copies([])
    assert not copies.all()

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agent.hand_over(point, 0, ours, reading=False)
    given = Hold(theirs).given()
    ours.close()
    theirs.close()
    assert [(item.restores, item.mine) for item in given] == [(True, True), (True, True)]
    found = images_of(given)
    assert found is not None
    assert found.whole
    agent.begin(None, [0])
    assert not agent.all()


def test_what_was_gone_on_from_is_let_go_when_it_is_not_needed_any_more() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agent, hold = HeldImages(), Hold(theirs)
    ours.setblocking(False)
    point = Point(1, 5, 2)
    stages = images()
    hold.keep(stages[0].fd)
    raw = copy_image(stages[1].fd)
    assert raw is not None
    agent.hear(0, ours)
    agent.put(raw)
    agent.begin(point, [0])
    assert [image.rank for image in agent.all()] == [0, 1]
    assert agent.foreign
    for count in (1, 2):
        stage = images(generation=2)[0]
        hold.keep(stage.fd)
        agent.hear(0, ours)
        agent.settle(2, [0])
        assert agent.foreign == (count < 2)
    ours.close()
    theirs.close()
    agent.close()


def held_by(points: Mapping[int, list[tuple[int, int, int]]], world: int = 4) -> dict[int, list[HeldImage]]:
    """By node: generation, step and rank of its images."""
    return {
        node: [HeldImage(generation, step, rank, world, step - 1, 100) for generation, step, rank in images]
        for node, images in points.items()
    }


def test_a_snapshot_counts_when_every_rank_has_it() -> None:
    found = held_by({0: [(1, 7, 0), (1, 7, 1), (1, 8, 0)], 1: [(1, 7, 2), (1, 7, 3), (1, 8, 2), (1, 8, 3)]})
    ranks = {0: [0, 1], 1: [2, 3]}
    assert complete_points(found) == [Point(1, 7, 4)]
    assert in_place(Point(1, 7, 4), found, ranks)
    assert newest_row(Point(1, 7, 4), found) == 6
    assert not in_place(Point(1, 7, 4), found, {0: [2, 3], 1: [0, 1]})
    assert not in_place(Point(1, 7, 4), found, {0: [0, 1, 2, 3, 4]})
    assert complete_points(held_by({0: [(1, 7, 0), (2, 7, 1)], 1: [(1, 7, 2), (1, 7, 3)]})) == []


def test_the_newest_snapshot_comes_first_and_the_later_generation_of_two() -> None:
    found = held_by({0: [(1, 5, 0), (2, 5, 0), (2, 4, 0)]}, world=1)
    assert complete_points(found) == [Point(2, 5, 1), Point(1, 5, 1), Point(2, 4, 1)]


# ---- how often


def test_snapshots_are_taken_as_often_as_the_job_says() -> None:
    assert [done for done in range(1, 30) if Pace(10, start=0).due(done)][:1] == [10]
    pace = Pace(10, start=3)
    taken = []
    for done in range(4, 40):
        if pace.due(done):
            taken.append(done)
            pace.taken(done, 1.0)
    assert taken == [13, 23, 33]
    assert not any(Pace("never", start=0).due(done) for done in range(1, 1000))


@pytest.mark.parametrize(("cost", "every"), [(0.0001, 1), (0.001, 1), (0.0035, 4), (0.1, 100)])
def test_automatic_snapshots_cost_a_hundredth_of_the_step_time(cost: float, every: int) -> None:
    pace, taken = Pace("auto", start=0), list[int]()
    for done in range(1, 301):
        pace.stepped(0.1)
        if pace.due(done):
            taken.append(done)
            pace.taken(done, 5.0 if len(taken) < 3 else cost)  # new pages
        if done % 5 == 0:
            pace.agree(pace.wanted)
    assert taken[:3] == [1, 2, 3]
    gaps = {later - earlier for earlier, later in pairwise(taken[5:])}
    assert gaps <= {every}
    assert len(taken) > 3


def test_snapshots_that_came_to_nothing_do_not_make_them_look_cheap() -> None:
    pace = Pace("auto", start=0)
    pace.stepped(0.1)
    for done in range(1, 10):
        pace.taken(done, 0.01 if done < 6 else None)
    assert pace.wanted == 10


# ---- a killed rank


def put(box: Sandbox, *generations: list[dict[str, object]]) -> None:
    for name in ("killed.py", "small_transformer.py"):
        shutil.copy(Path(__file__).with_name(name), box.folder)
    (box.folder / "kills.json").write_text(json.dumps(generations))


def costs(run: RunFolder) -> list[dict[str, object]]:
    return [json.loads(path.read_text())["cost"] for path in sorted((run.path / "failures").glob("*.json"))]


def test_killed_ranks_cost_at_most_a_step_and_no_bit(sandbox: Sandbox, reference: RunFolder) -> None:
    put(
        sandbox,
        [{"rank": 1, "step": 13, "how": "rank"}],
        [{"rank": 0, "step": 19, "how": "both"}, {"rank": 1, "step": 19, "how": "both"}],
        [{"rank": 0, "step": 26, "how": "torn"}],
    )
    job = (*JOB, "recipe=killed:Cnn", "recovery.snapshot=1", "recovery.max_restarts=3")
    done = sandbox.run(*LAUNCH, *job)
    assert done.returncode == 0, done.stdout + done.stderr
    run = run_of(sandbox)
    assert_same_run(run, reference)
    found = costs(run)
    assert [(cost["from_step"], cost["steps"]) for cost in found[:2]] == [(13, 0), (19, 0)]
    assert (found[2]["from_step"], found[2]["steps"]) in [(26, 0), (26, 1)]
    assert {cost["origin"] for cost in found} == {"in memory of 2 ranks"}
    assert "from step 13, in the memory of 2 ranks" in done.stdout


COMMON = (
    *("seed=3", "train.steps=20", "train.global_batch=24", "train.microbatches=4", "train.optimizer.lr=0.003"),
    *("train.optimizer.weight_decay=0.1", "train.schedule.warmup_steps=4", "train.clip_norm=1.0", "train.ema=0.9"),
    *("train.evaluate_every=6", "checkpoint.every=15", "tracking.wandb.mode=disabled"),
)
TRANSFORMER = (
    *("recipe=killed:Transformer", "model.dim=16", "model.feedforward=32", "model.dropout=0.1", "model.vocabulary=24"),
    *("model.layers=4", "data.source=small_transformer:corpus"),
)
GAN = ("recipe=killed:Gan", "model.width=16", "model.latent=8", "train.parts={generator: {every: 2}}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nodes", "ranks", "job"),
    [
        (1, 1, TRANSFORMER),
        (1, 4, TRANSFORMER),
        (1, 2, (*TRANSFORMER, "train.precision=fp16")),
        (1, 4, (*TRANSFORMER, "parallel.strategy=fsdp", "parallel.tensor=2")),
        (2, 2, (*TRANSFORMER, "parallel.strategy=zero2")),  # a node has nothing of some tensors
        (1, 2, (*TRANSFORMER, "parallel.strategy=zero3")),
        (1, 2, (*TRANSFORMER, "parallel.pipeline=2")),
        (1, 2, GAN),
    ],
    ids=["ddp-1", "ddp-4", "fp16", "fsdp-tensor", "zero2", "zero3", "pipeline", "gan"],
)
def test_every_strategy_goes_on_from_memory_to_the_same_bits(
    sandbox: Sandbox, nodes: int, ranks: int, job: tuple[str, ...]
) -> None:
    put(sandbox, [{"rank": ranks - 1, "step": 8, "how": "rank"}], [{"rank": 0, "step": 17, "how": "both"}])
    whole = train_ranks(sandbox.folder, ranks, *COMMON, *job)
    shape = ("--nodes", str(nodes), "--nproc-per-node", str(ranks // nodes))
    done = sandbox.run("launch", *shape, *COMMON, *job, "recovery.snapshot=1", "recovery.max_restarts=2")
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = (sandbox.folder / "runs").glob("*/0001")
    run = RunFolder(found)
    assert run.steps() == list(range(1, 21))
    assert run.numbers() == whole.numbers()
    assert [(cost["from_step"], cost["steps"]) for cost in costs(run)] == [(8, 0), (17, 0)]

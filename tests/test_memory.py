"""Snapshots in memory: what counts, what is kept, what is gone on from, and how often they are taken."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from checkpoints import make_state, rows
from dltrain.checkpoint.image import DATA, Image, Images, note_copied, read_head
from dltrain.checkpoint.manifest import CorruptCheckpoint
from dltrain.checkpoint.reader import read
from dltrain.checkpoint.writer import PieceKey, assign, held
from dltrain.core.contracts import ShardedState
from dltrain.core.memory import Room
from dltrain.launcher.held_images import HeldImages, image_of
from dltrain.launcher.messages import HeldImage, Point
from dltrain.launcher.points import Move, buddies, complete_points, gone_ranks, moves, newest_row
from dltrain.training.hold import Hold, images_of
from dltrain.training.marks import Marks, Progress
from dltrain.training.pace import Pace
from dltrain.training.staging import Holdings, ImagePlan, Stage

POSITION = {"samples": 7, "total_steps": 9, "extra": {}}


def an_image(
    shards: ShardedState, mine: list[PieceKey], *, rank: int, world: int, generation: int, marked: int = 0
) -> Stage:
    """A rank's image of a snapshot, in memory."""
    facts = {"job": {"name": "mine"}, "rng": {}, "tracking": {}}
    plan = ImagePlan(shards, mine[:1], mine, save="feed", facts=facts)
    holdings = Holdings()
    assert holdings.refresh(shards)
    assert not holdings.refresh(shards)
    stage = Stage.of_size(plan.size)
    stage.fill(plan, holdings)
    lines = [plan.text, json.dumps(POSITION).encode(), b'[{"step": 5}]']
    place = {"generation": generation, "step": 5, "rank": rank, "world": world, "row": 5, "marked": marked}
    stage.commit(plan, b"\n".join(lines), **place)
    return stage


def images(world: int = 2, generation: int = 1, marked: int = 0) -> list[Stage]:
    """Every rank's image of the awkward tensors, cut by rows."""
    shards = rows(make_state(3), world)
    mine = assign([held(each) for each in shards])
    more = {"world": world, "generation": generation, "marked": marked}
    return [an_image(shards[rank], mine[rank], rank=rank, **more) for rank in range(world)]


def copy(stage: Stage, to: HeldImages, kept: list[Point], *, head: bool = True) -> bool:
    """Have another node take in an image, in parts."""
    found = read_head(stage.fd)
    assert found is not None
    image = image_of(found[0])
    begins = [*range(DATA, image.size, 1000), *([0] if head else [])]
    parts = {begin: os.pread(stage.fd, min(1000, image.size - begin) if begin else DATA, begin) for begin in begins}
    return all(to.receive(image, kept, begin, data) for begin, data in parts.items())


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
    holdings = Holdings()
    shards = rows(make_state(4), 1)[0]
    holdings.refresh(shards)
    plan = ImagePlan(shards, held(shards), held(shards), save="feed", facts={})
    stage.fill(plan, holdings)
    found = read_head(stage.fd)
    assert found is not None
    assert not found[1]
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

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agent.begin(point, [0, 1])
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


def test_what_an_agent_has_no_room_for_it_is_told_later() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    agent, hold = HeldImages(), Hold(theirs)
    stages = [stage for _ in range(20) for stage in images()]
    for stage in stages:  # the agent does not come to read
        hold.keep(stage.fd)
    hold.drop(stages[0].fd)
    hold.drop(stages[-1].fd)
    agent.hear(0, ours)
    assert 0 < len(agent.all()) < 38
    for _ in stages:
        hold.flush()
        agent.hear(0, ours)
    assert len(agent.all()) == 38
    ours.close()
    hold.drop(stages[1].fd)  # it is gone, and with it what it held: nothing to wait for
    assert not hold._waiting
    agent.close()
    theirs.close()


def test_what_was_gone_on_from_is_let_go_when_it_is_not_needed_any_more() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agent, hold = HeldImages(), Hold(theirs)
    ours.setblocking(False)
    point = Point(1, 5, 2)
    stages = images()
    hold.keep(stages[0].fd)
    agent.hear(0, ours)
    assert copy(stages[1], agent, [point])
    assert not agent.foreign
    agent.begin(point, [0])
    assert [image.rank for image in agent.all()] == [0, 1]
    assert agent.foreign
    for count, marked in enumerate([1, 0, 1]):
        hold.keep(images(generation=2, marked=marked)[0].fd)
        agent.hear(0, ours)
        agent.settle(2, copies=True)
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
    assert not moves(Point(1, 7, 4), found, ranks)
    assert newest_row(Point(1, 7, 4), found) == 6
    assert complete_points(held_by({0: [(1, 7, 0), (2, 7, 1)], 1: [(1, 7, 2), (1, 7, 3)]})) == []


def test_the_newest_snapshot_comes_first_and_the_later_generation_of_two() -> None:
    found = held_by({0: [(1, 5, 0), (2, 5, 0), (2, 4, 0)]}, world=1)
    assert complete_points(found) == [Point(2, 5, 1), Point(1, 5, 1), Point(2, 4, 1)]


def test_what_lies_elsewhere_is_moved() -> None:
    found = held_by({0: [(1, 7, 0), (1, 7, 3)], 1: [(1, 8, 1), (1, 7, 1), (1, 7, 0)], 3: [(1, 7, 2)]})
    assert moves(Point(1, 7, 4), found, {0: [0], 1: [1], 2: [2], 3: [3]}) == [Move(2, 3, 2), Move(3, 0, 3)]
    assert gone_ranks(held_by({0: [(1, 7, 0), (1, 8, 2)]}), 4) == [1, 3]


@pytest.mark.parametrize(
    ("machines", "expected"),
    [
        ("aa", [1, 0]),
        ("abc", [1, 2, 0]),
        ("aabb", [2, 3, 0, 1]),
        ("aaabbb", [3, 4, 5, 0, 1, 2]),
        ("aabbcc", [2, 3, 4, 5, 0, 1]),
        ("aaa", [1, 2, 0]),
        ("aab", [1, 2, 0]),
    ],
)
def test_copies_lie_on_another_machine_where_there_is_one(machines: str, expected: list[int]) -> None:
    found = buddies(machines)
    assert found == expected
    assert sorted(found) == list(range(len(machines)))


# ---- copies on another node


def test_a_copy_counts_once_its_head_is_there_and_those_not_needed_are_let_go() -> None:
    node, point, newer = HeldImages(), Point(1, 5, 2), Point(2, 5, 2)
    assert copy(images()[1], node, [point], head=False)
    assert not node.all()
    assert copy(images()[1], node, [point])
    assert copy(images()[0], node, [point])
    assert [(image.rank, image.point) for image in node.all()] == [(1, point), (0, point)]
    assert node.rows(point) == {0: [{"step": 5}], 1: [{"step": 5}]}
    assert copy(images(generation=2)[1], node, [point, newer])
    assert sorted((image.rank, image.generation) for image in node.all()) == [(0, 1), (1, 1), (1, 2)]
    assert copy(images(generation=3)[1], node, [newer, Point(3, 5, 2)])
    assert sorted((image.rank, image.generation) for image in node.all()) == [(0, 1), (1, 2), (1, 3)]
    node.begin(newer, [0])
    assert [(image.rank, image.generation) for image in node.all()] == [(1, 2)]
    node.close()


def test_a_copy_for_which_there_is_no_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dltrain.launcher.held_images.Room.now", lambda: Room(10_000, 1000, 0))
    node = HeldImages()
    assert not copy(images()[0], node, [])
    assert not node.all()


def test_marked_images_are_copied_once() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    agent, hold = HeldImages(), Hold(theirs)
    stages = [images(generation=2, marked=marked)[0] for marked in (1, 0)]
    for stage in stages:
        hold.keep(stage.fd)
    agent.hear(0, ours)
    assert not agent.to_copy(1)
    (found,) = agent.to_copy(2)
    assert (found.head.marked, found.kept) == (1, (Point(2, 5, 2),))
    note_copied(found.fd, found.head.number)
    os.close(found.fd)
    assert stages[0].copied
    assert not stages[1].copied
    assert not agent.to_copy(2)
    for sock in (ours, theirs):
        sock.close()
    agent.close()


def test_a_marked_snapshot_is_kept_until_a_later_one_has_been_copied_everywhere() -> None:
    def take() -> Stage:
        stage = images(1, marked=int(marks.due))[0]
        marks.taken(stage)
        return stage

    def copied(stage: Stage) -> None:
        head = read_head(stage.fd)
        assert head is not None
        note_copied(stage.fd, head[0].number)

    marks = Marks(wanted=True)
    first = take()
    take()
    assert (marks.stages, marks.progress) == ([first], Progress.COPYING)
    copied(first)
    assert marks.progress == Progress.COPIED
    marks.agree(Progress.COPYING)  # another rank's is not
    assert marks.progress == Progress.COPIED
    marks.agree(Progress.COPIED)
    second = take()
    assert marks.stages == [second, first]
    marks.agree(Progress.MISSED)  # another rank has no such snapshot
    assert (marks.stages, marks.due) == ([first], True)
    marks.miss()
    assert (marks.progress, marks.due) == (Progress.MISSED, False)
    marks.agree(marks.progress)
    third = take()
    copied(third)
    marks.agree(marks.progress)
    assert marks.stages == [third]
    found = [read_head(stage.fd) for stage in (first, second, third)]
    assert [head[0].marked for head in found if head] == [0, 0, 1]
    assert not Marks(wanted=False).due


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

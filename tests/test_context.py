"""The context: what it reads from torchrun's variables, and what ``log`` sends."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from dltrain.core.wire import Channel
from dltrain.training.context import Context, from_environment


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """A channel's two ends: the rank's and the agent's."""
    rank, agent = (Channel(sock) for sock in socket.socketpair())
    yield rank, agent
    rank.close()
    agent.close()


def launched(channel: Channel, *, rank: int = 0) -> Context:
    ctx = from_environment({"RANK": str(rank), "WORLD_SIZE": "2"})
    ctx.channel = channel
    return ctx


def test_a_process_without_torchruns_variables_is_one_rank_alone() -> None:
    ctx = from_environment({})
    assert (ctx.rank, ctx.world_size, ctx.local_world_size, ctx.launched) == (0, 1, 1, False)
    ctx.log({"loss": 1.0})  # and its rows go nowhere


def test_torchruns_variables_are_read() -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RESTART_COUNT")
    ctx = from_environment(dict(zip(names, "518423", strict=True)))
    assert (ctx.rank, ctx.local_rank, ctx.world_size, ctx.local_world_size) == (5, 1, 8, 4)
    assert (ctx.node_rank, ctx.restart) == (2, 3)


def test_whatever_is_one_number_can_be_logged(ends: tuple[Channel, Channel]) -> None:
    loss = (torch.ones(1, requires_grad=True) * 0.5).sum()
    launched(ends[0]).log({"tensor": loss, "numpy": np.float32(2), "one": torch.ones(1, 1), "int": 3, "true": True})
    (message,) = ends[1].receive()
    row = {"tensor": 0.5, "numpy": 2.0, "one": 1.0, "int": 3.0, "true": 1.0}
    assert message == {"t": "log", "step": 0, "metrics": row}


@pytest.mark.parametrize("value", [torch.ones(2), "text", None, np.ones(2)])
def test_what_is_no_number_is_refused_by_name(ends: tuple[Channel, Channel], value: object) -> None:
    with pytest.raises(TypeError, match="'train/loss' must be a number"):
        launched(ends[0]).log({"train/loss": value})  # pyright: ignore[reportArgumentType]  # that is the test


def test_steps_are_counted_or_given_and_only_rank_0_speaks(ends: tuple[Channel, Channel]) -> None:
    ctx = launched(ends[0])
    ctx.log({"a": 1.0})
    ctx.log({"a": 2.0}, step=10)
    ctx.log({"a": 3.0})
    ctx.log({"a": 3.5}, step=np.int64(12))  # pyright: ignore[reportArgumentType]  # as good as an int
    launched(ends[0], rank=1).log({"a": 4.0})
    assert [message["step"] for message in ends[1].receive()] == [0, 10, 11, 12]
    with pytest.raises(TypeError):
        ctx.log({"a": 5.0}, step=12.5)  # pyright: ignore[reportArgumentType]  # that is the test

"""What a plan says of memory, against what torch's allocator had at the most."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from allocations import measure
from dltrain.core.job import Job
from dltrain.launcher.dryruns import DryRuns
from dltrain.launcher.rows import MARGIN, WORKSPACE
from ranks import preload, run_ranks

preload("allocations", "dltrain.models.transformer", "dltrain.models.rnn", "dltrain.models.gan", "dltrain.models.mlp")

DEVICE = {
    "rates": {"half": 1e12, "full": 1e12, "memory": 1e11, "launch": 1e-6},
    "gpu": False,
    "fused": [],
    "grouped": [],
}
TOKENS = {name: {"shape": [48], "dtype": "int64"} for name in "xy"}
LABEL = {"shape": [], "dtype": "int64"}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tied": ("transformer", {"preset": "mini"}, TOKENS),
    "untied": ("transformer", {"preset": "mini", "layers": 2, "tie_weights": False, "dropout": 0.1}, TOKENS),
    "deep": ("transformer", {"preset": "tiny", "dim": 128, "layers": 12}, TOKENS),
    "encoder": (
        "transformer",
        {"preset": "mini", "task": "classify", "layers": 2},
        {"x": {"shape": [48], "dtype": "int64"}, "y": LABEL},
    ),
    "mlp": ("mlp", {"inputs": 64, "hidden": [512, 512]}, {"x": {"shape": [64], "dtype": "float32"}, "y": LABEL}),
    "cnn": ("cnn", {}, {"x": {"shape": [1, 8, 8], "dtype": "float32"}, "y": LABEL}),
    "rnn": ("rnn", {}, {"x": {"shape": [8, 8], "dtype": "float32"}, "y": LABEL}),
    "gan": ("gan", {}, {"x": {"shape": [1, 8, 8], "dtype": "float32"}}),
}
ALL = ("ddp", "fsdp", "zero1", "zero2", "zero3")


def cells() -> Iterator[tuple[str, int, dict[str, Any], dict[str, Any], int]]:
    """Model, ranks, what the job says of parallel and of train, samples of an evaluation."""
    for model in ("tied", "mlp"):
        for strategy in ALL:
            yield model, 2, {"strategy": strategy}, {"global_batch": 16}, 0
    for model, strategies in (("encoder", ("ddp", "fsdp")), ("deep", ("ddp", "fsdp")), ("untied", ("fsdp",))):
        for strategy in strategies:
            yield model, 2, {"strategy": strategy}, {"global_batch": 32}, 0
    for model in ("cnn", "rnn"):
        yield model, 2, {}, {"global_batch": 32}, 0
    yield "gan", 2, {}, {"global_batch": 32}, 32
    yield "tied", 1, {}, {"global_batch": 24}, 0
    yield "tied", 1, {}, {"global_batch": 8, "ema": 0.9, "clip_norm": 1.0, "precision": "bf16"}, 64
    yield "untied", 1, {}, {"global_batch": 16, "recompute": True, "optimizer": {"name": "muon"}}, 16
    for train in ({"microbatches": 8}, {"microbatches": 16, "recompute": True}, {"precision": "bf16"}):
        for strategy in ("ddp", "fsdp"):
            yield "tied", 2, {"strategy": strategy}, {"global_batch": 16, **train}, 0
    for model in ("tied", "untied"):
        yield model, 2, {"tensor": 2}, {"global_batch": 8}, 16
    yield "tied", 2, {"tensor": 2, "sequence": True}, {"global_batch": 8}, 0
    yield "tied", 2, {"pipeline": 2}, {"global_batch": 16, "microbatches": 8}, 16
    yield "untied", 2, {"pipeline": 2, "pipeline_schedule": "gpipe"}, {"global_batch": 16, "microbatches": 4}, 0


def cell(model: str, parallel: dict[str, Any], train: dict[str, Any], evaluated: int) -> dict[str, Any]:
    recipe, arguments, samples = MODELS[model]
    job = {"recipe": recipe, "model": arguments, "parallel": parallel, "train": train}
    return {"job": job, "samples": samples, "evaluated": evaluated}


def foretold(runs: DryRuns, world: int, asked: dict[str, Any]) -> float:
    """Of the ranks' peaks the highest; in a pipeline those of all stages count."""
    job = Job.model_validate(asked["job"]).model_dump(mode="json")
    stages = job["parallel"]["pipeline"]
    request = {"ask": "footprint", **asked, "job": job, "world": world, "per_node": 8, "device": DEVICE}
    answers = [runs.ask({**request, "rank": stage * world // stages}) for stage in range(stages)]
    peaks = [answer.result()["peaks"] for answer in answers]
    return max(sum(kinds.values()) for found in peaks for kinds in found.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_foretold_is_what_the_allocator_has(tmp_path: Path) -> None:
    asked = [(world, f"{model} on {world}: {p} {t}", cell(model, p, t, e)) for model, world, p, t, e in cells()]
    assert len(asked) >= 30
    errors: dict[str, float] = {}
    short: list[str] = []
    with DryRuns(1) as runs:
        for world in (1, 2):
            mine = [(name, each) for ranks, name, each in asked if ranks == world]
            file = tmp_path / f"{world}.json"
            file.write_text(json.dumps([each for _, each in mine]))
            assert run_ranks(measure, world, tmp_path, str(file), world, timeout=600) == [0] * world, (
                tmp_path / "rank0.log"
            ).read_text()
            measured: list[list[int]] = json.loads(file.with_suffix(".peaks").read_text())
            for (name, each), peaks in zip(mine, measured, strict=True):
                said = foretold(runs, world, each)
                errors[name] = said / max(peaks) - 1
                if said * (1 + MARGIN) + WORKSPACE < max(peaks):
                    short.append(name)
    print(*(f"{error:+.2%}  {name}" for name, error in errors.items()), sep="\n")
    assert statistics.median(map(abs, errors.values())) <= 0.05
    assert not short, "said to fit where it does not"

"""The example scripts give the same numbers, to the bit, under ``torchrun`` and under ``dltrain launch``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import Sandbox

EXAMPLES = Path(__file__).parent.parent / "examples"

#: Two ranks, three ways. One thread each: threads share out sums, and so change the last bits.
TORCHRUN = ("torchrun", "--standalone", "--log-dir", "elastic", "--nproc-per-node", "2")
ONE_NODE = ("dltrain", "launch", "--nproc-per-node", "2")
TWO_NODES = ("dltrain", "launch", "--nodes", "2", "--nproc-per-node", "1")


def run(sandbox: Sandbox, launcher: tuple[str, ...], *script: str) -> str:
    command, *options = launcher
    done = sandbox.run(*options, str(EXAMPLES / script[0]), *script[1:], command=command, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(sandbox: Sandbox, name: str = "losses.txt") -> list[tuple[float, ...]]:
    """The lines of a file of losses, each the step and its losses in full precision; the file is removed."""
    path = sandbox.folder / name
    lines = [tuple(float(word) for word in line.split()) for line in path.read_text().splitlines()]
    path.unlink()
    assert [line[0] for line in lines] == list(range(1, len(lines) + 1))
    return lines


@pytest.mark.slow
def test_ddp_goes_on_under_either_launcher_from_where_the_other_stopped(sandbox: Sandbox) -> None:
    script = ("ddp_resume.py", "--epochs", "3")
    run(sandbox, TORCHRUN, *script)
    whole = losses(sandbox)
    assert len(whole) == 3 * 28
    assert whole[-1][1] < 0.5 < whole[0][1]
    for first, second in ((TORCHRUN, ONE_NODE), (TWO_NODES, TORCHRUN)):
        (sandbox.folder / "digits.pt").unlink()
        run(sandbox, first, *script, "--stop-after", "40")
        assert run(sandbox, second, *script).count("going on from step 40") == 2
        assert losses(sandbox) == whole


@pytest.mark.slow
@pytest.mark.parametrize("script", [("gan.py", "--steps", "60"), ("fsdp2.py", "--steps", "30")], ids=lambda s: s[0])
def test_the_same_losses_to_the_bit(sandbox: Sandbox, script: tuple[str, ...]) -> None:
    said: dict[str, str] = {}
    found: dict[str, list[tuple[float, ...]]] = {}
    for name, launcher in {"torchrun": TORCHRUN, "one node": ONE_NODE, "two nodes": TWO_NODES}.items():
        said[name] = run(sandbox, launcher, *script)
        found[name] = losses(sandbox)
    assert len(found["torchrun"]) == int(script[-1])
    assert len({line[1] for line in found["torchrun"]}) == len(found["torchrun"]), "the losses do not move"
    assert found["one node"] == found["two nodes"] == found["torchrun"]
    assert said["one node"] == said["two nodes"] == said["torchrun"] != ""


def test_a_recipe_of_ones_own_trains_from_a_module_beside_the_job(sandbox: Sandbox) -> None:
    source = (EXAMPLES / "my_recipe.py").read_text()
    assert len(source.splitlines()) < 45
    (sandbox.folder / "my_recipe.py").write_text(source)
    done = sandbox.run(
        "launch", "--nodes", "2", "recipe=my_recipe:MyRecipe", "train.optimizer.lr=0.01", "train.epochs=8"
    )
    assert done.returncode == 0, done.stderr
    rows = (sandbox.folder / "runs/digits/0001/metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["test/accuracy"] > 0.9


def test_a_launch_from_python(sandbox: Sandbox) -> None:
    done = sandbox.run(str(EXAMPLES / "notebook.py"), command="python")
    assert done.returncode == 0, done.stderr
    assert "finished at step 114: test accuracy 9" in done.stdout

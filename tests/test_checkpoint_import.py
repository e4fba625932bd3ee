"""``dltrain checkpoint import``: weights that something else saved, checked against the model of a job."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import dltrain
import pytest
import ranks
import torch
from command import Done
from command import dltrain as run
from dltrain.core.config import load_job
from dltrain.core.storage import Storage
from dltrain.training.recipes import outline
from ranks import run_ranks, train_ranks
from safetensors.torch import save_file
from torch import Tensor
from zero_saves import Net, save_zero, write_job

from .checkpoints import assert_same, bit_equal

ranks.preload("zero_saves")
if importlib.util.find_spec("deepspeed"):
    ranks.preload("deepspeed", "deepspeed.runtime.zero.muon.original_muon")

slow = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_job(tmp_path)
    return tmp_path


def adopt(source: object, *options: str, target: str = "out", job: str = "net.yaml") -> Done:
    return run("checkpoint", "import", str(source), target, "--job", job, *options)


def state() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return Net().state_dict()


def imported(target: str = "out") -> dict[str, Tensor]:
    found = dltrain.load_checkpoint(target)
    assert found.step == 0
    assert all(name.startswith("model.net.") for name in found)
    return found.weights()


def assert_imported(done: Done, want: dict[str, Tensor], target: str = "out") -> None:
    assert (done.code, done.err) == (0, "")
    assert_same(imported(target), want)
    assert run("checkpoint", "verify", target).code == 0


def test_a_state_dict(folder: Path) -> None:
    torch.save(state(), "net.pt")
    done = adopt("net.pt")
    assert_imported(done, state())
    assert done.out.startswith("net.pt is a state dict\n")
    assert dltrain.load_checkpoint("out").job["recipe"] == "zero_saves:NetRecipe"
    assert dltrain.load_checkpoint("out").manifest.extra["imported"] == {"from": "net.pt", "as": "a state dict"}


def test_an_entry_of_what_a_trainer_saved(folder: Path) -> None:
    average = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in state().items()}
    torch.save({"epoch": 3, "state_dict": state(), "ema": average}, "net.ckpt")
    assert_imported(adopt("net.ckpt"), state())
    assert_imported(adopt("net.ckpt", "--key", "ema", target="averaged"), average, "averaged")
    done = adopt("net.ckpt", "--key", "best", target="other")
    assert (done.code, "there are: state_dict, ema" in done.err) == (2, True)


def test_a_file_of_before_torch_1_6(folder: Path) -> None:
    torch.save(state(), "net.pth", _use_new_zipfile_serialization=False)
    assert_imported(adopt("net.pth"), state())


def test_safetensors_with_a_tied_weight_once(folder: Path) -> None:
    once = {name: tensor for name, tensor in state().items() if name != "head.weight"}
    save_file(once, "net.safetensors")
    assert_imported(adopt("net.safetensors"), state())


def test_what_convert_wrote_in_shards(folder: Path, bucket: str) -> None:
    torch.save(state(), "net.pt")
    adopt("net.pt")
    run("checkpoint", "convert", "out", "hub", "--max-shard-size", "200B")
    assert len(list(Path("hub").glob("*.safetensors"))) > 2
    target = f"s3://{bucket}/run"
    assert_imported(adopt("hub", target=target), state(), target)
    next(Path("hub").glob("model-00002*")).unlink()
    done = adopt("hub", target="other")
    assert (done.code, "names model-00002-of-00" in done.err, "is missing" in done.err) == (2, True, True)


def test_an_index_names_files_of_its_folder_only(folder: Path) -> None:
    Path("hub").mkdir()
    save_file(state() | {"head.weight": torch.zeros(11, 7)}, "secret.safetensors")
    index = {"weight_map": {"embed.weight": "../secret.safetensors"}}
    Path("hub/model.safetensors.index.json").write_text(json.dumps(index))
    done = adopt("hub")
    assert (done.code, "not in its folder" in done.err) == (2, True)


def test_names_that_differ_are_told_with_the_rename_that_helps(folder: Path) -> None:
    torch.save({f"module.{name}": tensor for name, tensor in state().items()}, "ddp.pt")
    done = adopt("ddp.pt")
    assert done.code == 2
    assert "missing: model.net.embed.weight, " in done.err
    assert "not in the model: module.embed.weight, " in done.err
    assert "did you mean --rename module.= ?" in done.err
    assert not Path("out").exists()
    assert_imported(adopt("ddp.pt", "--rename", "module.="), state())


def test_shapes_and_kinds_that_differ_are_told(folder: Path) -> None:
    wrong: dict[str, Any] = state() | {"lin.bias": torch.zeros(6), "lin.weight": torch.zeros(5, 7, dtype=torch.int32)}
    del wrong["frozen.bias"]
    torch.save(wrong | {"more": torch.zeros(1)}, "net.pt")
    done = adopt("net.pt")
    assert done.code == 2
    for said in (
        "lin.bias has the shape [6], model.net.lin.bias [5]",
        "lin.weight holds torch.int32, model.net.lin.weight torch.float32",
        "missing: model.net.frozen.bias",
        "not in the model: more",
    ):
        assert said in done.err
    assert not Path("out").exists()


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch was-run",)


def test_nothing_is_unpickled(folder: Path) -> None:
    torch.save({"w": torch.zeros(1), "x": Evil()}, "evil.pt")
    done = adopt("evil.pt")
    assert done.code == 2
    assert "evil.pt asks for posix.system" in done.err
    assert not Path("was-run").exists()


def test_wrong_requests(folder: Path) -> None:
    torch.save(state(), "net.pt")
    torch.save([1], "list.pt")
    torch.save({"a": 1}, "other.pt")
    Path("short.pt").write_bytes(Path("net.pt").read_bytes()[:500])
    Path("short.safetensors").write_bytes(b"12345678{")
    Path("empty").mkdir()
    adopt("net.pt")
    for source, options, said in [
        ("gone.pt", [], "no such file or folder"),
        ("list.pt", [], "holds a list, no state dict"),
        ("other.pt", [], "no state dict, but: a"),
        ("short.pt", [], "no whole file of torch.save"),
        ("short.safetensors", [], "no whole safetensors file"),
        ("empty", [], "nothing here that can be imported"),
        ("out", [], "a dltrain checkpoint already"),
        ("net.pt", ["--rename", "module"], "'module' renames nothing"),
        ("net.pt", [], "there is step-00000000 already"),
    ]:
        done = adopt(source, *options)
        assert (done.code, done.out) == (2, ""), source
        assert said in done.err, done.err


@pytest.mark.parametrize("stage", [pytest.param(1, marks=slow), pytest.param(2, marks=slow), 3])
def test_a_zero_checkpoint_that_deepspeed_saved(folder: Path, stage: int) -> None:
    pytest.importorskip("deepspeed")
    ended = run_ranks(save_zero, 2, folder, stage)
    assert ended == [0, 0], (folder / "rank0.log").read_text()
    want = torch.load("whole.pt", weights_only=True)
    done = adopt("saved")
    assert_imported(done, want)
    kind = "3" if stage == 3 else "1 or 2"
    assert done.out.startswith(f"saved is a DeepSpeed ZeRO {kind} checkpoint of step 2 and 2 ranks\n")
    assert bit_equal(imported()["head.weight"], want["embed.weight"])

    assert adopt("saved/global_step2", target="again").code == 0
    shutil.move(next(Path("saved/global_step2").glob("*rank_1*optim_states.pt")), "elsewhere.pt")
    lost = adopt("saved", target="other")
    assert (lost.code, "1 of 2 ranks' optimizer states are here" in lost.err) == (2, True)


def test_a_recipe_of_two_parts(folder: Path) -> None:
    Path("gan.yaml").write_text("recipe: gan\n", encoding="utf-8")
    model = outline(load_job(folder / "gan.yaml").job)
    values = {name.removeprefix("model."): torch.rand(t.shape).to(t.dtype) for name, t in model.items()}
    assert {name.partition(".")[0] for name in values} == {"generator", "discriminator"}
    torch.save(values, "gan.pt")
    assert adopt("gan.pt", job="gan.yaml").code == 0
    assert_same(dltrain.load_checkpoint("out").weights(), values)


def test_two_names_for_one_tensor_are_refused(folder: Path) -> None:
    torch.save(state() | {"net.lin.bias": torch.zeros(5)}, "net.pt")
    done = adopt("net.pt")
    assert (done.code, "net.lin.bias and lin.bias are both model.net.lin.bias" in done.err) == (2, True), done.err


def test_what_is_imported_is_what_a_run_itself_saves(folder: Path) -> None:
    trained = train_ranks(folder, 1, "train.steps=1", "checkpoint.every=1")
    own = str(trained.path / "checkpoints")
    assert run("checkpoint", "convert", own, "plain").code == 0
    Path("cnn.yaml").write_text("recipe: cnn\n", encoding="utf-8")
    assert adopt("plain", job="cnn.yaml").code == 0
    assert run("checkpoint", "diff", own, "out", "--match", "model.*").code == 0
    assert set(dltrain.load_checkpoint("out")) == {
        name for name in dltrain.load_checkpoint(own) if name[:6] == "model."
    }
    assert Storage("out").folders() == ["step-00000000"]

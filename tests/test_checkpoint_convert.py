"""``dltrain checkpoint convert``: plain safetensors in one file, or as the Hugging Face hub lays them out."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from command import Done, dltrain
from dltrain.checkpoint.export import export_weights
from dltrain.core.storage import Storage
from dltrain.core.tensorfile import nbytes
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from .checkpoints import State, assert_same, bit_equal, flip, grid, make_state, rows, save, shard_files, whole


def convert(*args: object) -> Done:
    return dltrain("checkpoint", "convert", *map(str, args))


def weights(state: State) -> State:
    found = {fqn.removeprefix("model.net."): t for fqn, t in state.items() if fqn.startswith("model.")}
    del found["head.weight"]  # tied
    return found


def load_folder(folder: Path) -> State:
    """What transformers and others read of a sharded folder."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    loaded: State = {}
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, "pt") as shard:
            loaded[name] = shard.get_tensor(name)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in loaded.values())
    return loaded


def test_one_file_with_its_config(storage: Storage, tmp_path: Path) -> None:
    save(storage, 3, grid(make_state()), normalizer={"mean": 0.5})
    target = tmp_path / "out" / "net.safetensors"
    done = convert(storage, target)
    assert (done.code, done.err) == (0, "")
    assert_same(load_file(target), weights(make_state()))
    with safe_open(target, "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["step"], config["model"], config["averaged"]) == (3, {}, False)
    assert config["tied_weights"] == {"head.weight": "embed.weight"}
    assert config["normalizer"] == {"mean": 0.5}
    assert "head.weight is tied to embed.weight" in done.out
    assert sorted(path.name for path in target.parent.iterdir()) == ["config.json", "net.safetensors"]


def test_shards_with_an_index(local: Storage, tmp_path: Path) -> None:
    save(local, 3, rows(make_state(), 4))
    done = convert(local, tmp_path / "hub", "--max-shard-size", "1kB")
    assert done.code == 0, done.err
    assert_same(load_folder(tmp_path / "hub"), weights(make_state()))
    files = sorted((tmp_path / "hub").glob("*.safetensors"))
    assert [path.name for path in files] == [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    sizes = [sum(t.numel() * t.element_size() for t in load_file(path).values()) for path in files]
    assert [size for size in sizes if size > 1000] == [nbytes("F32", (8, 4, 3, 3))]  # one that is larger by itself
    assert (tmp_path / "hub/config.json").is_file()
    again = convert(local, tmp_path / "hub", "--force")
    assert again.code == 0
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == ["config.json", "model.safetensors"]


def test_a_bucket_as_target(local: Storage, bucket: str) -> None:
    save(local, 3, rows(make_state(), 4))
    done = convert(local, f"s3://{bucket}/hub", "--max-shard-size", "1kB")
    assert done.code == 0, done.err
    out = Storage(f"s3://{bucket}/hub")
    assert len(out.names()) == 5
    assert set(json.loads(out.read("model.safetensors.index.json"))["weight_map"]) == set(weights(make_state()))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.other = nn.Linear(4, 4)


def tied_state(*, averages: bool) -> State:
    model = Tied()
    state: State = {f"model.m.{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, tensor in model.named_parameters():
        state[f"optimizer.m.{name}.exp_avg"] = torch.zeros_like(tensor)
        if averages:
            state[f"ema.m.{name}"] = tensor.detach() + 1
    return state


@pytest.mark.parametrize("averages", [False, True])
def test_tied_weights_are_stored_once_and_load(local: Storage, tmp_path: Path, averages: bool) -> None:
    state = tied_state(averages=averages)
    save(local, 1, rows(state, 2))
    target = tmp_path / "m.safetensors"
    assert convert(local, target, *["--ema"] * averages).code == 0
    assert set(load_file(target)) == {"embed.weight", "other.weight", "other.bias"}
    model = Tied()
    assert load_model(model, target) == (set(), [])
    kind = "ema.m." if averages else "model.m."
    assert torch.equal(model.head.weight, state[f"{kind}embed.weight"])
    assert torch.equal(model.other.bias, state[f"{kind}other.bias"])


def test_what_a_run_ends_with_has_the_average_under_each_name_of_a_tied_weight(local: Storage, tmp_path: Path) -> None:
    state = tied_state(averages=True)
    export_weights(local, save(local, 1, whole(state, 1)), tmp_path / "w.safetensors")
    model = Tied()
    model.load_state_dict(load_file(tmp_path / "w.safetensors"))
    assert torch.equal(model.embed.weight, state["ema.m.embed.weight"])


def test_weights_that_only_happen_to_be_equal_are_all_there(local: Storage, tmp_path: Path) -> None:
    same = torch.ones(3, 3)
    state = {f"model.m.{name}": same for name in ("a.weight", "b.weight", "scale")}
    state |= {"model.m.bias": torch.zeros(3), "model.m.running_mean": torch.zeros(3)}
    state |= {f"optimizer.m.{name}.exp_avg": torch.zeros(3, 3) for name in ("a.weight", "b.weight")}
    state["optimizer.m.bias.exp_avg"] = torch.zeros(3)
    save(local, 1, whole(state, 1))
    assert convert(local, tmp_path / "m.safetensors").code == 0
    assert set(load_file(tmp_path / "m.safetensors")) == {"a.weight", "b.weight", "scale", "bias", "running_mean"}


def test_a_part_of_a_gan(local: Storage, tmp_path: Path) -> None:
    state: State = {"model.generator.w": torch.ones(2), "model.discriminator.w": torch.zeros(3)}
    state["ema.generator.w"] = torch.full((2,), 5.0)
    save(local, 1, whole(state, 1))
    both = {"generator.w": torch.ones(2), "discriminator.w": torch.zeros(3)}
    for name, options, want in [
        ("both", (), both),
        ("averages", ("--ema",), both | {"generator.w": state["ema.generator.w"]}),
        ("one", ("--part", "discriminator"), {"w": torch.zeros(3)}),
        ("average", ("--part", "generator", "--ema"), {"w": state["ema.generator.w"]}),
    ]:
        assert convert(local, tmp_path / name, *options).code == 0
        assert_same(load_file(tmp_path / name / "model.safetensors"), want)


def test_wrong_requests_leave_what_is_there(local: Storage, tmp_path: Path) -> None:
    save(local, 1, whole(make_state(), 1))
    folder = tmp_path / "hub"
    folder.mkdir()
    for taken in ("model-00001-of-00002.safetensors", "config.json"):
        (folder / taken).write_text("mine")
        done = convert(local, folder)
        assert (done.code, f"there is a {taken}" in done.err, "--force" in done.err) == (2, True, True)
        (folder / taken).unlink()
    (folder / "notes.txt").write_text("mine")
    for options, said in [
        ((folder, "--part", "nett"), "did you mean 'net'?"),
        ((folder, "--ema"), "no averaged weights"),
        ((folder, "--max-shard-size", "many"), "'many' is no size"),
        ((folder / "one.safetensors", "--max-shard-size", "1GB"), "one file takes no shard size"),
        ((folder / "notes.txt",), "cannot convert"),
    ]:
        done = convert(local, *options)
        assert (done.code, done.out) == (2, "")
        assert said in done.err
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_damaged_checkpoint_replaces_nothing(local: Storage, tmp_path: Path) -> None:
    save(local, 1, whole(make_state(), 1))
    assert convert(local, tmp_path / "m.safetensors").code == 0
    before = (tmp_path / "m.safetensors").read_bytes()
    flip(shard_files(local, 1)[0])
    victims = [shard_files(local, 1)[0].read_bytes()]
    done = convert(local, tmp_path / "m.safetensors", "--force")
    assert (done.code, "do not match their blake3" in done.err) == (2, True)
    assert (tmp_path / "m.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))
    assert victims == [shard_files(local, 1)[0].read_bytes()]


def test_a_tensor_larger_than_the_memory_it_takes(local: Storage, tmp_path: Path) -> None:
    large = torch.arange(24 << 20, dtype=torch.int32).reshape(-1, 1 << 10)
    state: dict[str, Tensor] = {"model.m.w": large, "model.m.v": torch.ones(3)}
    save(local, 1, rows(state, 2))
    tracemalloc.start()
    try:
        for command in (["verify", str(local)], ["convert", str(local), str(tmp_path / "m.safetensors")]):
            assert dltrain("checkpoint", *command).code == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.65 * large.nbytes  # of 96 MiB
    assert bit_equal(load_file(tmp_path / "m.safetensors")["w"], large)

"""``dltrain checkpoint ls``, ``show`` and ``verify``: what they print, and how they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import dltrain
from dltrain.checkpoint.verify import verify
from dltrain.core.storage import Storage

from .checkpoints import flip, grid, make_state, rows, save, shard_files, truncate, whole


def checkpoint(*args: object) -> tuple[int, str, str]:
    done = dltrain("checkpoint", *map(str, args))
    return done.code, done.out, done.err


def shown(*args: object) -> Any:
    code, out, err = checkpoint(*args, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def write_run(folder: Path, **checkpoint_spec: Any) -> Path:
    """A run directory whose job has this section."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = {"to": None, "options": {}} | checkpoint_spec
    (folder / "run.json").write_text(json.dumps({"job": {"checkpoint": spec}}), encoding="utf-8")
    return folder


def edit(storage: Storage, step: int, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(storage.read(f"step-{step:08d}/manifest.json"))
    change(document)
    storage.write(f"step-{step:08d}/manifest.json", [json.dumps(document).encode()])


JOB = {
    "name": "t",
    "parallel": {"strategy": "fsdp", "tensor": 2},
    "train": {"early_stop": {"metric": "val/loss", "goal": "min"}, "schedule": {"metric": "val/acc", "goal": "max"}},
}
COURSE = {
    "falls": 0,
    "watches": {
        "train.early_stop.metric": {"best": 0.25, "since": 1},
        "train.schedule.metric": {"best": -0.75, "since": 0},
    },
}


def test_ls_tells_complete_ones_from_the_rest(storage: Storage) -> None:
    save(storage, 5, whole(make_state(), 2))
    save(storage, 10, grid(make_state()), course=COURSE)
    save(storage, 15, rows(make_state(), 4))
    edit(storage, 10, lambda document: document.update(job=JOB))
    edit(storage, 15, lambda document: document.update(surprise=1))
    storage.write("step-00000020/shard-00000-of-00001.safetensors", [b"half of it"])
    listed = {item["step"]: item for item in shown("ls", storage)}
    assert list(listed) == [20, 15, 10, 5]
    assert [item["state"] for item in listed.values()] == ["incomplete", "corrupt", "complete", "complete"]
    assert listed[20]["bytes"] == len(b"half of it")
    assert listed[10]["written_by"] == "fsdp x tensor 2, 4 ranks"
    assert listed[10]["best"] == {"val/loss": 0.25, "val/acc": 0.75}
    assert listed[5]["bytes"] == sum(t.numel() * t.element_size() for t in make_state().values())
    assert "surprise" in listed[15]["why"]
    code, out, _ = checkpoint("ls", storage)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split()[:1] == ["step"]
    assert lines[1].endswith("incomplete: no manifest: not completed, or set aside")
    assert "fsdp x tensor 2, 4 ranks  val/loss 0.25, val/acc 0.75  complete" in lines[3]
    assert [line["step"] for line in shown("ls", f"{storage}/step-00000010")] == [10]


def test_show_prints_the_position_and_the_tensors(local: Storage) -> None:
    save(local, 3, rows(make_state(), 4))
    save(local, 7, whole(make_state(), 1))
    told = shown("show", local, "--match", "*.embed.weight", "--match", "optimizer.*", "--step", 3)
    assert (told["step"], told["world"], told["cursor"]) == (3, 4, {"step": 3, "samples": 192})
    assert told["tensors"]["model.net.embed.weight"] == {"shape": [24, 10], "dtype": "F32", "pieces": 4, "bytes": 960}
    assert set(told["tensors"]) == {
        "model.net.embed.weight",
        "optimizer.net.embed.weight.exp_avg",
        "optimizer.net.embed.weight.step",
    }
    code, out, _ = checkpoint("show", local)
    assert code == 0
    assert "step 7 of 1,000, 448 samples" in out
    assert "model.net.norm.weight" in out
    assert out.endswith("9 tensors, 4.2 kB; the checkpoint has 1 shard file\n")
    assert shown("show", Path(str(local)) / "step-00000003")["step"] == 3
    code, _, err = checkpoint("show", local, "--match", "model.net.embed.wieght")
    assert (code, "did you mean 'model.net.embed.weight'?" in err) == (2, True)


def test_a_run_directory_leads_to_where_its_checkpoints_are(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs/a/0001")
    save(Storage(str(run / "checkpoints")), 4, whole(make_state(), 1))
    assert shown("show", run)["step"] == 4
    save(Storage(str(tmp_path / "elsewhere")), 9, whole(make_state(), 1))
    assert shown("show", write_run(run, to=str(tmp_path / "elsewhere")))["step"] == 9
    code, _, err = checkpoint("ls", tmp_path / "runs/a")
    assert code == 2
    assert f"did you mean {tmp_path}/runs/a/0001?" in err


def test_what_is_not_there_is_refused_with_what_is(tmp_path: Path, local: Storage) -> None:
    save(local, 100, whole(make_state(), 1))
    save(local, 200, whole(make_state(), 1))
    local.write("step-00000300/shard-00000-of-00001.safetensors", [b"half"])
    (tmp_path / "empty").mkdir()
    script = write_run(tmp_path / "script")
    (script / "run.json").write_text('{"job": {}}', encoding="utf-8")
    for source, options, said in [
        (local, ["--step", 190], ["there is no step 190", "did you mean 200?", "complete: 200, 100"]),
        (local, ["--step", 300], ["step-00000300 has no manifest", "complete: 200, 100"]),
        (f"{local}/step-00000110", [], ["there is no step 110", "did you mean 100?"]),
        (f"{local}/step-00000100", ["--step", 200], ["that of step 100, not of 200"]),
        (f"{local}s", [], ["no such folder", "did you mean 'run'?"]),
        (f"{local}/step-00000100/manifest.json", [], ["a file, not a checkpoint"]),
        (tmp_path / "empty", [], ["there is no complete checkpoint", "name a run directory"]),
        (tmp_path / "no/where", [], ["no such folder", f"{tmp_path}/no does not exist"]),
        (script, [], ["a script's run"]),
        ("nothing://here", [], ["unknown protocol 'nothing'"]),
    ]:
        code, out, err = checkpoint("show", source, *options)
        assert (code, out) == (2, ""), source
        assert not [text for text in said if text not in err], err


def test_nothing_in_a_bucket_is_refused(bucket: str) -> None:
    code, _, err = checkpoint("ls", f"s3://{bucket}/run")
    assert code == 2
    assert "there is no complete checkpoint in s3://" in err


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (flip, "not the bytes that were written (blake3)"),
        (truncate, "the file is cut short"),
        (Path.unlink, "the file is missing, which holds pieces of 7 tensors"),
        (lambda path: path.write_bytes(b""), "the file has no whole safetensors header"),
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b"model.net", b"model.nut")),
            "its safetensors header is not the one that was written",
        ),
    ],
)
def test_verify_names_what_is_wrong(local: Storage, harm: Callable[[Path], object], said: str) -> None:
    for step in (1, 2):
        save(local, step, rows(make_state(), 4))
    assert checkpoint("verify", local) == (0, "step-00000002: whole: every byte of its shards is as written\n", "")
    victim = shard_files(local, 2)[1]
    harm(victim)
    code, out, _ = checkpoint("verify", local)
    assert code == 1
    assert out.startswith(f"step-00000002/{victim.name}")
    assert said in out
    code, out, _ = checkpoint("verify", local, "--all")
    assert code == 1
    assert out.endswith("step-00000001: whole: every byte of its shards is as written\n")
    assert checkpoint("verify", local, "--step", 1)[0] == 0


def test_verify_finds_any_byte_of_a_shard_and_any_length(local: Storage) -> None:
    state = {"model.m.w": torch.randn(7, 3), "model.m.none": torch.empty(0, 5), "model.m.step": torch.tensor(1)}
    save(local, 1, rows(state, 2))
    for path in shard_files(local, 1):
        whole_file = path.read_bytes()
        for place in range(len(whole_file)):
            harmed = bytearray(whole_file)
            harmed[place] ^= 4
            path.write_bytes(harmed)
            assert list(verify(local, 1)), f"byte {place}: {whole_file[place : place + 1]!r}"
        for length in (*range(0, len(whole_file), 7), len(whole_file) - 1):
            path.write_bytes(whole_file[:length])
            assert list(verify(local, 1)), length
        path.write_bytes(whole_file + b"x")
        assert list(verify(local, 1))
        path.write_bytes(whole_file)
    assert not list(verify(local, 1))


def test_verify_lists_everything_by_tensor_and_bytes(storage: Storage) -> None:
    manifest = save(storage, 2, rows(make_state(), 4))
    victims = [[*manifest.tensors[name].blocks()][-1] for name in ("model.net.conv", "model.net.turned")]
    for piece in victims:
        data = bytearray(storage.read(f"step-00000002/{piece.file}"))
        data[piece.begin] ^= 1
        storage.write(f"step-00000002/{piece.file}", [data])
    code, out, _ = checkpoint("verify", storage)
    assert code == 1
    for name, piece in zip(("model.net.conv", "model.net.turned"), victims, strict=True):
        place = f"step-00000002/{piece.file}, tensor {name}, bytes [{piece.begin}, {piece.end}): "
        assert f"{place}not the bytes that were written (blake3)\n" in out
    assert out.endswith("step-00000002: 2 things wrong\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(surprise=1), "manifest.json: surprise: Extra inputs are not permitted"),
        (
            lambda d: d["tensors"]["model.net.conv"]["pieces"][0].update(file="../../secret.safetensors"),
            "manifest.json, tensor model.net.conv: pieces.0.file",
        ),
    ],
)
def test_a_manifest_that_is_not_ours_is_corrupt(
    local: Storage, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    save(local, 2, rows(make_state(), 4))
    edit(local, 2, change)
    code, out, _ = checkpoint("verify", local)
    assert code == 1
    assert said in out
    code, _, err = checkpoint("show", local)
    assert code == 2
    assert "checkpoint step-00000002 is corrupt" in err
    assert "--step" in err


def test_a_newer_format_is_refused_by_its_number(storage: Storage) -> None:
    save(storage, 2, rows(make_state(), 4))
    edit(storage, 2, lambda document: document.update(format=7, dltrain="9.9"))
    for command in ("show", "verify"):
        code, out, err = checkpoint(command, storage)
        assert (code, out) == (2, "")
        assert "checkpoint format 7, written by dltrain '9.9'; this version reads up to format 3" in err
        assert "install a newer dltrain" in err
    assert [item["state"] for item in shown("ls", storage)] == ["newer"]


def test_looking_takes_no_torch(local: Storage, tmp_path: Path) -> None:
    save(local, 1, rows(make_state(), 2))
    program = """
import sys
from dltrain.cli.main import main
for line in sys.argv[1:]:
    sys.argv = ["dltrain", "checkpoint", *line.split()]
    try:
        main()
    except SystemExit as end:
        assert not end.code
heavy = {"torch", "ray", "wandb", "s3fs"} & set(sys.modules)
assert not heavy, heavy
"""
    lines = [f"{command} {local}" for command in ("ls", "show", "verify", "gc")]
    lines += [f"diff {local} {local}", f"convert {local} {tmp_path}/out"]
    done = subprocess.run([sys.executable, "-c", program, *lines], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

"""What happens when something is wrong with a checkpoint, or a save is killed halfway."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from dltrain.checkpoint.manifest import CorruptCheckpoint
from dltrain.checkpoint.reader import catalogue, open_manifest, read
from dltrain.checkpoint.retention import prune
from dltrain.core.errors import JobError
from dltrain.core.storage import Storage

from .checkpoints import (
    assert_same,
    flip,
    make_state,
    newest,
    newest_good,
    rows,
    save,
    shard_files,
    truncate,
    whole,
)
from .s3_server import S3Server


@pytest.mark.parametrize(
    ("harm", "said"),
    [(flip, "do not match their blake3"), (truncate, "cut short"), (Path.unlink, "missing")],
)
@pytest.mark.parametrize("victim", [0, 3])
def test_a_harmed_shard_is_named_and_the_older_checkpoint_used(
    local: Storage, harm: Callable[[Path], None], said: str, victim: int
) -> None:
    save(local, 100, rows(make_state(1), 4))
    save(local, 200, rows(make_state(2), 4))
    path = shard_files(local, 200)[victim]
    harm(path)
    with pytest.raises(CorruptCheckpoint) as caught:
        read(local, open_manifest(local, 200))
    assert (caught.value.step, caught.value.file) == (200, path.name)
    assert said in caught.value.why
    if harm is not Path.unlink:
        assert caught.value.tensor.startswith(("model.", "optimizer."))
        assert caught.value.tensor in str(caught.value)

    messages: list[str] = []
    found = newest_good(local, lambda manifest: read(local, manifest), messages.append)
    assert found is not None
    assert found[0].step == 100
    assert_same(found[1], make_state(1))
    assert path.name in messages[0]
    assert "step-00000200" in messages[0]
    assert "step-00000100" in messages[1]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"format": 1}'])
def test_a_harmed_manifest_is_named_and_the_older_checkpoint_used(local: Storage, content: bytes) -> None:
    save(local, 100, whole(make_state(1), 1))
    save(local, 200, whole(make_state(2), 1))
    local.write("step-00000200/manifest.json", [content])
    with pytest.raises(CorruptCheckpoint) as caught:
        open_manifest(local, 200)
    assert (caught.value.step, caught.value.file) == (200, "manifest.json")
    assert newest(local)[0] == 100


def test_when_all_are_corrupt_it_is_an_error_and_when_there_is_none_it_is_none(local: Storage) -> None:
    assert newest_good(local, lambda manifest: read(local, manifest), print) is None
    for step in (1, 2):
        save(local, step, whole(make_state(), 1))
        flip(shard_files(local, step)[0])
    messages: list[str] = []
    with pytest.raises(CorruptCheckpoint) as caught:
        newest_good(local, lambda manifest: read(local, manifest), messages.append)
    assert caught.value.step == 2
    assert len(messages) == 3


def test_a_failing_storage_is_not_mistaken_for_a_corrupt_checkpoint(local: Storage) -> None:
    save(local, 1, whole(make_state(1), 1))
    manifest = save(local, 2, whole(make_state(2), 1))
    path = shard_files(local, 2)[0]
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        newest_good(local, lambda found: read(local, found), print)
    assert manifest.step == 2


SAVE_AND_DIE = """
import os, signal, sys, traceback
import torch
from dltrain.core.tensorfile import ITEMSIZE
from dltrain.checkpoint.writer import assign, commit, held, make_manifest, write_shard
from dltrain.core.contracts import Shard
from dltrain.core.storage import Storage

class Deadly(Storage):
    '''Kills this process before the block with the given number goes out, counted over all files of the save.'''
    left = -1
    def write(self, name, chunks):
        super().write(name, self.counted(chunks))
    def counted(self, chunks):
        for chunk in chunks:
            for begin in range(0, len(chunk), 256 << 10):
                if self.left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.left -= 1
                yield chunk[begin : begin + (256 << 10)]

def save(url, step, fatal, rows, columns):
    torch.manual_seed(step)
    storage = Deadly(url)
    storage.left = fatal
    full = torch.randn(2 * rows, columns)
    ranks = [
        {f"model.m.{n}": Shard((2 * rows, columns), (rows * r, 0), full[rows * r : rows * (r + 1)] + n) for n in (1, 2)}
        for r in range(2)
    ]
    shares = assign([held(shards) for shards in ranks])
    records = [record for r in range(2) for record in write_shard(storage, step, r, 2, ranks[r], shares[r])]
    commit(storage, make_manifest(records, step=step, total_steps=999, samples=0, world=2, job={}))

def run(*args):
    child = os.fork()
    if child == 0:
        try:
            save(*args)
        except BaseException:
            traceback.print_exc()
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

url, rows, columns, *numbers = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
assert run(url, 100, -1, rows, columns) == 0
for number in numbers:
    code = run(url, 200 + number, number, rows, columns)
    print(200 + number, flush=True)
    if code != -signal.SIGKILL:
        sys.exit(code)
"""


def save_and_die(url: str, *, rows: int, columns: int, at: Iterable[int]) -> list[int]:
    """Save step 100, then others, killed before the blocks of the numbers ``at``; their steps: the last survived."""
    command = [sys.executable, "-c", SAVE_AND_DIE, url, str(rows), str(columns), *map(str, at)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.splitlines()]


def test_a_save_killed_anywhere_leaves_the_older_checkpoint(local: Storage) -> None:
    """SIGKILL before every block that a save writes: headers and tensors of two shards, the manifest."""
    *killed, survivor = save_and_die(str(local), rows=3, columns=1 << 15, at=range(100))
    assert len(killed) == 2 * (1 + 2 * 2) + 1
    for step in killed:
        folder = Path(str(local), f"step-{step:08d}")
        assert any(path.suffix == ".partial" for path in folder.iterdir())  # it died inside a file
    assert [entry.step for entry in catalogue(local)] == [survivor, 100]
    read(local, open_manifest(local, 100))
    assert newest(local)[0] == survivor
    assert prune(local, 3) == killed[::-1]
    assert local.folders() == ["step-00000100", f"step-{survivor:08d}"]


def test_an_upload_killed_halfway_leaves_the_older_checkpoint(bucket: str, s3: S3Server) -> None:
    storage = Storage(f"s3://{bucket}/run")
    at = (155, 316, 322, 323)  # late in either shard of 161 blocks, before the manifest, and never
    *killed, survivor = save_and_die(str(storage), rows=5, columns=1 << 20, at=at)
    assert len(killed) == 3
    assert s3.client.list_multipart_uploads(Bucket=bucket)["Uploads"]  # some died in the middle of an upload
    assert [entry.step for entry in catalogue(storage)] == [survivor, 100]
    read(storage, open_manifest(storage, 100))
    assert newest(storage)[0] == survivor
    prune(storage, 3)
    assert storage.folders() == ["step-00000100", f"step-{survivor:08d}"]


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(small)]
    mounted = subprocess.run(mount, capture_output=True, text=True, timeout=30)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        storage = Storage(str(small / "run"))
        state = {"model.m.w": torch.randn(2 << 20)}
        save(storage, 1, whole(state, 1))
        with pytest.raises(OSError, match="No space left on device"):
            save(storage, 2, whole(state, 1))
        assert [entry.step for entry in catalogue(storage)] == [1]
        assert list((small / "run" / "step-00000002").iterdir()) == []
        assert_same(newest(storage)[1], state)
        (small / "filler").write_bytes(bytes(shutil.disk_usage(small).free))
        with pytest.raises(JobError, match=r"No space left on device.*free some space"):
            storage.check_writable()
    finally:
        subprocess.run(["umount", str(small)], check=True, timeout=30)

"""The storage folder, on a local disk, in memory through fsspec, and on a real S3 server of this process."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from dltrain.core.errors import JobError
from dltrain.core.storage import Storage

from .s3_server import S3Server


@pytest.fixture
def aws(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.use(monkeypatch)


@pytest.fixture(params=["local", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(str(tmp_path / "deep" / "run"))
    if request.param == "memory":
        return Storage(f"memory://{uuid.uuid4().hex}/run")
    return Storage(f"s3://{request.getfixturevalue('bucket')}/deep/run")


def test_files_are_written_whole_and_read_by_ranges(storage: Storage) -> None:
    storage.write("a/b.bin", [b"01234", b"", bytearray(b"567"), memoryview(b"89")])
    assert storage.read("a/b.bin") == b"0123456789"
    assert storage.read_range("a/b.bin", 3, 8) == b"34567"
    assert storage.read_range("a/b.bin", 4, 4) == b""
    assert storage.size("a/b.bin") == 10
    storage.write("a/b.bin", [b"new"])
    assert storage.read("a/b.bin") == b"new"
    with pytest.raises(OSError, match=r"ends before byte 9|range"):
        storage.read_range("a/b.bin", 2, 9)
    with pytest.raises(ValueError, match="no range"):
        storage.read_range("a/b.bin", 3, 2)


def test_listing_and_removing(storage: Storage) -> None:
    assert storage.names() == []
    assert storage.folders() == []
    for name in ("top", "one/x", "one/deep/y", "one-more/z"):
        storage.write(name, [b"1"])
    assert storage.names() == ["one-more/z", "one/deep/y", "one/x", "top"]
    assert storage.names("one") == ["one/deep/y", "one/x"]
    assert storage.names("none") == []
    assert storage.folders() == ["one", "one-more"]
    assert storage.exists("one/x")
    assert not storage.exists("one/none")
    assert not storage.exists("one")
    assert not storage.exists("top/below-a-file")

    storage.remove("one/x")
    storage.remove("one/x")
    assert storage.names("one") == ["one/deep/y"]
    storage.remove_tree("one")
    storage.remove_tree("one")
    assert storage.names() == ["one-more/z", "top"]


@pytest.mark.parametrize("operation", [Storage.read, Storage.size, lambda s, n: s.read_range(n, 0, 4)])
def test_a_missing_file_is_named(storage: Storage, operation: Callable[[Storage, str], object]) -> None:
    storage.write("there", [b"1"])
    with pytest.raises(FileNotFoundError) as caught:
        operation(storage, "step-1/gone")
    assert "step-1/gone" in str(caught.value)


def test_a_failing_source_leaves_the_old_file_and_nothing_else(storage: Storage) -> None:
    def chunks(count: int) -> Iterator[bytes]:
        for _ in range(count):
            yield bytes(20 << 20)  # more than one remote request can hold, so an upload has begun
        raise RuntimeError("the source failed")

    storage.write("file", [b"old"])
    for count in (0, 1, 2):
        with pytest.raises(RuntimeError, match="the source failed"):
            storage.write("file", chunks(count))
        with pytest.raises(RuntimeError, match="the source failed"):
            storage.write(f"new/{count}", chunks(count))
    gc.collect()  # fsspec's files commit what they have when they are collected
    assert storage.names() == ["file"]
    assert storage.read("file") == b"old"


def test_nothing_half_written_stays_on_the_disk(tmp_path: Path) -> None:
    def fails() -> Iterator[bytes]:
        yield b"some"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Storage(str(tmp_path)).write("file", fails())
    assert list(tmp_path.iterdir()) == []


def test_a_failed_upload_leaves_no_temporary_file() -> None:
    def fails() -> Iterator[bytes]:
        yield b"some"
        raise RuntimeError("the source failed")

    place = uuid.uuid4().hex
    with pytest.raises(RuntimeError):
        Storage(f"memory://{place}").write("file", fails())
    assert fsspec.filesystem("memory").find(f"/{place}") == []


def test_a_failed_upload_is_aborted_at_the_server(bucket: str, s3: S3Server) -> None:
    def fails() -> Iterator[bytes]:
        yield bytes(33 << 20)
        raise RuntimeError("the source failed")

    with pytest.raises(RuntimeError):
        Storage(f"s3://{bucket}").write("file", fails())
    assert "Uploads" not in s3.client.list_multipart_uploads(Bucket=bucket)


def test_large_files_go_in_several_requests(bucket: str) -> None:
    data = os.urandom(1 << 20) * 70
    storage = Storage(f"s3://{bucket}/x")
    storage.write("large", [data[:5], memoryview(data)[5:]])
    assert storage.size("large") == len(data)
    assert storage.read_range("large", 1 << 20, 69 << 20) == data[1 << 20 : 69 << 20]


def test_a_range_goes_into_any_number_of_buffers(storage: Storage) -> None:
    data = os.urandom(10_000)
    storage.write("file", [data])
    sizes = [0, 1, 5, 0, 2000, *[2] * 3000, 1500, 0]
    buffers = [memoryview(bytearray(size)) for size in sizes]
    storage.read_into("file", 7, buffers)
    assert b"".join(buffers) == data[7 : 7 + sum(sizes)]
    begin = 7
    for given, size in zip(storage.fill("file", 7, buffers), sizes, strict=True):  # each is full when it is given
        assert given == data[begin : begin + size]
        begin += size
    with pytest.raises(OSError, match="ends before byte 10001"):
        storage.read_into("file", 9_000, [memoryview(bytearray(500)), memoryview(bytearray(501))])


def test_listings_are_never_stale(bucket: str) -> None:
    one, other = Storage(f"s3://{bucket}/run"), Storage(f"s3://{bucket}/run")
    one.write("a", [b"1"])
    assert one.names() == ["a"]
    other.write("b/c", [b"22"])
    other.remove("a")
    assert one.names() == ["b/c"]
    assert one.folders() == ["b"]
    assert not one.exists("a")


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../up", "a/../../b", "a//b", "a/", "./a", "a\\..\\b", "a\0b"])
def test_names_may_not_leave_the_folder(tmp_path: Path, name: str) -> None:
    storage = Storage(str(tmp_path / "in"))
    for operation in (storage.read, storage.size, storage.exists, storage.remove, storage.remove_tree):
        with pytest.raises(ValueError, match="no name inside a folder"):
            operation(name)
    with pytest.raises(ValueError, match="no name inside a folder"):
        storage.write(name, [b"1"])
    assert list(tmp_path.iterdir()) == []


def test_local_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("here")
    monkeypatch.chdir("/")
    storage.write("file", [b"1"])
    assert (tmp_path / "here" / "file").read_bytes() == b"1"
    assert str(storage) == str(tmp_path / "here")
    assert Storage(f"file://{tmp_path}/here").read("file") == b"1"
    assert (tmp_path / "here" / "file").stat().st_mode & 0o444 & ~_umask() == 0o444 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("", None, "names no folder"),
        ("file://", None, "names no folder"),
        ("sfpt://host/x", None, "did you mean 'sftp'?"),
        ("qq://bucket/x", None, "known: abfs, az, file, "),
        ("gs://bucket/x", None, "gs:// needs a package that is not installed"),
        ("./here", {"anon": True}, "a local folder takes no options, not 'anon'"),
        ("s3://bucket/x", {"key": "a", "username": "b"}, "not both"),
    ],
)
def test_a_wrong_request_is_refused(url: str, options: dict[str, object] | None, said: str) -> None:
    with pytest.raises(JobError) as caught:
        Storage(url, options)
    assert said in str(caught.value)
    assert caught.value.problems[0].where == "checkpoint.to"


@pytest.mark.parametrize("url", ["s3://key:hunter2@bucket/x", "sftp://me:hun/ter2@x@host/x", "qq://a:hunter2@b"])
def test_a_password_in_the_url_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(JobError) as caught:
        Storage(url)
    assert "ter2" not in str(caught.value)
    assert "holds a password" in str(caught.value)


def test_a_local_folder_that_cannot_be_written(tmp_path: Path) -> None:
    Storage(str(tmp_path / "new")).check_writable()
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(JobError, match=r"cannot write to .*/file/run: ") as caught:
        Storage(str(tmp_path / "file" / "run"), where="resume").check_writable()
    assert caught.value.problems[0].where == "resume"


def test_a_bucket_that_does_not_exist(bucket: str) -> None:
    Storage(f"s3://{bucket}/run").check_writable()
    assert Storage(f"s3://{bucket}").names() == []
    with pytest.raises(JobError, match=r"cannot write to s3://no-such-bucket/run: .*does not exist") as caught:
        Storage("s3://no-such-bucket/run").check_writable()
    assert caught.value.problems[0].where == "checkpoint.to"


def test_no_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    storage = Storage(f"s3://{bucket}/run")
    with pytest.raises(OSError, match="credentials"):
        storage.write("file", [b"1"])
    with pytest.raises(JobError, match="credentials"):
        storage.check_writable()


@pytest.mark.usefixtures("aws")
def test_a_server_that_never_answers_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        storage = Storage("s3://bucket/run", {"endpoint_url": address}, timeout=0.5)
        with pytest.raises(TimeoutError, match=r"no answer to 'complete' within 0\.5 s"):
            storage.write("file", [b"1"])
        with pytest.raises(JobError, match=r"no answer .* can this machine reach it"):
            storage.check_writable()


def test_a_remote_folder_is_not_used_across_a_fork() -> None:
    storage = Storage(f"memory://{uuid.uuid4().hex}")
    child = os.fork()
    if child == 0:
        try:
            storage.names()
        except RuntimeError as error:
            os._exit(7 if "after the fork" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_each_storage_has_its_own_client(bucket: str) -> None:
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    Storage(f"s3://{bucket}").names()
    assert not S3FileSystem._cache


def test_what_is_imported_and_what_is_missing() -> None:
    program = """
import sys
from dltrain.core.storage import Storage
from dltrain.core.errors import JobError
Storage("/nowhere").exists("file")
heavy = {"fsspec", "s3fs", "aiohttp", "torch", "ray"} & set(sys.modules)
assert not heavy, heavy
sys.modules["s3fs"] = None  # as if it were not installed
try:
    Storage("s3://bucket/run")
except JobError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "pip install 'dltrain[s3]'" in done.stdout

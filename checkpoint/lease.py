"""One run at a time writes to a folder of checkpoints: a small file says which. No torch.

The file is renewed while the run goes on. A run that finds another's is refused, unless the other is known to be over:
its process is gone (where that can be seen), or nobody has renewed it for :data:`TTL` seconds. What is guaranteed on
which storage is in docs/decisions/0021-lease.md.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, ValidationError

from ..core.errors import JobError, Problem
from ..core.processes import Process, boot, namespace
from ..core.storage import Storage

LEASE = "lease.json"
TTL = 60.0
"""Seconds after which a lease that was not renewed is over."""
RENEW = 15.0
"""Seconds between renewals."""

_READ_BACK = 1.0  # seconds until a storage without atomic creation shows who came last


class Lease(BaseModel):
    """Who writes to the folder.

    Attributes:
        token: of this taking; what is written under another is not the holder's. After a point it has the number of the
            generation of ranks that it was handed to: an older one's writes nothing more.
        run: the run's id.
        boot, namespace: the start of that machine, and what process numbers are good for there: names of machines may
            be the same.
        pid: process that took it.
        began: when that process began, in clock ticks after the machine did: process numbers are used again.
        since, renewed: Unix time in seconds.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    token: str
    run: str
    host: str
    boot: str
    namespace: str
    pid: int
    began: int
    since: float
    renewed: float

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"run {self.run} (process {self.pid} on {self.host}, since {since})"


def take(storage: Storage, run: str, *, pid: int, on_message: Callable[[str], None], where: str) -> str:
    """Take the lease for ``run``, whose process ``pid`` of this machine is; the token to renew it with.

    Raises:
        JobError: another run holds it, or the storage fails; ``where`` is the job's key that named the folder.
    """
    try:
        held = _read(storage)
        if held is not None and held.run != run:
            _expect_over(storage, held, on_message, where)
        now = time.time()
        mine = Lease(
            token=secrets.token_hex(8),
            run=run,
            host=socket.gethostname(),
            boot=boot(),
            namespace=namespace(),
            pid=pid,
            began=process.started if (process := Process.of(pid)) else 0,
            since=now,
            renewed=now,
        )
        _write(storage, mine, new=held is None)
        found = _read(storage)
    except OSError as error:
        raise JobError(Problem(f"cannot take the lease of {storage}: {error.strerror or error}", where)) from error
    if found is None or found.token != mine.token:
        raise _taken(storage, found or mine, where)
    return mine.token


def of_generation(token: str, generation: int) -> str:
    """The token for a generation of the holder's ranks. Once it was renewed, those of older ones are no longer good."""
    return f"{_taking(token)}.{generation}"


def renew(storage: Storage, token: str) -> Lease | None:
    """Say that the holder of ``token`` is still at work; who has taken over instead, if somebody has.

    An older generation's token in the file gives way to a newer one's. The holder's own, which is of none, leaves it.

    A lease file that is gone is no longer anybody's, and is not made again.

    Raises:
        OSError: the storage failed.
    """
    held = _read(storage)
    if held is None or not _good(token, held):
        return held
    newest = token if _generation(token) >= 0 else held.token
    renewed = held.model_copy(update={"token": newest, "renewed": time.time()})
    storage.write(LEASE, [renewed.model_dump_json().encode()])
    return None


def holder(storage: Storage) -> Lease | None:
    """Who holds the lease, whether it is over or not. Raises OSError."""
    return _read(storage)


def release(storage: Storage, token: str) -> None:
    """Give the lease back, if ``token`` still holds it. Raises OSError."""
    held = _read(storage)
    if held is not None and _taking(held.token) == _taking(token):
        storage.remove(LEASE)


def _taking(token: str) -> str:
    return token.partition(".")[0]


def _generation(token: str) -> int:
    """Of ranks; -1 where the token is the holder's own."""
    return int(token.partition(".")[2] or -1)


def _good(token: str, held: Lease) -> bool:
    """Whether ``token`` is the holder's, and of no older generation than the one that is at work."""
    own = _generation(token) < 0
    return _taking(token) == _taking(held.token) and (own or _generation(token) >= _generation(held.token))


def _expect_over(storage: Storage, held: Lease, on_message: Callable[[str], None], where: str) -> None:
    """Return if the holder's run is over, and say so."""
    if (held.boot, held.namespace) == (boot(), namespace()):
        if Process(held.pid, held.began).alive:
            raise _taken(storage, held, where)
        on_message(f"taking over {storage} from {held}, whose process is gone")
        return
    age = time.time() - held.renewed
    if age < TTL:
        raise _taken(storage, held, where)
    on_message(f"taking over {storage} from {held}, which has not been heard of for {age:.0f} s")


def _taken(storage: Storage, held: Lease, where: str) -> JobError:
    what = f"{storage} is in use by {held}"
    hint = f"name another folder; if that run is over, its lease ends {TTL:g} s after its last sign of life"
    return JobError(Problem(what, where, hint))


def _read(storage: Storage) -> Lease | None:
    """The lease, if there is one that can be read: a damaged one protects nothing."""
    try:
        return Lease.model_validate_json(storage.read(LEASE))
    except (FileNotFoundError, ValidationError):
        return None


def _write(storage: Storage, lease: Lease, *, new: bool) -> None:
    data = [lease.model_dump_json().encode()]
    if not new:
        storage.write(LEASE, data)
    elif _created(storage, data):
        return
    time.sleep(_READ_BACK)  # of two that came at once, the later write stands


def _created(storage: Storage, data: list[bytes]) -> bool:
    """Whether there is a lease now that nobody writes over: this one, or one that came first."""
    try:
        return storage.create(LEASE, data)
    except FileExistsError:
        if _read(storage) is None:  # damaged, so it protects nothing
            storage.write(LEASE, data)
            return False
        return True


def torchrun_owner() -> tuple[str, int]:
    """The run and its process for a rank without a launcher: torchrun's agent, which starts ranks again, or itself."""
    pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    process = Process.of(pid)
    began = process.started if process else 0
    return f"torchrun-{socket.gethostname()}-{boot()[:8]}-{namespace()}-{pid}-{began}", pid

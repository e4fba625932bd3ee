"""The node agent's hold on a rank's memory: what the rank has copied there is there when the rank is gone."""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import socket
from dataclasses import dataclass

from ..checkpoint.image import Image, Images

_MAX_MESSAGE, _MAX_FDS = 1 << 16, 250
# The agent has not come to read, or the kernel has no room for descriptors that are under way.
_LATER = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS})
_GONE = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})


@dataclass(frozen=True)
class Given:
    """Memory that the agent hands to a new rank.

    Attributes:
        restores: it holds a part of the snapshot that all ranks go on from.
        mine: it was this rank's before, and is again: it may be written over once all have gone on.
    """

    fd: int
    restores: bool
    mine: bool


class Hold:
    """This rank's end of the socket over which descriptors of memory go (SOCK_SEQPACKET).

    from the agent  {"t": "given", "images": [{"restores", "mine"}, …]} with a descriptor each, before the rank starts
    to the agent    {"t": "keep"} with a descriptor; {"t": "drop", "inode"}

    Training never waits for the agent: what it has no room for goes with the next message, or with :meth:`flush`.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._waiting: list[tuple[dict[str, object], int | None]] = []

    def given(self) -> list[Given]:
        """What the agent has handed over."""
        found: list[Given] = []
        with contextlib.suppress(OSError):  # nothing more
            while True:
                data, fds, _, _ = socket.recv_fds(self._sock, _MAX_MESSAGE, _MAX_FDS)
                if not data:
                    break
                labels = json.loads(data)["images"]
                found += [Given(fd, label["restores"], label["mine"]) for fd, label in zip(fds, labels, strict=True)]
        return found

    def keep(self, fd: int) -> None:
        """Have the agent hold this memory. The descriptor stays open until :meth:`drop`."""
        self._waiting.append(({"t": "keep"}, fd))
        self.flush()

    def drop(self, fd: int) -> None:
        """Have the agent let go of this memory."""
        if ({"t": "keep"}, fd) in self._waiting:  # it never heard of it
            self._waiting.remove(({"t": "keep"}, fd))
        else:
            self._waiting.append(({"t": "drop", "inode": os.fstat(fd).st_ino}, None))
        self.flush()

    def flush(self) -> None:
        """Send what the agent had no room for, as far as it has now.

        Raises:
            OSError: the socket fails otherwise than by the agent's end, with which all is gone that it held.
        """
        while self._waiting:
            message, fd = self._waiting[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd is not None else []
            try:
                self._sock.sendmsg([json.dumps(message).encode()], rights, socket.MSG_NOSIGNAL)
            except OSError as error:
                if error.errno in _LATER:
                    return
                if error.errno not in _GONE:
                    raise
            self._waiting.pop(0)


def images_of(given: list[Given]) -> Images | None:
    """The snapshot to go on from; None where none was handed over."""
    found = [Image(item.fd) for item in given if item.restores]
    return Images(found) if found else None

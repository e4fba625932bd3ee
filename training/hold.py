"""The node agent's hold on a rank's memory: what the rank has copied there is there when the rank is gone."""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
from dataclasses import dataclass

from ..checkpoint.image import Image, Images

_MAX_MESSAGE, _MAX_FDS = 1 << 16, 250


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
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

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
        """Have the agent hold this memory."""
        self._send({"t": "keep"}, [fd])

    def drop(self, fd: int) -> None:
        """Have the agent let go of this memory."""
        self._send({"t": "drop", "inode": os.fstat(fd).st_ino})

    def _send(self, message: dict[str, object], fds: list[int] | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with contextlib.suppress(OSError):  # an agent that is gone holds nothing: then there is no such snapshot
            self._sock.sendmsg([json.dumps(message).encode()], rights, socket.MSG_NOSIGNAL)


def images_of(given: list[Given]) -> Images | None:
    """The snapshot to go on from; None where none was handed over."""
    found = [Image(item.fd) for item in given if item.restores]
    return Images(found) if found else None

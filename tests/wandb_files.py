"""The files that wandb writes where it has no server."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any


def offline_rows(folder: Path, record_type: Any) -> list[dict[str, Any]]:
    """The history rows of the one ``.wandb`` file in ``folder``: records in LevelDB's log format."""
    (file,) = folder.glob("*.wandb")
    data, at, record, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        crc, size, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + 7 : at + 7 + size]
        assert zlib.crc32(piece, zlib.crc32(bytes([kind]))) == crc
        at += 7 + size
        record = record + piece if kind in (3, 4) else piece
        if kind in (1, 4):
            message = record_type.FromString(record)
            if message.WhichOneof("record_type") == "history":
                items = message.history.item
                rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return rows

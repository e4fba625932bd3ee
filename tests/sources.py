"""Files that tests of data sources read, and how their refusals are looked at."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dltrain.core.errors import JobError
from dltrain.core.job import DataSpec, Split
from dltrain.core.storage import Storage
from dltrain.data.sources import open_source
from dltrain.data.split import split_source

_IDX_CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx_file(array: np.ndarray) -> bytes:
    """The array as an IDX file, as http://yann.lecun.com/exdb/mnist describes it."""
    head = struct.pack(">BBBB", 0, 0, _IDX_CODES[array.dtype.str[1:]], array.ndim)
    return head + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(array.dtype.newbyteorder(">")).tobytes()


def refusal(source: str, **options: Any) -> tuple[str, str]:
    """(where, the whole message) of the refusal of a source with these options."""
    with pytest.raises(JobError) as refused:
        open_source(DataSpec(source=source, options=options))
    return refused.value.problems[0].where, str(refused.value)


def parts_of(storage: Storage | str, split: Split | None = None, **options: Any) -> dict[str, list[dict[str, Any]]]:
    """The samples of each part, as plain values."""
    spec = DataSpec(source=str(storage), options=options, split=split or Split(train=0.5, val=0.25, test=0.25))
    source = open_source(spec)
    fetched = {name: source.fetch(np.asarray(i)) for name, i in split_source(source, spec.split).items() if len(i)}
    return {
        name: [{key: value[row].tolist() for key, value in fields.items()} for row in range(len(fields["x"]))]
        for name, fields in fetched.items()
    }


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

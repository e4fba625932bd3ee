"""Write down everything a script can see of its process, and what becomes of what it does: ``rank<RANK>.json``.

torchrun --nproc-per-node 2 surroundings.py OUT
dltrain launch --nproc-per-node 2 surroundings.py OUT
"""

import atexit
import concurrent.futures
import dataclasses
import faulthandler
import gc
import inspect
import io
import json
import locale
import logging
import multiprocessing
import os
import pathlib
import pickle
import random
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import typing
import warnings
import weakref
import zipfile

AT_START = {
    "environ": dict(os.environ),
    "exception hook": repr(sys.excepthook),
    "globals": sorted(set(globals()) - {"AT_START"}),
    "logging": [logging.root.level, repr(logging.root.handlers), repr(logging.lastResort), logging.raiseExceptions],
    "multiprocessing": [multiprocessing.get_start_method(allow_none=True), multiprocessing.current_process().name],
    "timers": signal.getitimer(signal.ITIMER_REAL),
    "warning filters": [repr(entry) for entry in warnings.filters],
}


def stream_facts(stream: typing.Any) -> dict[str, typing.Any]:
    return {
        "types": [type(stream).__name__, type(stream.buffer).__name__],
        "text": [stream.encoding, stream.errors, stream.newlines, stream.line_buffering, stream.write_through],
        "named": [stream.name, stream.mode, stream.fileno(), stream in (sys.__stdout__, sys.__stderr__)],
    }


def main_facts() -> dict[str, typing.Any]:
    main = sys.modules["__main__"]
    loader = main.__loader__
    return {
        "module": [main.__dict__ is globals(), sys.modules.get("__mp_main__", main) is main, repr(main)],
        "names": [main.__name__, main.__package__, main.__file__, main.__doc__, getattr(main, "__cached__", "missing")],
        "builtins": repr(main.__builtins__),
        "annotations": inspect.get_annotations(main),
        "spec": repr(main.__spec__),
        "loader": [type(loader).__module__, type(loader).__name__, loader.name, loader.path],
        "source": [main_facts.__code__.co_filename, inspect.getsource(main_facts).splitlines()[0]],
    }


def descriptors() -> dict[str, list[typing.Any]]:
    """What each descriptor is, and whether a program that is executed inherits it."""
    found = {}
    for entry in pathlib.Path("/proc/self/fd").iterdir():
        try:
            found[entry.name] = [str(entry.readlink()), os.get_inheritable(int(entry.name))]
        except OSError:  # the one that listed the folder
            continue
    return found


def inherited() -> list[str]:
    listing = subprocess.run(["ls", "/proc/self/fd"], capture_output=True, text=True, close_fds=False, check=True)
    return listing.stdout.split()


def system_facts() -> dict[str, typing.Any]:
    wanted = ("SigBlk", "SigIgn", "SigCgt", "Threads", "Umask", "NoNewPrivs", "Seccomp", "Cpus_allowed", "CapEff")
    status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    return {
        "status": {name: status[name].strip() for name in wanted},
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if "RLIMIT_" in name},
        "handlers": {s.name: repr(signal.getsignal(s)) for s in signal.Signals},
        "wakeup": signal.set_wakeup_fd(-1),
        "session": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
        "priority": [os.nice(0), os.sched_getscheduler(0), pathlib.Path("/proc/self/oom_score_adj").read_text()],
        "stdin": [stat.S_IFMT(os.fstat(0).st_mode), sys.stdin.encoding, sys.stdin.errors, sys.stdin.isatty()],
        "children": pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
        "inherited": inherited(),
    }


def interpreter_facts() -> dict[str, typing.Any]:
    flags = [name for name in dir(sys.flags) if not name.startswith(("_", "n_")) and name not in ("count", "index")]
    return {
        "flags": {name: getattr(sys.flags, name) for name in flags},
        "options": [sys._xoptions, sys.warnoptions, sys.pycache_prefix, sys.dont_write_bytecode],
        "command": [
            sys.argv,
            sys.orig_argv[1:],
            os.path.realpath(sys.executable),
            sys.prefix,
        ],
        "path": [sys.path, str(pathlib.Path.cwd()), multiprocessing.process.ORIGINAL_DIR, tempfile.gettempdir()],
        "streams": [stream_facts(sys.stdout), stream_facts(sys.stderr)],
        "threads": [thread.name for thread in threading.enumerate()],
        "main thread": [
            threading.main_thread().ident == threading.get_ident(),
            threading.get_native_id() == os.getpid(),
        ],
        "hooks": [repr(threading.excepthook), repr(sys.unraisablehook), repr(sys.gettrace()), repr(sys.getprofile())],
        "faulthandler": faulthandler.is_enabled(),
        "collector": [gc.isenabled(), gc.get_threshold(), gc.get_debug()],
        "recursion": [sys.getrecursionlimit(), sys.getswitchinterval(), sys.get_int_max_str_digits()],
        "locale": [locale.setlocale(locale.LC_ALL), sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()],
        "time": [time.tzname, time.timezone, time.process_time() < 60],
    }


def torch_facts() -> dict[str, typing.Any]:
    import torch

    return {
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "modes": [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")],
        "defaults": [str(torch.get_default_dtype()), torch.get_float32_matmul_precision()],
        "debug level": torch.distributed.get_debug_level().name,
    }


def random_facts() -> dict[str, typing.Any]:
    """What is random in every fresh process."""
    import numpy
    import torch

    return {
        "random": random.random(),
        "numpy": numpy.random.rand(),
        "torch": torch.rand(1).item(),
        "torch seed": torch.initial_seed(),
        "authentication key": multiprocessing.current_process().authkey.hex(),
    }


@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.5


class Squares:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return index * index


def square(point: Point) -> tuple[Point, bool]:
    return Point(point.x**2), multiprocessing.parent_process() is not None


def fill(tensor: typing.Any) -> None:
    tensor += 1


def pool(method: str) -> list[str]:
    with multiprocessing.get_context(method).Pool(1) as workers:
        return [repr(entry) for entry in workers.map_async(square, [Point(2), Point(3)]).get(timeout=60)]


def executor() -> str:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as workers:
        return repr(workers.submit(square, Point(5)).result(timeout=60))


def loader(method: str) -> list[list[int]]:
    from torch.utils.data import DataLoader

    batches = DataLoader(Squares(), batch_size=2, num_workers=1, multiprocessing_context=method)
    return [batch.tolist() for batch in batches]


def shared_tensor() -> list[typing.Any]:
    import torch
    import torch.multiprocessing

    tensor = torch.zeros(3).share_memory_()
    process = torch.multiprocessing.get_context("fork").Process(target=fill, args=(tensor,))
    process.start()
    process.join(60)
    return [process.exitcode, tensor.tolist()]


def saved_class() -> str:
    import torch

    buffer = io.BytesIO()
    torch.save({"point": Point(7)}, buffer)
    buffer.seek(0)
    return repr(torch.load(buffer, weights_only=False))


def forked() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(11)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def prompt() -> str:
    try:
        return input()
    except EOFError as error:
        return repr(error)


def deeds() -> dict[str, typing.Any]:
    return {
        "annotations": [repr(Point.__annotations__), repr(typing.get_type_hints(Point))],
        "pickle": [repr(pickle.loads(pickle.dumps(Point(3)))), Point.__module__],
        "torch.save": saved_class(),
        "pools": [pool("fork"), pool("spawn"), executor()],
        "loaders": [loader("fork"), loader("forkserver")],
        "shared tensor": shared_tensor(),
        "fork": forked(),
        "shell": subprocess.run("echo $RANK; pwd", shell=True, capture_output=True, text=True, check=True).stdout,
        "input": prompt(),
    }


class Closing:
    """Writes when it is destroyed, as archives and HDF5 files do."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __del__(self) -> None:
        self.path.write_text("destroyed")


def outlive_the_main_thread(path: pathlib.Path) -> None:
    threading.main_thread().join()
    path.write_text("ran on")


if __name__ == "__main__":
    out = pathlib.Path(sys.argv[1], f"rank{os.environ['RANK']}")
    out.mkdir()
    # what looks on comes before what changes anything
    looks = {"at start": AT_START, "descriptors": descriptors(), "main": main_facts(), "system": system_facts()}
    facts = {
        **looks,
        "interpreter": interpreter_facts(),
        "torch": torch_facts(),
        "random": random_facts(),
        "hash": hash("text"),
        "deeds": deeds(),
    }
    (out / "facts.json").write_text(json.dumps(facts, indent=2))

    print("a line")
    os.write(1, b"past the stream\n")
    sys.stdout.write("half a line")
    sys.stderr.write("an umlaut: \u00fc, and what is no text: \udcff\n")
    atexit.register((out / "atexit").write_text, "called")
    weakref.finalize(Point, (out / "finalize").write_text, "called")
    threading.Thread(target=outlive_the_main_thread, args=[out / "thread"]).start()
    left_open = (out / "open").open("w")
    left_open.write("never flushed")
    archive = zipfile.ZipFile(out / "archive.zip", "w")
    archive.writestr("name", "content")
    closing = Closing(out / "destructor")
    scratch = tempfile.NamedTemporaryFile(dir=out, prefix="scratch")  # noqa: SIM115  # left open on purpose
    sys.exit()

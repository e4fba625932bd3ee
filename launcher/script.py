"""Run a user's program as ``python -u script.py args`` or ``python -u -m module args`` would, inside this process."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import functools
import gc
import importlib.machinery
import io
import os
import runpy
import signal
import sys
import threading
import types
import zipfile
from pathlib import Path
from typing import Any


def run_target(target: dict[str, Any]) -> int:
    """Run the target as ``__main__`` and return its exit code; an uncaught exception is printed and gives 1.

    ``sys.argv``, ``sys.path[0]``, ``__file__`` and ``sys.modules["__main__"]`` are what the interpreter itself sets.
    A negative code is the signal that the interpreter would have ended itself with (SIGINT, for KeyboardInterrupt).
    """
    name, args, is_module = target["name"], list(target["args"]), target["kind"] == "module"
    sys.orig_argv = [sys.executable, "-u", *(["-m"] if is_module else []), name, *args]
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = main
    if "__mp_main__" in sys.modules:  # multiprocessing's alias, by which spawned children name the script's classes
        sys.modules["__mp_main__"] = main
    try:
        if is_module:
            sys.argv = ["-m", *args]  # until the module is found, as the interpreter has it
            _run_module(name, folder=str(Path.cwd()), alter_argv=True)
        elif Path(name).is_dir() or zipfile.is_zipfile(name):
            sys.argv = [name, *args]
            _run_module("__main__", folder=_absolute(name), alter_argv=False)
        else:
            sys.argv = [name, *args]
            _run_file(main, _absolute(name))
    except SystemExit as error:
        return exit_code(error)
    except BaseException:
        return _report_uncaught()
    return 0


def exit_code(error: SystemExit) -> int:
    """The process's exit code for ``sys.exit(…)``; a text is printed, as the interpreter does."""
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)  # noqa: T201  # the user's own last words
    return 1


def keep_process_groups() -> None:
    """Keep a script from a deadlock in torch (2.13 at least) that forks meet far more often than fresh processes.

    When the last user of a destroyed group is dropped, a DDP model say, the group's destructor holds the interpreter
    lock while it waits for gloo's threads, and those need the lock to let go of the last collective's tensors. A fresh
    process gives the lock away in time, by importing modules on the way; a fork has imported them. So each destroyed
    group is kept until the process ends, which it does without destructors.
    """
    from torch import distributed

    world = distributed.distributed_c10d._world  # pyright: ignore[reportPrivateUsage]  # no public list of groups
    destroy = distributed.destroy_process_group
    kept: set[Any] = set()

    @functools.wraps(destroy)
    def destroy_process_group(group: Any = None) -> None:
        kept.update(world.pg_map)
        destroy(group)

    distributed.destroy_process_group = distributed.distributed_c10d.destroy_process_group = destroy_process_group


def shut_down() -> None:
    """What the interpreter's end does that programs rely on: join threads, run atexit functions, drop ``__main__``.

    Destructors close what the program left open. The interpreter's real end is not used: it can hang in process groups.
    """
    with contextlib.suppress(BaseException):
        threading._shutdown()  # pyright: ignore  # joins non-daemon threads; has no public name
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]  # there is no public way to run them early
    threading.excepthook = _ignore  # the interpreter would stop daemon threads before it takes their globals away
    names = sys.modules["__main__"].__dict__
    names.update(dict.fromkeys(names.keys() - {"__builtins__"}))
    gc.collect()
    for item in gc.get_objects():
        if issubclass(type(item), io.IOBase):
            with contextlib.suppress(Exception):
                item.flush()


def _ignore(*_: object) -> None:
    pass


def _run_module(name: str, *, folder: str, alter_argv: bool) -> None:
    _prepend_to_path(folder)
    runpy._run_module_as_main(name, alter_argv)  # pyright: ignore  # what `python -m` itself calls; it has no public name


def _run_file(main: types.ModuleType, path: str) -> None:
    _prepend_to_path(str(Path(path).resolve().parent))
    main.__file__ = path
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    main.__dict__["__cached__"] = None
    with io.open_code(path) as file:
        source = file.read()
    exec(compile(source, path, "exec", dont_inherit=True), main.__dict__)  # noqa: S102  # running it is the purpose


def _absolute(name: str) -> str:
    return name if name.startswith("/") else f"{Path.cwd()}/{name}"  # "./" stays, as CPython leaves it


def _prepend_to_path(folder: str) -> None:
    if not os.environ.get("PYTHONSAFEPATH"):
        sys.path.insert(0, folder)


def _report_uncaught() -> int:
    """Print the exception being handled as the interpreter would; the exit code."""
    kind, error, trace = sys.exc_info()
    assert kind is not None
    assert error is not None
    error = error.with_traceback(_users_part(trace))  # hooks such as torch.distributed's look there
    sys.excepthook(kind, error, error.__traceback__)
    return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def _users_part(trace: types.TracebackType | None) -> types.TracebackType | None:
    """The traceback without the frames of this module, as the interpreter would show it."""
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace

"""Processes that get a core only while nobody else wants it."""

from __future__ import annotations

import subprocess
import sys

CHILD = """
import threading, time
end = threading.Event()
def stay():
    threading.Thread(target=end.wait, daemon=True).start()
def begin_others():
    for _ in range(1000):
        stay()
        time.sleep(0.0002)
for _ in range(300):
    stay()
threading.Thread(target=begin_others, daemon=True).start()
print("there", flush=True)
end.wait()
"""
PROGRAM = """
import os, subprocess, sys
from pathlib import Path
from dltrain.tracking.processes import run_in_gaps
with subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE) as child:
    child.stdout.readline()
    run_in_gaps()
    threads = [int(path.name) for pid in (os.getpid(), child.pid) for path in Path(f"/proc/{pid}/task").iterdir()]
    print(len(threads) > 300, {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_IDLE})
    child.kill()
"""


def test_threads_that_are_begun_meanwhile_run_in_the_gaps_too() -> None:
    command = [sys.executable, "-c", PROGRAM, CHILD]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "True True\n"

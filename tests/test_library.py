"""``dltrain.launch`` called from Python programs: several times, from a thread, and beside the program's own Ray."""

from __future__ import annotations

import shutil
from textwrap import dedent

from launching import Sandbox
from runs import RunFolder

HEAD = """
import dltrain
QUICK = {"model.widths": [4], "model.hidden": 16, "train.steps": 20, "tracking.wandb.mode": "disabled"}
"""


def run(sandbox: Sandbox, code: str) -> tuple[int, list[str], str]:
    (sandbox.folder / "program.py").write_text(HEAD + dedent(code), encoding="utf-8")
    done = sandbox.run("program.py", command="python")
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_launches_follow_each_other_and_run_in_a_thread(sandbox: Sandbox) -> None:
    code, said, errors = run(
        sandbox,
        """
        import signal, threading
        quiet = dltrain.Options(quiet=True, runs="runs")
        before = signal.getsignal(signal.SIGINT)
        results = [dltrain.launch(QUICK, options=quiet)]
        thread = threading.Thread(target=lambda: results.append(dltrain.launch(QUICK, options=quiet)))
        thread.start()
        thread.join()
        for result in results:
            print(result.status, result.step, result.run_dir.name)
        try:
            dltrain.launch(QUICK | {"model.width": 3}, options=quiet)
        except dltrain.JobError as error:
            print(error.problems[0].where)
        print(signal.getsignal(signal.SIGINT) is before)
        """,
    )
    assert (code, errors) == (0, "")
    assert said == ["finished 20 0001", "finished 20 0002", "model.width", "True"]
    first, second = (RunFolder(sandbox.folder / "runs/digits" / name) for name in ("0001", "0002"))
    assert first.weights() == second.weights()


def test_the_programs_own_ray_is_used_if_asked_for_and_left_as_it_was(sandbox: Sandbox) -> None:
    code, said, errors = run(
        sandbox,
        """
        import time
        import ray
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, logging_level="ERROR")
        try:
            dltrain.launch(QUICK, options=dltrain.Options(quiet=True))
        except dltrain.JobError as error:
            print(error.problems[0].hint)
        result = dltrain.launch(QUICK, options=dltrain.Options(address="auto", quiet=True))
        deadline = time.monotonic() + 100
        while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        print(result.status, ray.available_resources()["CPU"], ray.get(ray.remote(lambda: 7).remote()))
        """,
    )
    assert code == 0, errors
    assert said == ["say address='auto' to use that one, or ray.shutdown() first", "finished 2.0 7"]
    shutil.rmtree(sandbox.temporary / "ray")  # the program's own Ray leaves its session

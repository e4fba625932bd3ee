"""``dltrain launch``: which words are dltrain's and which the script's, and what the options mean."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dltrain.cli.arguments import LaunchRequest, split
from dltrain.cli.options import option_spellings, parse_launch
from dltrain.cli.render import exit_code
from dltrain.core.errors import Interrupted, JobError, RunFailed
from hypothesis import given
from hypothesis import strategies as st

DLTRAIN = str(Path(sys.executable).with_name("dltrain"))
SCRIPT = __file__


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("train.py", "job.yaml", "prog", "pkg/mod.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


def given_values(line: str) -> dict[str, Any]:
    """What a command line sets, beside the notes."""
    request = parse_launch(line.split())
    fields = dataclasses.fields(LaunchRequest)
    return {f.name: getattr(request, f.name) for f in fields if getattr(request, f.name) != f.default} | {"notes": ()}


def refusals(line: str) -> list[str]:
    with pytest.raises(JobError) as caught:
        parse_launch(line.split())
    return [str(problem) for problem in caught.value.problems]


def run(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("DLTRAIN_")} | environ
    return subprocess.run([DLTRAIN, *args], capture_output=True, text=True, timeout=60, env=env, check=False)


# The surface


def test_the_option_surface_is_frozen() -> None:
    """A new option is a decision: change this list with it."""
    spellings = option_spellings()
    assert sorted(name for name, takes_value in spellings.items() if takes_value) == [
        "--address", "--init-from", "--keep-warm", "--local-addr", "--local-ranks-filter", "--log-dir",
        "--master-addr", "--master-port", "--max-restarts", "--monitor-interval", "--network-interface", "--nnodes",
        "--node-rank", "--nodes", "--nproc-per-node", "--numa-binding", "--placement", "--rdzv-backend", "--rdzv-conf",
        "--rdzv-endpoint", "--rdzv-id", "--redirects", "--resume", "--role", "--run-dir", "--start-method",
        "--strategy", "--submission", "--tee",
        "-r", "-t",
    ]  # fmt: skip
    assert sorted(name for name, takes_value in spellings.items() if not takes_value) == [
        "--help", "--module", "--no-python", "--preflight", "--quiet", "--run-path", "--standalone", "-h", "-m", "-q",
    ]  # fmt: skip


def test_every_option_of_torchrun_is_accepted_or_refused_by_name() -> None:
    from torch.distributed.run import get_args_parser

    spellings = option_spellings()
    for action in get_args_parser()._actions:
        for spelled in action.option_strings:
            name = spelled.replace("_", "-") if spelled.startswith("--") else spelled
            if name in spellings:
                assert spellings[name] == (action.nargs != 0), name
            else:
                assert refusals(f"{spelled} train.py") == [
                    f"torchrun's {name} is not supported (see dltrain launch --help)"
                ]


# Whose words


WORDS = st.lists(st.text(min_size=0, max_size=12), max_size=6)
OWN = st.lists(
    st.sampled_from(
        [["--nodes", "2"], ["--nnodes=2"], ["--nproc_per_node", "cpu"], ["-q"], ["-r", "3"], ["-t0:1"], ["-qr3"],
         ["--max-restarts", "1"], ["--rdzv_id=a=b"], ["--standalone"], ["--master-port", "0"]]
    ),
    max_size=4,
)  # fmt: skip


@given(own=OWN, words=WORDS)
def test_what_follows_a_script_is_never_touched(own: list[list[str]], words: list[str]) -> None:
    request = parse_launch([*(word for option in own for word in option), SCRIPT, *words])
    assert (request.kind, request.script, request.script_args) == ("file", SCRIPT, tuple(words))


@given(own=OWN, words=WORDS, flag=st.sampled_from(["-m", "--module", "--no-python", "--no_python"]))
def test_what_follows_a_module_or_a_program_is_never_touched(own: list[list[str]], words: list[str], flag: str) -> None:
    request = parse_launch([flag, *(word for option in own for word in option), "pkg.mod", *words])
    assert request.kind == ("module" if flag.startswith(("-m", "--m")) else "program")
    assert (request.script, request.script_args) == ("pkg.mod", tuple(words))


PARTS = st.sampled_from([["--nodes", "2"], ["-q"], ["a.b=1"], ["job.yaml"], ["c=[1, 2]"]])


@given(st.lists(PARTS, unique_by=str).flatmap(st.permutations))
def test_the_order_of_a_jobs_arguments_is_free(parts: list[list[str]]) -> None:
    request = parse_launch(["x=1", *(word for part in parts for word in part)])
    flat = [word for part in parts for word in part]
    assert request.kind == "job"
    assert request.overrides == ("x=1", *(word for word in flat if "=" in word))
    assert (request.nodes, request.quiet) == (2 if "--nodes" in flat else None, "-q" in flat)


@given(st.lists(st.text(alphabet="-abm=_ .", max_size=5), max_size=5))
def test_the_splitter_splits_or_refuses(argv: list[str]) -> None:
    try:
        options, target = split(argv, {"--aa": True, "-a": True, "-b": False, "--module": False, "-m": False})
    except JobError:
        return
    assert len(options) + len(target) <= sum(len(word) + 1 for word in argv)  # -ba1 is three words
    assert all(option.startswith("-") or options[i - 1] == "-a" for i, option in enumerate(options))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train.py", {"kind": "file", "script": "train.py"}),
        ("-- train.py -- -x", {"kind": "file", "script": "train.py", "script_args": ("--", "-x")}),
        ("prog job.yaml", {"kind": "file", "script": "prog", "script_args": ("job.yaml",)}),
        ("--run-path train.py -m", {"kind": "file", "script": "train.py", "script_args": ("-m",)}),
        ("-m job.yaml", {"kind": "module", "script": "job.yaml"}),
        ("--no-python train.py", {"kind": "program", "script": "train.py"}),
        ("--no-python --run-path train.py", {"kind": "file", "script": "train.py"}),
        ("job.yaml", {"kind": "job", "job_file": Path("job.yaml")}),
        ("missing.json", {"kind": "job", "job_file": Path("missing.json")}),
        ("train.lr=a.py", {"kind": "job", "overrides": ("train.lr=a.py",)}),
        ("", {"kind": "job"}),
    ],
)
def test_targets(line: str, expected: dict[str, Any]) -> None:
    assert given_values(line) == expected | {"notes": ()}


def test_without_a_job_file_it_is_the_one_here_and_says_so(folder: Path) -> None:
    assert parse_launch([]).notes == ("no job file: this is the built-in digits job",)
    (folder / "dltrain.yaml").touch()
    request = parse_launch(["seed=1"])
    assert request.job_file == Path("dltrain.yaml")
    assert request.notes == ("job file: dltrain.yaml",)
    assert parse_launch(["job.yaml"]).notes == ()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("trian.py --lr 3", "no such file: 'trian.py' (did you mean 'train.py'?)"),
        ("train --lr 3", "'train' is no job file, override or script (did you mean 'train.py'?)"),
        ("job", "'job' is no job file, override or script (did you mean 'job.yaml'?)"),
        ("pkg.mod --lr 3", "'pkg.mod' is no job file, override or script (did you mean -m pkg.mod?)"),
        ("pkg", "'pkg' is a folder (there are: mod.py)"),
        ("job.yaml train.py", "'train.py' is a script, in the arguments of a job"),
        ("job.yaml b.yaml", "a second job file, 'b.yaml' (the first is 'job.yaml')"),
        ("job.yaml -m pkg.mod", "-m comes before what it runs"),
        ("job.yaml -- --nodes", "'--nodes' is no job file, override or script"),
        ("-m", "-m needs something to run"),
        ("-m --no-python prog", "--module and --no-python exclude each other"),
        ("--nods 3", "no option --nods (did you mean --nodes?)"),
        ("--nproc 3 train.py", "no option --nproc (did you mean --nproc-per-node?)"),
        ("-z train.py", "no option -z"),
        ("--nodes", "--nodes needs a value"),
        ("--nodes --quiet", "--nodes needs a value"),
        ("--quiet=1", "--quiet takes no value"),
    ],
)  # fmt: skip
def test_lines_that_cannot_be_split(line: str, says: str) -> None:
    (only,) = refusals(line)
    assert only.startswith(says)


# What the options mean


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--nnodes 2:2 --nproc_per_node 4", {"nodes": 2, "nproc_per_node": 4}),
        ("--nnodes 2:4 --max-restarts 1", {"nodes": (2, 4), "max_restarts": 1}),
        ("--nproc-per-node=gpu", {"nproc_per_node": "gpu"}),
        ("--address auto --network-interface eth0", {"address": "auto", "network_interface": "eth0"}),
        ("--address ray://head:10001 --placement spread", {"address": "ray://head:10001", "placement": "spread"}),
        ("--address auto --keep-warm 10min", {"address": "auto", "keep_warm": 600.0}),
        ("--address auto --keep-warm 90", {"address": "auto", "keep_warm": 90.0}),
        ("--max-restarts auto", {"max_restarts": "auto"}),
        ("--max-restarts 3 --start-method spawn", {"max_restarts": 3, "start_method": "spawn"}),
        ("--run-dir out --log-dir logs", {"run_dir": Path("out"), "log_dir": Path("logs")}),
        ("-r 3 -t 0:1,2:3", {"redirects": 3, "tee": {0: 1, 2: 3}}),
        ("-r=0 --tee=1", {"redirects": 0, "tee": 1}),
        ("--local_ranks_filter 0,2", {"local_ranks_filter": (0, 2)}),
        ("--master-addr ::1 --master_port 29500", {"master_addr": "::1", "master_port": 29500}),
        (
            "--role trainer --rdzv-id a --standalone -q",
            {"role": "trainer", "rdzv_id": "a", "standalone": True, "quiet": True},
        ),
    ],
)
def test_options_of_a_script(options: str, expected: dict[str, Any]) -> None:
    assert given_values(f"{options} train.py") == {"kind": "file", "script": "train.py", "notes": ()} | expected
    assert parse_launch([*options.split(), "train.py"]).notes == ()


def test_options_that_are_values_of_the_job() -> None:
    line = "--nodes 2 --nproc-per-node cpu --network-interface lo --placement pack --max-restarts 0"
    assert parse_launch(line.split()).job_flags() == {
        "resources.nodes": 2,
        "resources.nproc_per_node": "cpu",
        "resources.network_interface": "lo",
        "resources.placement": "pack",
        "recovery.max_restarts": 0,
    }
    elastic = {"resources.nodes": 4, "recovery.nodes": "2:4"}
    assert parse_launch(["--nodes", "2:4"]).job_flags() == elastic
    assert parse_launch([]).job_flags() == {}


def test_resume(folder: Path) -> None:
    (folder / "step-1").mkdir()
    for value in ("auto", "never", "step-1", "s3://bucket/step-1"):
        assert parse_launch(["--resume", value]).resume == value
    assert parse_launch([]).resume == "auto"
    assert refusals("--resume atuo") == ["--resume: no checkpoint at 'atuo' (did you mean 'auto'?)"]


def test_every_wrong_value_is_named_at_once() -> None:
    line = (
        "--nodes 0 --nproc-per-node xpu --address head --placement near --keep-warm soon --run-dir job.yaml "
        "--max-restarts -1 --start-method thread --redirects 4 --tee 0:9 --local-ranks-filter a "
        "--master-port 70000 train.py"
    )
    assert [text.partition(":")[0] for text in refusals(line)] == [
        "--nodes", "--nproc-per-node", "--address", "--placement", "--run-dir", "--keep-warm", "--max-restarts",
        "--start-method", "--redirects", "--tee", "--local-ranks-filter", "--master-port",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--nnodes 4:1 train.py", "the range 4:1 has no nodes in it: the least comes first"),
        ("--node-rank 1 --nnodes 2 train.py", "run one dltrain launch for all nodes"),
        ("--node-rank 0 --nnodes 2 --master-addr h train.py", "run one dltrain launch for all nodes"),
        ("--nnodes 2 --rdzv-endpoint h:1 train.py", "run one dltrain launch for all nodes"),
        ("--standalone --address h:1 train.py", "--standalone: cannot stand beside --address"),
        ("--keep-warm 10min train.py", "--keep-warm: keeps nothing on the embedded cluster"),
        ("--resume auto train.py", "--resume: does nothing for a script"),
        ("job.yaml --tee 3", "--tee: does nothing in a job"),
        ("job.yaml --redirects 3", "--redirects: does nothing in a job"),
        ("job.yaml --role a", "--role: does nothing in a job"),
        ("job.yaml --log-dir a", "--log-dir: does nothing in a job"),
    ],
)
def test_options_that_contradict_each_other_or_do_nothing(line: str, says: str) -> None:
    (only,) = refusals(line)
    assert says in only


def test_a_pasted_torchrun_line_works_and_says_what_is_ignored() -> None:
    line = (
        "--nnodes=1 --nproc_per_node=2 --rdzv_backend=c10d --rdzv_endpoint=localhost:0 --rdzv_conf=a=1 --node_rank=0 "
        "--monitor_interval 1 --local_addr h --numa_binding node --run_path --start_method forkserver train.py --lr 1"
    )
    request = parse_launch(line.split())
    assert (request.nodes, request.nproc_per_node, request.start_method) == (1, 2, "fork")
    assert request.script_args == ("--lr", "1")
    assert request.notes[0] == "--start-method forkserver: the same as fork, dltrain forks from a server"
    assert "--rdzv-endpoint: dltrain rendezvouses by itself; ignored" in request.notes
    assert {note.partition(":")[0] for note in request.notes[1:]} == {
        "--rdzv-backend", "--rdzv-endpoint", "--rdzv-conf", "--node-rank", "--monitor-interval", "--local-addr",
        "--numa-binding", "--run-path",
    }  # fmt: skip
    assert parse_launch(["--nnodes", "2", "--rdzv-endpoint", "h:1", "--address", "h:6379", "train.py"]).nodes == 2


# The command


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["launch", "trian.yaml"], "dltrain: trian.yaml: no such file"),
        (["launch", "--nods", "3"], "did you mean --nodes?"),
        (["launch", "train.epoch=3"], "did you mean 'epochs'?"),
        (["launch", "--nodes", "0", "--placement", "x"], "dltrain: 2 problems; nothing was started"),
        (["train.py"], "did you mean: dltrain launch train.py"),
        (["lanuch"], "launch"),
    ],
)
def test_a_wrong_request_ends_with_2_and_no_traceback(args: list[str], says: str) -> None:
    done = run(*args)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_help_wins_over_a_wrong_target() -> None:
    for args in (
        ["launch", "--help"],
        ["launch", "-h", "nothing"],
        ["launch", "-m", "--help"],
        ["--help"],
        ["config", "-h"],
    ):
        done = run(*args)
        assert (done.returncode, done.stderr) == (0, "")
        assert "Usage: dltrain" in done.stdout


def test_help_groups_the_options() -> None:
    text = run("launch", "--help").stdout
    assert all(panel in text for panel in ("─ Cluster ─", "─ Run ─", "─ torchrun compatible ─"))
    assert "[job.yaml]" in text


def test_version() -> None:
    assert run("--version").stdout == "dltrain 0.1.0\n"


def test_exit_codes() -> None:
    assert exit_code(JobError("x")) == 2
    assert exit_code(RunFailed("x")) == 1
    assert exit_code(Interrupted("x", signum=15)) == 143


ENDINGS = [
    ("raise RunFailed('rank 3 died\\nat x', report='r.txt')", 1, "dltrain: rank 3 died\nat x\nreport: r.txt\n"),
    ("raise Interrupted('stopped by Ctrl-C', signum=2)", 130, "dltrain: stopped by Ctrl-C\n"),
    ("raise JobError(Problem('a\\nb', 'x:1: k', 'c\\nd'))", 2, "dltrain: x:1: k: a\n      b\n      c\n      d\n"),
    ("return 7", 7, ""),
]


@pytest.mark.parametrize(("action", "code", "says"), ENDINGS)
def test_how_a_launch_ends(action: str, code: int, says: str) -> None:
    """The launcher's endings, as the command renders them; the module below it is replaced in a process of its own."""
    program = f"""
import sys, types
from dltrain.core.errors import *
def run(request):
    {action}
stand_in = types.ModuleType("dltrain.cli.launch")
stand_in.run = run
sys.modules["dltrain.cli.launch"] = stand_in
sys.argv = ["dltrain", "launch", "train.py"]
from dltrain.cli.main import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (code, says)


def test_a_bug_keeps_its_traceback() -> None:
    program = """
import sys
sys.modules["dltrain.cli.launch"] = None
sys.argv = ["dltrain", "launch", "train.py"]
from dltrain.cli.main import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ModuleNotFoundError" in done.stderr

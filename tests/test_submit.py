"""What is handed to clusters, as text; cluster files; and how handles of submitted jobs are found."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from command import dltrain
from dltrain.core.errors import JobError, RunFailed
from dltrain.core.job import Resources
from dltrain.launcher.rundir import RunDir
from dltrain.launcher.submit import follow
from dltrain.launcher.submit.clusters import TEMPLATES, read_cluster, template
from dltrain.launcher.submit.handle import Handle
from dltrain.launcher.submit.handles import find_handle, resolve, write_handle
from dltrain.launcher.submit.steps import Submission

Golden = Callable[[str, str], None]

SUBMISSION = Submission(
    name="digits",
    options=("--nodes=2", "--resume=never"),
    target=("job.yaml", "train.epochs=3", "name=it's"),
    is_job=True,
    resources=Resources(nodes=2, nproc_per_node=4),
    machines=2,
    stop_grace=30.0,
    folder=Path("/home/me/my project"),
    runs=Path("/home/me/my project/runs"),
    environ={"WANDB_API_KEY": "very-secret", "DLTRAIN_TRAIN__EPOCHS": "2", "EDITOR": "ed"},
)
SCRIPT = replace(SUBMISSION, target=("train.py", "--lr", "0.1"), is_job=False, name="train", options=("--nodes=2",))

CLUSTERS = {
    "kuberay": ("kuberay.yaml", template("kuberay")),
    "vms": ("aws.yaml", template("aws")),
    "ray": ("ray.yaml", "kind: ray\naddress: http://head:8265\nruns: /shared\nenvironment: [EDITOR]\n"),
    "slurm": ("slurm.yaml", "kind: slurm\nsbatch: {partition: gpu, exclusive: true}\nsetup: module load cuda\n"),
    "ssh": ("hostfile", "node1 slots=4\nnode2 slots=8  # a larger one\nnode3\n"),
}


@pytest.mark.parametrize("kind", CLUSTERS)
def test_what_is_handed_over(kind: str, golden: Golden, tmp_path: Path) -> None:
    name, text = CLUSTERS[kind]
    (tmp_path / name).write_text(text, encoding="utf-8")
    cluster = read_cluster(tmp_path / name)
    environ = {} if kind == "kuberay" else SUBMISSION.environ  # nothing travels there
    shown = "".join(
        f"{line}\n"
        for title, submission in (("a job", SUBMISSION), ("a script", SCRIPT))
        for line in (f"=== {title}", *cluster.render(replace(submission, environ=environ)).lines())
    )
    shown = shown.replace(str(Path(sys.executable).parent), "/ENVIRONMENT/bin")
    shown = shown.replace(str(tmp_path), "/HERE")
    shown = re.sub(r"is sent: \d+ files, [0-9.]+ MB", "is sent: N files", shown)
    assert "very-secret" not in shown
    golden(f"submit-{kind}.txt", shown)


def test_what_shells_are_told_is_shell(tmp_path: Path) -> None:
    for name, text in (CLUSTERS["slurm"], CLUSTERS["ssh"]):
        (tmp_path / name).write_text(text, encoding="utf-8")
        for submission in (SUBMISSION, SCRIPT):
            for script in read_cluster(tmp_path / name).render(submission).files.values():
                done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_example_files_are_right(kind: str, empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/bin-that-is-not-there")  # no sbatch to ask
    assert dltrain("cluster", "init", kind).code == 0
    assert Path(TEMPLATES[kind]).read_text(encoding="utf-8") == template(kind)
    done = dltrain("cluster", "check", TEMPLATES[kind])
    assert done.code == 0, done.err
    again = dltrain("cluster", "init", kind)
    assert (again.code, "this file exists" in again.err) == (2, True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cluster_name: a\nprovider: {type: aws}\nmax_worker: 2\n", "c.yaml:3: max_worker: unknown key 'max_worker'"),
        ("cluster_name: a\nprovider: {}\n", "c.yaml:2: provider: 'type' is missing"),
        ("kind: [slurm]\n", "c.yaml:1: kind: no kind of cluster is called '['slurm']'"),
        ("kind: slrum\n", "c.yaml:1: kind: no kind of cluster is called 'slrum'\n      did you mean 'slurm'?"),
        ("sbatch: {}\n", "c.yaml: 'kind' is missing"),
        ("- slurm\n", "expected keys like 'kind: slurm'"),
        ("kind: slurm\nsbtach: {time: 3}\n", "c.yaml:2: sbtach: unknown key 'sbtach'\n      did you mean 'sbatch'?"),
        ("kind: slurm\nwarning: soon\n", "c.yaml:2: warning: 'soon' is no duration"),
        ("kind: slurm\nsbatch:\n  nodes: 3\n", "c.yaml:3: sbatch.nodes: this is not the file's to say"),
        ("kind: slurm\nsbatch:\n  --time: 3\n", "c.yaml:3: sbatch.--time: options stand here without dashes"),
    ],
)
def test_a_cluster_file_that_cannot_be_right_is_refused_by_line(text: str, says: str, empty_folder: Path) -> None:
    Path("c.yaml").write_text(text, encoding="utf-8")
    done = dltrain("submit", "--cluster", "c.yaml", "--dry-run")
    assert done.code == 2
    assert says in done.err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--cluster nowhere", "there is no cluster file 'nowhere'"),
        ("--cluster own.yaml --nodes 2 recovery.spares=1", "the job wants 3 nodes"),
        ("--cluster own.yaml --nodes 3", "the job wants 3 nodes, the file allows 1 workers"),
        ("--cluster hosts --address auto", "--address: has no place in dltrain submit"),
        ("--cluster hosts --nodes 4", "the job wants 4 nodes, the hostfile has 3"),
        ("--cluster hosts --nproc-per-node 5", "the job wants 5 ranks a node, node1 has 4 slots"),
        ("--cluster hosts train.epoch=3", "unknown key 'epoch'"),
        ("--cluster hosts --nods 2", "did you mean --nodes?"),
        ("--cluster hosts none.py", "'none.py'"),
        ("--cluster hosts --run-dir hosts/below", "hosts is no folder"),
    ],
)
def test_a_wrong_submission_is_refused_before_anything_starts(line: str, says: str, empty_folder: Path) -> None:
    Path("hosts").write_text(CLUSTERS["ssh"][1], encoding="utf-8")
    Path("own.yaml").write_text("cluster_name: a\nprovider: {type: local}\nmax_workers: 1\n", encoding="utf-8")
    done = dltrain("submit", *line.split())
    assert done.code == 2, done.out
    assert says in done.err
    assert not Path("runs").exists()


def test_a_cluster_is_found_by_its_name(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = empty_folder / "config/dltrain/clusters"
    home.mkdir(parents=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(empty_folder / "config"))
    (home / "lab.yaml").write_text("kind: slurm\nsbatch: {partition: far}\n", encoding="utf-8")
    assert "--partition=far" in dltrain("submit", "--cluster", "lab", "--dry-run").out
    Path("lab.yaml").write_text("kind: slurm\nsbatch: {partition: near}\n", encoding="utf-8")
    assert "--partition=near" in dltrain("submit", "--cluster", "lab", "--dry-run").out


def test_words_find_the_newest_of_runs_and_submitted_jobs(tmp_path: Path) -> None:
    first = RunDir.create(tmp_path, "digits", {})
    first.close()
    handle = Handle("slurm", "7", "digits", submitted=2e9, runs=str(tmp_path))
    path = write_handle(tmp_path, handle)
    for word in (None, "digits", "digits/slurm-7", str(path)):
        assert resolve(tmp_path, word) == (None, handle)
    assert resolve(tmp_path, "digits/0001") == (first.path, None)
    made = RunDir.create(tmp_path, "digits", {})
    made.update(submission="slurm-7")
    made.close()
    for word in (None, "digits", "digits/slurm-7", "digits/0002"):
        assert resolve(tmp_path, word) == (made.path, handle)
    write_handle(tmp_path, replace(handle, id="6", submitted=1.0))  # before the runs that others launched
    assert find_handle(tmp_path, "digits") == handle
    (tmp_path / "digits/slurm-7.json").unlink()
    assert resolve(tmp_path, "digits") == (made.path, None)
    with pytest.raises(JobError, match="no handle"):
        resolve(tmp_path, "digits/slurm-7.json")


def test_who_watches_a_job_bears_that_nobody_answers_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([1, RunFailed("restarted"), 2, RunFailed("away"), RunFailed("away")])

    def question() -> int:
        answer = next(answers)
        if isinstance(answer, RunFailed):
            raise answer
        return answer

    ask = follow.Patient(question, 0)
    assert [ask() for _ in range(4)] == [1, 1, 2, 2]
    monkeypatch.setattr(follow, "PATIENCE", -1.0)
    with pytest.raises(RunFailed, match="away"):
        ask()


def test_patience_counts_from_the_first_question_that_was_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(follow.time, "monotonic", lambda: now[0])

    def question() -> int:
        raise RunFailed("away")

    ask = follow.Patient(question, 1)
    now[0] = 3600.0  # a connection that has lasted for an hour
    assert ask() == 1
    now[0] += follow.PATIENCE
    assert ask() == 1
    ask.heard()  # another connection, of another hour
    now[0] += 3600.0
    assert ask() == 1
    now[0] += follow.PATIENCE + 1
    with pytest.raises(RunFailed, match="away"):
        ask()

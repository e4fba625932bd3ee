"""The sbatch script of a job: its options and settings, rendered, before a body that is always the same."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

Options = Mapping[str, str | int | bool]


def script(
    *,
    name: str,
    options: Options,
    folder: str,
    log: str,
    setup: str,
    launch: Sequence[str],
    target: Sequence[str],
    again: Sequence[str],
    nodes: int,
    requeue: bool,
) -> str:
    """The text of the script.

    Args:
        name: of the job.
        options: of sbatch, without dashes; true gives a flag, false nothing.
        folder: the working directory.
        log: the beginning of the path of logs, before the job's number.
        setup: shell lines for every node.
        launch: ``dltrain launch`` and its options, without an address.
        target: what it launches.
        again: further options when Slurm runs the job anew.
        nodes: how many machines there have to be.
        requeue: whether the job goes back into the queue before its time is up.
    """
    lines = ["#!/bin/bash", f"# {name}: rendered by dltrain submit"]
    lines += [f"#SBATCH {text}" for text in map(_option, options.items()) if text]
    lines += [
        "",
        f"folder={shlex.quote(folder)}",
        f"log={shlex.quote(log)}$SLURM_JOB_ID",
        f"launch=({shlex.join(launch)})",
        f"target=({shlex.join(target)})",
        f"again=({shlex.join(again)})  # what a requeued job adds",
        f"nodes={nodes}",
        f"requeue={int(requeue)}",
        "prepare() {  # every node",
        *(f"    {line}".rstrip() for line in setup.strip().splitlines()),
        "    true",
        "}",
    ]
    return "\n".join(lines) + "\n" + _BODY


def _option(pair: tuple[str, str | int | bool]) -> str:
    name, value = pair
    if isinstance(value, bool):
        return f"--{name}" if value else ""
    return f"--{name}={shlex.quote(str(value))}"


_BODY = r"""
# The address at which Slurm itself reaches this node.
address() {
    local named
    named=$(scontrol show node --oneliner "$SLURMD_NODENAME" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    getent ahostsv4 "${named:-$(hostname)}" | awk 'NR == 1 { print $1 }'
}

# This node of the Ray cluster, until its input ends. What Ray keeps is in a folder of its own, and goes with it.
node() {
    prepare
    local where=(--address="$head:$port")
    if ((SLURM_NODEID == 0)); then
        where=(--head --port="$port" --ray-client-server-port=$((port + 10000)) --include-dashboard=false)
        where+=(--temp-dir="$session")
    fi
    ray start --block --disable-usage-stats "${where[@]}" \
        --node-ip-address="$(address)" --num-cpus="$SLURM_CPUS_ON_NODE" --object-store-memory=80000000 </dev/null &
    local ray=$! code
    exec 3<&0
    { read -r _; kill -TERM "$ray"; } <&3 2>/dev/null &
    trap 'kill -TERM "$ray"' TERM INT
    while kill -0 "$ray" 2>/dev/null; do wait "$ray"; code=$?; done
    trap '' TERM
    kill -TERM 0  # what Ray has started and not ended
    sleep 1
    rm -rf "$session"
    return "$code"
}

# Runs a command that gets SIGTERM when this script is asked to stop.
child=
run() {
    local code
    "$@" 9>&- &
    child=$!
    ((asked)) && kill -TERM "$child"
    wait "$child"
    code=$?
    while kill -0 "$child" 2>/dev/null; do  # a signal has ended the wait, not the command
        wait "$child"
        code=$?
    done
    child=
    return "$code"
}

ask() {
    asked=1
    [[ -z $child ]] || kill -TERM "$child"
}

asked=0 late=0
trap 'late=1; ask' USR1  # the time is nearly up
trap ask TERM INT

prepare
cd "$folder" || exit 1
port=$((20000 + SLURM_JOB_ID % 10000))
head=$(address)
session=/tmp/dltrain-$SLURM_JOB_ID
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')  # lives in the environment only, as long as the job
export head port session RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
export -f prepare address node

# srun passes its input on to all nodes, so closing it is how they are told to end
exec 9> >(exec srun --export=ALL --nodes="$nodes" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 --label \
    bash -c node >>"$log-ray.log" 2>&1)
cluster=$!
((${SLURM_RESTART_COUNT:-0} == 0)) || launch+=("${again[@]}")
run python -P -m dltrain.launcher.submit.gather "$head:$port" "$nodes" "$cluster" &&
    run "${launch[@]}" --submission "slurm-$SLURM_JOB_ID" --address "$head:$port" "${target[@]}"
code=$?
exec 9>&-
for ((i = 0; i < 60; i++)); do
    kill -0 "$cluster" 2>/dev/null || break
    sleep 0.5
done
kill -TERM "$cluster" 2>/dev/null

if ((late && code == 143 && requeue)); then
    echo "the time is nearly up: back into the queue"
    scontrol requeue "$SLURM_JOB_ID" && exec sleep 60  # Slurm ends this script
fi
exit "$code"
"""

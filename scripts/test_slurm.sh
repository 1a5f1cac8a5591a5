#!/usr/bin/env bash
# Sweeps on a real SLURM: a cluster of one node on the loopback interface, brought up for the
# purpose and taken down again. A run is preempted by a job of a higher partition, in the two
# ways that clusters do it, and must end with the bits of an undisturbed one.
#
#   scripts/test_slurm.sh [python, default .venv/bin/python]
#
# Needs Debian's slurm-wlm and munge, which it installs, so it needs root. Ends with 77 where that
# cannot be done. Touches no SLURM that may be there: ports, sockets and state are its own.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-.venv/bin/python}")
packages=(slurm-wlm munge)

if ! command -v slurmctld slurmd munged sbatch >/dev/null; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "SLURM test left out: ${packages[*]} are not installed, and only root could do that"
        exit 77
    fi
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${packages[@]}"; } \
        >/tmp/test_slurm_apt.log 2>&1 \
        || { echo "SLURM test left out: apt-get cannot install ${packages[*]}"; exit 77; }
fi
[ "$(id -u)" = 0 ] || { echo "SLURM test left out: its daemons need root"; exit 77; }

work=$(mktemp -d /tmp/metarun-slurm.XXXXXX)
daemons=()
stop() {
    [ ${#daemons[@]} -gt 0 ] || return 0
    scancel --quiet --user=root --signal=KILL --full 2>/dev/null || true
    scancel --quiet --user=root 2>/dev/null || true
    wait_for 20 "the last jobs to end" sh -c '[ -z "$(squeue -h)" ]' || true
    for pid in "${daemons[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait_for 10 "the daemons to end" sh -c "! kill -0 ${daemons[*]}" \
        || kill -KILL "${daemons[@]}" 2>/dev/null || true
    wait "${daemons[@]}" 2>/dev/null || true
    daemons=()
}
finish() {
    code=$?
    set +e
    stop
    if [ $code = 0 ] || [ $code = 77 ]; then rm -rf "$work"; else echo "failed; logs are in $work"; fi
    exit $code
}
trap finish EXIT
trap 'exit 130' INT TERM

wait_for() {  # wait_for <seconds> <what> <command …>
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $deadline ] || { echo "gave up waiting for $what"; return 1; }
        sleep 0.2
    done
}

export SLURM_CONF=$work/slurm.conf
read -ra ports < <("$python" -c "
import socket
held = [socket.create_server(('127.0.0.1', 0)) for _ in range(2)]
print(*(s.getsockname()[1] for s in held))")
mkdir "$work/munge" "$work/state" "$work/spool"
chmod 755 "$work"
dd if=/dev/urandom bs=1 count=1024 of="$work/munge/key" 2>/dev/null
chmod 400 "$work/munge/key"
chmod 700 "$work/munge"

start() {  # start <seconds between SIGTERM and SIGKILL> <parameters of slurmctld>
    cat >"$SLURM_CONF" <<CONF
ClusterName=metarun
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmdPort=${ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge/socket
CredType=cred/munge
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
KillWait=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
$2
SlurmdParameters=config_overrides
NodeName=$(hostname) NodeAddr=127.0.0.1 CPUs=1 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=$1 MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
CONF
    munged --force --foreground --key-file="$work/munge/key" --socket="$work/munge/socket" \
        --pid-file="$work/munge/pid" --seed-file="$work/munge/seed" \
        --log-file="$work/munge/log" 2>>"$work/munged.log" &
    daemons+=($!)
    wait_for 10 munged test -S "$work/munge/socket"
    slurmctld -D -c >"$work/slurmctld.log" 2>&1 &
    daemons+=($!)
    slurmd -D >"$work/slurmd.log" 2>&1 &
    daemons+=($!)
    wait_for 30 "an idle node" sh -c '[ "$(sinfo -h -o %T -p low)" = idle ]'
}

export OMP_NUM_THREADS=1 METARUN_CACHE=$work/cache
metarun() { "$python" -m metarun "$@"; }
run=(data=sinusoid backbone=mlp inner_opt=adam inner_opt.learn=[lr] trainer.steps=4000
    trainer.eval_every=1000 trainer.checkpoint_every=100000 trainer.log_every=10
    trainer.eval_episodes=20 trainer.test_episodes=20
    engine.compile=none)  # slow enough to be preempted
metarun train "${run[@]}" seed=0 hydra.run.dir="$work/undisturbed" >"$work/undisturbed.log" 2>&1

started() {  # started <run directory> <client>: it has logged a few steps, or will never
    [ "$(wc -l <"$1/metrics.jsonl")" -ge 3 ] || ! kill -0 "$2"
}

preempted() {  # preempted <name> <seeds> <what its log must say> <arguments of start …>
    local sweep=$work/$1 victim=$work/$1/maml-sinusoid-s0
    start "${@:4}"
    local command=(train -m "${run[@]}" seed="$2" hydra/launcher=submitit_slurm
        hydra.launcher.partition=low hydra.launcher.cpus_per_task=1 hydra.sweep.dir="$sweep")
    metarun "${command[@]}" >"$work/$1.log" 2>&1 &
    local client=$!
    wait_for 180 "the first run" started "$victim" "$client"
    sbatch --quiet --partition=high --output=/dev/null --wrap='sleep 1'
    while kill -0 "$client" 2>/dev/null; do  # SLURM holds a requeued job for two minutes
        for id in $(squeue -h -t PENDING -o %i); do
            scontrol update JobId="$id" StartTime=now 2>/dev/null || true
        done
        sleep 1
    done
    wait "$client" || { cat "$work/$1.log"; return 1; }
    cat "$sweep"/.submitit/*/*/*_log.err >"$work/$1.jobs.log"
    grep -q "$3" "$work/$1.jobs.log" || { cat "$work/$1.jobs.log"; echo "no '$3'"; return 1; }
    grep -q ' completed, 0 recalled, 0 failed' "$work/$1.log"
    "$python" - "$victim" "$work/undisturbed" <<'CHECK'
import json, sys
from pathlib import Path

import torch

from metarun.rundir import checkpoint

ours, undisturbed = map(Path, sys.argv[1:])
status = json.loads((ours / "status.json").read_text())
assert status["status"] == "completed" and status["attempts"] == 2, status
a, b = (checkpoint.load(p / "checkpoints" / "last.safetensors") for p in (ours, undisturbed))
assert a["step"] == b["step"] and all(torch.equal(a["meta"][k], b["meta"][k]) for k in b["meta"])
results = [json.loads((p / "result.json").read_text())["test"] for p in (ours, undisturbed)]
assert results[0] == results[1]
CHECK
    metarun "${command[@]}" 2>&1 | grep -q ' 0 completed, . recalled, 0 failed'
    [ "$(ls "$sweep/.submitit" | wc -l)" = 1 ]  # and nothing was submitted
    stop
    echo "$1: preempted, requeued, resumed in place, with the bits of an undisturbed run"
}

killed_job() {  # what becomes of the sweep if a job is killed and comes back no more
    local sweep=$work/died code=0
    start 0 ""
    metarun train -m "${run[@]}" seed=2 hydra/launcher=submitit_slurm hydra.launcher.partition=low \
        hydra.launcher.cpus_per_task=1 hydra.sweep.dir="$sweep" >"$work/died.log" 2>&1 &
    local client=$!
    wait_for 180 "the run" started "$sweep/maml-sinusoid-s2" "$client"
    scancel --user=root --signal=KILL --full
    wait "$client" || code=$?
    if [ $code != 1 ] || ! grep -q 'maml-sinusoid-s2: job .* died' "$work/died.log"; then
        cat "$work/died.log"
        return 1
    fi
    stop
    echo "died: a killed job is a failed run"
}

# What keeps daemons from starting (no loopback, a container's limits) says nothing of metarun.
if ! (start 0 "" && up=0 || up=1; stop; exit $up); then
    tail -n 5 "$work"/*.log
    echo "SLURM test left out: its daemons do not start here"
    exit 77
fi

# A cluster that sends the signal which a job asks for, and one that merely kills after a while.
preempted signalled 0,1 "interrupted by SIGUSR2 after meta-step" 20 \
    SlurmctldParameters=preempt_send_user_signal
preempted killed 0 "SIGTERM: saving a checkpoint" 0 ""
killed_job

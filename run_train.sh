#!/usr/bin/env bash
# [CONFIG_FILE=file.toml] [NGPU=n] [LOG_RANK=0,1] ./run_train.sh [--section.field value ...]
#
#   CONFIG_FILE  TOML of the run; default train_configs/debug.toml. It is looked up in the current folder, then in the
#                folder of this script.
#   NGPU         processes on this machine; default: the number of GPUs, or 1. Without GPUs NGPU=4 starts four CPU
#                processes.
#   LOG_RANK     ranks whose output is shown, default 0. If a run fails, the last error of the other ranks of this
#                machine is shown too.
#   PYTHON       interpreter to use without checks. Default: the active python3 if it has the requirements, otherwise
#                .venv, which is made on first use.
#   NNODES, RDZV_ID, RDZV_ENDPOINT   set by multinode_trainer.slurm, which starts this script once on each node.
#
# Relative paths in the TOML and in the arguments are relative to the current folder.
# SIGTERM or SIGUSR2 to this script saves a checkpoint at the next step and exits 0. A second signal stops at once.
set -u
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CONFIG_FILE=${CONFIG_FILE:-train_configs/debug.toml}
LOG_RANK=${LOG_RANK:-0}
NNODES=${NNODES:-1}

fail() {
    echo "error: $1" >&2
    exit 1
}

if [ ! -f "$CONFIG_FILE" ]; then
    known=$(cd "$ROOT" && echo train_configs/*.toml)
    [ -f "$ROOT/$CONFIG_FILE" ] \
        || fail "CONFIG_FILE=$CONFIG_FILE is not a file, here or in $ROOT. Configurations: $known"
    CONFIG_FILE=$ROOT/$CONFIG_FILE
fi

if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^[:space:]]')
else
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ')
fi
NGPU=${NGPU:-$((gpus > 0 ? gpus : 1))}
[[ $NGPU =~ ^[1-9][0-9]*$ ]] || fail "NGPU=$NGPU is not a number of processes; use 1 or more."

source "$ROOT/ensure_env.sh"
ensure_env || exit 1

export PYTHONUNBUFFERED=1
if ((gpus > 0)) && [ -z "${PYTORCH_CUDA_ALLOC_CONF:-}" ]; then
    # Clips of many sizes fragment the default allocator.
    export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
fi
train=("$ROOT/train.py" --job.config_file "$CONFIG_FILE" "$@")

if ((NGPU == 1 && NNODES == 1)) || [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
    exec "$PYTHON" "${train[@]}"    # one process, all cores, and signals reach it directly
fi

# Several processes share the cores. Without this torchrun would give each a single thread.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NGPU ? cores / NGPU : 1))}

# On SIGTERM torchrun kills its ranks after 30 s and exits 1; SIGUSR2 kills torchrun. So it runs in a process group of
# its own (set -m), which signals to the group of this script do not reach. This script forwards signals to the ranks:
# they save and exit 0, and so does torchrun. If this script or torchrun is killed, its children die too (setpriv) and
# do not go on training unseen.
with_parent=()
setpriv --pdeathsig KILL true 2>/dev/null && with_parent=(setpriv --pdeathsig KILL)
logs=$(mktemp -d "${TMPDIR:-/tmp}/titan_video.XXXXXX")
options=(
    --nnodes "$NNODES" --nproc_per_node "$NGPU"
    --rdzv_backend c10d --rdzv_id "${RDZV_ID:-$$}" --rdzv_endpoint "${RDZV_ENDPOINT:-localhost:0}"
    --log-dir "$logs" --local-ranks-filter "$LOG_RANK" --role rank --tee 3
)
set -m
# titan_video.launch checks the configuration, then is torchrun.
PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} "${with_parent[@]}" "$PYTHON" -m titan_video.launch "${options[@]}" \
    --no-python "${with_parent[@]}" "$PYTHON" "${train[@]}" &
agent=$!

# Child processes of torchrun, from /proc: after the name in parentheses, the fields of `stat` are state and parent.
ranks() {
    local stat line fields
    for stat in /proc/[0-9]*/stat; do
        { read -r line <"$stat"; } 2>/dev/null || continue
        read -ra fields <<<"${line##*) }"
        [ "${fields[1]}" != "$agent" ] || echo "${line%% *}"
    done
}
forward() {
    local pids tries=30
    interrupted=1
    # No ranks: torchrun is about to end by itself, or has not started them yet. Then there is nothing to save.
    until pids=$(ranks) && [ -n "$pids" ]; do
        kill -0 "$agent" 2>/dev/null || return
        ((tries--)) || { pids=$agent && break; }
        sleep 0.1
    done
    kill -s "$1" $pids 2>/dev/null
}
trap 'forward TERM' TERM
trap 'forward USR2' USR2
trap 'interrupted=1; kill -s INT "$agent"' INT
trap 'interrupted=1; kill -s HUP "$agent"' HUP

errors_of_others() {
    local file rank
    for file in "$logs"/*/attempt_*/*/stderr.log; do
        rank=$(basename "$(dirname "$file")")
        [[ ",$LOG_RANK," == *",$rank,"* ]] || sed -n "/^error: /,\$ s/^/[rank$rank]: /p" "$file"
    done >&2
    echo "The output of all ranks is in $logs" >&2
}

while :; do    # a trapped signal ends `wait` early, with a status that is not torchrun's
    interrupted=0
    wait "$agent"
    status=$?
    ((interrupted)) || break
done
if ((status)) && [ -n "$(ls -A "$logs")" ]; then
    errors_of_others
else
    rm -rf "$logs"    # the run succeeded, or the configuration was refused before torchrun started
fi
exit "$status"

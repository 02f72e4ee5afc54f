#!/usr/bin/env bash
# [CONFIG_FILE=file.toml] [NGPU=n] [LOG_RANK=0,1] ./run_train.sh [--section.field value ...]
#
#   CONFIG_FILE  TOML of the run; default train_configs/shapes.toml. It is looked up in the current folder, then in the
#                folder of this script.
#   NGPU         processes on this machine; default: the number of GPUs, or 1. Without GPUs NGPU=4 starts four CPU
#                processes.
#   LOG_RANK     ranks of this machine whose output is shown, default 0; each line begins with the rank's number in the
#                whole run. Of the other ranks warnings are shown, and if the run fails their last error. Of several
#                machines only the first one shows more than that of its rank 0.
#   PYTHON       interpreter to use without checks. Default: the active python3 if it has the requirements, otherwise
#                .venv, which is made on first use.
#   NNODES, RDZV_ID, RDZV_ENDPOINT   set by multinode_trainer.slurm, which starts this script once on each node.
#
# Relative paths in the TOML and in the arguments are relative to the current folder.
# SIGTERM, Ctrl-C, SIGUSR2 or SIGHUP to this script saves a checkpoint after the current step and stops. A second one
# stops at once. Exit codes: 0 the run finished; 85 it was stopped, and the same command continues it; 1 error.
set -u
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CONFIG_FILE=${CONFIG_FILE:-train_configs/shapes.toml}
LOG_RANK=${LOG_RANK:-0}
NNODES=${NNODES:-1}
STOPPED=85    # titan_video/tools/signals.py

# The first signal is passed on as SIGUSR1, which may arrive beside the same signal from a terminal or a scheduler and
# asks for the same. A second one, 0.2 s or more later, stops at once.
first=''      # when, in milliseconds
at_once=0
milliseconds() {
    local now=${EPOCHREALTIME:-$SECONDS.000000}    # bash before 5.0 has whole seconds only
    echo "$((10#${now%[.,]*} * 1000 + 10#${now#*[.,]} / 1000))"
}
on_stop() {
    if [ -z "${!:-}" ]; then    # no program has been started
        echo "SIG$1: stopped before the run began; the same command starts it" >&2
        exit "$STOPPED"
    elif [ -z "$first" ]; then
        first=$(milliseconds)
        kill -s USR1 "$!" 2>/dev/null
    elif (($(milliseconds) - first >= 200)); then
        at_once=1
        kill -s "$second" "$!" 2>/dev/null
    fi
}
trap 'on_stop TERM' TERM
trap 'on_stop INT' INT
trap 'on_stop USR2' USR2
trap 'on_stop USR1' USR1
trap 'on_stop HUP' HUP

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

if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
    exec "$PYTHON" "${train[@]}"
fi

# If this script or torchrun is killed, its children die too (setpriv) and do not go on training unseen.
with_parent=()
setpriv --pdeathsig KILL true 2>/dev/null && with_parent=(setpriv --pdeathsig KILL)
logs=''
if ((NGPU == 1 && NNODES == 1)); then    # one process, all cores
    second=KILL
    # How long a thread spins before it sleeps. libgomp's default wastes time on cores that others use, too.
    export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}
    "${with_parent[@]}" "$PYTHON" "${train[@]}" <&0 &
else
    second=QUIT
    # Several processes share the cores. Without this torchrun would give each a single thread.
    cores=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NGPU ? cores / NGPU : 1))}
    logs=$(mktemp -d "${TMPDIR:-/tmp}/titan_video.XXXXXX")
    # The id differs at each start, so that a status left by an earlier one is not taken for this one's.
    options=(
        --nnodes "$NNODES" --nproc_per_node "$NGPU"
        --rdzv_backend c10d --rdzv_id "${RDZV_ID:-$$.$(date +%s)}" --rdzv_endpoint "${RDZV_ENDPOINT:-localhost:0}"
        --log-dir "$logs" --local-ranks-filter "$LOG_RANK" --role rank --tee 3
    )
    if ((NNODES == 1)); then    # on loopback, so that the host name need not resolve and others do not see it
        options+=(--local-addr 127.0.0.1)
        [ ! -e /sys/class/net/lo ] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
    fi
    # titan_video.launch checks the configuration, is torchrun, and passes signals on to the ranks.
    PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} "${with_parent[@]}" "$PYTHON" -m titan_video.launch "${options[@]}" \
        --no-python "${with_parent[@]}" "$PYTHON" "${train[@]}" &
fi
errors_of_others() {
    local file rank
    for file in "$logs"/*/attempt_*/*/stderr.log; do
        [ -e "$file" ] || continue
        rank=$(basename "$(dirname "$file")")
        [[ ",$LOG_RANK," == *",$rank,"* ]] || sed -n "/^error: /,\$ s/^/[rank$rank]: /p" "$file"
    done >&2
    echo "The output of all ranks is in $logs" >&2
}

# A trapped signal, also one that came before, ends `wait` early with a status that is not the program's. bash keeps that
# of a program that has ended.
while kill -0 "$!" 2>/dev/null; do
    wait "$!"
done 2>/dev/null    # bash would report a child that a signal has ended
wait "$!"
wait "$!"
status=$?
if [ -n "$logs" ]; then
    if ((status != 0 && status != STOPPED)) && [ -n "$(ls -A "$logs")" ]; then
        errors_of_others
    else
        rm -rf "$logs"    # the run ended well, or the configuration was refused before torchrun started
    fi
fi
if ((status > 128 && at_once == 0)) && [ -n "$first" ]; then    # of the first signal, before Python could take it
    echo "stopped while Python was starting; the same command starts the run" >&2
    status=$STOPPED
fi
exit "$status"

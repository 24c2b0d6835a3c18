#!/usr/bin/env bash
# Starts training with one command on a CPU, one GPU, several GPUs or several machines:
#
#   ./launch.sh --data demo --model demo --training demo        everything after launch.sh goes to tracknet.scripts.train
#   DRY_RUN=1 ./launch.sh ...                                   prints the command that would run, and starts nothing
#
# It is steered by environment variables (docs/launching.md):
#   NUM_PROCESSES      processes on all machines together; one per GPU, or one per machine on CPU, where unset
#   NUM_MACHINES       machines (1); with more than one, run this on each of them with
#   MACHINE_RANK         its number (0), MAIN_PROCESS_IP (the address of machine 0) and MAIN_PROCESS_PORT (29500)
#   CPU                1 trains on the CPU, 0 on GPUs; 1 where no GPU is found
#   ACCELERATE_CONFIG  an accelerate YAML in place of the one chosen from accelerate_configs/; the variables above override it
#   MAX_RESTARTS       how often all processes are started again after a failure (0); needs at least two processes
#   PYTHON             the interpreter; else the active environment's, else .venv's, which uv makes where it is missing
#
# It leaves with the worker's own exit code (accelerate turns all of them into 1) and repeats its error as the last line.
set -uo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
launcher=""
exit_folder=""

refuse() {
    printf 'launch.sh: %s\n' "$1" >&2
    exit 2
}

# A plain `key: value` of the YAML in ACCELERATE_CONFIG; nothing where there is none.
yaml_value() {
    [[ -n "${ACCELERATE_CONFIG:-}" ]] || return 0
    sed -n "s/^$1:[[:space:]]*[\"']\{0,1\}\([^\"'#[:space:]]*\).*/\1/p" "$ACCELERATE_CONFIG"
}

# Environment variable $1, else key $2 of ACCELERATE_CONFIG, else $3.
setting() {
    local value="${!1:-}"
    [[ -n "$value" ]] || value="$(yaml_value "$2")"
    printf '%s' "${value:-$3}"
}

need_number() {
    [[ "$2" =~ ^(0|[1-9][0-9]{0,5})$ ]] && (($2 >= $3)) || refuse "$1 is '$2'; it must be a whole number of at least $3"
}

count_gpus() {
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        [[ "$CUDA_VISIBLE_DEVICES" =~ ^(-1)?$ ]] && echo 0 || awk -F, '{print NF}' <<<"$CUDA_VISIBLE_DEVICES"
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU '
    else
        find /dev -maxdepth 1 -name 'nvidia[0-9]*' | wc -l
    fi
}

choose_cpu() {
    CPU="${CPU:-}"
    case "${ACCELERATE_USE_CPU:-$(yaml_value use_cpu)}" in true | True | yes | 1) CPU="${CPU:-1}" ;; esac
    gpus=0
    [[ "$CPU" == 1 ]] || gpus="$(count_gpus)"
    ((gpus > 0)) || CPU="${CPU:-1}"
    CPU="${CPU:-0}"
    [[ "$CPU" == [01] ]] || refuse "CPU is '$CPU'; it must be 1 (train on the CPU) or 0 (train on GPUs)"
}

choose_sizes() {
    NUM_MACHINES="$(setting NUM_MACHINES num_machines 1)"
    need_number NUM_MACHINES "$NUM_MACHINES" 1
    local per_machine=$((gpus > 0 ? gpus : 1))
    NUM_PROCESSES="$(setting NUM_PROCESSES num_processes $((per_machine * NUM_MACHINES)))"
    need_number NUM_PROCESSES "$NUM_PROCESSES" 1
    ((NUM_PROCESSES % NUM_MACHINES == 0)) ||
        refuse "NUM_PROCESSES=$NUM_PROCESSES does not divide by NUM_MACHINES=$NUM_MACHINES; it counts the processes of all machines together"
    MACHINE_RANK="$(setting MACHINE_RANK machine_rank 0)"
    need_number MACHINE_RANK "$MACHINE_RANK" 0
    ((MACHINE_RANK < NUM_MACHINES)) || refuse "MACHINE_RANK is $MACHINE_RANK; with NUM_MACHINES=$NUM_MACHINES it must be below $NUM_MACHINES"
    MAX_RESTARTS="${MAX_RESTARTS:-0}"
    need_number MAX_RESTARTS "$MAX_RESTARTS" 0
    ((MAX_RESTARTS == 0 || NUM_PROCESSES > 1)) ||
        refuse "MAX_RESTARTS=$MAX_RESTARTS needs at least two processes: accelerate does not restart a single one"
}

choose_rendezvous() {
    MAIN_PROCESS_IP="$(setting MAIN_PROCESS_IP main_process_ip "")"
    # One machine takes any free port, so that two runs can share it.
    local port=0
    if ((NUM_MACHINES > 1)); then
        [[ -n "$MAIN_PROCESS_IP" ]] || refuse "NUM_MACHINES=$NUM_MACHINES needs MAIN_PROCESS_IP, the address of machine 0, on every machine"
        port=29500
    fi
    MAIN_PROCESS_PORT="$(setting MAIN_PROCESS_PORT main_process_port "$port")"
    need_number MAIN_PROCESS_PORT "$MAIN_PROCESS_PORT" $((NUM_MACHINES > 1 ? 1 : 0))
}

choose_config() {
    local name=single_gpu
    [[ "$CPU" == 0 ]] || name=cpu
    if ((NUM_MACHINES > 1)); then
        [[ "$CPU" == 0 ]] && name=multi_node || name=cpu_multi_node
    elif ((NUM_PROCESSES > 1)); then
        [[ "$CPU" == 0 ]] && name=multi_gpu || name=cpu_multi
    fi
    ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-$here/accelerate_configs/$name.yaml}"
}

choose_python() {
    make_environment=()
    if [[ -n "${PYTHON:-}" ]]; then
        return
    elif [[ -x "${VIRTUAL_ENV:-}/bin/python" ]]; then
        PYTHON="$VIRTUAL_ENV/bin/python"
    else
        PYTHON="$here/.venv/bin/python"
        [[ -x "$PYTHON" ]] || make_environment=(uv sync --project "$here")
    fi
}

build_command() {
    exports=("TRACKNET_EXPECTED_WORLD_SIZE=$NUM_PROCESSES")
    # `--cpu` and a MULTI_CPU YAML start one unconnected process; this variable with the multi-GPU launcher starts what was asked for.
    [[ "$CPU" == 0 ]] || exports+=("ACCELERATE_USE_CPU=true")
    command=("$PYTHON" -m accelerate.commands.launch --config_file "$ACCELERATE_CONFIG"
        --num_processes "$NUM_PROCESSES" --num_machines "$NUM_MACHINES" --machine_rank "$MACHINE_RANK" --main_process_port "$MAIN_PROCESS_PORT")
    ((NUM_MACHINES == 1)) || command+=(--main_process_ip "$MAIN_PROCESS_IP")
    ((MAX_RESTARTS == 0)) || command+=(--max_restarts "$MAX_RESTARTS")
    command+=(-m tracknet.scripts.train "$@")
}

print_command() {
    local line=""
    ((${#make_environment[@]} == 0)) || line="$(printf '%q ' "${make_environment[@]}")&& "
    line+="$(printf '%q ' env "${exports[@]}" "${command[@]}")"
    printf '%s\n' "${line% }" # in one write: on several nodes the lines of all go to one output
}

workers() {
    "$PYTHON" -c 'import sys, psutil; print(*(child.pid for child in psutil.Process(int(sys.argv[1])).children()))' "$launcher" 2>/dev/null
}

# Several processes: their launcher passes the first signal on and waits. After a second one it would kill them in 30 s, and it makes SIGTERM of
# any; so only Ctrl-C, which is to end them at once, goes on, to the workers themselves. One process: its launcher passes nothing on, so it is
# signalled itself.
forward() {
    interrupted=1
    local earlier="${last_signal:-}"
    last_signal="$1"
    [[ -n "$launcher" ]] || exit "$(code_without_record 1)"
    local targets
    targets="$(workers)"
    if [[ -z "$targets" ]]; then
        kill -s KILL "$launcher" 2>/dev/null # nothing to save, and a launcher that waits for another machine does not hear signals
    elif ((NUM_PROCESSES > 1)) && [[ -z "$earlier" ]]; then
        kill -s "$1" "$launcher" 2>/dev/null
    elif ((NUM_PROCESSES == 1)) || [[ "$1" == INT ]]; then
        # shellcheck disable=SC2086  # a list of process ids
        kill -s "$1" $targets 2>/dev/null
    fi
}

# An interrupted `wait` returns early, so it is repeated until it ends by itself.
wait_for_launcher() {
    while :; do
        interrupted=0
        wait "$launcher"
        status=$?
        ((interrupted)) || return 0
    done
}

code_without_record() {
    case "${last_signal:-}" in INT) echo 130 ;; TERM) echo 75 ;; *) echo "$1" ;; esac
}

# The worker's exit code on the first line and its message on the second; nothing where no worker got as far as leaving one.
read_record() {
    [[ -s "$TRACKNET_EXIT_FILE" ]] || return 0
    "$PYTHON" -c '
import json, sys
record = json.load(open(sys.argv[1], encoding="utf-8"))
print(int(record["code"]), " ".join(str(record["message"]).split()), sep="\n")' "$TRACKNET_EXIT_FILE" 2>/dev/null
}

finish() {
    local code="" message=""
    ((status != 0)) || exit 0
    { read -r code && read -r message; } < <(read_record)
    if [[ -z "$code" || "$code" == 0 ]]; then
        code="$(code_without_record 1)"
        message="launch.sh: no worker said why it stopped (the launcher left with $status); see the output above"
        [[ -z "${last_signal:-}" ]] || message="launch.sh: stopped by SIG$last_signal before a worker could save anything"
    fi
    [[ -z "$message" ]] || printf '%s\n' "$message" >&2
    exit "$code"
}

[[ -z "${ACCELERATE_CONFIG:-}" || -f "$ACCELERATE_CONFIG" && "$ACCELERATE_CONFIG" == *.y?(a)ml ]] ||
    refuse "ACCELERATE_CONFIG is '$ACCELERATE_CONFIG'; it must be an existing .yaml file, such as $here/accelerate_configs/multi_gpu.yaml"
choose_cpu
choose_sizes
choose_rendezvous
choose_config
choose_python
build_command "$@"

case "${DRY_RUN:-0}" in
    0) ;;
    1) print_command; exit ;;
    *) refuse "DRY_RUN is '$DRY_RUN'; it must be 1 (print the command) or 0" ;;
esac

if ((${#make_environment[@]} > 0)); then
    command -v uv >/dev/null || refuse "there is no environment yet: run 'pip install uv', or set PYTHON to an interpreter that has tracknet"
    "${make_environment[@]}" >&2 || refuse "'${make_environment[*]}' failed; see the output above"
fi
[[ -x "$(command -v "$PYTHON")" ]] || refuse "PYTHON is '$PYTHON', which cannot be run; set PYTHON to an interpreter that has tracknet"

trap 'forward INT' INT
# SIGUSR1 is what Slurm users often ask for as a warning; unhandled it would end this script and orphan the workers.
trap 'forward TERM' TERM HUP USR1
trap 'rm -rf -- "$exit_folder"' EXIT
exit_folder="$(mktemp -d)" || refuse "no temporary folder could be made; set TMPDIR to one that can be written to"
export TRACKNET_EXIT_FILE="$exit_folder/exit.json"
export TRACKNET_TIMESTAMP="${TRACKNET_TIMESTAMP:-$(date +%Y%m%d-%H%M%S)}"
# How long the launcher lets workers save after a signal before it kills them, in seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"
export "${exports[@]}"

device=GPU
[[ "$CPU" == 0 ]] || device=CPU
printf 'launch.sh: %s on %s, %s process(es), machine %s of %s\n' "${ACCELERATE_CONFIG##*/}" "$device" "$NUM_PROCESSES" "$((MACHINE_RANK + 1))" "$NUM_MACHINES" >&2
# Job control gives the launcher its own process group: Ctrl-C then comes through `forward` only, and SIGINT is not ignored in the workers.
set -m
"${command[@]}" </dev/null &
launcher=$!
wait_for_launcher
finish

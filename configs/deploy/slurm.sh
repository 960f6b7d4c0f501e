#!/usr/bin/env bash
# Serves a model on the nodes of a Slurm job: a Ray cluster for as long as the job lasts, with the server on its first
# node. From an environment that has `phalanx` on its PATH:
#   sbatch configs/deploy/slurm.sh configs/two-nodes-16x-h100.yaml --set model=/models/llama-3.1-70b-instruct
# Nodes, GPUs and time can be given to sbatch before the script; they must suit the YAML. What follows the YAML goes to
# `phalanx serve`. To end the job so that running requests finish: scancel --batch --signal=TERM JOBID. A plain scancel
# ends Ray at the same moment, and what runs is lost.
#SBATCH --job-name=phalanx
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=1-00:00:00
#SBATCH --output=phalanx-%j.log
# This shell alone is told 120 s before the time is up: more than serve.drain_timeout_s, which is 60 where the YAML says
# nothing, with 15 s for the ranks to end and 30 s for Ray.
#SBATCH --signal=B:TERM@120
set -euo pipefail

if (($# == 0)); then
    echo "usage: sbatch slurm.sh CONFIG [OPTION OF phalanx serve]..." >&2
    exit 2
fi

# Nodes and networks are shared: a port and a folder of this job's own, and a token that no other job knows. Ray's logs
# stay in the folder, on each node.
port=$((20000 + SLURM_JOB_ID % 10000))
folder=/tmp/ray-$SLURM_JOB_ID
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
workers=("${nodes[@]:1}")
address=$head:$port

steps=() # process ids of srun, one a step
stopping=
child=

# start_ray COUNT NODE,NODE... [OPTION OF ray start]...: a step that lasts until it is ended, and then ends what it
# started and nothing else. Where nodes have several networks, --node-ip-address chooses.
start_ray() {
    srun --overlap --export=ALL --nodes="$1" --ntasks="$1" --nodelist="$2" --ntasks-per-node=1 \
        --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none \
        ray start --num-cpus="$SLURM_CPUS_ON_NODE" --block "${@:3}" &
    steps+=($!)
}

# attend COMMAND...: runs it, passes SIGTERM on to it, and returns its own exit status. While a command is in the
# foreground bash would wait for its end before it heard of a signal.
attend() {
    "$@" &
    child=$!
    [[ -z $stopping ]] || kill -TERM "$child" # it came before there was a child to pass it on to
    while kill -0 "$child" 2>/dev/null; do
        wait "$child" || true
    done
    local ended=$child
    child=
    wait "$ended"
}

stop() {
    stopping=yes
    [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}

end_ray() {
    kill -TERM "${steps[@]}" 2>/dev/null || true
    wait "${steps[@]}" || true
}

trap stop TERM INT
trap end_ray EXIT

start_ray 1 "$head" --head --port="$port" --temp-dir="$folder"
until attend ray health-check --address "$address" >/dev/null 2>&1; do
    [[ -z $stopping ]] && kill -0 "${steps[0]}" || exit 1 # its own message is in the log
    attend sleep 2
done
if ((${#workers[@]})); then
    start_ray "${#workers[@]}" "$(IFS=,; echo "${workers[*]}")" --address="$address"
fi
attend python -m phalanx.configs.deploy.wait_for_ray --address "$address" --nodes "${#nodes[@]}" --timeout 600
attend phalanx serve --host 0.0.0.0 --set "cluster.ray=$address" "$@"

#!/usr/bin/env bash
# Pretrain by a recipe on several machines without a scheduler: run this on each of them, with the same arguments.
#
#   NODES=2 HEAD=node0 GPUS=8 examples/several_nodes.sh RECIPE TEXT RUN_DIR [field=value ...] [--flag-of-megatron ...]
#
# NODES is the number of machines, HEAD the name of one of them that all can reach, PORT a free port there, GPUS the
# processes on each machine (by default all its GPUs), DEVICE the kind that the planner lays the run out for.
# TEXT and RUN_DIR must be the same folders on every machine. DRY_RUN=1 prints the command instead of running it.
set -euo pipefail

if (($# < 3)) || [[ -z ${NODES:-} || -z ${HEAD:-} ]]; then
    echo "usage: NODES=2 HEAD=node0 GPUS=8 $0 RECIPE TEXT RUN_DIR [field=value ...] [--flag-of-megatron ...]" >&2
    exit 2
fi
recipe=$1 text=$2 run_dir=$3
shift 3
changes=()
while (($#)) && [[ $1 != --* ]]; do
    changes+=("$1")
    shift
done
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

# Each machine computes the flags; they depend on nothing but the arguments, so that all come to the same.
mkdir -p "$run_dir"
flags_file=$(mktemp)
trap 'rm -f "$flags_file"' EXIT
composer-megatron recipe flags "$recipe" "${changes[@]}" --gpus $((NODES * gpus)) --device "${DEVICE:-h100}" \
    --architecture "$run_dir/architecture.json" > "$flags_file"
mapfile -t flags < "$flags_file"

command=(torchrun --nnodes "$NODES" --nproc-per-node "$gpus"
    --rdzv-id "$(basename "$run_dir")" --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}"
    -m composer_megatron.train "${flags[@]}" --text "$text" --run-dir "$run_dir" "$@")
if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${command[@]}"
    echo
else
    "${command[@]}"
fi

#!/usr/bin/env bash
# Pretrain by a recipe on the GPUs of this machine. The same command again goes on from the last checkpoint.
#
#   examples/one_node.sh RECIPE TEXT RUN_DIR [field=value ...] [--flag-of-megatron ...]
#   GPUS=4 examples/one_node.sh 1b-stacked runs/text runs/1b-stacked tokens=1e9
#
# GPUS is the number of processes (by default all GPUs); DEVICE the kind that the planner lays the run out for.
# DRY_RUN=1 prints the command instead of running it.
set -euo pipefail

if (($# < 3)); then
    echo "usage: $0 RECIPE TEXT RUN_DIR [field=value ...] [--flag-of-megatron ...]" >&2
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

mkdir -p "$run_dir"
composer-megatron recipe flags "$recipe" "${changes[@]}" --gpus "$gpus" --device "${DEVICE:-h100}" \
    --architecture "$run_dir/architecture.json" > "$run_dir/train.flags"
mapfile -t flags < "$run_dir/train.flags"

command=(torchrun --standalone --nproc-per-node "$gpus"
    -m composer_megatron.train "${flags[@]}" --text "$text" --run-dir "$run_dir" "$@")
if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi

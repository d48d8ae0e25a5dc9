#!/usr/bin/env bash
# Copies what a run wrote from a worker to here.
#
#   launch/fetch_tpu.sh --name=ldm --zone=us-west4-a --workdir=/mnt/shared/runs/paper \
#       --out=runs/paper
#
#   --what=logs      the workdir without its checkpoints, and the worker's train.log
#   --what=all       checkpoints too
#   --worker=0       from which worker
#
# From a bucket `gcloud storage cp --recursive gs://BUCKET/runs/paper .` does it without a slice.
#
set -euo pipefail
# shellcheck source=launch/tpu_common.sh
. "$(dirname "$0")/tpu_common.sh"
parse_options "workdir out what worker" "$@"
check workdir '.*' "the run's folder on the worker"
check out '.*' "a folder here"
check what 'logs|all' "logs or all"
check worker '[0-9]+' "a worker's number"

left_out=(--exclude=./first_stage --exclude=./diffusion)
[ "$what" = logs ] || left_out=()
ssh_command "$worker" "$(show tar -czf - ${left_out[@]+"${left_out[@]}"} -C "$workdir" .) \
-C ~/ldm_run train.log"
line="$(show "${ssh[@]}") | tar -xzf - -C $(show "$out")"
if [ -n "$dry_run" ]; then
  echo "mkdir -p $(show "$out") && $line"
  exit
fi
mkdir -p "$out"
echo "+ $line" >&2
"${ssh[@]}" | tar -xzf - -C "$out"

#!/usr/bin/env bash
# Starts a command on all workers of a slice as a service: it outlives the connection, is started
# again when it fails or the VM reboots, and what ran there before is stopped first.
#
#   launch/run_tpu.sh --name=ldm --zone=us-west4-a -- python -m latent_diffusion_jax.train \
#       --config=configs/txt2img.py:paper --workdir=/mnt/shared/runs/paper
#   launch/run_tpu.sh --name=ldm --zone=us-west4-a --stop    # saves a checkpoint, then ends
#
# `python` is the environment's that setup_tpu.sh made. A command that ends with status 2, an error
# of the user's, is not started again.
#
set -euo pipefail
# shellcheck source=launch/tpu_common.sh
. "$(dirname "$0")/tpu_common.sh"
parse_options "stop" "$@"

if [ -n "$stop" ]; then
  [ ${#command[@]} -eq 0 ] || fail "--stop takes no command" 2
  ssh_command all "bash latent_diffusion_jax/launch/worker_run.sh stop"
else
  [ ${#command[@]} -gt 0 ] || fail "which command? -- python -m latent_diffusion_jax.train ..." 2
  check_workdir
  ssh_command all "bash latent_diffusion_jax/launch/worker_run.sh start $(show "${command[@]}")"
fi
call "${ssh[@]}"

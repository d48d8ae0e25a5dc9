#!/usr/bin/env bash
# Copies the last commit of this checkout to all workers of a slice, and installs what it needs.
#
#   launch/setup_tpu.sh --name=ldm --zone=us-west4-a --mount=gs://my-bucket
#
#   --mount=SOURCE   gs://BUCKET[/FOLDER] (through Cloud Storage FUSE; a bucket with hierarchical
#                    namespace) or HOST:/SHARE (NFS, such as Filestore), at /mnt/shared on every
#                    worker: the place of --workdir and of data
#
# To be called again after a commit: what is installed is not installed again.
#
set -euo pipefail
# shellcheck source=launch/tpu_common.sh
. "$(dirname "$0")/tpu_common.sh"
parse_options "mount" "$@"

commit=$(git -C "$root" rev-parse --short HEAD)
archive=${TMPDIR:-/tmp}/latent_diffusion_jax-$commit.tar.gz
[ -z "$(git -C "$root" status --porcelain)" ] ||
  echo "warning: changes that are not committed stay here; the workers get commit $commit" >&2

call git -C "$root" archive --format=tar.gz --output="$archive" HEAD
call gcloud compute tpus tpu-vm scp "$archive" "$name:latent_diffusion_jax.tar.gz" "${where[@]}" \
  --worker=all
ssh_command all "mkdir -p latent_diffusion_jax && \
tar -xzf latent_diffusion_jax.tar.gz -C latent_diffusion_jax && \
bash latent_diffusion_jax/launch/worker_setup.sh $mount"
call "${ssh[@]}"

#!/usr/bin/env bash
# Deletes a slice, with the disks of its VMs; only this ends its costs. A bucket or a share that was
# mounted stays.
#
#   launch/delete_tpu.sh --name=ldm --zone=us-west4-a
#
set -euo pipefail
# shellcheck source=launch/tpu_common.sh
. "$(dirname "$0")/tpu_common.sh"
parse_options "" "$@"

delete=(gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet)
delete_node=(gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet)
if [ -n "$dry_run" ]; then
  call "${delete[@]}"
  exit
fi

look_up queue || fail "cannot ask for the state of $name"
queue=$state
look_up node || fail "cannot ask for the state of $name"
say "deleting $name in $zone: queued resource $queue, node $state"
# --force takes the node along.
[ "$queue" = ABSENT ] || call "${delete[@]}"
# A node that was made without a queued resource, or that outlived it, goes on costing.
look_up node || fail "cannot see whether the node $name is gone"
[ "$state" = ABSENT ] || call "${delete_node[@]}"
say "$name is deleted"

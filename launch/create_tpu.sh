#!/usr/bin/env bash
# Asks for a Cloud TPU slice and waits until it is there. Where it already is, nothing happens.
#
#   launch/create_tpu.sh --name=ldm --zone=us-west4-a --type=v5litepod-16 --spot
#
#   --wait=86400     seconds to wait at most
#   --interval=30    seconds between two looks
#
set -euo pipefail
# shellcheck source=launch/tpu_common.sh
. "$(dirname "$0")/tpu_common.sh"
parse_options "wait interval" "$@"
check type '.*' "a type such as v5litepod-16"
[ -n "$version" ] || default_version

create=(gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}"
  --accelerator-type="$type" --runtime-version="$version" ${spot:+--spot}
  ${create_flags[@]+"${create_flags[@]}"})
if [ -n "$dry_run" ]; then
  call "${create[@]}"
  queue_command && call "${query[@]}"
  node_command && call "${query[@]}"
  exit
fi

delete="launch/delete_tpu.sh --name=$name --zone=$zone"
look_up queue || fail "cannot ask for the state of $name"
if [ "$state" = ABSENT ]; then call "${create[@]}"; else say "$name exists"; fi
while true; do
  look_up queue || state=UNREACHABLE # one lost connection is no reason to give up
  seen="queued resource $name: $state"
  case $state in
    FAILED | SUSPENDED | SUSPENDING | DELETING | ABSENT)
      fail "$seen. It will not become active: $delete, then create it again (FAILED: \
'gcloud compute tpus queued-resources describe $name --zone=$zone' says why)" ;;
    ACTIVE)
      look_up node || state=UNREACHABLE
      seen+=", node: $state"
      case $state in
        READY) say "$seen" && exit ;;
        PREEMPTED | TERMINATED | ABSENT) fail "$seen. It was taken away: $delete, then create it again" ;;
      esac ;;
  esac
  say "$seen"
  [ "$SECONDS" -lt "$wait" ] || fail "$seen after $wait seconds. It stays in the queue: the same \
command goes on waiting, $delete takes it out"
  sleep "$interval"
done

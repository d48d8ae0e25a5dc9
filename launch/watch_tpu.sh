#!/usr/bin/env bash
# Shows the state of a slice and the end of a worker's log; with --keep it keeps a run going.
#
#   launch/watch_tpu.sh --name=ldm --zone=us-west4-a
#   launch/watch_tpu.sh --keep --name=ldm --zone=us-west4-a --type=v5litepod-16 --spot \
#       --mount=gs://my-bucket -- python -m latent_diffusion_jax.train \
#       --config=configs/txt2img.py:paper --workdir=/mnt/shared/runs/paper
#
#   --worker=0         whose log; --lines=50 of it
#   --keep             does what is missing (create, set up, run), and again after a preemption,
#                      until the run is finished; to be left running, in tmux for example
#   --delete_at_end    with --keep: deletes the slice when the run is finished
#   --mount=SOURCE     as for setup_tpu.sh; --wait=86400 as for create_tpu.sh
#   --interval=30      seconds between two looks
#
set -euo pipefail
# shellcheck source=launch/tpu_common.sh
. "$(dirname "$0")/tpu_common.sh"
parse_options "worker lines keep delete_at_end mount wait interval" "$@"

common=(--name="$name" --zone="$zone" ${project:+--project="$project"} ${dry_run:+--dry_run})
launch=$(dirname "$0")
create() {
  bash "$launch/create_tpu.sh" "${common[@]}" --type="$type" ${version:+--version="$version"} \
    ${spot:+--spot} ${create_flags[@]+"${create_flags[@]/#/--create_flag=}"} \
    --wait="$wait" --interval="$interval"
}
start() {
  bash "$launch/setup_tpu.sh" "${common[@]}" ${mount:+--mount="$mount"} &&
    bash "$launch/run_tpu.sh" "${common[@]}" -- "${command[@]}"
}
delete() { bash "$launch/delete_tpu.sh" "${common[@]}"; }

if [ -z "$keep" ]; then
  ssh_command "$worker" "cat ldm_run/status; tail -n $lines ldm_run/train.log"
  if [ -n "$dry_run" ]; then
    queue_command && call "${query[@]}"
    node_command && call "${query[@]}"
  else
    look_up queue && say "queued resource $name: $state" && look_up node || exit
    say "node $name: $state"
    [ "$state" = READY ] || exit 0
  fi
  call "${ssh[@]}"
  exit
fi

check type '.*' "a type such as v5litepod-16"
[ ${#command[@]} -gt 0 ] || fail "which command? -- python -m latent_diffusion_jax.train ..." 2
check_workdir
if [ -n "$dry_run" ]; then
  delete && create && start
  exit
fi

look_up queue || fail "cannot ask for the state of $name" # later on it is asked again
failures=0 stopped=0 # in a row
while true; do
  step=''
  if look_up queue && queue=$state && look_up node; then
    case $queue/$state in
      SUSPENDED/* | FAILED/* | */PREEMPTED | */TERMINATED | ACTIVE/ABSENT)
        say "queued resource $name: $queue, node: $state; starting anew" && step=delete ;;
      SUSPENDING/* | DELETING/*) say "queued resource $name: $queue" ;;
      ACTIVE/READY)
        ssh_command all "cat ldm_run/status 2>/dev/null || echo none"
        poll "${ssh[@]}" || answer=unreachable
        say "queued resource $name: $queue, run: $(sort -u <<<"$answer" | paste -sd , -)"
        case $answer in
          *failed*) fail "the run has failed for good; its log: launch/watch_tpu.sh --name=$name \
--zone=$zone. launch/run_tpu.sh starts it again; the slice goes on costing until \
launch/delete_tpu.sh" ;;
          *none*) step=start ;;
          *ing* | *unreachable*) stopped=0 ;;
          *stopped*) # by the signal before a preemption, or by somebody
            stopped=$((stopped + 1))
            [ $stopped -lt 10 ] || fail "somebody has stopped the run and the slice is still there; \
launch/run_tpu.sh starts it again; the slice goes on costing until launch/delete_tpu.sh" ;;
          *finished*) break ;;
        esac ;;
      *) step=create ;;
    esac
    if [ -n "$step" ]; then
      if "$step"; then
        [ "$step" != start ] || failures=0
        continue
      fi
      failures=$((failures + 1))
      [ $failures -lt 6 ] || fail "six failures in a row, the last in: $step"
    fi
  fi
  sleep "$interval"
done
say "the run is finished"
if [ -n "$delete_at_end" ]; then delete; else say "the slice costs until launch/delete_tpu.sh"; fi

#!/usr/bin/env bash
# Runs a command until it is done: when it fails it is started again, after a pause that grows.
#
#   launch/supervise.sh --log=train.log --status=status -- python -m latent_diffusion_jax.train ...
#
#   --log=FILE         what it prints is appended there
#   --status=FILE      how it is doing, one line: running, restarting, finished, stopped, failed
#   --pause=5          seconds before the first new start, then twice as long each time, to 60
#   --max_restarts=20  in a row; one that has run for an hour counts anew
#
# Status 0 is done and 2 an error of the user's: both are the end. SIGTERM is passed on, once, and
# when the command has saved and ended nothing is started again.
set -euo pipefail

log=/dev/stdout status_file=/dev/null pause=5 max_restarts=20
while [ $# -gt 0 ]; do
  case $1 in
    --log=*) log=${1#*=} ;;
    --status=*) status_file=${1#*=} ;;
    --pause=*) pause=${1#*=} ;;
    --max_restarts=*) max_restarts=${1#*=} ;;
    --) shift && break ;;
    *) echo "error: unknown option '$1'" >&2 && exit 2 ;;
  esac
  shift
done
[ $# -gt 0 ] || { echo "error: which command? -- COMMAND ..." >&2 && exit 2; }
exec >>"$log" 2>&1

note() {
  echo "$1" >"$status_file"
  printf '%(%F %T)T supervise: %s\n' -1 "$1"
}
child='' asked=''
pass_on() {
  [ -n "$asked" ] || [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true
  asked=yes
}
trap pass_on TERM INT

restarts=0 delay=$pause
while true; do
  note running
  started=$SECONDS
  "$@" &
  child=$!
  [ -z "$asked" ] || kill -TERM "$child" # it came between the two
  status=0 && wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do # it was a signal to this script that ended the waiting
    status=0 && wait "$child" || status=$?
  done
  child=''
  [ "$status" -ne 0 ] || { note finished && exit 0; }
  [ "$status" -ne 2 ] || { note "failed: status 2, an error of the user's" && exit 2; }
  [ -z "$asked" ] || { note "stopped: status $status" && exit 0; }
  if [ $((SECONDS - started)) -ge 3600 ]; then restarts=0 delay=$pause; fi
  restarts=$((restarts + 1))
  if [ "$restarts" -gt "$max_restarts" ]; then
    note "failed: status $status after $max_restarts new starts"
    exit "$status"
  fi
  note "restarting: status $status, start $restarts of $max_restarts in $delay s"
  sleep "$delay" &
  wait $! || true
  [ -z "$asked" ] || { note "stopped" && exit 0; }
  delay=$(awk "BEGIN { d = 2 * $delay; print d < 60 ? d : 60 }")
done

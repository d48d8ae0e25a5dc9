# Sourced by the *_tpu.sh scripts: their common options and the gcloud commands that they share.
#
#   --name=NAME      of the slice; its queued resource and its node are both called this
#   --zone=ZONE      such as us-west4-a
#   --project=ID     default: gcloud's own
#   --type=TYPE      accelerator type, such as v5litepod-8 (one host) or v5litepod-16 (four)
#   --version=V      software of the VMs; default: what Google names for JAX on that generation
#   --spot           cheaper, and may be taken away at any time
#   --create_flag=F  a further flag for `queued-resources create`, such as
#                    --create_flag=--network=mine; may be repeated
#   --dry_run        print the commands, quoted for pasting, and run none of them
# shellcheck shell=bash disable=SC2034  # what is set here is used by the scripts

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name='' zone='' project='' type='' version='' spot='' dry_run='' create_flag='' create_flags=()
mount='' wait=86400 interval=30 stop='' worker=0 lines=50 keep='' delete_at_end=''
workdir='' out='' what=logs command=()
booleans=" spot dry_run stop keep delete_at_end "
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
shown=$'\n'

fail() { # MESSAGE [STATUS]
  echo "error: $1" >&2
  exit "${2:-1}"
}

say() { echo "$(date +%T) $*" >&2; }

show() { # prints a command as one line that a shell reads back as the same words
  local line
  printf -v line ' %q' "$@"
  echo "${line:1}"
}

call() { # runs a command and says which; with --dry_run it only says so
  if [ -n "$dry_run" ]; then
    show "$@"
  else
    echo "+ $(show "$@")" >&2
    "$@"
  fi
}

poll() { # runs a command for its output, into `answer`; says which one the first time
  local line
  line="+ $(show "$@")"
  if [[ $shown != *$'\n'"$line"$'\n'* ]]; then
    echo "$line" >&2
    shown+=$line$'\n'
  fi
  answer=$("$@" 2>"$errors")
}

usage() { # the comments at the top of the script and of this file
  local file
  for file in "$0" "${BASH_SOURCE[0]}"; do
    sed -n -e '/^#!/d' -e '/^[^#]/q' -e '/shellcheck/d' -e 's/^#$//p' -e 's/^# //p' "$file"
  done
}

# parse_options "OWN OPTIONS" "$@": sets the variables above, and `command` to what follows --.
parse_options() {
  local known=" name zone project type version spot create_flag dry_run $1 " key value
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      --) shift && command=("$@") && break ;;
      --help) usage && exit ;;
      --*) key=${1#--} && key=${key%%=*} value=${1#*=} ;;
      *) fail "unexpected argument '$1'; options are written --option=value" 2 ;;
    esac
    [[ $known == *" $key "* ]] || fail "unknown option --$key; known are:${known// / --}" 2
    if [[ $booleans == *" $key "* ]]; then
      [ "$1" = "--$key" ] || fail "--$key takes no value" 2
      value=yes
    elif [[ $1 != *=?* ]]; then
      fail "--$key needs a value: --$key=VALUE" 2
    fi
    printf -v "$key" %s "$value"
    [ "$key" != create_flag ] || create_flags+=("$value")
    shift
  done
  check name '[a-z]([a-z0-9-]{0,60}[a-z0-9])?' "lower-case letters, digits and dashes"
  check zone '[a-z0-9]+(-[a-z0-9]+)+' "a zone such as us-west4-a"
  [ -z "$project" ] || check project '[a-z0-9:.-]+' "a project's id"
  [ -z "$type" ] || check type '[a-z0-9]+-[0-9]+' "a type such as v5litepod-16"
  [ -z "$version" ] || check version '[a-z0-9.-]+' "a version such as v2-alpha-tpuv5-lite"
  [ -z "$mount" ] || check mount 'gs://[a-z0-9][A-Za-z0-9._/-]*|[A-Za-z0-9.-]+:/[A-Za-z0-9._/-]*' \
    "gs://BUCKET, gs://BUCKET/FOLDER or HOST:/SHARE"
  check interval '[0-9.]+' "seconds" && check wait '[0-9]+' "seconds"
  check lines '[0-9]+' "a number" && check worker '[0-9]+|all' "a worker's number, or all"
  where=(--zone="$zone") && [ -z "$project" ] || where+=(--project="$project")
  [ -n "$dry_run" ] || type -P gcloud >/dev/null ||
    fail "gcloud is not on the PATH; https://cloud.google.com/sdk/docs/install"
}

check() { # VARIABLE PATTERN WHAT IT SHOULD BE
  [ -n "${!1}" ] || fail "--$1 is needed: $3" 2
  [[ ${!1} =~ ^($2)$ ]] || fail "--$1='${!1}' is not $3" 2
}

default_version() { # for --type
  case $type in
    v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) fail "no default --version for --type=$type; Google's list has it: \
https://cloud.google.com/tpu/docs/runtimes" 2 ;;
  esac
}

queue_command() {
  query=(gcloud compute tpus queued-resources describe "$name" "${where[@]}"
    --format="value(state.state)")
}

node_command() {
  query=(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format="value(state)")
}

# Sets `state`: of the queued resource (queue) or the node (node); ABSENT where there is none.
# Fails where that cannot be found out.
look_up() {
  "$1_command"
  if poll "${query[@]}"; then
    state=${answer:-UNKNOWN}
  elif grep -q NOT_FOUND "$errors"; then
    state=ABSENT
  else
    cat "$errors" >&2
    return 1
  fi
}

ssh_command() { # WORKER COMMAND: the words to run a line of shell there, into `ssh`
  # A VM that is gone says nothing; ssh alone would wait for it for ever.
  ssh=(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1"
    --ssh-flag=-oConnectTimeout=30 --ssh-flag=-oServerAliveInterval=30 --command="$2")
}

# A run has to find its checkpoints after a preemption, and all hosts have to write to one folder.
check_workdir() {
  local word folder=''
  for word in "${command[@]}"; do
    case $folder in --workdir) folder=$word && break ;; esac
    case $word in --workdir=* | --workdir) folder=${word#--workdir=} ;; esac
  done
  case $folder in
    gs://*) fail "--workdir=$folder: a workdir is a folder. Mount the bucket (setup_tpu.sh \
--mount=gs://BUCKET) and give --workdir=/mnt/shared/..." 2 ;;
    /mnt/*) ;;
    ?*) echo "warning: --workdir=$folder is on the VMs' own disks: it is lost with the slice, and \
several hosts need one folder. With setup_tpu.sh --mount=... there is /mnt/shared" >&2 ;;
  esac
}

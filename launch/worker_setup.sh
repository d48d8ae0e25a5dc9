#!/usr/bin/env bash
# On a worker (setup_tpu.sh calls it): Python, what the package needs on TPUs, and a mount.
#
#   worker_setup.sh [gs://BUCKET[/FOLDER] | HOST:/SHARE]
#
# The mount is at /mnt/shared, also after a boot.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh
source=${1:-} shared=${LDM_SHARED:-/mnt/shared}
releases=https://github.com/GoogleCloudPlatform/gcsfuse/releases/download

patiently() { # a new VM installs updates of its own for some minutes and holds apt's locks
  local attempt
  for attempt in {1..30}; do
    if sudo env DEBIAN_FRONTEND=noninteractive "$@"; then return; fi
    echo "attempt $attempt of 30 failed: $*" >&2
    sleep 10
  done
  return 1
}

apt_install() {
  patiently apt-get update -q
  patiently apt-get install -y -q "$@"
}

mount_shared() {
  local options package bucket=${source#gs://}
  if [ "$source" = "$bucket" ]; then
    command -v mount.nfs >/dev/null || apt_install nfs-common
    options="$source $shared nfs rw,_netdev,hard"
  else
    if ! command -v gcsfuse >/dev/null; then
      package=$(mktemp --suffix=.deb)
      chmod a+r "$package" # apt reads it as a user of its own
      curl -fsSL --retry 5 -o "$package" "$releases/v3.8.0/gcsfuse_3.8.0_amd64.deb"
      apt_install "$package"
      rm -f "$package"
    fi
    # Workers must see each other's files at once, so nothing about files is remembered (the default
    # on large machines is for ever); and folders are renamed at once or not at all.
    options="${bucket%%/*} $shared gcsfuse rw,_netdev,allow_other,uid=$(id -u),gid=$(id -g)"
    options+=,implicit_dirs,metadata_cache_ttl_secs=0,metadata_cache_negative_ttl_secs=0
    options+=,rename_dir_limit=0
    [[ $bucket != */?* ]] || options+=,only_dir=${bucket#*/}
  fi
  if mountpoint -q "$shared"; then sudo umount "$shared"; fi
  sudo sed -i "\\| $shared |d" /etc/fstab
  echo "$options 0 0" | sudo tee -a /etc/fstab >/dev/null
  sudo mkdir -p "$shared"
  sudo mount "$shared"
  [ -w "$shared" ] || sudo chmod a+rwx "$shared"

  # Orbax writes a checkpoint into a folder and renames that when it is whole.
  local probe
  probe=$shared/.probe-$(hostname)
  rm -rf "$probe" "$probe-renamed"
  mkdir -p "$probe/a/b"
  touch "$probe/a/b/file"
  if ! mv "$probe" "$probe-renamed"; then
    echo "error: $source cannot rename folders, which checkpoints need. A bucket has to be made \
with a hierarchical namespace: gcloud storage buckets create gs://NAME --location=REGION \
--uniform-bucket-level-access --enable-hierarchical-namespace" >&2
    return 1
  fi
  rm -r "$probe-renamed"
  echo "$source" >"$HOME/ldm_run/mount"
}

if ! find_python >/dev/null 2>&1; then # Ubuntu 22.04 has 3.10
  patiently add-apt-repository -y ppa:deadsnakes/ppa
  apt_install python3.12 python3.12-venv
fi
"$(find_python)" -c 'import ensurepip' 2>/dev/null || apt_install python3-venv
sed 's/^jax>/jax[tpu]>/' requirements.txt >requirements-tpu.txt
install requirements-tpu.txt

mkdir -p "$HOME/ldm_run"
if [ -n "$source" ] && ! { mountpoint -q "$shared" &&
  [ "$(cat "$HOME/ldm_run/mount" 2>/dev/null)" = "$source" ]; }; then
  mount_shared
fi
echo "$(hostname) is set up"

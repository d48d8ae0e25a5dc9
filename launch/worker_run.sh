#!/usr/bin/env bash
# On a worker (run_tpu.sh calls it): makes a command the service `ldm_run`, and starts or stops it.
#
#   worker_run.sh start COMMAND... | stop
#
# The service is supervise.sh around the command; its log and status are in ~/ldm_run.
set -euo pipefail
cd "$(dirname "$0")/.."
run=$HOME/ldm_run shared=${LDM_SHARED:-/mnt/shared}
unit=/etc/systemd/system/ldm_run.service
mkdir -p "$run"

action=$1 && shift
if sudo systemctl cat ldm_run >/dev/null 2>&1; then # it saves, for up to TimeoutStopSec
  sudo systemctl disable --now ldm_run
fi
[ "$action" = start ] || exit 0

{
  echo '#!/usr/bin/env bash'
  printf 'cd %q\n' "$PWD"
  printf 'export PATH=%q:"%s"\n' "$PWD/.venv/bin" "\$PATH"
  # Without the mount it would start from nothing on this VM's own disk.
  [ ! -e "$run/mount" ] ||
    printf 'mountpoint -q %q || sudo mount %q || exit 1\n' "$shared" "$shared"
  printf 'exec' && printf ' %q' "$@" && echo
} >"$run/command.sh"

# mixed: SIGTERM goes to supervise.sh alone, which passes it on once; at a second one train quits.
# TPU drivers pin memory, which services may do less of than logins.
sudo tee "$unit" >/dev/null <<END
[Unit]
Description=latent_diffusion_jax
Wants=network-online.target
After=network-online.target remote-fs.target

[Service]
User=$(id -un)
ExecStart=/bin/bash $PWD/launch/supervise.sh --log=$run/train.log --status=$run/status -- /bin/bash $run/command.sh
KillMode=mixed
TimeoutStopSec=600
LimitMEMLOCK=infinity
LimitNOFILE=524288

[Install]
WantedBy=multi-user.target
END
echo starting >"$run/status"
sudo systemctl daemon-reload
sudo systemctl enable --now ldm_run
echo "started; the log: $run/train.log"

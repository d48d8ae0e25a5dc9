#!/usr/bin/env bash
# From a checkout to a picture: installs into .venv, trains configs/txt2img.py on its embedded
# digits, draws a grid. About ten minutes on 2 CPU cores; a second call goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh

# Large pages: a step on a CPU takes about a tenth less.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

workdir=runs/digits
install requirements.txt
.venv/bin/python -m latent_diffusion_jax.train --config=configs/txt2img.py --workdir="$workdir"
.venv/bin/python -m latent_diffusion_jax.sample --workdir="$workdir" \
  --prompt="a handwritten seven" --num_images=16 --out="$workdir/seven.png"

cat <<EOF

picture:      $workdir/seven.png
checkpoints:  $workdir/first_stage, $workdir/diffusion
logs:         $workdir/tensorboard (also $workdir/metrics.jsonl)

Draw something else:
  .venv/bin/python -m latent_diffusion_jax.sample --workdir=$workdir --prompt="the digit 3" --out=three.png
EOF

#!/usr/bin/env bash
# Installs what tests need into .venv, then checks format, lint, types and shell scripts and runs
# the tests.
# Arguments go to pytest: launch/test.sh tests/models -k unet
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh

install requirements.txt requirements-test.txt
PIP_FLAGS=--no-deps install requirements-peers.txt
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/shellcheck -x launch/*.sh launch/slurm.sbatch
.venv/bin/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"

# shellcheck shell=bash
# Sourced by the scripts beside it: makes .venv in the checkout and installs requirement files into
# it, once for each content of the files. Usage: install requirements.txt [more.txt ...]

find_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11; do
    if command -v "$name" >/dev/null &&
      "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  echo "error: no Python 3.11 to 3.13 found on the PATH" >&2
  return 1
}

install() {
  local python file mark
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # not there, or cut off
    python=$(find_python)
    echo "making .venv with $("$python" --version)"
    if ! "$python" -m venv --clear .venv; then
      rm -rf .venv
      echo "error: '$python -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2
      return 1
    fi
  fi
  for file in "$@"; do
    mark=".venv/installed-$(sha256sum "$file" | cut -c 1-16)"
    if [ ! -e "$mark" ]; then
      echo "installing $file"
      # shellcheck disable=SC2086  # several flags
      .venv/bin/python -m pip install --quiet ${PIP_FLAGS:-} -r "$file"
      touch "$mark"
    fi
  done
}

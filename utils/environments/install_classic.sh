#!/usr/bin/env bash
# Builds a Python environment of its own with the original D4RL stack (gym 0.23.1, d4rl 1.1, MuJoCo 2.1.0).
#
#   bash utils/environments/install_classic.sh [--environments-only] VENV
#
# VENV: the folder of the virtual environment; an existing one is completed, not rebuilt. With
# --environments-only it holds just what the environments need (a minute or two); without it also
# requirements.txt, so that 'VENV/bin/python run.py --backend d4rl ...' trains and evaluates there.
# PYTHON names the interpreter to build from (default python3); it has to be 3.11.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
packages="gcc libosmesa6-dev libgl1-mesa-dev libglfw3 libglew-dev patchelf"

fail() {
  echo "install_classic: $1" >&2
  exit 2
}

whole_project=yes
if [ "${1:-}" = --environments-only ]; then
  whole_project=no
  shift
fi
[ $# -eq 1 ] || fail "give one folder: bash utils/environments/install_classic.sh [--environments-only] VENV"
venv=$1

"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
  || fail "the original stack beside this project takes Python 3.11, and '$python' is another; name one with PYTHON=python3.11"

# What building and loading mujoco-py's extension takes: a compiler, headers, libraries, patchelf.
probe='#include <GL/osmesa.h>
int main(void) { return OSMesaGetProcAddress("glBegin") == 0 && glGetError() == 0; }'
command -v patchelf >/dev/null 2>&1 && command -v gcc >/dev/null 2>&1 \
  && gcc -x c - -o /dev/null -lOSMesa -lGL <<<"$probe" 2>/dev/null \
  || fail "a system package is missing; run: sudo apt-get install $packages"
"$python" -c 'import pathlib, sys, sysconfig
sys.exit(not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").is_file())' \
  || fail "the headers of '$python' are missing; run: sudo apt-get install python3-dev"

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
if [ "$whole_project" = yes ]; then
  # NumPy 2 first and then an older one would be two downloads: ask for both lists' NumPy at once.
  "$venv/bin/pip" install --quiet -r "$root/requirements.txt" 'numpy>=1.26,<2'
fi
"$venv/bin/pip" install --quiet --no-deps --ignore-requires-python -r "$root/utils/environments/requirements-d4rl.txt"

# mujoco-py compiles its extension (about a minute) when it is imported for the first time.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export D4RL_SUPPRESS_IMPORT_ERROR=1 MUJOCO_PY_FORCE_CPU=1
if ! "$venv/bin/python" -c 'import mujoco_py, d4rl.gym_mujoco, d4rl.locomotion' >"$log" 2>&1; then
  cat "$log" >&2
  fail "the stack is installed and does not load (above is why); are these there: $packages?"
fi
echo "install_classic: $venv has gym 0.23.1, d4rl 1.1 and MuJoCo 2.1.0"

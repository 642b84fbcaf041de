#!/usr/bin/env bash
# Everything that needs a GPU, in under 10 minutes: correctness, training and acting speed, growth with seeds, T and
# batch. Writes results/benchmarks/*_NAME.json, a table and a figure, or the same into a folder of your choice.
#
#   bash benchmarks/on_gpu.sh NAME [FOLDER]       NAME: the machine, for the files' names, such as h200
#
# PYTHON names the interpreter (default python3). Evaluation is measured where gymnasium and mujoco are installed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=${1:?give the machine a name, such as h200}
out=${2:-results/benchmarks}
python=${PYTHON:-python3}
mkdir -p "$out"
failed=0

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || { echo "on_gpu: $python sees no torch with a CUDA device" >&2; exit 2; }

step() { # step FILE COMMAND...: keep the JSON that a command prints; go on when one fails
  local file=$1
  shift
  echo "== $*"
  timeout 150 "$python" -m "$@" --json >"$out/$file.tmp" && mv "$out/$file.tmp" "$out/$file" || { echo "on_gpu: failed: $*" >&2; rm -f "$out/$file.tmp"; failed=1; }
}

if "$python" -c 'import pytest' 2>/dev/null; then
  echo "== captured and eager updates give the same numbers"
  timeout 150 "$python" -m pytest -q tests/test_execution.py -k "graph or captured" || failed=1
fi

fast="--device 0 --steps 1000 --plain_steps 40 --rows 1000000"
step "training_locomotion_1_$name.json" benchmarks.training $fast --env_name halfcheetah-medium-v2 --seeds 1
step "training_locomotion_16_$name.json" benchmarks.training $fast --env_name halfcheetah-medium-v2 --seeds 16
step "training_antmaze_1_$name.json" benchmarks.training $fast --env_name antmaze-large-play-v0 --seeds 1
step "training_antmaze_8_$name.json" benchmarks.training $fast --env_name antmaze-large-play-v0 --seeds 8
for algo in diffusion_ql diffusion_bc dtql; do
  step "training_${algo}_$name.json" benchmarks.training $fast --algo "$algo" --env_name halfcheetah-medium-v2 --seeds 1
done
step "acting_$name.json" benchmarks.acting --device 0
if "$python" -c 'import gymnasium, mujoco' 2>/dev/null; then
  step "evaluation_$name.json" benchmarks.evaluation --device 0 --env_name halfcheetah-medium-v2
fi
echo "== growth with seeds, T and batch size"
timeout 150 "$python" -m benchmarks.scaling --device 0 --steps 200 --repeats 3 --name "$name" --out "$out" || failed=1

"$python" -m benchmarks.table "$out" "$name" || failed=1
exit $failed

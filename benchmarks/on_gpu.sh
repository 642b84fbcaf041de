#!/usr/bin/env bash
# Everything that needs a GPU, in under 10 minutes, the most important first: whether captured updates are right, training
# in float32, tf32 and bfloat16, acting, another library beside ours, growth with seeds, T and batch. A run whose graph
# fails its check of itself is named. Writes results/benchmarks/*_NAME.json, tables and a figure, or the same into a
# folder of your choice.
#
#   bash benchmarks/on_gpu.sh NAME [FOLDER]              NAME: the machine, for the files' names, such as h200
#   bash benchmarks/on_gpu.sh NAME FOLDER algorithms     in a call of its own: the ten algorithms without a plain form
#
# PYTHON names the interpreter (default python3). Evaluation is measured where gymnasium and mujoco are installed, and
# d3rlpy where PEER_WHEELS is a folder with its wheels and those it needs (no network), or PEER_ENVIRONMENT the folder of
# an environment that benchmarks.peers has made.
# Most of the time goes into compiling; what no longer fits is left out and said. A second call finds the compiled
# code in PyTorch's cache and gets further; LIMIT sets other seconds for the whole.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=${1:?give the machine a name, such as h200}
out=${2:-results/benchmarks}
python=${PYTHON:-python3}
limit=${LIMIT:-570}
mkdir -p "$out"
failed=0

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || { echo "on_gpu: $python sees no torch with a CUDA device" >&2; exit 2; }

run() { # run SECONDS COMMAND...: at most so long, and no longer than is left of the whole
  local most=$1 left=$((limit - SECONDS))
  shift
  echo "== $* (at ${SECONDS} s)" >&2
  if ((left < 20)); then
    echo "on_gpu: no time left for: $*" >&2
    return 1
  fi
  timeout -k 5 "$((left < most ? left : most))" "$python" -m "$@"
}

step() { # step FILE COMMAND...: keep the JSON that a command prints; go on when one fails
  local file=$1
  shift
  if run 150 "$@" --json >"$out/$file.tmp"; then
    mv "$out/$file.tmp" "$out/$file"
    # What a training run was asked for is a graph; anything else stands there where the graph did not pass its check.
    if [[ $file == training_* ]] && ! grep -q '"execution": "graph"' "$out/$file"; then
      echo "on_gpu: no graph was used: $*" >&2
      failed=1
    fi
  else
    echo "on_gpu: failed: $*" >&2
    rm -f "$out/$file.tmp"
    failed=1
  fi
}

if [ "${3:-}" = algorithms ]; then
  for algo in iql cql idql qgpo td3_bc bcq bear awr sfbc bc; do
    step "training_${algo}_$name.json" benchmarks.training --device 0 --no-plain --rows 20000 --steps 1000 --algo "$algo"
  done
  "$python" -m benchmarks.table "$out" "$name" || failed=1
  exit $failed
fi

peers() { # peers ALGO...: d3rlpy's training beside ours, a table each, so that what is done is kept
  local from
  if [ -n "${PEER_ENVIRONMENT:-}" ]; then
    from=(--environment "$PEER_ENVIRONMENT")
  elif [ -n "${PEER_WHEELS:-}" ]; then
    from=(--wheels "$PEER_WHEELS" --environment "$(mktemp -d)/d3rlpy")
  else
    echo "on_gpu: neither PEER_WHEELS nor PEER_ENVIRONMENT is given: no other library is measured" >&2
    return
  fi
  for algo in "$@"; do
    run 120 benchmarks.peers "${from[@]}" --device 0 --threads 1 --seconds 0.5 --repeats 5 --algos "$algo" \
      --out "$out" --name "${name}_$algo" || echo "on_gpu: left out: d3rlpy's $algo" >&2
  done
}

fast="--device 0 --steps 1000 --plain_steps 40 --rows 1000000"
half="--env_name halfcheetah-medium-v2"
step "training_locomotion_1_$name.json" benchmarks.training $fast $half --seeds 1
if "$python" -c 'import pytest' 2>/dev/null; then # captured and eager updates give the same numbers, in any precision
  run 200 pytest -v tests/training/test_capture.py -k "graph or captured or capture or rounding" || failed=1
  run 60 pytest -v tests/training/test_precision.py -k "cuda" || failed=1
else
  echo "on_gpu: no pytest: what a graph gives is checked by the runs themselves alone" >&2
fi
for precision in tf32 bfloat16; do
  step "training_locomotion_1_${precision}_$name.json" benchmarks.training $fast $half --no-plain --seeds 1 \
    --precision "$precision"
done
step "training_locomotion_16_$name.json" benchmarks.training $fast $half --seeds 16
step "training_antmaze_1_$name.json" benchmarks.training $fast --env_name antmaze-large-play-v0 --seeds 1
step "acting_$name.json" benchmarks.acting --device 0
if "$python" -c 'import gymnasium, mujoco' 2>/dev/null; then
  step "evaluation_$name.json" benchmarks.evaluation --device 0 $half
else
  echo "on_gpu: no gymnasium or mujoco: evaluation is not measured" >&2
fi
peers cql td3_bc
for algo in dtql diffusion_ql; do
  step "training_${algo}_$name.json" benchmarks.training $fast $half --algo "$algo" --seeds 1
  for precision in tf32 bfloat16; do
    step "training_${algo}_${precision}_$name.json" benchmarks.training $fast $half --no-plain --algo "$algo" --seeds 1 \
      --precision "$precision"
  done
done
step "training_diffusion_bc_$name.json" benchmarks.training $fast $half --algo diffusion_bc --seeds 1
step "training_antmaze_8_$name.json" benchmarks.training $fast --env_name antmaze-large-play-v0 --seeds 8
"$python" -m benchmarks.table "$out" "$name" || failed=1

# Growth with seeds, T and batch size. The last point that is begun may take a minute and a half.
if ((limit - SECONDS > 100)); then
  minutes=$(((limit - SECONDS - 90) / 60)).$((((limit - SECONDS - 90) % 60) * 10 / 60))
  run "$limit" benchmarks.scaling --device 0 --steps 200 --repeats 3 --name "$name" --out "$out" --minutes "$minutes" || failed=1
else
  echo "on_gpu: no time left for benchmarks.scaling" >&2
  failed=1
fi
exit $failed

#!/usr/bin/env bash
# The CPU figures of the README: training of every algorithm and evaluation, with one thread and with two, in about
# 20 minutes on two free cores (most of it compiling). Writes results/benchmarks/*_NAME.json and a table.
#
#   bash benchmarks/on_cpu.sh NAME [FOLDER]       NAME: the machine, for the files' names
#
# PYTHON names the interpreter (default python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=${1:?give the machine a name, such as epyc2}
out=${2:-results/benchmarks}
python=${PYTHON:-python3}
mkdir -p "$out"

step() { # step FILE COMMAND...: keep the JSON that a command prints
  local file=$1
  shift
  echo "== $*"
  "$python" -m "$@" --json >"$out/$file.tmp"
  mv "$out/$file.tmp" "$out/$file"
}

for threads in 1 2; do
  flags="--device cpu --threads $threads --steps 60 --plain_steps 60"
  for algo in diffcps diffusion_ql dtql; do
    for precision in float32 bfloat16; do
      step "training_${algo}_${precision}_t${threads}_$name.json" benchmarks.training $flags --execution compile \
        --precision $precision --algo $algo
    done
  done
  step "training_diffcps_eager_t${threads}_$name.json" benchmarks.training $flags --execution eager
  step "evaluation_t${threads}_$name.json" benchmarks.evaluation --device cpu --threads "$threads"
done
step "training_diffusion_bc_t1_$name.json" benchmarks.training --device cpu --threads 1 --steps 60 --plain_steps 60 \
  --execution compile --algo diffusion_bc
# No plain form is written of the others; few rows, since two of them sample actions for each.
for algo in bc awr td3_bc bcq bear sfbc iql cql idql qgpo; do
  step "training_${algo}_t1_$name.json" benchmarks.training --device cpu --threads 1 --execution eager --no-plain \
    --rows 2000 --steps 10 --repeats 3 --algo "$algo"
done
step "evaluation_antmaze_t2_$name.json" benchmarks.evaluation --device cpu --threads 2 --env_name antmaze-umaze-v0 \
  --episodes 100 --max_steps 20 --plain_episodes 5
step "acting_$name.json" benchmarks.acting --device cpu --threads 1 \
  --algos diffcps diffusion_ql diffusion_bc dtql
"$python" -m benchmarks.memory --algos diffcps diffusion_ql idql iql cql bear td3_bc --seconds 4 \
  --out "$out" --name "$name"
"$python" -m benchmarks.table "$out" "$name"

#!/usr/bin/env bash
# Mystery Path Grid-Easy with a small agent, with and without memory: the table of docs/mysterypath.md.
# 8M steps, 15 minutes on one core per agent and seed.
#
#     benchmarks/mysterypath_small.sh [seed ...]
set -euo pipefail
[[ "$*" =~ ^[0-9\ ]*$ ]] || { echo "usage: $0 [seed ...]"; exit 1; }
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"

flags=(
  --runs-dir runs/mysterypath_small
  --num-channels 4 --num-layers 1 --d-model 64 --d-head 32 --d-ffc 64 --d-actor 64 --d-critic 64 --chrono-steps 100
  --num-envs 32 --num-minibatches 16 --update-epochs 1 --learning-rate 2e-3 --anneal-lr --ent-coef 0.01
  --gamma 0.9 --gae-lambda 0.8 --max-grad-norm 0.5 --total-timesteps 8e6 --eval-episodes 5000
)
for seed in "${@:-1}"; do
  python ppo_agalite_mysterypath.py --seed "$seed" "${flags[@]}"
  python benchmarks/without_memory.py ppo_agalite_mysterypath.py --seed "$seed" "${flags[@]}"
done

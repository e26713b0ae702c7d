#!/usr/bin/env bash
# Craftax with the PPO settings of a published GTrXL that reaches 18% of the maximum after 1e9 steps. For a GPU.
# Not run here: docs/craftax.md has the curve to compare with.
#
#     benchmarks/craftax_other_settings.sh [seed ...]
set -euo pipefail
[[ "$*" =~ ^[0-9\ ]*$ ]] || { echo "usage: $0 [seed ...]"; exit 1; }
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"

flags=(--gamma 0.999 --ent-coef 0.002 --gae-lambda 0.8 --max-grad-norm 1.0 --learning-rate 2e-4 --total-timesteps 1e9)
for seed in "${@:-1}"; do
  # The size of the published GTrXL.
  python ppo_gtrxl_craftax.py --seed "$seed" "${flags[@]}" --memory-len 128 --num-layers 2 --num-heads 8 --d-head 32 \
    --d-model 256 --d-encoder 256 --d-actor 256 --d-critic 256
  # AGaLiTe at its own published size.
  python ppo_agalite_craftax.py --seed "$seed" "${flags[@]}"
done

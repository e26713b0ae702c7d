#!/usr/bin/env bash
# Craftax Classic with small agents: AGaLiTe and GTrXL, with and without memory: the table of docs/craftax.md.
# 2M steps; a run takes 10 minutes on an idle core of Zen 5, 24 to 47 on a busy one of Zen 4.
#
#     benchmarks/craftax_small.sh [seed ...]
#     STEPS=1e7 benchmarks/craftax_small.sh [seed ...]  # another length, in runs/craftax_small_1e7
set -euo pipefail
[[ "$*" =~ ^[0-9\ ]*$ ]] || { echo "usage: $0 [seed ...]"; exit 1; }
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"

flags=(
  --runs-dir "runs/craftax_small${STEPS:+_$STEPS}" --env-id Craftax-Classic-Symbolic-v1
  --num-envs 32 --num-steps 64 --num-layers 2 --d-model 64 --d-head 32
  --total-timesteps "${STEPS:-2e6}" --checkpoint-interval 60 --eval-episodes 500
)
for seed in "${@:-1}"; do
  python ppo_agalite_craftax.py --seed "$seed" "${flags[@]}" --eta 4
  python benchmarks/without_memory.py ppo_agalite_craftax.py --seed "$seed" "${flags[@]}" --eta 4
  python ppo_gtrxl_craftax.py --seed "$seed" "${flags[@]}"
  python benchmarks/without_memory.py ppo_gtrxl_craftax.py --seed "$seed" "${flags[@]}"
done

#!/usr/bin/env bash
# Mystery Path Grid-Easy with small agents whose encoder reads one tile at a time: the first table of
# docs/mysterypath.md. On one core of Zen 5, a seed of GTrXL takes 80 minutes; on a busy core of Zen 4, GTrXL 145 and
# AGaLiTe 160. GTrXL without memory was stopped after 97 minutes, at 11.8M steps.
#
#     benchmarks/mysterypath_tiles.sh [seed ...]
set -euo pipefail
[[ "$*" =~ ^[0-9\ ]*$ ]] || { echo "usage: $0 [seed ...]"; exit 1; }
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"

flags=(
  --runs-dir runs/mysterypath_tiles
  --encode-tiles --num-channels 16 --num-layers 1 --d-head 32 --d-actor 64 --d-critic 64 --num-envs 32
  --learning-rate 4e-4 --anneal-lr --ent-coef 0.03 --gamma 0.97 --gae-lambda 0.9 --max-grad-norm 0.5
  --checkpoint-interval 100 --eval-episodes 5000 --total-timesteps 2e7
)
for seed in "${@:-1}"; do
  python ppo_gtrxl_mysterypath.py --seed "$seed" "${flags[@]}" --d-model 64
  python benchmarks/without_memory.py ppo_gtrxl_mysterypath.py --seed "$seed" "${flags[@]}" --d-model 64
  python ppo_agalite_mysterypath.py --seed "$seed" "${flags[@]}"
done

#!/usr/bin/env bash
# Memory Maze 9x9 with small agents, AGaLiTe and LSTM: the table of docs/memorymaze.md.
# 753,664 steps, 70 to 103 minutes on one core and 5 GB of RAM per agent and seed.
#
#     benchmarks/memorymaze_small.sh [seed ...]
set -euo pipefail
[[ "$*" =~ ^[0-9\ ]*$ ]] || { echo "usage: $0 [seed ...]"; exit 1; }
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"

flags=(
  --runs-dir runs/memorymaze_small
  --num-channels 4 --d-actor 64 --d-critic 64 --num-envs 16 --num-steps 256 --update-epochs 2 --no-norm-adv
  --learning-rate 1e-3 --gamma 0.97 --max-grad-norm 0.5 --total-timesteps 753664 --eval-episodes 64
)
for seed in "${@:-1}"; do
  python ppo_agalite_memorymaze.py --seed "$seed" "${flags[@]}" --num-layers 1 --d-model 64 --d-head 32 --d-ffc 64
  python ppo_lstm_memorymaze.py --seed "$seed" "${flags[@]}" --hidden-size 128
done

#!/usr/bin/env bash
# What each piece of the T-Maze recipe is worth: AGaLiTe at corridor 160 without one piece.
# 1.5M steps, 4 to 5 minutes per seed and piece on a core of Zen 5, 8 to 17 on a busy one of Zen 4. Then
#
#     python benchmarks/results.py docs/results/tmaze_ablation runs/tmaze_ablation/*
#
# writes docs/results/tmaze_ablation.md.
#
#     benchmarks/tmaze_ablation.sh [seed ...]
set -euo pipefail
[[ "$*" =~ ^[0-9\ ]*$ ]] || { echo "usage: $0 [seed ...]"; exit 1; }
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
export PYTHONPATH=.

# A copy whose critic does not know the time limit.
unaware=$(mktemp -d)/ppo_unaware_tmaze.py
sed '/gamma\*\*steps_left/d' ppo_agalite_tmaze.py > "$unaware"
[ "$(diff ppo_agalite_tmaze.py "$unaware" | grep -c '^<')" = 1 ] || { echo "ppo_agalite_tmaze.py has changed"; exit 1; }

for seed in "${@:-1}"; do
  flags=(--runs-dir runs/tmaze_ablation --seed "$seed")
  python ppo_agalite_tmaze.py "${flags[@]}"
  python ppo_agalite_tmaze.py "${flags[@]}" --logit-noise 0
  python ppo_agalite_tmaze.py "${flags[@]}" --initial-value 0
  python ppo_agalite_tmaze.py "${flags[@]}" --chrono-steps 1
  python "$unaware" "${flags[@]}"
done

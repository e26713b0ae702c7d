#!/usr/bin/env bash
# What the parts of AGaLiTe are worth: gates beta and gamma, approximation r, expansion eta. Small agents, corridor 80,
# five seeds, 1.5M steps each; about an hour on one core for all. Then
#
#     python benchmarks/results.py docs/results/memory_ablation runs/memory_ablation/*
#
# writes docs/results/memory_ablation.md.
#
#     benchmarks/memory_ablation.sh [first of five seeds]
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
export PYTHONPATH=.
flags=(--runs-dir runs/memory_ablation --seed "${1:-1}" --num-seeds 5 --corridor-len 80)
flags+=(--num-layers 2 --d-model 64 --d-head 32 --d-ffc 64 --d-actor 64 --d-critic 64)

# In the style of linear transformers (Katharopoulos et al. 2020): GaLiTe with eta 1, whose memory sums all that it
# reads. Features are GaLiTe's relu, and p1 still scales each key.
linear=$(mktemp -d)/ppo_linear_tmaze.py
sed -e 's/keep \* (1 - gamma)/keep/' -e 's/new_k = gamma \*/new_k =/' \
  -e 's/keep\[..., None\] \* (1 - outer(beta, gamma))/keep[..., None]/' -e 's/outer(beta \* v/outer(v/' \
  ppo_galite_tmaze.py > "$linear"
[ "$(diff ppo_galite_tmaze.py "$linear" | grep -c '^>')" = 4 ] || { echo "ppo_galite_tmaze.py has changed"; exit 1; }

python ppo_agalite_tmaze.py "${flags[@]}"
python ppo_agalite_tmaze.py "${flags[@]}" --chrono-steps 1  # gates as published
for r in 1 3 7; do
  python ppo_agalite_tmaze.py "${flags[@]}" --r "$r"
done
for eta in 1 8; do
  python ppo_agalite_tmaze.py "${flags[@]}" --eta "$eta"
done
python ppo_galite_tmaze.py "${flags[@]}" --eta 1
python "$linear" "${flags[@]}" --eta 1

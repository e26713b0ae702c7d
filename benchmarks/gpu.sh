#!/usr/bin/env bash
# On a GPU: tests of its numbers, the speed of all scripts, eight seeds of the T-Maze. Writes docs/results/gpu.md.
#
#     benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
folder=$(mktemp -d)
set -m  # each job is a process group, so that the next line also ends what it has started
trap 'for job in $(jobs -p); do kill -- "-$job"; done 2> "$folder/none" || true; rm -rf "$folder"' EXIT
mkfifo "$folder/go"
exec 3<> "$folder/go"
export PYTHONPATH=. XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_COMPILATION_CACHE_DIR=$folder/cache
# XLA's search for the fastest matrix products would take minutes while other processes use the GPU. Agents that see
# images need it: on an H100, the gradient of Memory Maze's encoder takes eight times as long without it.
flags=${XLA_FLAGS:-}
export XLA_FLAGS="$flags --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"

python -c 'import jax; assert jax.default_backend() == "gpu", "no GPU: see README.md for the CUDA build of JAX"'

job() {  # NAME COMMAND: runs it in the background, keeps its output, and shows it if it fails
  { "${@:2}" > "$folder/$1" 2> "$folder/$1.errors" || {
    touch "$folder/failed"
    echo "$1 failed:"
    tail -n 30 "$folder/$1" "$folder/$1.errors"
  }; } &
}

# Compilation takes most of the time. So all programs are compiled at once, beside the tests and the training ...
job scripts python benchmarks/all_scripts.py --wait ppo_*_{craftax,tmaze}.py <&3
scripts=$!
job attention python benchmarks/attention.py 512,4,4 128,16,4 128,128,8
attention=$!
job tests python -m pytest -q -n 4 -m "not slow" -k "golden or float64 or ratio_is_one or linear_attention" \
  tests/test_{agalite,galite,gtrxl,rnn,memory,ppo,memorymaze_scripts}.py
tests=$!
job training python ppo_agalite_tmaze.py --num-seeds 8 --runs-dir "$folder/runs"
wait $attention $tests $!
while kill -0 $scripts 2> "$folder/none" && ! grep -q compiled "$folder/scripts"; do sleep 1; done

# ... and then measured on a GPU that does nothing else.
job attention python benchmarks/attention.py 512,4,4 128,16,4 128,128,8
wait $!
echo >&3
wait $scripts
job images env XLA_FLAGS="$flags" python benchmarks/all_scripts.py ppo_*_{memorymaze,mysterypath}.py
wait $!
[ ! -e "$folder/failed" ] || exit 1
{
  echo "# On a GPU"
  echo
  version="commit $(git rev-parse --short HEAD 2> "$folder/none" || echo unknown), $(python -V)"
  echo "Made by \`benchmarks/gpu.sh\` in $SECONDS s: $version, $(nproc) CPU cores."
  echo
  echo "Golden numbers, float64 references, ratio 1, attention as on a CPU (with full products; the rest may use TF32):"
  echo
  tail -n 1 "$folder/tests" | sed 's/^/    /'
  echo
  echo "Attention, ours against the authors' form:"
  echo
  sed 's/^/    /' "$folder/attention"
  echo
  echo "Scripts at their default size, without XLA's search for the fastest products (${XLA_FLAGS# }):"
  echo
  sed 1d "$folder/scripts"
  echo
  echo "Scripts whose agents see images, with this search, which is JAX's default:"
  echo
  cat "$folder/images"
  echo
  echo "\`python ppo_agalite_tmaze.py --num-seeds 8\`, beside everything else; minutes of all eight seeds together:"
  echo
  python benchmarks/results.py "$folder/tmaze" "$folder"/runs/* | tail -n +3
} > "$folder/gpu.md"
mv "$folder/gpu.md" docs/results/gpu.md
cat docs/results/gpu.md

"""python tests/devices.py SCRIPT: two updates on four virtual devices and on one. test_ppo.py runs it.

With one seed, its environments are spread over the devices; the first script also runs four seeds, which are spread.
Prints a JSON list: for each run the largest difference, the largest collectives of the compiled update, and how many
worlds of Craftax it holds at once on each device.
"""

import json
import re
import sys

import jax
import numpy as np
from common import FIRST, WORLD, bind, float64, load, quick_jit, seed_keys, tiny_args

COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast|"
    r"reduce-scatter)(?:-start)?\("
)


def size(shape: str) -> int:
    """Bytes of an HLO shape such as (f32[8,4]{1,0}, pred[2]{0})."""
    total = 0
    for kind, bits, dims in re.findall(r"(pred|[a-z]+)(\d*)\w*\[([\d,]*)\]", shape):
        total += (1 if kind == "pred" else int(bits) // 8) * int(np.prod([int(n) for n in dims.split(",") if n]))
    return total


def collectives(hlo: str) -> dict[str, int]:
    """The kinds of collectives in the program, each with the bytes of the largest."""
    largest = {}
    for shape, kind in COLLECTIVE.findall(hlo):
        largest[kind] = max(largest.get(kind, 0), size(shape))
    return largest


def worlds(hlo: str) -> int:
    """The most worlds of the stand-in for Craftax in one array of the program, 0 without Craftax."""
    shapes = re.findall(rf"f32\[([\d,]*){WORLD[0]},{WORLD[1]}\]", hlo)
    return max((int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes), default=0)


def run(script, args, shardings):
    """Two updates -> runner, compiled update."""
    init, update = (jax.vmap(f) for f in bind(script, args))
    init = quick_jit(init, out_shardings=shardings and shardings[0])
    runner = init(seed_keys(args))
    update = quick_jit(update, out_shardings=shardings).lower(runner).compile()
    for _ in range(2):
        runner, *_ = update(runner)
    return runner, update


def main(name: str):
    script, results = load(name), []
    assert jax.device_count() == 4
    # A tiny model and many environments: a rollout is far larger than a gradient.
    # Without these two, rounding errors of tiny gradients or advantages would be scaled up to full size.
    exact = {"adam_eps": 1e-3, "norm_adv": False}
    if hasattr(script, "Craftax"):
        exact["optimistic_reset_ratio"] = 2  # four groups that share worlds, one per device
    args = lambda num_seeds: tiny_args(script, num_seeds=num_seeds, num_envs=32, num_minibatches=2, **exact)
    cases = ((1, [1, 8]), (4, [1, 32])) if name in FIRST else ((1, [1, 8]),)  # seeds spread alike for all models
    alone, _ = run(script, args(cases[-1][0]), None)
    for num_seeds, shards in cases:
        shardings = script.make_shardings(args(num_seeds))
        runner, compiled = run(script, args(num_seeds), shardings)
        params, expected = float64(runner.train_state.params), float64(alone.train_state.params)
        error = jax.tree.map(lambda a, b, n=num_seeds: np.abs(a - b[:n]).max(), params, expected)
        results.append({
            "num_seeds": num_seeds,
            "error": max(jax.tree.leaves(error)),
            "shards": list(runner.obs.addressable_shards[0].data.shape[:2]),
            "expected shards": shards,
            "bytes of parameters": sum(x[0].size * 4 for x in jax.tree.leaves(params)),
            "bytes of a minibatch": runner.obs[0, 0].nbytes * args(1).batch_size // 2,
            "collectives": collectives(compiled.as_text()),
            "worlds": worlds(compiled.as_text()),
        })  # fmt: skip
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])

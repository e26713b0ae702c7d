"""Training speed on the T-Maze: our attention against the authors' form in its place, and the machine's bound.

    python benchmarks/training.py

One update of the authors' amount of work (8 environments, 256 steps, one epoch, one minibatch), whole: acting,
learning, optimizer. The bound is the number of floating-point operations in matrix products alone, 14.2 MFLOP a step,
over the rate this machine reaches in a large matrix product, measured in the same run. The two forms update in turn.
"""

import functools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import attention

import ppo_agalite_tmaze as script

ROUNDS = 15


def median_seconds(function, *arguments) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def matrix_rate() -> float:
    """FLOP a second in the product of two 2048 x 2048 float32 matrices."""
    a = jax.random.normal(jax.random.key(0), (2048, 2048))
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    return 2 * 2048**3 / median_seconds(product, a, a)


def main():
    args = script.Args(num_envs=8, num_steps=256, update_epochs=1, num_minibatches=1)
    env = script.make_env(args, args.num_envs)
    init = functools.partial(script.init, args, env, script.ActorCritic(args, 4))
    runner = jax.jit(init)(jax.random.key(1))
    parts = {
        "update": functools.partial(script.update, args, env),
        "rollout": lambda runner: script.rollout(args, env, runner, jax.random.key(2)),
    }
    compiled, ours = {}, script.gated_linear_attention
    for form, function in (("ours", ours), ("theirs", attention.authors_form)):
        script.gated_linear_attention = function
        for part, run in parts.items():
            # A new function each time: otherwise jit would find the other form in its cache.
            compiled[form, part] = jax.jit(lambda runner, run=run: run(runner)).lower(runner).compile()
            jax.block_until_ready(compiled[form, part](runner))
    script.gated_linear_attention = ours
    loss = [float(compiled[form, "update"](runner)[1]["losses/value_loss"]) for form in ("ours", "theirs")]
    assert abs(loss[0] - loss[1]) < 1e-4 * abs(loss[1]), f"the two forms learn differently: {loss}"

    seconds = {key: [] for key in compiled}
    for _ in range(ROUNDS):
        for key, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(runner))
            seconds[key].append(time.perf_counter() - start)
    seconds = {key: float(np.median(values)) for key, values in seconds.items()}

    size = sum(x.size for x in jax.tree.leaves(runner.train_state.params))
    rate = matrix_rate()
    bound = rate / (4 * 2 * size)  # acting once, learning forward once and backward twice; 2 FLOP a parameter each
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {size:,} parameters, {8 * size / 1e6:.1f} MFLOP a step"
    )
    print(f"matrix products: {rate / 1e9:.0f} GFLOP/s, so at most {bound:.0f} steps/s")
    for form in ("ours", "theirs"):
        speed = args.batch_size / seconds[form, "update"]
        acting = seconds[form, "rollout"] / seconds[form, "update"]
        print(f"{form:9} {speed:6.0f} steps/s, {speed / bound:4.0%} of the bound; {acting:.0%} of the time acts")
    print(f"ratio {seconds['theirs', 'update'] / seconds['ours', 'update']:.1f}")


if __name__ == "__main__":
    main()

"""Training speed on the T-Maze: with our attention, with the authors' form, and the machine's bound.

    python benchmarks/training.py

One whole update with the authors' amount of work (8 environments, 256 steps, one epoch, one minibatch): acting,
learning, optimizer. The script's update has an axis of seeds, which makes ours faster on a CPU and the authors' form
slower, so both are measured with and without it, in turn, and the ratio is of the best of each.

The bound is the rate that this machine reaches in a large matrix product, measured in the same run, over the number of
floating-point operations in matrix products alone, 14.2 MFLOP per step.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ppo_agalite_tmaze as script
from benchmarks.attention import authors_form
from benchmarks.scripts import milliseconds

ROUNDS = 15


def matrix_rate() -> float:
    """FLOP per second in the product of two 2048 x 2048 float32 matrices."""
    a = jax.random.normal(jax.random.key(0), (2048, 2048))
    product = functools.partial(jax.jit(jnp.matmul), a, a)
    return 2 * 2048**3 / (1e-3 * milliseconds([product], ROUNDS)[0])


def main():
    args = script.Args(num_envs=8, num_steps=256, update_epochs=1, num_minibatches=1)
    env = script.make_env(args, args.num_envs)
    init = functools.partial(script.init, args, env, script.ActorCritic(args, 4))
    runner = jax.jit(init)(jax.random.key(1))
    one_seed = jax.tree.map(lambda x: x[None], runner)
    update = functools.partial(script.update, args, env)
    rollout = lambda runner: script.rollout(args, env, runner, jax.random.key(2))
    runs, ours = {}, script.gated_linear_attention
    for form, function in (("ours", ours), ("theirs", authors_form)):
        script.gated_linear_attention = function
        # A new function each time: otherwise jit would find the other form in its cache.
        for part, run in (("update", lambda x: update(x)), ("rollout", lambda x: rollout(x))):
            runs[form, "no axis of seeds", part] = functools.partial(jax.jit(run).lower(runner).compile(), runner)
            vmapped = jax.jit(jax.vmap(run)).lower(one_seed).compile()
            runs[form, "one seed", part] = functools.partial(vmapped, one_seed)
    script.gated_linear_attention = ours
    loss = [float(jnp.sum(run()[1]["losses/value_loss"])) for key, run in runs.items() if key[2] == "update"]
    np.testing.assert_allclose(loss, loss[0], rtol=1e-4, err_msg="the two forms learn differently")

    seconds = {key: 1e-3 * ms for key, ms in zip(runs, milliseconds(runs.values(), ROUNDS), strict=True)}

    size = sum(x.size for x in jax.tree.leaves(runner.train_state.params))
    rate = matrix_rate()
    bound = rate / (4 * 2 * size)  # acting once, learning forward once and backward twice; 2 FLOP per parameter each
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"{size:,} parameters, {8e-6 * size:.1f} MFLOP per step")
    print(f"matrix products: {rate / 1e9:.0f} GFLOP/s, so at most {bound:.0f} steps/s")
    best = {"ours": np.inf, "theirs": np.inf}
    for form, axis in [key[:2] for key in runs if key[2] == "update"]:
        best[form] = min(best[form], seconds[form, axis, "update"])
        speed = args.batch_size / seconds[form, axis, "update"]
        acting = seconds[form, axis, "rollout"] / seconds[form, axis, "update"]
        print(f"{form:7} {axis:17} {speed:6.0f} steps/s, {speed / bound:4.0%} of the bound, acting {acting:.0%}")
    print(f"ratio {best['theirs'] / best['ours']:.1f}")


if __name__ == "__main__":
    if sys.argv[1:]:
        raise SystemExit("usage: python benchmarks/training.py")
    main()

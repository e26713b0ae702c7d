"""The encoder of pictures, written as products of matrices, against XLA's own convolutions.

    python benchmarks/encoder.py [--batch 128]

Milliseconds of CPU time (of wall time on a GPU) and the ratio of theirs to ours: values, gradients, and gradients
inside a loop, as in the scripts' update. Both have the same parameters, and that they agree is checked first.
"""

import argparse
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import ppo_agalite_mysterypath as script  # noqa: E402

LAYERS = ((32, 8, 4), (64, 4, 2), (64, 3, 1))


class Convolutions(nn.Module):
    """ConvEncoder by nn.Conv."""

    @nn.compact
    def __call__(self, obs):
        x = obs / 255.0
        for features, size, stride in LAYERS:
            x = nn.relu(nn.Conv(features, (size, size), stride, padding="VALID")(x))
        return x.reshape(*x.shape[:2], -1)


def as_convolutions(params):
    """Our parameters in the shapes of nn.Conv."""
    converted = {}
    for i, (features, size, stride) in enumerate(LAYERS):
        ours, n = params["params"][f"Dense_{i}"], size // stride
        kernel = ours["kernel"].reshape(n, n, stride, stride, -1, features).swapaxes(1, 2)
        converted[f"Conv_{i}"] = {"kernel": kernel.reshape(size, size, -1, features), "bias": ours["bias"]}
    return {"params": converted}


def milliseconds(function, *inputs) -> float:
    """The best of three calls after the first."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    function, best = jax.jit(function), float("inf")
    jax.block_until_ready(function(*inputs))
    for _ in range(3):
        start = clock()
        jax.block_until_ready(function(*inputs))
        best = min(best, 1e3 * (clock() - start))
    return best


def main(batch: int) -> None:
    obs = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, batch, 84, 84, 3), np.uint8))
    params = script.ConvEncoder().init(jax.random.key(0), obs)
    encoders = (script.ConvEncoder(), params), (Convolutions(), as_convolutions(params))
    np.testing.assert_allclose(*(encoder.apply(p, obs) for encoder, p in encoders), atol=1e-4)
    table = []
    for encoder, p in encoders:
        gradient = jax.grad(lambda p, obs, encoder=encoder: jnp.square(encoder.apply(p, obs)).sum())
        loop = lambda p, obs, gradient=gradient: jax.lax.scan(lambda p, _: (gradient(p, obs), None), p, length=1)[0]
        table.append([milliseconds(f, p, obs) for f in (encoder.apply, gradient, loop)])
    print(f"{batch} pictures on {jax.devices()[0].device_kind}\n")
    print("| | ours, ms | nn.Conv, ms | ratio |\n| --- | --- | --- | --- |")
    for name, ours, theirs in zip(("values", "gradients", "gradients inside a loop"), *table, strict=True):
        print(f"| {name} | {ours:.0f} | {theirs:.0f} | {theirs / ours:.1f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128, help="pictures")
    main(parser.parse_args().batch)

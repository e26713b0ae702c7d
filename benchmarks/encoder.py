"""Image encoders as the scripts run them, in pieces, against all images at once and XLA's own convolutions.

    python benchmarks/encoder.py [--batch 128]

Prints milliseconds and ratios to ours: values, gradients, and gradients inside a loop, as in the scripts' update. A GPU
has no pieces. Parameters are the same; a check first shows that all agree.
"""

import argparse
import functools
import sys
from pathlib import Path
from unittest.mock import patch

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import ppo_agalite_mysterypath  # noqa: E402
import ppo_lstm_memorymaze  # noqa: E402
from benchmarks.scripts import milliseconds  # noqa: E402

LAYERS = ((32, 8, 4), (64, 4, 2), (64, 3, 1))


class InPieces(nn.Module):
    """The encoder as agents that see images call it."""

    encoder: type[nn.Module]

    @nn.compact
    def __call__(self, obs):
        return ppo_agalite_mysterypath.in_pieces(self.encoder(name="encoder"), obs)


class Conv3x3(nn.Module):
    """nn.Conv with the parameters, and so the name, of Memory Maze's Conv3x3."""

    features: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (9 * x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        params = {"kernel": kernel.reshape(3, 3, -1, self.features), "bias": bias}
        return nn.Conv(self.features, (3, 3)).apply({"params": params}, x)


class ImpalaConvolutions(ppo_lstm_memorymaze.ImpalaEncoder):
    """ImpalaEncoder with nn.Conv."""

    def __call__(self, obs):
        with patch.object(ppo_lstm_memorymaze, "Conv3x3", Conv3x3):
            return super().__call__(obs)


class Convolutions(nn.Module):
    """ConvEncoder with nn.Conv."""

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


def gradients(module):
    return jax.grad(lambda p, obs: jnp.square(module.apply(p, obs)).sum())


def gradients_in_loop(module):
    return lambda p, obs: jax.lax.scan(lambda p, _: (gradients(module)(p, obs), None), p, length=1)[0]


# From a module to a function of parameters and images.
WORK = {
    "values": lambda module: module.apply,
    "gradients": gradients,
    "gradients inside a loop": gradients_in_loop,
}


def main(batch: int) -> None:
    print(f"{batch} images, eight per time step, on {jax.devices()[0].device_kind}\n")
    print("| encoder | | ours, ms | at once, ms | ratio | nn.Conv, ms | ratio |\n" + "| --- " * 7 + "|")
    for name, size, encoder, convolutions, convert in (
        ("Mystery Path", 84, ppo_agalite_mysterypath.ConvEncoder, Convolutions, as_convolutions),
        ("Memory Maze", 64, ppo_lstm_memorymaze.ImpalaEncoder, ImpalaConvolutions, lambda params: params),
    ):
        obs = jnp.asarray(np.random.default_rng(0).integers(0, 256, (batch // 8, 8, size, size, 3), np.uint8))
        params = jax.jit(encoder().init)(jax.random.key(0), obs)
        encoders = [(InPieces(encoder), {"params": {"encoder": params["params"]}}), (encoder(), params)]
        encoders.append((convolutions(), convert(params)))
        with jax.default_matmul_precision("float32"):  # a GPU's default is TF32
            expected, *others = [jax.jit(module.apply)(p, obs) for module, p in encoders]
        for other in others:
            np.testing.assert_allclose(other, expected, rtol=1e-4, atol=1e-4)
        for row, make in WORK.items():
            functions = [functools.partial(jax.jit(make(module)), p, obs) for module, p in encoders]
            ours, *theirs = milliseconds(functions, 3)
            cells = [f"{other:.1f} | {other / ours:.1f}" for other in theirs]
            print(f"| {name} | {row} | {ours:.1f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128, help="images")
    batch = parser.parse_args().batch
    if batch < 8 or batch % 8:
        parser.error(f"--batch {batch}: must be a multiple of 8")
    main(batch)

"""Our LSTM and GRU against Flax's cells in a plain loop, in time, at their published sizes on the T-Maze.

    python benchmarks/recurrent.py

Flax's cells compute the input products in the loop, and its backward pass adds to the gradient of each kernel in every
step. Ours computes both outside the loop, the kernel's gradient in one product (`over_time`). tests/test_rnn.py shows
that they are equal. Each row measures both in turn, so trust the ratios, not the milliseconds.
"""

import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.scripts import milliseconds
from ppo_gru_tmaze import GRU
from ppo_lstm_tmaze import LSTM


class PlainLoop(nn.Module):
    """The same as `LSTM` or `GRU`, with Flax's cell."""

    cell: nn.Module

    @nn.compact
    def __call__(self, x, reset, memory):
        def step(cell, memory, inputs):
            x, reset = inputs
            return cell(jax.tree.map(lambda m: jnp.where(reset[:, None], 0.0, m), memory), x)

        memory, h = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})(
            self.cell, memory, (x, reset)
        )
        return h, memory


def passes(module, memory, x, reset):
    """-> forward, and forward with backward, as functions without arguments."""
    params = module.init(jax.random.key(0), x, reset, memory)
    forward = jax.jit(lambda params, x: module.apply(params, x, reset, memory)[0])
    both = jax.jit(jax.grad(lambda params, x: jnp.square(forward(params, x)).mean()))
    return (lambda: forward(params, x)), (lambda: both(params, x))


def main():
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; ms: ours, Flax's cell, ratio")
    rng = np.random.default_rng(0)
    for T, B in ((1, 32), (512, 4), (512, 32)):
        x, reset = jnp.asarray(rng.normal(size=(T, B, 16)), jnp.float32), jnp.asarray(rng.random((T, B)) < 0.01)
        c, h = jnp.zeros((2, B, 600))
        lstm = passes(LSTM(600), (c, h), x, reset), passes(PlainLoop(nn.OptimizedLSTMCell(600)), (c, h), x, reset)
        h = jnp.zeros((B, 680))
        gru = passes(GRU(680), (h,), x, reset), passes(PlainLoop(nn.GRUCell(680)), h, x, reset)
        for name, forms in (("LSTM 600", lstm), ("GRU 680", gru)):
            row = f"T {T:3}, B {B:2}, {name:8}"
            for kind, pair in zip(("forward", "forward and backward"), zip(*forms, strict=True), strict=True):
                ours, flax = milliseconds(pair)
                row += f"   {kind}: {ours:.1f}, {flax:.1f}, {flax / ours:.1f}"
            print(row, flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        raise SystemExit("usage: python benchmarks/recurrent.py")
    main()

"""AGaLiTe's attention: ours against the authors' form, in time and peak memory.

    python benchmarks/attention.py
    python benchmarks/attention.py 512,4,4 128,128,8

The authors store keys, queries and gates, expanded to eta * d, for all T steps and all r frequencies, and run one
`jax.lax.associative_scan` over them. That form is written here from the equations, jitted, and checked before timing:
it gives the same outputs, memory and gradients as ours. Each row measures both forms in turn, so trust the ratios, not
the milliseconds. Peak memory is what XLA's compiler reserves beyond inputs and outputs. Arguments are T, B and eta.
"""

import functools
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.scripts import milliseconds
from ppo_agalite_tmaze import LayerMemory, gated_linear_attention

R = 2  # frequencies, as published


def state_of_frequency(r: int) -> np.ndarray:
    """The index of our state for each frequency of linspace(-pi, pi, r): w and -w share one."""
    return np.minimum(np.arange(r), np.arange(r)[::-1])


def authors_form(memory, reset, cos, weight, k, q, v, beta, gamma, p1, p2, p3, r: int = R):
    """Same arguments and results as `gated_linear_attention`; all r frequencies, all T steps at once."""
    T, B, H, d = k.shape
    which = state_of_frequency(r)
    expand = lambda p, x: (p[..., :, None] * x[..., None, :]).reshape(T, B, H, -1)
    k, q, gamma = expand(p1, k), expand(p2, q), expand(p3, gamma)  # (T, B, H, e * d)
    keep, cos = 1.0 - reset[:, :, None, None], cos[:, :, which, None, None]  # (T, B, 1, 1), (T, B, r, 1, 1)

    def scan(decay, inflow, start):
        inflow = inflow.at[0].add(decay[0] * start)
        combine = lambda left, right: (left[0] * right[0], left[1] * right[0] + right[1])
        return jax.lax.associative_scan(combine, (decay, inflow))[1]

    flat = lambda x: x.reshape(*x.shape[:-2], -1)
    key_decay = jnp.broadcast_to(((1 - gamma) * keep)[:, :, None], (T, B, r, H, k.shape[-1]))
    value_decay = jnp.broadcast_to(((1 - beta) * keep)[:, :, None], (T, B, r, H, d))
    keys = scan(key_decay, (gamma * k)[:, :, None] * cos, flat(memory.keys[:, which]))  # (T, B, r, H, e * d)
    values = scan(value_decay, (beta * v)[:, :, None] * cos, memory.values[:, which])  # (T, B, r, H, d)
    norm = scan((1 - gamma) * keep, gamma * k, flat(memory.norm))  # (T, B, H, e * d)
    out = (values * (keys * q[:, :, None]).sum(-1, keepdims=True)).sum(2)
    out = out / (2 * r * (norm * q).sum(-1, keepdims=True) + 1e-5)
    unflat = lambda x: x.reshape(*x.shape[:-1], -1, d)
    F = (r + 1) // 2
    return LayerMemory(unflat(keys[-1])[:, :F], values[-1][:, :F], unflat(norm[-1])), out


def random_inputs(T: int, B: int, eta: int, H: int = 4, d: int = 64):
    """-> memory, reset, cos, weight; k, q, v, beta, gamma, p1, p2, p3"""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    frequencies = np.linspace(-np.pi, np.pi, R)[: (R + 1) // 2]
    F, weight = len(frequencies), jnp.asarray(np.bincount(state_of_frequency(R)), jnp.float32)
    memory = LayerMemory(normal(B, F, H, eta, d), normal(B, F, H, d), jnp.abs(normal(B, H, eta, d)))
    reset = jnp.asarray(rng.random((T, B)) < 0.02)
    cos = jnp.broadcast_to(jnp.cos(jnp.asarray(frequencies, jnp.float32) * jnp.arange(T)[:, None, None]), (T, B, F))
    k, q = (jax.nn.relu(normal(T, B, H, d)) for _ in range(2))
    p1, p2 = (jax.nn.relu(normal(T, B, H, eta)) for _ in range(2))
    beta, gamma, p3 = (jax.nn.sigmoid(normal(T, B, H, n)) for n in (d, d, eta))
    return (memory, reset, cos, weight), (k, q, normal(T, B, H, d), beta, gamma, p1, p2, p3)


def compile_pair(form, inputs):
    """-> two compiled functions: memory and outputs; a loss with its gradient for the memory, k, q and so on."""
    (memory, *rest), tensors = inputs
    weights = jnp.asarray(np.random.default_rng(1).normal(size=tensors[0].shape), jnp.float32)
    forward = lambda memory, tensors: form(memory, *rest, *tensors)
    both = jax.value_and_grad(lambda memory, tensors: (forward(memory, tensors)[1] * weights).sum(), argnums=(0, 1))
    return [jax.jit(function).lower(memory, tensors).compile() for function in (forward, both)]


def largest_difference(ours, theirs) -> float:
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(jnp.abs(a - b).max() / (jnp.abs(b).max() + 1e-30)) for a, b in pairs)


def main(sizes: list[str]):
    if not all(re.fullmatch(r"\d+,\d+,\d+", size) for size in sizes):
        raise SystemExit("usage: python benchmarks/attention.py [T,B,eta ...]")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; one layer, H 4, d 64, r {R}, float32")
    print(f"{'':14}|      forward, ms      | forward+backward, ms  |   peak memory, MiB    | largest")
    print("   T   B  eta  " + "|  ours  theirs  ratio  " * 3 + "| difference")
    for size in sizes or ["1,16,4", "256,1,4", "256,4,4", "256,8,4", "256,16,4", "64,8,4", "256,8,8"]:
        T, B, eta = map(int, size.split(","))
        inputs = random_inputs(T, B, eta)
        arguments = inputs[0][0], inputs[1]
        ours, theirs = compile_pair(gated_linear_attention, inputs), compile_pair(authors_form, inputs)
        difference = max(largest_difference(a(*arguments), b(*arguments)) for a, b in zip(ours, theirs, strict=True))
        # Single gradients are ill-conditioned if norm . q is close to 0: float32 itself allows no better.
        assert difference < 1e-3, f"the two forms disagree by {difference:.1e} at T {T}, B {B}, eta {eta}"
        row = f"{T:4}{B:4}{eta:5}  "
        for pair in zip(ours, theirs, strict=True):
            a, b = milliseconds(functools.partial(function, *arguments) for function in pair)
            row += f"|{a:6.1f}{b:8.1f}{b / a:7.1f}  "
        a, b = (form[1].memory_analysis().temp_size_in_bytes / 2**20 for form in (ours, theirs))
        print(f"{row}|{a:6.1f}{b:8.1f}{b / a:7.1f}  | {difference:.0e}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

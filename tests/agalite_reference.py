"""A slow float64 reference of AGaLiTe, written from the formulas alone: nothing here comes from the scripts.

Every step goes through all layers before the next one begins. Each of the r frequencies has its own state, the
expansions eta * d are written out, and the angle w t is never wrapped. The same code runs on numpy (xp=np, a Python
loop) and on JAX (xp=jnp, a scan), which can differentiate it.
"""

import jax
import jax.numpy as jnp
import numpy as np

PAIRS = "LayerNorm", "GRUGate", "Dense"  # a layer has two of each


def sigmoid(x, xp):
    return (1 + xp.tanh(x / 2)) / 2


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def layer_norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / ((centred**2).mean(-1, keepdims=True) + 1e-6) ** 0.5 * p["scale"] + p["bias"]


def gate(p, x, y, xp):
    r = sigmoid(y @ p["Wr"] + x @ p["Ur"], xp)
    z = sigmoid(y @ p["Wz"] + x @ p["Uz"] - p["bias"], xp)
    h = xp.tanh(y @ p["Wg"] + (r * x) @ p["Ug"])
    return (1 - z) * x + z * h


def outer(a, b):
    """(B, H, e), (B, H, d) -> (B, H, e * d), d is the fast axis."""
    return (a[..., :, None] * b[..., None, :]).reshape(*a.shape[:2], -1)


def split(p, obs):
    """-> noise for the logits, steps left until the time limit, and what the memory model reads."""
    actions = p["Dense_2"]["kernel"].shape[1]
    return obs[..., :actions], obs[..., actions], obs[..., actions + 1 :]


def heads(p, x, obs, discount, xp):
    """-> logits (..., actions), value (...)"""
    actor, critic = (xp.tanh(dense(p[name], x)) for name in ("Dense_0", "Dense_1"))
    noise, steps_left, _ = split(p, obs)
    return dense(p["Dense_2"], actor) + noise, dense(p["Dense_3"], critic)[..., 0] * (1 - discount**steps_left)


def unroll(step, carry, T, xp):
    """step(carry, i) -> carry, outputs, for i = 0 .. T - 1 -> outputs stacked, last carry."""
    if xp is jnp:
        carry, outputs = jax.lax.scan(step, carry, jnp.arange(T))
        return outputs, carry
    outputs = []
    for i in range(T):
        carry, output = step(carry, i)
        outputs.append(output)
    return tuple(np.stack(x) for x in zip(*outputs, strict=True)), carry


def attention(p, u, t, state, sizes, xp):
    """u (B, D), t (B,) the time of this step, state K (r, B, H, ed), V (r, B, H, d), s (B, H, ed) -> (B, D), state."""
    H, d, e, r = sizes
    B = len(u)
    K, V, s = state
    k, q, v, beta, gamma = (x.reshape(B, H, d) for x in xp.split(dense(p, u), 5, axis=-1))
    p1, p2, p3 = (x.reshape(B, H, e) for x in xp.split(dense(p["p"], u), 3, axis=-1))
    relu = lambda x: xp.maximum(x, 0)
    key, query = outer(relu(p1), relu(k)), outer(relu(p2), relu(q))
    gamma = outer(sigmoid(p3, xp), sigmoid(gamma, xp))
    beta = sigmoid(beta, xp)
    new_K, new_V, out = [], [], 0
    for i, omega in enumerate(np.linspace(-np.pi, np.pi, r)):
        c = xp.cos(omega * t)[:, None, None]
        new_K.append((1 - gamma) * K[i] + gamma * key * c)
        new_V.append((1 - beta) * V[i] + beta * v * c)
        out = out + new_V[-1] * (new_K[-1] * query).sum(-1, keepdims=True)
    s = (1 - gamma) * s + gamma * key
    out = out / (2 * r * (s * query).sum(-1, keepdims=True) + 1e-5)
    return dense(p["out"], out.reshape(B, H * d)), (xp.stack(new_K), xp.stack(new_V), s)


def agent(params, obs, reset, t, states, sizes, num_layers, discount, xp):
    """A whole ActorCritic. obs (T, B, n), reset (T, B), t (B,) the time of the previous step, states one per layer.

    -> (logits (T, B, actions), value (T, B)), (t, states) after the last step
    """
    p, memory = params["params"], params["params"]["AGaLiTe_0"]
    relu = lambda x: xp.maximum(x, 0)

    def step(carry, i):
        t, states = carry
        fresh = reset[i]
        t = xp.where(fresh, 2.0, t + 1)
        keep = xp.where(fresh, 0.0, 1.0)[:, None, None]
        states = tuple((K * keep, V * keep, s * keep) for K, V, s in states)
        x = relu(dense(memory["embedding"], split(p, obs[i])[2]))
        new_states = []
        for n in range(num_layers):
            norms, gates, maps = ([memory[f"{kind}_{2 * n + j}"] for j in (0, 1)] for kind in PAIRS)
            y, state = attention(memory[f"AGaLiTeAttention_{n}"], layer_norm(norms[0], x), t, states[n], sizes, xp)
            x = gate(gates[0], x, relu(y), xp)
            z = relu(dense(maps[0], layer_norm(norms[1], x)))
            x = gate(gates[1], x, relu(dense(maps[1], z)), xp)
            new_states.append(state)
        return (t, tuple(new_states)), heads(p, x, obs[i], discount, xp)

    reset = xp.asarray(reset)
    return unroll(step, (t, states), len(obs), xp)

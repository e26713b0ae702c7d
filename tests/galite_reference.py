"""A slow float64 reference of GaLiTe, written from the formulas alone: nothing here comes from the scripts.

Every step goes through all layers before the next one begins. The same code runs on numpy (xp=np, a Python loop) and
on JAX (xp=jnp, a scan), which can differentiate it.
"""

from agalite_reference import PAIRS, dense, gate, heads, layer_norm, sigmoid, split, unroll


def attention(p, u, state, xp):
    """u (B, D), state C (B, H, d, d, e), s (B, H, d, e) -> (B, D), state. Head by head."""
    relu = lambda x: xp.maximum(x, 0)
    C, s = state
    new_C, new_s, out = [], [], []
    for h in range(C.shape[1]):
        of_head = lambda name, h=h: u @ p[name]["kernel"][h] + p[name]["bias"][h]
        query = of_head("query")
        of_query = lambda name, h=h, query=query: query @ p[name]["kernel"][h] + p[name]["bias"][h]
        outer = lambda a, b: a[:, :, None] * b[:, None, :]  # (B, d), (B, e) -> (B, d, e)
        k = outer(relu(of_head("k")), relu(of_head("p1")))
        g = outer(sigmoid(of_head("gamma"), xp), sigmoid(of_head("p3"), xp))
        q = outer(relu(of_query("q")), relu(of_query("p2")))
        v, beta = of_head("v")[:, :, None, None], sigmoid(of_head("beta"), xp)[:, :, None, None]
        bg = beta * g[:, None]  # (B, d, d, e)
        new_C.append((1 - bg) * C[:, h] + bg * v * k[:, None])
        new_s.append((1 - g) * s[:, h] + g * k)
        read = (new_C[-1] * q[:, None]).sum((2, 3))  # (B, d)
        out.append(read / ((new_s[-1] * q).sum((1, 2)) + 1e-10)[:, None])
    return dense(p["out"], xp.concatenate(out, axis=1)), (xp.stack(new_C, 1), xp.stack(new_s, 1))


def agent(params, obs, reset, states, discount, xp):
    """A whole ActorCritic. obs (T, B, n), reset (T, B), states one per layer.

    -> (logits (T, B, actions), value (T, B)), states after the last step
    """
    p, memory = params["params"], params["params"]["GaLiTe_0"]
    relu = lambda x: xp.maximum(x, 0)

    def step(states, i):
        keep = xp.where(reset[i], 0.0, 1.0)
        x = dense(memory["embedding"], split(p, obs[i])[2])
        new_states = []
        for n, (C, s) in enumerate(states):
            norms, gates, maps = ([memory[f"{kind}_{2 * n + j}"] for j in (0, 1)] for kind in PAIRS)
            state = C * keep[:, None, None, None, None], s * keep[:, None, None, None]
            y, state = attention(memory[f"GaLiTeAttention_{n}"], layer_norm(norms[0], x), state, xp)
            x = gate(gates[0], x, relu(y), xp)
            z = relu(dense(maps[0], layer_norm(norms[1], x)))
            x = gate(gates[1], x, relu(dense(maps[1], z)), xp)
            new_states.append(state)
        return tuple(new_states), heads(p, x, obs[i], discount, xp)

    reset = xp.asarray(reset)
    return unroll(step, tuple(states), len(obs), xp)

"""GaLiTe once more, written from the formulas alone, slowly and in float64: nothing here comes from the scripts.

Every step goes through all layers before the next one begins. The same text runs on numpy (xp=np, a Python loop) and
on JAX (xp=jnp, a scan), which then gives derivatives of this text.
"""

from agalite_reference import dense, gate, heads, layer_norm, sigmoid, unroll


def attention(p, u, state, sizes, xp):
    """u (B, D), state C (B, H, d, d, e), s (B, H, d, e) -> (B, D), state. Head by head."""
    H, d, e = sizes
    relu = lambda x: xp.maximum(x, 0)
    C, s = state
    new_C, new_s, out = [], [], []
    for h in range(H):
        of_head = lambda name, n, h=h: (
            u @ p[name]["kernel"][:, h * n : (h + 1) * n] + p[name]["bias"][h * n : (h + 1) * n]
        )
        wq = of_head("query", d)
        within = lambda name, h=h, wq=wq: wq @ p[f"{name}_kernel"][h] + p[f"{name}_bias"][h]
        outer = lambda a, b: a[:, :, None] * b[:, None, :]  # (B, d), (B, e) -> (B, d, e)
        k = outer(relu(of_head("key", d)), relu(of_head("p1", e)))
        g = outer(sigmoid(of_head("gamma", d), xp), sigmoid(of_head("p3", e), xp))
        q = outer(relu(within("query_query")), relu(within("p2")))
        v, beta = of_head("value", d)[:, :, None, None], sigmoid(of_head("beta", d), xp)[:, :, None, None]
        bg = beta * g[:, None]  # (B, d, d, e)
        new_C.append((1 - bg) * C[:, h] + bg * v * k[:, None])
        new_s.append((1 - g) * s[:, h] + g * k)
        read = (new_C[-1] * q[:, None]).sum((2, 3))  # (B, d)
        out.append(read / ((new_s[-1] * q).sum((1, 2)) + 1e-10)[:, None])
    return dense(p["out"], xp.concatenate(out, axis=1)), (xp.stack(new_C, 1), xp.stack(new_s, 1))


def agent(params, obs, reset, states, sizes, xp):
    """A whole ActorCritic. obs (T, B, n), reset (T, B), states one a layer.

    -> (logits (T, B, actions), value (T, B)), states after the last step
    """
    p = params["params"]
    relu = lambda x: xp.maximum(x, 0)

    def step(states, i):
        keep = xp.where(reset[i], 0.0, 1.0)
        x = dense(p["memory"]["embedding"], obs[i])
        new_states = []
        for n, (C, s) in enumerate(states):
            layer = p["memory"][f"GaLiTeLayer_{n}"]
            state = C * keep[:, None, None, None, None], s * keep[:, None, None, None]
            y, state = attention(layer["attention"], layer_norm(layer["LayerNorm_0"], x), state, sizes, xp)
            x = gate(layer["GRUGate_0"], x, relu(y), xp)
            z = relu(dense(layer["Dense_0"], layer_norm(layer["LayerNorm_1"], x)))
            x = gate(layer["GRUGate_1"], x, relu(dense(layer["Dense_1"], z)), xp)
            new_states.append(state)
        return tuple(new_states), heads(p, x, xp)

    reset = xp.asarray(reset)
    return unroll(step, tuple(states), len(obs), xp)

"""A slow float64 reference of GTrXL, written from the formulas alone: nothing here comes from the scripts.

It scores all pairs of steps, each with its own vector of relative position, and then masks most of them. The same code
runs on numpy (xp=np) and on JAX (xp=jnp), which can differentiate it.
"""

import numpy as np
from agalite_reference import dense, gate, heads, layer_norm, split


def agent(params, obs, reset, inputs, visible, sizes, discount, xp):
    """A whole ActorCritic. obs (T, B, n), reset (T, B), normalised inputs L times (B, M, D) and visible (B, M) of the
    previous M steps.

    -> (logits (T, B, actions), value (T, B)), inputs, visible after the last step
    """
    H, d = sizes
    p, (T, B), (L, M) = params["params"], reset.shape, (len(inputs), inputs[0].shape[1])
    memory, relu = p["GTrXL_0"], lambda x: xp.maximum(x, 0)

    # What a step sees: its own episode, not the future, at most M steps back.
    begun = np.zeros((M + T, B), int)  # number of resets so far
    begun[M:] = np.cumsum(reset, axis=0)
    known = np.concatenate([visible.T, np.ones((T, B), bool)])
    sees = np.zeros((T, M + T, B), bool)
    for i in range(T):
        for j in range(M + T):
            sees[i, j] = known[j] & (begun[M + i] == begun[j]) & (0 <= M + i - j <= M)

    x, new_inputs = relu(dense(memory["embedding"], split(p, obs)[2])), []
    D = x.shape[-1]
    distance = np.maximum(M + np.arange(T)[:, None] - np.arange(M + T), 0)
    sinusoid = np.empty((T, M + T, D))
    for m in range(D // 2):
        sinusoid[..., m] = np.sin(distance / 10000 ** (2 * m / D))
        sinusoid[..., D // 2 + m] = np.cos(distance / 10000 ** (2 * m / D))
    for n in range(L):
        attention = memory[f"GTrXLAttention_{n}"]
        gates, maps = ([memory[f"{kind}_{2 * n + j}"] for j in (0, 1)] for kind in ("GRUGate", "Dense"))
        normalised = layer_norm({"scale": 1.0, "bias": 0.0}, x)
        tokens = xp.concatenate([xp.moveaxis(inputs[n], 1, 0), normalised])  # (M + T, B, D)
        new_inputs.append(xp.moveaxis(tokens[-M:], 0, 1))
        k, v = ((tokens * attention["scale"] + attention["bias"]) @ attention[name] for name in ("Wk", "Wv"))
        k, v = k.reshape(M + T, B, H, d), v.reshape(M + T, B, H, d) + attention["bv"]
        published_bias = np.linspace(-1, 1, H * d).reshape(H, d)  # ours has none: softmax gives the same with any
        k = k + published_bias
        q = dense(attention["q"], x).reshape(T, B, H, d)
        position = (sinusoid @ attention["position"]["kernel"]).reshape(T, M + T, H, d) + published_bias[::-1]
        score = xp.einsum("ibhd,jbhd->ijbh", q + memory["content_bias"], k)
        score = score + xp.einsum("ibhd,ijhd->ijbh", q + memory["position_bias"], position)
        score = xp.where(sees[..., None], score / d**0.5, -1e30)
        weight = xp.exp(score - score.max(1, keepdims=True))
        weight = weight / weight.sum(1, keepdims=True)
        y = dense(attention["out"], xp.einsum("ijbh,jbhd->ibhd", weight, v).reshape(T, B, H * d))
        x = gate(gates[0], x, relu(y), xp)
        z = relu(dense(maps[0], layer_norm(memory[f"LayerNorm_{n}"], x)))
        x = gate(gates[1], x, relu(dense(maps[1], z)), xp)
    new_visible = (known & (begun == begun[-1]))[-M:].T
    return heads(p, x, obs, discount, xp), tuple(new_inputs), new_visible

"""What remembering costs: one acting step and one training pass of all five T-Maze agents, over the context length.

    python benchmarks/inference.py

The context is GTrXL's --memory-len; the other memories do not depend on it. Every agent has the published size. Acting
is one step of a batch of environments; 64 steps are timed together, in a compiled loop. Training is the gradient of a
loss over 256 steps of 4 environments. Operations are counted in the traced program: a loop's as often as it runs, but
once if they depend only on parameters, because XLA moves these out of the loop. Peak memory is what the compiler
reserves beyond inputs and outputs; state is what one environment carries. "GTrXL, cached" keeps keys and values while
acting instead of layer inputs; a check shows that it gives the same outputs. Agents run in turn, so trust the ratios to
GTrXL of the same length, not the microseconds.

Writes docs/inference.csv and docs/inference.png.
"""

import csv
import functools
import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.scripts import milliseconds

ROOT = Path(__file__).resolve().parents[1]
LENGTHS, BATCHES, T, OBS = (32, 64, 128, 256, 512), (1, 16), 256, 21
LOOP = 64  # acting steps that are timed together
NAMES = {"agalite": "AGaLiTe", "galite": "GaLiTe", "lstm": "LSTM", "gru": "GRU", "gtrxl": "GTrXL"}


def build(name: str, B: int, **changes):
    """-> args, agent, parameters and a blank memory of B environments."""
    script = importlib.import_module(f"ppo_{name}_tmaze")
    args = script.Args(**changes)
    agent = script.ActorCritic(args, 4)
    memory = agent.initial_memory(B)
    params = jax.jit(agent.init)(jax.random.key(0), jnp.zeros((1, B, OBS)), jnp.ones((1, B), bool), memory)
    return args, agent, params, memory


def cached_step(script, args, params, obs, memory):
    """One step of GTrXL from cached keys and values (B, L, M, H, d) and which are visible (B, M), without resets."""
    keys, values, visible = memory
    p, H, d, M = params["params"], args.num_heads, args.d_head, args.memory_len
    gtrxl = p["GTrXL_0"]
    dense = lambda p, x: x @ p["kernel"] + p["bias"]
    norm = lambda p, x: script.nn.LayerNorm().apply({"params": {name: p[name] for name in ("scale", "bias")}}, x)
    gate = lambda p, x, y: script.GRUGate().apply({"params": p}, x, y)
    seen = jnp.pad(visible, [(0, 0), (0, 1)], constant_values=True)  # (B, M + 1), also the step itself
    noise, steps_left, obs = jnp.split(obs, [4, 5], axis=-1)
    x = jax.nn.relu(dense(gtrxl["embedding"], obs))  # (1, B, D)
    new_keys, new_values = [], []
    for i in range(args.num_layers):
        a = gtrxl[f"GTrXLAttention_{i}"]
        k, v = ((norm(a, x) @ a[name]).reshape(1, -1, H, d) for name in ("Wk", "Wv"))
        k, v = (jnp.concatenate([jnp.moveaxis(old[:, i], 1, 0), new]) for old, new in ((keys, k), (values, v)))
        new_keys.append(k[1:])
        new_values.append(v[1:])
        positions = (script.sinusoids(M + 1, args.d_model) @ a["position"]["kernel"]).reshape(M + 1, H, d)
        q = dense(a["q"], x).reshape(1, -1, H, d)
        content = jnp.einsum("ibhd,jbhd->bhj", q + gtrxl["content_bias"], k)
        position = jnp.einsum("ibhd,jhd->bhj", q + gtrxl["position_bias"], positions[::-1])
        score = jnp.where(seen[:, None], (content + position) / d**0.5, -jnp.inf)  # (B, H, M + 1)
        y = (jnp.einsum("bhj,jbhd->bhd", jax.nn.softmax(score), v) + a["bv"]).reshape(1, -1, H * d)
        x = gate(gtrxl[f"GRUGate_{2 * i}"], x, jax.nn.relu(dense(a["out"], y)))
        z = jax.nn.relu(dense(gtrxl[f"Dense_{2 * i}"], norm(gtrxl[f"LayerNorm_{i}"], x)))
        x = gate(gtrxl[f"GRUGate_{2 * i + 1}"], x, jax.nn.relu(dense(gtrxl[f"Dense_{2 * i + 1}"], z)))
    actor, critic = jnp.tanh(dense(p["Dense_0"], x)), jnp.tanh(dense(p["Dense_1"], x))
    logits = dense(p["Dense_2"], actor) + noise
    value = (dense(p["Dense_3"], critic) * (1 - args.gamma**steps_left)).squeeze(-1)
    stack = lambda new: jnp.moveaxis(jnp.stack(new), 2, 0)  # (L, M, B, H, d) -> (B, L, M, H, d)
    return logits, value, (stack(new_keys), stack(new_values), seen[:, 1:])


def acting(name: str, B: int, length: int):
    """-> a function of (params, obs (1, B, OBS), memory), its first and its last argument."""
    cached = name == "gtrxl, cached"
    script = importlib.import_module(f"ppo_{name.split(',')[0]}_tmaze")
    changes = {"memory_len": length} if "gtrxl" in name else {}
    args, agent, params, memory = build(name.split(",")[0], B, **changes)
    if cached:
        shape = B, args.num_layers, length, args.num_heads, args.d_head
        memory = jnp.zeros(shape), jnp.zeros(shape), jnp.zeros((B, length), bool)
        return lambda params, obs, memory: cached_step(script, args, params, obs, memory), params, memory
    return lambda params, obs, memory: agent.apply(params, obs, jnp.zeros((1, B), bool), memory), params, memory


def check_cache(B: int = 2, length: int = 5, steps: int = 12):
    """The cached variant must equal GTrXL, also after more steps than its window."""
    obs = np.random.default_rng(0).normal(size=(steps, 1, B, OBS)).astype(np.float32)
    outputs = []
    for name in ("gtrxl", "gtrxl, cached"):
        step, params, memory = acting(name, B, length)
        step, logits = jax.jit(step), []
        for x in obs:
            out, _, memory = step(params, x, memory)
            logits.append(out)
        outputs.append(np.stack(logits))
    assert np.abs(outputs[0] - outputs[1]).max() < 1e-5 * np.abs(outputs[0]).max() + 1e-6


def training(name: str, length: int, B: int = 4):
    """-> the gradient of a loss over T steps, a function of (params, obs (T, B, OBS), memory), and its arguments."""
    _, agent, params, memory = build(name, B, **({"memory_len": length} if name == "gtrxl" else {}))
    obs = jnp.asarray(np.random.default_rng(0).normal(size=(T, B, OBS)), jnp.float32)

    def loss(params, obs, memory):
        logits, value, _ = agent.apply(params, obs, jnp.zeros((T, B), bool), memory)
        return (logits**2).mean() + (value**2).mean()

    return jax.grad(loss), params, obs, memory


# Primitives that only move numbers.
MOVES = set("reshape transpose broadcast_in_dim slice squeeze concatenate gather dynamic_slice pad copy".split())
MOVES |= set("convert_element_type split rev dynamic_update_slice scatter-add expand_dims".split())


def operations(equations) -> float:
    """Floating-point operations: 2 per multiply-add in matrix products, 1 per element that another operation makes.

    The compiler counts the body of a loop once; this function counts it as often as it runs.
    """
    total = 0.0
    for equation in equations:
        size = sum(x.aval.size for x in equation.outvars if jnp.issubdtype(x.aval.dtype, jnp.floating))
        inner = [getattr(x, "jaxpr", x) for x in jax.tree.leaves(list(equation.params.values()))]
        inner = [x for x in inner if hasattr(x, "eqns")]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * size * np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
        elif equation.primitive.name == "scan":
            once, often = cut_loop(inner[0], equation.params["num_consts"])
            total += operations(once) + equation.params["length"] * operations(often)
        elif inner:
            total += sum(operations(x.eqns) for x in inner)
        elif equation.primitive.name not in MOVES:
            total += size
    return total


def cut_loop(body, num_consts: int):
    """-> the equations of a scan's body that depend only on what is the same in all steps, and the others."""
    same, once, often = {*body.invars[:num_consts], *body.constvars}, [], []
    for equation in body.eqns:
        if all(isinstance(x, Literal) or x in same for x in equation.invars):
            same.update(equation.outvars)
            once.append(equation)
        else:
            often.append(equation)
    return once, often


def looped(step):
    """LOOP acting steps in one program, each passing its memory to the next -> the last memory, all outputs."""

    def loop(params, obs, memory):  # obs (LOOP, 1, B, OBS)
        def body(memory, obs):
            logits, value, memory = step(params, obs, memory)
            return memory, (logits, value)

        return jax.lax.scan(body, memory, obs)

    return loop


def compile_(function, *arguments):
    """-> compiled, its floating-point operations, its peak memory in bytes."""
    compiled, traced = jax.jit(function).lower(*arguments).compile(), jax.make_jaxpr(function)(*arguments)
    return compiled, operations(traced.eqns), compiled.memory_analysis().temp_size_in_bytes


def measure() -> list[dict]:
    """A row for each kind of work, batch, length and agent."""
    rows = []
    for work, B in [("acting", B) for B in BATCHES] + [("training", 4)]:
        names = [*NAMES] + (["gtrxl, cached"] if work == "acting" else [])
        cases, facts = {}, {}
        for length in LENGTHS:
            for name in names:
                key = (name, length if "gtrxl" in name else None)  # only a window has a length
                if key in cases:
                    continue
                if work == "acting":
                    step, params, memory = acting(name, B, length)
                    step, arguments = looped(step), (params, jnp.ones((LOOP, 1, B, OBS)), memory)
                else:
                    step, *arguments = training(name, length)
                compiled, flops, peak = compile_(step, *arguments)
                flops /= LOOP if work == "acting" else 1
                cases[key] = functools.partial(compiled, *arguments)
                state = sum(x.nbytes for x in jax.tree.leaves(arguments[-1])) / B
                facts[key] = {"GFLOP": flops / 1e9, "state_kB": state / 1e3, "peak_MB": peak / 1e6}
        times = dict(zip(cases, milliseconds(cases.values()), strict=True))
        for length in LENGTHS:
            for name in names:
                key = (name, length if "gtrxl" in name else None)
                row = {"work": work, "batch": B, "length": length, "agent": name}
                row |= {"us": 1e3 * times[key] / (LOOP if work == "acting" else 1)} | facts[key]
                rows.append({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    return rows


def table(rows: list[dict]):
    """Prints each figure as a ratio to GTrXL at the same length, below 1 if less is needed."""
    for work, B in dict.fromkeys((row["work"], row["batch"]) for row in rows):
        print(f"\n{work}, {B} environments\n")
        print("| agent | length | time, µs | to GTrXL | operations to GTrXL | state, kB | to GTrXL | peak to GTrXL |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for row in (row for row in rows if (row["work"], row["batch"]) == (work, B)):
            same = lambda other, row=row: all(other[k] == row[k] for k in ("work", "batch", "length"))
            base = next(other for other in rows if same(other) and other["agent"] == "gtrxl")
            ratio = {k: float(row[k]) / max(float(base[k]), 1e-12) for k in ("us", "GFLOP", "state_kB", "peak_MB")}
            name = NAMES.get(row["agent"], "GTrXL, cached")
            print(
                f"| {name} | {row['length']} | {float(row['us']):,.0f} | {ratio['us']:.2f} | {ratio['GFLOP']:.2f} "
                f"| {float(row['state_kB']):,.0f} | {ratio['state_kB']:.2f} | {ratio['peak_MB']:.2f} |"
            )


def draw(rows: list[dict], path: Path):
    """Time of an acting step and of a training pass, and bytes of state, over the length."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = (("acting", BATCHES[-1], "us"), ("training", 4, "us"), ("acting", BATCHES[-1], "state_kB"))
    titles = (f"acting, {BATCHES[-1]} environments, µs", f"training, {T} steps of 4, µs", "state, kB")
    for axis, (work, B, name), title in zip(figure.subplots(1, 3), panels, titles, strict=True):
        for agent in dict.fromkeys(row["agent"] for row in rows if row["work"] == work):
            curve = [r for r in rows if (r["work"], r["batch"], r["agent"]) == (work, B, agent)]
            label = NAMES.get(agent, "GTrXL, cached")
            axis.loglog([r["length"] for r in curve], [float(r[name]) for r in curve], "o-", label=label, markersize=3)
        axis.set(xlabel="context length", title=title)
        axis.set_xticks(LENGTHS, LENGTHS)
        axis.xaxis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)


def main():
    check_cache()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, float32, published sizes")
    rows = measure()
    with (ROOT / "docs" / "inference.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table(rows)
    draw(rows, ROOT / "docs" / "inference.png")


if __name__ == "__main__":
    if sys.argv[1:]:
        raise SystemExit("usage: python benchmarks/inference.py")
    main()

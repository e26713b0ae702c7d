"""Craftax: steps a second of training with AGaLiTe, with GTrXL and without memory, and of the environment alone.

    python benchmarks/craftax_training.py --env-id Craftax-Classic-Symbolic-v1 --num-envs 32 --num-steps 64 \\
        --num-layers 2 --d-model 64 --d-head 32
    python benchmarks/craftax_training.py --memory-only

Flags are the scripts' own; without any, the published size. All are compiled first and then run in turn, with random
actions where there is no agent. Memory is what XLA plans for one whole update, its arguments and results included;
--memory-only stops there, so that it can be seen on a machine that could not run it.

"of AGaLiTe's" are parts of its training on their own, as often as an update applies them: once to each step of all
environments, and with gradients to every minibatch of each epoch. One over their ratio is their share of its time.
"""

import functools
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ppo_agalite_craftax as agalite
import ppo_gtrxl_craftax as gtrxl
from benchmarks.without_memory import forgetful
from envs.wrappers import AutoReset, EpisodeStatistics, VectorEnv

ROUNDS = 5


def training(script, args, agent_class):
    """-> update(runner), and a runner."""
    env = script.make_env(args, args.num_envs)
    agent = agent_class(args, env.action_space(env.default_params).n)
    return (lambda runner: script.update(args, env, runner)[0]), functools.partial(script.init, args, env, agent)


def environment(args, env):
    """-> a rollout with random actions, and where it begins."""
    params = env.default_params

    def rollout(carry):
        def step(carry, _):
            key, _, state = carry
            key, action_key, step_key = jax.random.split(key, 3)
            action = jax.random.randint(action_key, (args.num_envs,), 0, env.action_space(params).n)
            return (key, *env.step(step_key, state, action, params)[:2]), None  # observations too, or XLA omits them

        return jax.lax.scan(step, carry, length=args.num_steps)[0]

    return rollout, lambda key: (key, *env.reset(key, params))


class Attention(nn.Module):
    """AGaLiTe's, with the weight of its frequencies filled in."""

    args: agalite.Args

    @nn.compact
    def __call__(self, u, reset, cos, memory):
        return agalite.AGaLiTeAttention(self.args)(u, reset, cos, jnp.full(cos.shape[-1], 2.0), memory)


def part(args, module, times: int, over_time, *fixed):
    """A module that stands `times` times in the agent. over_time: its inputs (T, B, ...); fixed: (B, ...).

    -> passes(params) of an update, and params.
    """
    b = args.num_envs // args.num_minibatches
    apply = lambda params, inputs, fixed: jax.tree.leaves(module.apply(params, *inputs, *fixed))[0]

    def passes(params):
        def act(params, inputs):  # each step's outcome is used, or XLA would leave it out
            total = apply(params, [x[None] for x in inputs], fixed).sum()
            return jax.tree.map(lambda p: p + 1e-9 * total, params), None

        def learn(params, _):
            loss = lambda params: jnp.square(apply(params, [x[:, :b] for x in over_time], few)).sum()
            return jax.tree.map(lambda p, g: p - 1e-9 * g, params, jax.grad(loss)(params)), None

        few = jax.tree.map(lambda x: x[:b], fixed)
        for _ in range(times):
            params, _ = jax.lax.scan(act, params, over_time)
            params, _ = jax.lax.scan(learn, params, length=args.update_epochs * args.num_minibatches)
        return params

    return passes, lambda key: module.init(key, *[x[:1] for x in over_time], *fixed)


def parts(args):
    """The encoder of the wide observation and the attention, with random inputs."""
    T, B, rng = args.num_steps, args.num_envs, np.random.default_rng(0)
    env = agalite.make_env(args, args.num_envs)
    obs = rng.integers(0, 2, (T, B, *env.observation_space(env.default_params).shape), np.uint8)
    u = rng.normal(size=(T, B, args.d_model)).astype(np.float32)
    reset, cos = np.zeros((T, B), bool), np.ones((T, B, (args.r + 1) // 2), np.float32)
    memory = agalite.ActorCritic(args, 1).initial_memory(B).layers[0]
    return {
        "of AGaLiTe's, the attention alone": part(args, Attention(args), args.num_layers, [u, reset, cos], memory),
        "of AGaLiTe's, the encoder alone": part(args, nn.remat(agalite.SymbolEncoder)(args.d_encoder), 1, [obs]),
    }


def main(flags: list[str]):
    memory_only = "--memory-only" in flags
    flags = [flag for flag in flags if flag != "--memory-only"]
    args, other = agalite.parse_args(flags), gtrxl.parse_args(flags)
    single = agalite.make_env(args, args.num_envs).unwrapped
    programs = {
        "AGaLiTe": training(agalite, args, agalite.ActorCritic),
        "GTrXL": training(gtrxl, other, gtrxl.ActorCritic),
        "AGaLiTe's script without memory": training(agalite, args, forgetful(agalite.ActorCritic)),
        "environment alone, optimistic resets": environment(args, agalite.make_env(args, args.num_envs)),
        "environment alone, a new world for each in every step": environment(
            args, VectorEnv(AutoReset(EpisodeStatistics(single)), args.num_envs)
        ),
    } | parts(args)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {args.env_id}, {args.num_envs} x {args.num_steps}")
    compiled, memory, carries = {}, {}, {}
    for name, (step, begin) in programs.items():
        key = jax.random.key(1)
        shapes = jax.eval_shape(begin, key)
        compiled[name] = jax.jit(step, donate_argnums=0).lower(shapes).compile()
        plan = compiled[name].memory_analysis()
        size = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
        memory[name] = (size - plan.alias_size_in_bytes) / 2**20
        if memory_only:
            print(f"{name}: {memory[name]:,.0f} MiB", flush=True)
        else:
            carries[name] = jax.block_until_ready(compiled[name](jax.jit(begin)(key)))
    if memory_only:
        return

    seconds = {name: [] for name in programs}
    for _ in range(ROUNDS):
        for name, run in compiled.items():
            start = time.perf_counter()
            carries[name] = jax.block_until_ready(run(carries[name]))
            seconds[name].append(time.perf_counter() - start)
    rate = {name: args.batch_size / float(np.median(values)) for name, values in seconds.items()}
    print("\n| | steps/s | ratio to AGaLiTe's | memory, MiB |\n| --- | --- | --- | --- |")
    for name in programs:
        print(f"| {name} | {rate[name]:,.0f} | {rate[name] / rate['AGaLiTe']:.2f} | {memory[name]:,.0f} |")


if __name__ == "__main__":
    main(sys.argv[1:])

r"""Craftax: steps per second of training with AGaLiTe, with GTrXL and without memory, and of the environment alone.

    python benchmarks/craftax_training.py --env-id Craftax-Classic-Symbolic-v1 --num-envs 32 --num-steps 64 \
        --num-layers 2 --d-model 64 --d-head 32
    python benchmarks/craftax_training.py --memory-only

Flags are AGaLiTe's, also for GTrXL if it has them; without any, the published size. All programs are compiled first and
then run in turn, with random actions if there is no agent. Memory is what XLA plans for one whole update; a result that
takes the place of an argument counts once. --memory-only prints only this and runs nothing.

The last two rows are parts of AGaLiTe's agent, alone. They run as often as in an update: acting in each step, learning
in each minibatch of each epoch. A part's share of AGaLiTe's time is 1 / its ratio.
"""

import dataclasses
import functools
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ppo_agalite_craftax as agalite
import ppo_gtrxl_craftax as gtrxl
from benchmarks.scripts import milliseconds
from benchmarks.without_memory import forgetful
from envs.wrappers import AutoReset, EpisodeStatistics, VectorEnv

ROUNDS = 5


def training(script, args, agent_class):
    """-> update(runner), a function from a key to a runner."""
    env = script.make_env(args, args.num_envs)
    agent = agent_class(args, env.action_space(env.default_params).n)
    # With an axis of seeds, as the scripts have it.
    init = lambda key: jax.lax.map(functools.partial(script.init, args, env, agent), key[None])
    return (lambda runner: jax.vmap(functools.partial(script.update, args, env))(runner)[0]), init


def environment(args, env):
    """-> a rollout with random actions, a function from a key to its start."""
    params = env.default_params

    def rollout(carry):
        def step(carry, _):
            key, _, state = carry
            key, action_key, step_key = jax.random.split(key, 3)
            action = jax.random.randint(action_key, (args.num_envs,), 0, env.action_space(params).n)
            return (key, *env.step(step_key, state, action, params)[:2]), None  # observations, too: else XLA omits them

        return jax.lax.scan(step, carry, length=args.num_steps)[0]

    return rollout, lambda key: (key, *env.reset(key, params))


class Attention(nn.Module):
    """AGaLiTe's attention, with the weight of its frequencies filled in."""

    args: agalite.Args

    @nn.compact
    def __call__(self, u, reset, cos, memory):
        return agalite.AGaLiTeAttention(self.args)(u, reset, cos, jnp.full(cos.shape[-1], 2.0), memory)


def part(args, module, times: int, over_time, *memory):
    """A module that is `times` times in the agent. over_time: its inputs (T, B, ...); memory: (B, ...), if any.

    -> passes((params, memory)) of an update, a function from a key to their start. All results are used; otherwise XLA
    would omit them.
    """
    b = args.num_envs // args.num_minibatches
    starts = jnp.tile(jnp.arange(0, args.num_envs, b), args.update_epochs)  # another minibatch each time

    def apply(params, inputs, memory):  # -> output, memory
        result = module.apply(params, *inputs, *memory)
        return (result[0], result[1:]) if memory else (result, ())

    def act(carry, inputs):
        params, memory = carry
        output, memory = apply(params, [x[None] for x in inputs], memory)
        return (jax.tree.map(lambda p: p + 1e-9 * output.sum(), params), memory), None

    def learn(carry, start):
        params, memory = carry
        cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, b, axis)
        first, *rest = [cut(x, 1) for x in over_time]
        few = jax.tree.map(lambda x: cut(x, 0), memory)
        loss = lambda params, first: jnp.square(apply(params, [first, *rest], few)[0]).sum()
        wanted = (0, 1) if jnp.issubdtype(first.dtype, jnp.floating) else (0,)  # also for the layer below, if any
        grads, *below = jax.grad(loss, wanted)(params, first)
        used = 1e-9 * sum(jnp.abs(x).sum() for x in below)
        return (jax.tree.map(lambda p, g: p - 1e-9 * g + used, params, grads), memory), None

    def passes(carry):
        for _ in range(times):
            carry, _ = jax.lax.scan(act, carry, over_time)
            carry, _ = jax.lax.scan(learn, carry, starts)
        return carry

    return passes, lambda key: (module.init(key, *[x[:1] for x in over_time], *memory), memory)


def parts(args):
    """The encoder of the wide observation and the attention, with random inputs."""
    T, B, rng = args.num_steps, args.num_envs, np.random.default_rng(0)
    env = agalite.make_env(args, args.num_envs)
    obs = rng.integers(0, 2, (T, B, *env.observation_space(env.default_params).shape), np.uint8)
    u = rng.normal(size=(T, B, args.d_model)).astype(np.float32)
    reset, cos = np.zeros((T, B), bool), np.ones((T, B, (args.r + 1) // 2), np.float32)
    memory = agalite.ActorCritic(args, 1).initial_memory(B).layers[0]
    return {
        "AGaLiTe's attention alone": part(args, Attention(args), args.num_layers, [u, reset, cos], memory),
        "AGaLiTe's encoder alone": part(args, nn.remat(agalite.SymbolEncoder)(args.d_encoder), 1, [obs]),
    }


def main(flags: list[str]):
    memory_only = "--memory-only" in flags
    flags = [flag for flag in flags if flag != "--memory-only"]
    args = agalite.parse_args(flags)
    own = [field.name for field in dataclasses.fields(gtrxl.Args) if field.name != "exp_name"]
    other = gtrxl.Args(**{name: value for name, value in vars(args).items() if name in own})
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
            carries[name] = jax.jit(begin)(key)
    if memory_only:
        return

    def run(name):
        carries[name] = compiled[name](carries[name])
        return carries[name]

    times = milliseconds([functools.partial(run, name) for name in programs], ROUNDS)
    rate = {name: 1e3 * args.batch_size / ms for name, ms in zip(programs, times, strict=True)}
    print("\n| | steps/s | ratio to AGaLiTe's | memory, MiB |\n| --- | --- | --- | --- |")
    for name in programs:
        print(f"| {name} | {rate[name]:,.0f} | {rate[name] / rate['AGaLiTe']:.2f} | {memory[name]:,.0f} |")


if __name__ == "__main__":
    main(sys.argv[1:])

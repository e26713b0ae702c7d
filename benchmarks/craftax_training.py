"""Craftax: steps a second of training with AGaLiTe, with GTrXL and without memory, and of the environment alone.

    python benchmarks/craftax_training.py --env-id Craftax-Classic-Symbolic-v1 --num-envs 32 --num-steps 64 \\
        --num-layers 2 --d-model 64 --d-head 32
    python benchmarks/craftax_training.py --memory-only

Flags are the scripts' own; without any, the published size. All are compiled first and then run in turn, with random
actions where there is no agent. Memory is what XLA plans for one whole update, its arguments and results included;
--memory-only stops there, so that it can be seen on a machine that could not run it.
"""

import functools
import sys
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ppo_agalite_craftax
import ppo_gtrxl_craftax
from benchmarks.without_memory import forgetful
from envs.wrappers import AutoReset, EpisodeStatistics, VectorEnv

ROUNDS = 5


def training(script, args, agent_class):
    """-> update(runner), and a runner."""
    env = script.make_env(args, args.num_envs)
    parts = args, env, agent_class(args, env.action_space(env.default_params).n), script.make_optimizer(args)
    runner = functools.partial(script.init, *parts)
    return (lambda runner: script.update(*parts, runner)[0]), runner


def environment(args, env):
    """-> a rollout with random actions, and where it begins."""
    params = env.default_params

    def rollout(carry):
        def step(carry, _):
            key, state = carry
            key, action_key, step_key = jax.random.split(key, 3)
            action = jax.random.randint(action_key, (args.num_envs,), 0, env.action_space(params).n)
            obs, state, *_ = env.step(step_key, state, action, params)
            return (key, state), obs

        carry, obs = jax.lax.scan(step, carry, length=args.num_steps)
        return carry, obs

    return (lambda carry: rollout(carry)[0]), lambda key: (key, env.reset(key, params)[1])


def main(flags: list[str]):
    memory_only = "--memory-only" in flags
    flags = [flag for flag in flags if flag != "--memory-only"]
    agalite, gtrxl = ppo_agalite_craftax, ppo_gtrxl_craftax
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
    }
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

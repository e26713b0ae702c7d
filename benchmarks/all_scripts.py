"""Every script at its default size: steps per second of whole updates, memory, and the time to compile an update.

    python benchmarks/all_scripts.py
    python benchmarks/all_scripts.py ppo_agalite_tmaze.py ppo_gtrxl_tmaze.py

Each script is a process. All are compiled first, as many at once as there are cores, so each takes longer than it would
alone. Then they run one after another: the median of three updates, each after one that does not count. Memory is what
XLA plans for the update, including arguments and results; scripts donate the arguments, and so need less.

The mazes of Memory Maze are processes on CPUs. Random images replace them here, so its rows count only acting and
learning; the column "acting" is the share of acting. With --wait, the runs begin when a line arrives on standard
input.
"""

import functools
import multiprocessing
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
from gymnasium import spaces

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.scripts import load, milliseconds

ROOT = Path(__file__).resolve().parents[1]

UPDATES = 3


def on_device(script, args):
    """One update, with its environments -> [(1, update, its argument)]."""
    env = script.make_env(args, args.num_envs)
    agent = script.ActorCritic(args, env.action_space(env.default_params).n)
    runner = jax.jit(functools.partial(script.init, args, env, agent))(jax.random.key(1))
    one_seed = jax.tree.map(lambda x: x[None], runner)  # scripts always have the axis of seeds
    return [(1, jax.vmap(functools.partial(script.update, args, env)), (one_seed,))]


def with_processes(script, args):
    """An update of Memory Maze without its mazes -> [(T, act, its arguments), (1, learn, its arguments)]."""
    T, B, rng, key = args.num_steps, args.num_envs, np.random.default_rng(0), jax.random.key(1)

    class Envs:
        observation_space = spaces.Box(0, 255, (B, 64, 64, 3), np.uint8)

    agent = script.ActorCritic(args, 6)
    train_state = jax.jit(functools.partial(script.init_learner, args, Envs, agent))(key)
    obs, reset = rng.integers(0, 256, (T, B, 64, 64, 3), np.uint8), np.zeros((T, B), bool)
    memory, numbers = agent.initial_memory(B), rng.normal(size=(3, T, B)).astype(np.float32)
    transitions = script.Transition(obs, reset, rng.integers(0, 6, (T, B)), *numbers, reset)
    act, learn = functools.partial(script.act, agent), functools.partial(script.learn_from, args)
    acting = train_state.params, False, key, obs[0], reset[0], memory
    return [(T, act, acting), (1, learn, (train_state, key, memory, transitions, numbers[0, 0]))]


def compile_script(name: str):
    """-> steps per update, compiled parts of an update, seconds of compilation"""
    script = load(name)
    args = script.Args()
    parts = on_device(script, args) if hasattr(script, "update") else with_processes(script, args)
    start = time.perf_counter()
    parts = [(calls, jax.jit(part).lower(*inputs).compile(), inputs) for calls, part, inputs in parts]
    return args.batch_size, parts, time.perf_counter() - start


def measure(name: str, compiling, pipe):
    """The process of one script: compiles it, reports, waits for its turn, and sends its row of the table."""
    with compiling:
        steps, parts, compile_seconds = compile_script(name)
    pipe.send("compiled")
    pipe.recv()
    times = milliseconds([functools.partial(part, *inputs) for _, part, inputs in parts], UPDATES)
    seconds = [1e-3 * calls * ms for ms, (calls, _, _) in zip(times, parts, strict=True)]
    plans = [part.memory_analysis() for _, part, _ in parts]
    sizes = [p.argument_size_in_bytes + p.output_size_in_bytes + p.temp_size_in_bytes for p in plans]
    acting = f"{seconds[0] / sum(seconds):.0%}" if len(parts) > 1 else ""
    cells = f"{steps / sum(seconds):,.0f} | {sum(seconds):.3f} | {acting} | {max(sizes) / 2**20:,.0f}"
    pipe.send(f"| {Path(name).stem} | {cells} | {compile_seconds:.0f} |")


def main(names: list[str]):
    wait = "--wait" in names
    names = [name for name in names if name != "--wait"] or [str(path) for path in sorted(ROOT.glob("ppo_*.py"))]
    for name in names:
        load(name)  # refuses what is no script
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # all processes share a GPU
    spawn = multiprocessing.get_context("spawn")
    compiling, pipes = spawn.Semaphore(len(os.sched_getaffinity(0))), []
    for name in names:
        pipe, end = spawn.Pipe()
        spawn.Process(target=measure, args=(name, compiling, end), daemon=True).start()
        end.close()  # so that recv() below raises an error if the process has died
        pipes.append(pipe)
    for pipe in pipes:
        pipe.recv()
    if wait:
        print("compiled", flush=True)
        input()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    columns = "script", "steps/s", "seconds per update", "acting", "memory, MiB", "seconds to compile"
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
    for pipe in pipes:
        pipe.send("run")
        print(pipe.recv(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

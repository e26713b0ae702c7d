"""Memory Maze: where the time of a training step goes, part by part.

    taskset -c 0 python benchmarks/memorymaze_training.py ppo_agalite_memorymaze.py --num-channels 4 --num-envs 16

Flags are the script's own; without any, the published size. Each part is measured alone. Run it on one core: with more,
the workers overlap, and the parts do not add up to the whole. Milliseconds are per step of one environment.
Transitions are random, mazes are not.
"""

import functools
import itertools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.all_scripts import UPDATES, with_processes
from benchmarks.memorymaze import CHOICES
from benchmarks.scripts import load, milliseconds
from envs.memorymaze import MemoryMaze
from envs.workers import Workers

STEPS = 200  # of the environments


def environment(size: str) -> dict[str, float]:
    """One maze in this process -> ms of physics and of drawing, per step."""
    maze, actions, total = MemoryMaze(size), np.random.default_rng(0).choice(CHOICES, STEPS), {}
    maze.reset(seed=1)

    def timed(name, function, *inputs):
        start = time.perf_counter()
        result = function(*inputs)
        total[name] = total.get(name, 0.0) + 1e3 * (time.perf_counter() - start) / STEPS
        return result

    maze._move = functools.partial(timed, "physics", maze._move)
    maze._observe = functools.partial(timed, "drawing", maze._observe)
    for action in actions:
        maze.step(int(action))
    maze.close()
    return total


def with_workers(script, args) -> float:
    """All mazes in their processes -> ms per step of one of them."""
    envs, rng = Workers([script.make_env(args, index) for index in range(args.num_envs)]), np.random.default_rng(0)
    envs.reset(seed=1)
    for _ in range(100):  # the first images take longer, and all workers build their second maze
        envs.step(rng.choice(CHOICES, args.num_envs))
    start = time.perf_counter()
    for _ in range(STEPS):
        envs.step(rng.choice(CHOICES, args.num_envs))
    seconds = time.perf_counter() - start
    envs.close()
    return 1e3 * seconds / STEPS / args.num_envs


def agent_parts(script, args) -> dict[str, float]:
    """-> ms of acting, and of learning in the encoder and elsewhere, per step"""
    (T, act, acting), (_, learn, learning) = with_processes(script, args)
    B, (train_state, _, _, transitions, _) = args.num_envs, learning

    minibatch = jnp.asarray(transitions.obs[:, : B // args.num_minibatches])
    encoder = script.ImpalaEncoder(args.num_channels)
    pieces = lambda params, obs: script.in_pieces(encoder.bind(params), obs)
    params = {"params": train_state.params["params"]["encoder"]}
    times = args.num_minibatches * args.update_epochs

    def passes(params):  # as often as in an update, and in a loop, too
        loss = lambda params: jnp.square(pieces(params, minibatch)).sum()
        step = lambda params, _: (jax.tree.map(lambda p, g: p - 1e-9 * g, params, jax.grad(loss)(params)), None)
        return jax.lax.scan(step, params, length=times)[0]

    calls = (jax.jit(act), *acting), (jax.jit(learn), *learning), (jax.jit(passes), params)
    acting_ms, learning_ms, encoding_ms = milliseconds([functools.partial(*call) for call in calls], UPDATES)
    return {
        "acting": acting_ms / B,
        "learning: encoder, forward and backward": encoding_ms / (T * B),
        "learning: memory, heads, optimizer": (learning_ms - encoding_ms) / (T * B),
    }


def main(name: str, flags: list[str]):
    script = load(name, "_memorymaze.py")
    args = script.parse_args(flags)
    parts = environment(args.env_id.split("-")[1])
    rest = with_workers(script, args) - sum(parts.values())
    parts |= {"workers: traffic, new mazes": rest} | agent_parts(script, args)
    total = sum(parts.values())
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {name}, {args.num_envs} x {args.num_steps}\n")
    print("| part | ms per step | share |\n| --- | --- | --- |")
    for part, ms in itertools.chain(parts.items(), [("together", total)]):
        print(f"| {part} | {ms:.2f} | {ms / total:.0%} |")
    print(f"\n{1e3 / total:.0f} steps per second")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("usage: python benchmarks/memorymaze_training.py ppo_<memory>_memorymaze.py [its flags]")
    main(sys.argv[1], sys.argv[2:])

"""Mystery Path Grid-Easy: what a perfect memory is worth, and how well an agent learns to imitate the oracle.

    python benchmarks/mysterypath_oracle.py
    python benchmarks/mysterypath_oracle.py ppo_agalite_mysterypath.py --num-channels 16 --total-timesteps 1e6

The oracle walks towards the visible goal and remembers every tile that was on the path or beside it. The first command
plays 1000 episodes with it. The second trains a script's agent to imitate it: the agent acts, and cross-entropy teaches
it what the oracle would do in its place (DAgger, Ross et al. 2011). It shows what the network can learn without the
exploration and the rewards of reinforcement learning. The flags are the script's own; those of PPO's loss have no
effect.
"""

import functools
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.results import interval
from benchmarks.scripts import load
from envs.mysterypath import FORWARD, NEIGHBOURS, NOOP, SIDE, TILE, TILES, TURN_LEFT, TURN_RIGHT, EnvState, MysteryPath

ENV_ID = "MysteryPath-Grid-Easy-v0"
ROTATION_TO = np.array([6, 2, 4, 0])  # the rotation that faces each of NEIGHBOURS: right, left, down, up
UNKNOWN = 4.0  # cost of a step to an unknown tile; one to a known tile costs 1, a turn 0.3
FAR = 1e4


class Seen(NamedTuple):
    """What an episode has shown so far."""

    path: jax.Array  # (49,) bool, tiles of the path
    beside: jax.Array  # (49,) bool, tiles beside it, on which the agent fell

    @classmethod
    def nothing(cls):
        return cls(jnp.zeros(TILES, bool), jnp.zeros(TILES, bool))

    def with_tile_of(self, state: EnvState):
        x, y = state.position // TILE
        here = jnp.arange(TILES) == SIDE * x + y
        goal = jnp.arange(TILES) == state.route.goal
        return Seen(self.path | goal | here & ~state.off_path, self.beside | here & state.off_path)


def oracle(seen: Seen, state: EnvState) -> jax.Array:
    """-> action () int32: the first on the cheapest way to the goal, as if every unknown tile were on the path."""
    x, y = state.position // TILE
    cost = jnp.where(seen.beside, FAR, jnp.where(seen.path, 1.0, UNKNOWN))
    step_cost = lambda left: jnp.where(NEIGHBOURS == np.arange(TILES)[:, None], FAR, (cost + left)[NEIGHBOURS])

    def improve(_, left):  # one more tile of each way
        return jnp.minimum(left, step_cost(left).min(-1))

    left = jnp.full(TILES, FAR).at[state.route.goal].set(0.0)  # cost from each tile to the goal
    left = jax.lax.fori_loop(0, TILES, improve, left)
    turn = (ROTATION_TO - state.rotation) % 8  # 0, 2: to the left, 4: back, 6: to the right
    turns = jnp.array([0, 0, 1, 0, 2, 0, 1, 0])[turn]
    towards = (step_cost(left)[SIDE * x + y] + 0.3 * turns).argmin()
    action = jnp.where(turn[towards] == 0, FORWARD, jnp.where(turn[towards] == 6, TURN_RIGHT, TURN_LEFT))
    return jnp.where(state.off_path, NOOP, action)  # beside the path, actions have no effect


def play(num_episodes: int) -> dict[str, jax.Array]:
    """Episodes of the oracle -> return, length, success and falls of each, (num_episodes,)."""
    env = MysteryPath(ENV_ID)
    params = env.default_params

    def episode(key):
        _, state = env.reset(key, params)

        def step(carry, _):
            state, seen, going = carry
            _, state, reward, done, info = env.step(None, state, oracle(seen, state), params)
            counted = going * jnp.stack([reward, 1.0, info["success"], state.off_path])
            return (state, seen.with_tile_of(state), going & ~done), counted

        carry = (state, Seen.nothing().with_tile_of(state), True)
        return jax.lax.scan(step, carry, length=params.max_episode_steps)[1].sum(0)

    results = jax.jit(jax.vmap(episode))(jax.random.split(jax.random.key(0), num_episodes))
    return dict(zip(("return", "length", "success", "falls"), results.T, strict=True))


def imitate(script, args):
    """Trains the agent -> rows of (steps, cross-entropy, return, success), each a mean over a tenth of the training."""
    env = script.make_env(args, args.num_envs)
    agent = script.ActorCritic(args, env.action_space(env.default_params).n)
    runner = jax.jit(functools.partial(script.init, args, env, agent))(jax.random.key(args.seed))
    place_of = lambda env_state: env_state.env_state.env_state  # inside PooledReset and EpisodeStatistics
    nothing = jax.tree.map(lambda x: jnp.broadcast_to(x, (args.num_envs, TILES)), Seen.nothing())
    look = jax.vmap(Seen.with_tile_of)

    def rollout(runner, seen, key):
        def step(carry, key):
            runner, seen = carry
            params, state = runner.train_state.params, place_of(runner.env_state)
            logits, _, memory = agent.apply(params, runner.obs[None], runner.reset[None], runner.memory)
            action = jax.random.categorical(key, logits[0])
            obs, env_state, _, done, info = env.step(key, runner.env_state, action, env.default_params)  # draws nothing
            data = runner.obs, runner.reset, jax.vmap(oracle)(seen, state), ~state.off_path
            runner = runner._replace(env_state=env_state, obs=obs, reset=done, memory=memory)
            seen = jax.tree.map(lambda new, old: jnp.where(done[:, None], new, old), nothing, seen)
            return (runner, look(seen, place_of(env_state))), (data, (info["episodic_return"], info["success"], done))

        return jax.lax.scan(step, (runner, seen), jax.random.split(key, args.num_steps))

    def loss(params, memory, obs, reset, action, counts):
        logits, _, _ = agent.apply(params, obs, reset, memory)
        return jnp.average(optax.softmax_cross_entropy_with_integer_labels(logits, action), weights=counts)

    @jax.jit
    def update(runner, seen, key):
        refresh_key, rollout_key, learn_key = jax.random.split(key, 3)
        start = runner.memory
        runner = runner._replace(env_state=env.refresh(refresh_key, runner.env_state, env.default_params))
        (runner, seen), (data, (returns, success, done)) = rollout(runner, seen, rollout_key)

        def minibatch_step(train_state, chosen):
            memory, batch = jax.tree.map(lambda x: x[chosen], start), [x[:, chosen] for x in data]
            value, grads = jax.value_and_grad(loss)(train_state.params, memory, *batch)
            return train_state.apply_gradients(grads=grads), value

        epoch_keys = jax.random.split(learn_key, args.update_epochs)
        order = jax.vmap(lambda key: jax.random.permutation(key, args.num_envs))(epoch_keys)
        order = order.reshape(args.update_epochs * args.num_minibatches, -1)
        train_state, cross_entropy = jax.lax.scan(minibatch_step, runner.train_state, order)
        outcomes = [(x * done).sum() / jnp.maximum(done.sum(), 1) for x in (returns, success)]
        return runner._replace(train_state=train_state), seen, jnp.stack([cross_entropy.mean(), *outcomes])

    seen, rows = look(nothing, place_of(runner.env_state)), []
    for number, key in enumerate(jax.random.split(jax.random.key(args.seed + 1), args.num_updates), start=1):
        runner, seen, row = update(runner, seen, key)
        rows.append(row)
        if number * 10 // args.num_updates > (number - 1) * 10 // args.num_updates:
            yield number * args.batch_size, *np.mean(rows, axis=0)
            rows = []


def main(path: str = "", *flags: str) -> None:
    if not path:
        for name, values in play(1000).items():
            print("{}: {:.3g} ± {:.2g}".format(name, *interval(np.asarray(values))))
        return
    script = load(path, "_mysterypath.py")
    args = script.parse_args(list(flags))
    if getattr(args, "env_id", "") != ENV_ID:
        raise SystemExit(f"The oracle knows its way in {ENV_ID} only")
    start = time.time()
    print("| steps | minutes | cross-entropy | return | success |\n| --- | --- | --- | --- | --- |")
    for steps, *values in imitate(script, args):
        minutes = (time.time() - start) / 60
        print(f"| {steps:,} | {minutes:.1f} | {values[0]:.3f} | {values[1]:.2f} | {values[2]:.2f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Wrappers for environments with the interface of Craftax:

    reset(key, params) -> obs, state
    step(key, state, action, params) -> obs, state, reward, done, info

They stack in one of three ways, which differ in how many first states of episodes they make in each step:

    VectorEnv(AutoReset(EpisodeStatistics(env)), num_envs)            one for each environment
    OptimisticReset(EpisodeStatistics(env), num_envs, reset_ratio)    one for every reset_ratio environments
    PooledReset(EpisodeStatistics(env), num_envs, pool_size)          none: they are drawn between rollouts

Two wrappers extend the observation: EpisodeNoise(TimeAwareObservation(EpisodeStatistics(env)), scale).

All are pure functions of their arguments, so the whole stack is jitted, vmapped and sharded with the training loop.
That loop calls `refresh` once before each rollout.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces


class Wrapper:
    """Passes on whatever it does not change."""

    def __init__(self, env):
        self.env = env

    def __getattr__(self, name: str) -> Any:
        if name == "env":  # not set yet, as when unpickled
            raise AttributeError(name)
        return getattr(self.env, name)

    @property
    def unwrapped(self):
        """The environment inside all wrappers."""
        return getattr(self.env, "unwrapped", self.env)


class EpisodeStatisticsState(NamedTuple):
    env_state: Any
    episodic_return: jax.Array  # () float32, undiscounted sum of the rewards so far
    episodic_length: jax.Array  # () int32, steps so far


class EpisodeStatistics(Wrapper):
    """Adds "episodic_return" and "episodic_length" so far to info; the step that ends an episode has its totals."""

    @property
    def outcomes(self) -> dict[str, str]:
        """The entry of info for each metric, to be averaged over the episodes that ended."""
        own = {"charts/episodic_return": "episodic_return", "charts/episodic_length": "episodic_length"}
        return own | self.env.outcomes

    def reset(self, key, params):
        obs, env_state = self.env.reset(key, params)
        return obs, EpisodeStatisticsState(env_state, jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))

    def step(self, key, state, action, params):
        obs, env_state, reward, done, info = self.env.step(key, state.env_state, action, params)
        state = EpisodeStatisticsState(env_state, state.episodic_return + reward, state.episodic_length + 1)
        info = info | {"episodic_return": state.episodic_return, "episodic_length": state.episodic_length}
        return obs, state, reward, done, info

    def observe(self, state, params):
        return self.env.observe(state.env_state, params)

    def render(self, state, params, *args):
        return self.env.render(state.env_state, params, *args)


class TimeAwareObservation(Wrapper):
    """Puts the number of steps left until the time limit in front of each observation.

    Observations are vectors. It wraps EpisodeStatistics, which counts the steps; the limit is params.max_episode_steps.
    A critic that knows them can foresee the end of the episode (Pardo et al., "Time Limits in Reinforcement Learning",
    ICML 2018). Gymnasium has a wrapper of this name for environments that are not pure functions.
    """

    def observation_space(self, params):
        inner = self.env.observation_space(params)
        high = np.float32(params.max_episode_steps)
        return spaces.Box(np.append(np.float32(0), inner.low), np.append(high, inner.high))

    def reset(self, key, params):
        obs, state = self.env.reset(key, params)
        return self._with_steps_left(obs, state, params), state

    def step(self, key, state, action, params):
        obs, state, reward, done, info = self.env.step(key, state, action, params)
        return self._with_steps_left(obs, state, params), state, reward, done, info

    def observe(self, state, params):
        return self._with_steps_left(self.env.observe(state, params), state, params)

    def _with_steps_left(self, obs, state, params):
        return jnp.append(jnp.float32(params.max_episode_steps - state.episodic_length), obs)


class EpisodeNoiseState(NamedTuple):
    env_state: Any
    noise: jax.Array  # (size,) float32


class EpisodeNoise(Wrapper):
    """Puts normal random numbers, one per action, drawn once per episode, in front of each observation (a vector).

    scale is their standard deviation.

    A policy that adds them to its logits explores in the same direction for a whole episode (compare Plappert et al.,
    "Parameter Space Noise for Exploration", ICLR 2018). Since they are observed, learning recomputes the same logits.
    """

    def __init__(self, env, scale: float):
        super().__init__(env)
        self.size, self.scale = env.action_space(env.default_params).n, scale

    def observation_space(self, params):
        inner = self.env.observation_space(params)
        noise = np.full(self.size, np.inf, np.float32)
        return spaces.Box(np.append(-noise, inner.low), np.append(noise, inner.high))

    def reset(self, key, params):
        noise_key, reset_key = jax.random.split(key)
        obs, env_state = self.env.reset(reset_key, params)
        noise = self.scale * jax.random.normal(noise_key, (self.size,))
        return jnp.append(noise, obs), EpisodeNoiseState(env_state, noise)

    def step(self, key, state, action, params):
        obs, env_state, reward, done, info = self.env.step(key, state.env_state, action, params)
        return jnp.append(state.noise, obs), state._replace(env_state=env_state), reward, done, info

    def observe(self, state, params):
        return jnp.append(state.noise, self.env.observe(state.env_state, params))

    def render(self, state, params, *args):
        return self.env.render(state.env_state, params, *args)


class AutoReset(Wrapper):
    """Starts a new episode in the step that ends one: the observation returned with done is the first of the next."""

    def step(self, key, state, action, params):
        step_key, reset_key = jax.random.split(key)
        obs, state, reward, done, info = self.env.step(step_key, state, action, params)
        first_obs, first_state = self.env.reset(reset_key, params)
        obs, state = jax.tree.map(lambda new, old: jnp.where(done, new, old), (first_obs, first_state), (obs, state))
        return obs, state, reward, done, info


@jax.jit
def first(batch):
    """x[0] of all arrays of a pytree, in one call to the device and not one for each array."""
    return jax.tree.map(lambda x: x[0], batch)


class VectorEnv(Wrapper):
    """num_envs independent copies; everything but the key and params gets a leading axis B."""

    def __init__(self, env, num_envs: int):
        super().__init__(env)
        self.num_envs = num_envs

    def reset(self, key, params):
        return jax.vmap(self.env.reset, (0, None))(jax.random.split(key, self.num_envs), params)

    def step(self, key, state, action, params):
        keys = jax.random.split(key, self.num_envs)
        return jax.vmap(self.env.step, (0, 0, 0, None))(keys, state, action, params)

    def refresh(self, key, state, params):
        """-> state. Called once before each rollout, for work that is too expensive for each step. Here: nothing."""
        return state

    def render(self, state, params, *args):
        """-> an image of the first environment."""
        return self.env.render(first(state), params, *args)


class OptimisticReset(VectorEnv):
    """Replaces VectorEnv(AutoReset(env), num_envs) if a reset is expensive: fewer resets per step than environments.

    AutoReset makes a first state for every environment in every step and throws nearly all of them away. Here each step
    makes num_envs / reset_ratio, and the environments that finish share them (Matthews et al. 2024). They share within
    groups of at most 4 * reset_ratio neighbours, so that no first state moves to another device if groups are spread
    over devices. If more of a group finish at once than it has first states, some start in the same one, and go on with
    different keys.

    Raises ValueError if reset_ratio does not divide num_envs.
    """

    def __init__(self, env, num_envs: int, reset_ratio: int):
        if reset_ratio < 1 or num_envs % reset_ratio:
            raise ValueError(f"optimistic_reset_ratio {reset_ratio}: must divide num_envs {num_envs}")
        super().__init__(env, num_envs)
        self.num_fresh = num_envs // reset_ratio
        self.fresh_per_group = math.gcd(self.num_fresh, 4)  # in large groups, fewer first states repeat
        self.num_groups = self.num_fresh // self.fresh_per_group

    def step(self, key, state, action, params):
        step_key, reset_key = jax.random.split(key)
        obs, state, reward, done, info = super().step(step_key, state, action, params)
        reset_keys = jax.random.split(reset_key, (self.num_groups, self.fresh_per_group))
        fresh = jax.vmap(jax.vmap(self.env.reset, (0, None)), (0, None))(reset_keys, params)

        def restart_finished(fresh, done, current):
            """In a group of n: fresh (obs, state) (fresh_per_group, ...), done (n,), current (obs, state) (n, ...)."""
            turn = (jnp.cumsum(done) - 1) % self.fresh_per_group  # (n,): the k-th to finish gets the k-th fresh one
            return jax.tree.map(lambda new, old: jax.vmap(jnp.where)(done, new[turn], old), fresh, current)

        grouped = lambda tree: jax.tree.map(lambda x: x.reshape(self.num_groups, -1, *x.shape[1:]), tree)
        restarted = jax.vmap(restart_finished)(fresh, grouped(done), grouped((obs, state)))
        obs, state = jax.tree.map(lambda x: x.reshape(self.num_envs, *x.shape[2:]), restarted)
        return obs, state, reward, done, info


class PooledResetState(NamedTuple):
    env_state: Any  # (B, ...)
    pool: Any  # (B, K, ...), first states of episodes, K for each environment
    used: jax.Array  # (B,) int32, how many were taken since the last refresh; may exceed K


class PooledReset(VectorEnv):
    """num_envs copies; each starts its episodes from a separate pool of pool_size (K) first states.

    It replaces VectorEnv(AutoReset(env), num_envs), which resets every environment in every step. Here `reset` and
    `refresh` draw all first states in one batch, and a step that ends an episode takes the next of its pool. If more
    than K episodes of an environment end between two refreshes, its first states repeat, so K should be the largest
    number that may end. An evaluation of one episode per environment needs no refresh.

    The environment needs `observe(state, params) -> obs`, because pools hold states and no observations. States should
    be small. Raises ValueError if pool_size is less than 1.
    """

    def __init__(self, env, num_envs: int, pool_size: int):
        if pool_size < 1:
            raise ValueError(f"pool_size {pool_size}: must be at least 1")
        super().__init__(env, num_envs)
        self.pool_size = pool_size

    def reset(self, key, params):
        pool = self._draw_pool(key, params)
        state = PooledResetState(jax.tree.map(lambda x: x[:, 0], pool), pool, jnp.ones(self.num_envs, jnp.int32))
        return self._observe(state, params), state

    def refresh(self, key, state, params):
        """-> state with a new pool. Episodes go on where they are."""
        return state._replace(pool=self._draw_pool(key, params), used=jnp.zeros_like(state.used))

    def step(self, key, state, action, params):
        # Under jit the observations that are made here and not used cost nothing.
        _, env_state, reward, done, info = super().step(key, state.env_state, action, params)

        def restart(done, env_state, pool, used):
            return jax.tree.map(lambda old, new: jnp.where(done, new[used % self.pool_size], old), env_state, pool)

        env_state = jax.vmap(restart)(done, env_state, state.pool, state.used)
        state = PooledResetState(env_state, state.pool, state.used + done)
        return self._observe(state, params), state, reward, done, info

    def render(self, state, params, *args):
        """-> an image of the first environment."""
        return super().render(state.env_state, params, *args)

    def _draw_pool(self, key, params):
        keys = jax.random.split(key, (self.num_envs, self.pool_size))
        return jax.vmap(jax.vmap(self.env.reset, (0, None)), (0, None))(keys, params)[1]  # states

    def _observe(self, state, params):
        return jax.vmap(self.env.observe, (0, None))(state.env_state, params)


def record_video(env, policy, memory, seed: int, path: Path) -> None:
    """Saves one episode with sampled actions, at most 1000 steps of it, as a GIF. env holds one environment.

    policy is an ActorCritic with its parameters: obs (1, 1, ...), reset (1, 1), memory -> logits (1, 1, A), value,
    memory. Gymnasium's RecordVideo does the same for environments that are not pure functions.
    """
    policy, reset_env, step = jax.jit(policy), jax.jit(env.reset), jax.jit(env.step)
    key, reset_key = jax.random.split(jax.random.key(-1 - seed))  # training has the keys of seeds from 0 on
    obs, state = reset_env(reset_key, env.default_params)
    reset, frames = jnp.ones(1, bool), []
    while not (frames and reset[0]) and len(frames) < 1000:  # reset is true before the first step, too
        key, action_key, env_key = jax.random.split(key, 3)
        logits, _, memory = policy(obs[None], reset[None], memory)
        action = jax.random.categorical(action_key, logits[0])
        obs, next_state, reward, reset, _ = step(env_key, state, action, env.default_params)
        frame = env.render(state, env.default_params, action[0], jax.nn.softmax(logits[0, 0]), reward[0])
        frames.append(frame.quantize())  # to at most 256 colours, as in a GIF: a quarter of the memory
        state = next_state
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[60] * (len(frames) - 1) + [2000], loop=0)

"""Wrappers for environments with the interface of Craftax: `reset(key, params)`, `step(key, state, action, params)`.

They stack in one of three ways, by what a reset costs:

    VectorEnv(AutoReset(EpisodeStatistics(env)), num_envs)            a first state for each environment in each step
    OptimisticReset(EpisodeStatistics(env), num_envs, reset_ratio)    one for every reset_ratio of them
    PooledReset(EpisodeStatistics(env), num_envs, pool_size)          none in steps: they are drawn between rollouts

All are pure functions of their arguments, so the whole stack is jitted, vmapped and sharded with the training loop.
That loop calls `refresh` once before each rollout.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


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
    """Adds "episodic_return" and "episodic_length" to info: those of the finished episode in the step that ends it."""

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


class AutoReset(Wrapper):
    """Begins a new episode in the step that ends one: the observation returned with done is the first of the next."""

    def step(self, key, state, action, params):
        step_key, reset_key = jax.random.split(key)
        obs, state, reward, done, info = self.env.step(step_key, state, action, params)
        first_obs, first_state = self.env.reset(reset_key, params)
        obs, state = jax.tree.map(lambda new, old: jnp.where(done, new, old), (first_obs, first_state), (obs, state))
        return obs, state, reward, done, info


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
        """-> state. Called once before each rollout: the place for what is too costly for a step. Here nothing is."""
        return state


class OptimisticReset(VectorEnv):
    """In place of VectorEnv(AutoReset(env), num_envs) where a reset is dear: fewer of them than environments.

    AutoReset makes a new episode for every environment in every step, and throws nearly all away. Here each step makes
    num_envs / reset_ratio, and the environments that finish share them out (Matthews et al. 2024): each gets one of its
    own as long as there are enough. If more finish, some begin in the same state, and part as their steps' keys differ.

    Raises ValueError if reset_ratio does not divide num_envs.
    """

    def __init__(self, env, num_envs: int, reset_ratio: int):
        if reset_ratio < 1 or num_envs % reset_ratio:
            raise ValueError(f"num_envs {num_envs}: not divisible by {reset_ratio}, the environments per fresh start")
        super().__init__(env, num_envs)
        self.num_fresh = num_envs // reset_ratio

    def step(self, key, state, action, params):
        step_key, reset_key = jax.random.split(key)
        step_keys = jax.random.split(step_key, self.num_envs)
        obs, state, reward, done, info = jax.vmap(self.env.step, (0, 0, 0, None))(step_keys, state, action, params)
        fresh = jax.vmap(self.env.reset, (0, None))(jax.random.split(reset_key, self.num_fresh), params)

        def begin_anew(done, i, current):
            return jax.tree.map(lambda new, old: jnp.where(done, new[i], old), fresh, current)

        turn = (jnp.cumsum(done) - 1) % self.num_fresh  # (B,), counts those that finish
        obs, state = jax.vmap(begin_anew)(done, turn, (obs, state))
        return obs, state, reward, done, info


class PooledResetState(NamedTuple):
    env_state: Any  # (B, ...)
    pool: Any  # (B, K, ...), first states of episodes, of each environment its own
    used: jax.Array  # (B,) int32, how many of them have been taken; counts on past K


class PooledReset(Wrapper):
    """num_envs copies, each of which begins its episodes from a pool of pool_size (K) first states of its own.

    It takes the place of AutoReset and VectorEnv: AutoReset pays for a reset in every step of every environment. Here
    `reset` and `refresh` draw all first states in one batch, and a step that ends an episode takes the next of its
    environment. Where more than K episodes end between two calls of refresh, the pool is used again from its beginning,
    so K should be the most that do, or first states repeat. An evaluation of one episode each needs no refresh.

    The environment needs `observe(state, params) -> obs`: pools hold states and no observations, and these should be
    small. Raises ValueError for a pool that cannot work.
    """

    def __init__(self, env, num_envs: int, pool_size: int):
        if pool_size < 1:
            raise ValueError(f"pool_size {pool_size}: each new episode needs a first state, so at least 1")
        super().__init__(env)
        self.num_envs, self.pool_size = num_envs, pool_size

    def reset(self, key, params):
        pool = self._draw_pool(key, params)
        state = PooledResetState(jax.tree.map(lambda x: x[:, 0], pool), pool, jnp.ones(self.num_envs, jnp.int32))
        return self._observe(state, params), state

    def refresh(self, key, state, params):
        """-> state with a new pool. Episodes go on where they are."""
        return state._replace(pool=self._draw_pool(key, params), used=jnp.zeros_like(state.used))

    def step(self, key, state, action, params):
        keys = jax.random.split(key, self.num_envs)
        # Under jit the observations that are made here and not used cost nothing.
        _, env_state, reward, done, info = jax.vmap(self.env.step, (0, 0, 0, None))(
            keys, state.env_state, action, params
        )

        def begin_anew(done, env_state, pool, used):
            return jax.tree.map(lambda old, new: jnp.where(done, new[used % self.pool_size], old), env_state, pool)

        env_state = jax.vmap(begin_anew)(done, env_state, state.pool, state.used)
        state = PooledResetState(env_state, state.pool, state.used + done)
        return self._observe(state, params), state, reward, done, info

    def _draw_pool(self, key, params):
        keys = jax.random.split(key, (self.num_envs, self.pool_size))
        return jax.vmap(jax.vmap(self.env.reset, (0, None)), (0, None))(keys, params)[1]

    def _observe(self, state, params):
        return jax.vmap(self.env.observe, (0, None))(state.env_state, params)

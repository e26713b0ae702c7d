"""Wrappers for environments with the interface of Craftax: `reset(key, params)`, `step(key, state, action, params)`.

They stack in this order: `VectorEnv(AutoReset(EpisodeStatistics(env)), num_envs)`. All are pure functions of their
arguments, so the whole stack is jitted, vmapped and sharded with the training loop.
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

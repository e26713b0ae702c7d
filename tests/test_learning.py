"""Each script learns a small task that needs memory, and does not learn it when its memory is taken away."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import build, load

# What finds the junction of a long corridor and walks there is out of place in a short one.
SHORT = {
    "corridor_len": 8, "max_episode_steps": 50, "d_actor": 32, "d_critic": 32, "num_envs": 16, "num_steps": 64,
    "num_minibatches": 4, "ent_coef": 0.03, "total_timesteps": 65_536, "critic_bias": 0.0, "logit_noise": 0.0,
    "cautious_entropy": 2.0, "update_epochs": 4, "learning_rate": 1e-3,
}  # fmt: skip
LAYERS = {"num_layers": 1, "d_model": 32, "d_head": 16, "num_heads": 2}
SETTINGS = {
    "ppo_agalite_tmaze": SHORT | LAYERS | {"d_ffc": 32, "eta": 2, "chrono_t_max": 30.0, "learning_rate": 2e-3},
    "ppo_galite_tmaze": SHORT | LAYERS | {"d_ffc": 32, "eta": 2, "chrono_t_max": 30.0},
    "ppo_gtrxl_tmaze": SHORT | LAYERS | {"memory_len": 16},
    "ppo_lstm_tmaze": SHORT | {"hidden_size": 32, "chrono_t_max": 30.0},
    "ppo_gru_tmaze": SHORT | {"hidden_size": 32, "chrono_t_max": 30.0},
}


class Forgetful:
    """An agent that, where its parameter says so, is told at every step that a new episode begins."""

    def __init__(self, agent):
        self.agent, self.initial_memory = agent, agent.initial_memory

    def init(self, key, obs, reset, memory):
        return {"agent": self.agent.init(key, obs, reset, memory), "forgets": jnp.zeros(())}

    def apply(self, params, obs, reset, memory):
        return self.agent.apply(params["agent"], obs, reset | (params["forgets"] > 0), memory)


@pytest.mark.parametrize("name", SETTINGS)
def test_learns_with_memory_and_only_with_it(name):
    """Success is at least 0.9 in 200 episodes on each of three seeds, and at most 0.6, chance being 0.5, for the same
    script without memory."""
    script, seeds = load(name), [1, 2, 3]
    args = script.Args(**SETTINGS[name])
    env, agent, optimizer = build(script, args)
    agent = Forgetful(agent)
    init, update = (jax.jit(functools.partial(f, args, env, agent, optimizer)) for f in (script.init, script.update))
    many = script.make_env(args, 200)
    evaluate = jax.jit(functools.partial(script.evaluate, args, many, agent, greedy=False))
    success, length = [], []
    for forgets in (0.0, 1.0):
        for seed in seeds:
            runner = init(jax.random.key(seed))
            params = runner.learner.params | {"forgets": jnp.float32(forgets)}
            runner = runner._replace(learner=runner.learner._replace(params=params))
            for _ in range(args.num_updates):
                runner, _ = update(runner)
            assert runner.learner.params["forgets"] == forgets  # no gradient has moved it
            result = evaluate(runner.learner.params, jax.random.key(seed))
            success.append(float(result["success"].mean()))
            length.append(float(result["episodic_length"].mean()))
    success, length = np.array(success), np.array(length)
    assert (success[:3] >= 0.9).all(), success
    # 0.6 leaves room for chance: 200 fair coins exceed it once in 500 times, 600 never.
    assert np.mean(success[3:]) <= 0.6 and (success[3:] <= 0.65).all(), success
    assert (length[3:] < 2 * args.corridor_len).all(), "they walk to the junction, and fail there"

"""PPO around the memory: the ratio before the first step, advantages, loss, keys, minibatches, seeds and devices."""

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import sync
from common import (
    CRAFTAX,
    FEW,
    FIRST,
    MEMORYMAZE,
    MYSTERYPATH,
    QUICK,
    SCRIPTS,
    TMAZE,
    arrays_of,
    assert_close,
    assert_identical,
    bind,
    build,
    data,
    float64,
    load,
    log_prob_of,
    quick_jit,
    random_params,
    seed_keys,
    slow_but,
    small_args,
    stagger,
    tiny_args,
    with_params,
)

TESTS = Path(__file__).parent


@pytest.fixture(scope="module", params=FIRST)
def script(request):
    return load(request.param)


# ------------------------------------------------------------------------------------------------------------ Ratio 1
class Played:
    """The second of two consecutive rollouts with random parameters, and a way to recompute it."""

    def __init__(self, script):
        # 48 steps are three chunks of 16 and longer than a window of 5; episodes of 4 to 7 steps end everywhere.
        self.script, self.args = script, small_args(script, num_steps=48, num_envs=32, total_timesteps=10**4)
        self.env, self.agent = build(script, self.args)
        runner = quick_jit(functools.partial(script.init, self.args, self.env, self.agent))(jax.random.key(1))
        self.initial, self.params = runner, random_params(runner.train_state.params)
        # Compiled as in a real run: this compares rounding in acting and in learning.
        rollout = jax.jit(functools.partial(script.rollout, self.args, self.env))
        runner, *_ = rollout(stagger(with_params(runner, self.params)), jax.random.key(2))
        self.memory = runner.memory
        self.after, self.transitions, self.infos, self.last_value = rollout(runner, jax.random.key(3))
        self.apply = jax.jit(self.agent.apply)

    def deviations(self, obs=None, reset=None, memory=None) -> np.ndarray:
        """-> deviations of log-probabilities and values from those of the rollout, (2, T, B)."""
        obs = self.transitions.obs if obs is None else obs
        reset = self.transitions.reset if reset is None else reset
        memory = self.memory if memory is None else memory
        logits, value, _ = self.apply(self.params, obs, reset, memory)
        log_prob = log_prob_of(logits, self.transitions.action)
        return np.abs([log_prob - self.transitions.log_prob, value - self.transitions.value])

    def errors(self, **changes) -> list[float]:
        """-> the largest deviations of log-probabilities and of values."""
        return self.deviations(**changes).max((1, 2)).tolist()


@functools.cache
def played_by(name: str) -> Played:
    return Played(load(name))


@pytest.fixture(params=slow_but(SCRIPTS, QUICK))
def played(request):
    return played_by(request.param)


def test_ratio_is_one_before_the_first_gradient_step(played):
    """Log-probabilities and values recomputed over a rollout equal those of acting, whatever the parameters."""
    reset = np.asarray(played.transitions.reset)
    assert reset[0].any() and reset[-1].any() and reset[1:-1].any(), "resets at step 0, in the middle and at T-1"
    assert not reset[0].all(), "some start in mid-episode"
    assert max(np.abs(x).max() for x in jax.tree.leaves(float64(played.memory))) > 0.1, "the memory is not empty"
    logits, *_ = played.apply(played.params, played.transitions.obs, reset, played.memory)
    assert np.abs(logits - logits.mean(-1, keepdims=True)).mean() > 0.2, "the policy is far from uniform"
    assert np.std(played.transitions.value) > 0.1
    # Linear attention (AGaLiTe, GaLiTe) divides by norm . q. If that is nearly 0, rounding errors grow, on each CPU at
    # other steps: on Zen 3, one of the 1536 steps of Mystery Path is off by 9e-4, all others by less than 1e-5.
    share = 0.99 if "galite" in played.script.__name__ else 1.0
    assert np.quantile(played.deviations(), share, axis=(1, 2)).max() <= 1e-4


FAULTS = {
    "a reset too late": lambda p: {"reset": np.roll(p.transitions.reset, 1, axis=0)},
    "a reset too early": lambda p: {"reset": np.roll(p.transitions.reset, -1, axis=0)},
    "no resets": lambda p: {"reset": np.zeros_like(p.transitions.reset)},
    "memory after the first step": lambda p: {
        "memory": quick_jit(p.agent.apply)(p.params, p.transitions.obs[:1], p.transitions.reset[:1], p.memory)[2]
    },
    "memory of the rollout's end": lambda p: {"memory": p.after.memory},
    "no memory": lambda p: {"memory": p.agent.initial_memory(p.args.num_envs)},
    "observations a step late": lambda p: {"obs": np.roll(p.transitions.obs, 1, axis=0)},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_ratio_one_notices(played, fault):
    """Each planted fault moves the ratio far from 1, so the test above can fail."""
    assert min(played.errors(**FAULTS[fault](played))) > 1e-2


def test_a_checkpoint_gives_every_bit_back(played, tmp_path):
    """`restore` returns what was saved in the middle of episodes, in place of a run's first state."""
    later = played.after.train_state  # no step was learnt: change what only learning changes
    later = later.replace(step=later.step + 1, opt_state=jax.tree.map(lambda x: x + 1, later.opt_state))
    saved = played.after._replace(train_state=later, key=jax.random.key(9))
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(tmp_path, options=options, item_handlers=ocp.StandardCheckpointHandler()) as checkpoints:
        checkpoints.save(7, args=ocp.args.StandardSave(saved))
        number, restored = played.script.restore(checkpoints, played.initial)
    assert number == 7
    assert_identical(arrays_of(restored), arrays_of(saved))
    changed = jax.tree.map(lambda a, b: bool((data(a) != data(b)).any()), arrays_of(played.initial), arrays_of(saved))
    assert all(jax.tree.leaves(changed._replace(env_state=()))) and any(jax.tree.leaves(changed.env_state))


# ---------------------------------------------------------------------------------------------------------- Advantages
@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_gae_with_ends_in_every_place(script, gae_lambda):
    """Advantages are the discounted sums of their definition, for all 2^5 patterns of ends in five steps."""
    T, gamma = 5, 0.9
    done = np.array(list(itertools.product([False, True], repeat=T))).T  # (T, 32)
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=(2, *done.shape)).astype(np.float32)
    last_value = rng.normal(size=done.shape[1]).astype(np.float32)

    next_value = np.concatenate([value[1:], last_value[None]])
    expected = np.zeros(done.shape)
    for b in range(done.shape[1]):
        for t in range(T):
            weight = 1.0
            for k in range(t, T):  # the errors of this episode from t onwards
                bootstrap = 0.0 if done[k, b] else gamma * next_value[k, b]
                expected[t, b] += weight * (reward[k, b] + bootstrap - value[k, b])
                if done[k, b]:
                    break
                weight *= gamma * gae_lambda
    fields = {name: None for name in script.Transition._fields} | {"reward": reward, "value": value, "done": done}
    advantage = script.compute_gae(script.Transition(**fields), last_value, gamma, gae_lambda)
    np.testing.assert_allclose(advantage, expected, rtol=0, atol=1e-5)


def test_what_is_learnt_from_a_rollout(script, monkeypatch):
    """`update` learns from the rollout's transitions and first memory, advantages of gae_lambda, and value targets of
    critic_lambda. It reports how much of the targets the values explain, and how the episodes ended."""
    args = small_args(script, gae_lambda=0.7, critic_lambda=0.9, anneal_lr=True)
    env, agent = build(script, args)
    seen, original = {}, script.rollout

    def rollout(args, env, runner, key):
        seen["rollout"] = original(args, env, runner, key)
        return seen["rollout"]

    def learn(args, train_state, key, memory, batch):
        seen["memory"], seen["batch"] = memory, batch
        return train_state.replace(step=4), {}

    @quick_jit
    def update(key):
        before = script.init(args, env, agent, key)
        _, *reported = script.update(args, env, before)
        return before.memory, seen["memory"], seen["batch"], seen["rollout"][1:], reported

    monkeypatch.setattr(script, "rollout", rollout)
    monkeypatch.setattr(script, "learn", learn)
    memory, start_memory, batch, (transitions, infos, last_value), (metrics, outcomes) = update(jax.random.key(5))
    assert_identical(start_memory, memory)
    assert_identical(batch[0], transitions)
    assert_close(batch[1], script.compute_gae(transitions, last_value, args.gamma, 0.7), atol=1e-5)
    target = np.asarray(transitions.value + script.compute_gae(transitions, last_value, args.gamma, 0.9))
    assert_close(batch[2], target, atol=1e-5)
    explained = 1 - (target - transitions.value).var() / target.var()
    np.testing.assert_allclose(metrics["losses/explained_variance"], explained, rtol=1e-4)
    assert metrics["charts/learning_rate"] == np.float32(args.learning_rate), "that of this update, not of the next"
    done = np.asarray(transitions.done)
    assert metrics["charts/episodes"] == done.sum() > 3
    assert {"charts/episodic_return", "charts/episodic_length", "charts/success_rate"} == set(outcomes)
    for name, entry in env.outcomes.items():
        np.testing.assert_allclose(outcomes[name], np.asarray(infos[entry])[done].mean(), rtol=1e-5)


def test_no_bootstrap_at_a_time_limit(played):
    """A time limit counts as an end: its advantage is the reward minus the value, and the next step is a reset."""
    truncated = np.asarray(played.infos["truncated"])
    both = played.script.__name__ not in MYSTERYPATH  # its goal is too far for these short episodes
    assert 0 < truncated.sum() <= played.transitions.done.sum() - both, "both kinds of ends"
    advantage = played.script.compute_gae(played.transitions, played.last_value, 0.99, 0.95)
    alone = np.asarray(played.transitions.reward - played.transitions.value)
    done = np.asarray(played.transitions.done)
    assert done[truncated].all()
    np.testing.assert_allclose(np.asarray(advantage)[done], alone[done], rtol=0, atol=1e-6)
    assert np.abs(np.asarray(advantage) - alone)[~done].min() > 0
    np.testing.assert_array_equal(played.transitions.reset[1:], done[:-1])
    np.testing.assert_array_equal(played.after.reset, done[-1])


# ---------------------------------------------------------------------------------------------------------------- Loss
def table(params, obs, reset, memory):
    """A policy whose parameters are its logits and values, (T, B, ...), so that only the loss is tested."""
    return params["logits"], params["value"], memory


def numpy_loss(args, logits, value, batch, advantage, target):
    """The loss of the PPO paper, by loops over single steps, in float64."""
    T, B = batch.action.shape
    if args.norm_adv:
        mean = sum(advantage.flat) / advantage.size
        spread = (sum((x - mean) ** 2 for x in advantage.flat) / advantage.size) ** 0.5
        advantage = (advantage - mean) / (spread + 1e-8)
    sums = dict.fromkeys(("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac"), 0.0)
    for t, b in itertools.product(range(T), range(B)):
        odds = np.exp(logits[t, b])
        probability = odds / odds.sum()
        ratio = probability[batch.action[t, b]] / np.exp(batch.log_prob[t, b])
        clipped = min(max(ratio, 1 - args.clip_coef), 1 + args.clip_coef)
        sums["policy_loss"] -= min(ratio * advantage[t, b], clipped * advantage[t, b])
        error = (value[t, b] - target[t, b]) ** 2
        if args.clip_vloss:
            old = batch.value[t, b]
            near = old + min(max(value[t, b] - old, -args.clip_coef), args.clip_coef)
            error = max(error, (near - target[t, b]) ** 2)
        sums["value_loss"] += error / 2
        sums["entropy"] -= (probability * np.log(probability)).sum()
        sums["approx_kl"] += ratio - 1 - np.log(ratio)
        sums["clipfrac"] += abs(ratio - 1) > args.clip_coef
    means = {f"losses/{name}": x / (T * B) for name, x in sums.items()}
    loss = means["losses/policy_loss"] + args.vf_coef * means["losses/value_loss"]
    return loss - args.ent_coef * means["losses/entropy"], means


@pytest.mark.parametrize("clip_vloss", [False, True])
@pytest.mark.parametrize("norm_adv", [False, True])
def test_ppo_loss(script, clip_vloss, norm_adv):
    """The loss, its metrics and its derivative equal those of a float64 loop, on either side of every clip."""
    args = small_args(script, clip_vloss=clip_vloss, norm_adv=norm_adv, ent_coef=0.3, vf_coef=0.7, clip_coef=0.2)
    rng = np.random.default_rng(0)
    T, B, actions = 6, 4, 3
    params = {"logits": rng.normal(size=(T, B, actions)), "value": rng.normal(size=(T, B))}
    action = rng.integers(actions, size=(T, B))
    odds = np.exp(params["logits"])
    log_softmax = np.log(odds / odds.sum(-1, keepdims=True))
    log_prob = np.take_along_axis(log_softmax, action[..., None], -1)[..., 0] + 0.3 * rng.normal(size=(T, B))
    fields = {name: None for name in script.Transition._fields}
    fields |= {"action": action, "log_prob": log_prob, "value": params["value"] + 0.3 * rng.normal(size=(T, B))}
    batch = script.Transition(**fields)
    advantage, target = 2 + 3 * rng.normal(size=(T, B)), rng.normal(size=(T, B))

    loss = functools.partial(numpy_loss, args, batch=batch, advantage=advantage, target=target)
    expected, expected_metrics = loss(**params)
    assert 0.2 < expected_metrics["losses/clipfrac"] < 0.8
    single = lambda tree: jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, tree)
    value_and_grad = quick_jit(jax.value_and_grad(script.ppo_loss, has_aux=True), static_argnums=(1, 2))
    (ours, metrics), gradient = value_and_grad(
        single(params), args, table, None, *single((batch, advantage, target))
    )  # fmt: skip
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert metrics.keys() == expected_metrics.keys()
    for name in metrics:
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)

    h = 1e-6
    for name in params:
        for index in np.ndindex(params[name].shape):
            step = np.zeros_like(params[name])
            step[index] = h
            up, down = (loss(**params | {name: params[name] + s})[0] for s in (step, -step))
            np.testing.assert_allclose(
                gradient[name][index], (up - down) / (2 * h), atol=2e-6, err_msg=f"{name}{index}"
            )


def test_loss_of_the_rollout_itself(played):
    """Before the first gradient step the loss sees no divergence and clips nothing; with a shifted reset it does."""
    advantage = target = np.random.default_rng(0).normal(size=played.transitions.reward.shape).astype(np.float32)

    def loss(batch):  # not jitted as a whole: `apply` is compiled already
        return played.script.ppo_loss(
            played.params, played.args, played.apply, played.memory, batch, advantage, target
        )  # fmt: skip

    _, metrics = loss(played.transitions)
    assert abs(metrics["losses/approx_kl"]) < 1e-6
    assert metrics["losses/clipfrac"] == 0
    _, metrics = loss(played.transitions._replace(reset=np.roll(played.transitions.reset, 1, axis=0)))
    assert metrics["losses/approx_kl"] > 1e-3
    assert metrics["losses/clipfrac"] > 0.01


# ---------------------------------------------------------------------------------------------------------------- Keys
class UniformAgent:
    """Its logits are always 0, so its actions are the sampling noise and nothing else."""

    def initial_memory(self, B: int):
        return ()

    def init(self, key, obs, reset, memory):
        return {"w": jnp.zeros(1)}

    def apply(self, params, obs, reset, memory):
        return jnp.zeros((*reset.shape, 4)), jnp.zeros(reset.shape), memory


class KeyLog:
    """Keeps the key and the actions of every step in its state, passes the key of every refresh to `note`, and changes
    nothing else of the environment."""

    def __init__(self, env, steps: int, note):
        self.env, self.steps, self.note = env, steps, note
        self.num_envs, self.default_params = env.num_envs, env.default_params
        self.action_space, self.outcomes = env.action_space, env.outcomes

    def reset(self, key, params):
        obs, state = self.env.reset(key, params)
        keys = jnp.zeros((self.steps, *jax.random.key_data(key).shape), jnp.uint32)
        return obs, (state, 0, keys, jnp.zeros((self.steps, self.num_envs), jnp.int32))

    def step(self, key, state, action, params):
        state, time, keys, actions = state
        obs, state, reward, done, info = self.env.step(key, state, action, params)
        log = time + 1, keys.at[time].set(jax.random.key_data(key)), actions.at[time].set(action)
        return obs, (state, *log), reward, done, info

    def refresh(self, key, state, params):
        self.note(key)
        return self.env.refresh(key, state[0], params), *state[1:]


def test_noise_differs_from_update_to_update(script, monkeypatch, tmp_path):
    """Over three updates and the evaluations no key is used twice, and no two steps see the same sampling noise."""
    args, updates = small_args(script, num_envs=32), 3
    env, _ = build(script, args)
    agent, keys, refresh_keys = UniformAgent(), {}, []
    append = lambda words: refresh_keys.append(np.asarray(words))
    note_refresh = lambda key: jax.debug.callback(append, jax.random.key_data(key))
    env = KeyLog(env, updates * args.num_steps, note_refresh)

    def note(name, update, key):
        def write(update, words):
            assert (name, int(update)) not in keys
            keys[name, int(update)] = np.asarray(words)

        jax.debug.callback(write, update, jax.random.key_data(key))

    def rollout(args, env, runner, key):
        note("rollout", runner.train_state.step, key)
        return original(args, env, runner, key)

    def learn(args, train_state, key, memory, batch):
        note("learn", train_state.step, key)
        return train_state.replace(step=train_state.step + 1), {}

    original = script.rollout
    monkeypatch.setattr(script, "rollout", rollout)
    monkeypatch.setattr(script, "learn", learn)
    runner = quick_jit(functools.partial(script.init, args, env, agent))(jax.random.key(5))
    update = quick_jit(functools.partial(script.update, args, env))
    keys["seed", 0] = np.asarray(jax.random.key_data(jax.random.key(5)))
    for number in range(updates + 1):
        keys["runner", number] = np.asarray(jax.random.key_data(runner.key))
        if number < updates:
            runner, *_ = update(runner)

    def evaluate(env, agent, params, key, greedy):
        for i, each in enumerate((key, *jax.random.split(key))):
            note(f"evaluation {i}", greedy, each)
        return {}

    monkeypatch.setattr(script, "evaluate", evaluate)
    script.report(dataclasses.replace(args, seed=5), env, agent, jnp.zeros(1), tmp_path, None)
    jax.effects_barrier()
    _, time, env_keys, actions = runner.env_state
    assert time == updates * args.num_steps and len(keys) == 1 + 3 * updates + 1 + 2 * 3
    assert len(refresh_keys) == updates
    for number, greedy in ((3, False), (4, True)):
        expected = jax.random.key_data(jax.random.fold_in(jax.random.key(5), number))
        np.testing.assert_array_equal(keys["evaluation 0", greedy], expected, "the evaluation depends on the seed")
    of_init = jax.random.key_data(jax.random.split(jax.random.key(5), 3))[:2]  # the third is the runner's
    everything = np.concatenate([np.stack([*keys.values(), *refresh_keys]), of_init, env_keys])
    assert len(np.unique(everything, axis=0)) == len(everything) == len(keys) + 2 + updates * (1 + args.num_steps)

    # 32 actions out of four: two steps are equal by chance with probability 4^-32.
    assert len(np.unique(actions, axis=0)) == len(actions)
    assert np.abs(np.bincount(np.ravel(actions), minlength=4) / actions.size - 0.25).max() < 0.05
    # Nor do actions share their noise with the environment's step, or with any recorded key.
    sample = quick_jit(jax.vmap(lambda key: jax.random.categorical(key, jnp.zeros((args.num_envs, 4)))))
    of_keys = np.asarray(sample(jax.random.wrap_key_data(everything)))
    assert not (of_keys[:, None] == actions).all(-1).any()


def test_init_uses_each_key_once(script):
    """The environments, the parameters and the runner start from different keys, and none from the seed's own."""
    args = small_args(script)
    env, _ = build(script, args)
    env = mock.Mock(wraps=env, default_params=env.default_params)
    agent = mock.Mock(wraps=UniformAgent())
    runner = script.init(args, env, agent, jax.random.key(5))
    keys = env.reset.call_args.args[0], agent.init.call_args.args[0], runner.key, jax.random.key(5)
    assert len({tuple(data(key).tolist()) for key in keys}) == 4


@pytest.mark.parametrize("name", slow_but([x for x in SCRIPTS if f"{x}.py" in sync.PROJECT], QUICK))
def test_initial_heads(name):
    """Kernels of the heads are orthogonal: hidden layers of actor and critic, policy, value. Biases are 0, except for
    the value's on the T-Maze."""
    args, params = played_by(name).args, played_by(name).initial.train_state.params["params"]
    gains = (2, 2, 0.01, 1) if name in CRAFTAX else (2**0.5, 2**0.5, 0.1 if name in TMAZE else 2**0.5, 2**0.5)
    layers = [float64(params[f"Dense_{i}"]) for i in range(4)]
    sizes = [layer["bias"].size for layer in layers]
    assert sizes[:2] == [args.d_actor, args.d_critic] and sizes[3] == 1
    for layer, gain in zip(layers, gains, strict=True):
        np.testing.assert_allclose(np.linalg.svd(layer["kernel"], compute_uv=False), gain, rtol=1e-4)
    assert not any(layer["bias"].any() for layer in layers[:3])
    assert layers[3]["bias"] == getattr(args, "initial_value", 0)


@pytest.mark.parametrize("name", slow_but(SCRIPTS, QUICK))
def test_an_update_is_compiled_once(name):
    """It returns a runner of the types that it takes, also weak ones, so the second update is not compiled again."""
    init, update = bind(load(name), tiny_args(load(name)))
    first = jax.eval_shape(init, jax.random.key(0))
    second, *_ = jax.eval_shape(update, first)
    types = lambda runner: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(runner)]
    assert types(first) == types(second)


@pytest.mark.parametrize("name", slow_but(TMAZE, QUICK))
def test_the_critic_foresees_the_time_limit(name):
    """On the T-Maze, the value is the critic's output times 1 - gamma^n with n steps left, and nothing else sees n."""
    played, transitions = played_by(name), played_by(name).transitions
    obs, reset = np.asarray(transitions.obs), np.asarray(transitions.reset)
    left = obs[..., 4]
    np.testing.assert_array_equal(left[reset], played.args.max_episode_steps)
    np.testing.assert_array_equal((left[:-1] - left[1:])[~reset[1:]], 1)
    assert left.min() == 1
    far = obs.copy()
    far[..., 4] = 1e6
    logits, value, memory = played.apply(played.params, obs, reset, played.memory)
    far_logits, far_value, far_memory = played.apply(played.params, far, reset, played.memory)
    assert_identical((logits, memory), (far_logits, far_memory))
    assert_close(value, far_value * (1 - played.args.gamma**left), atol=1e-5)
    undiscounted = played.agent.clone(args=dataclasses.replace(played.args, gamma=1))  # sees no limit
    _, undiscounted_value, _ = jax.jit(undiscounted.apply)(played.params, obs, reset, played.memory)
    assert_close(undiscounted_value, far_value, atol=1e-5)


@pytest.mark.parametrize("name", slow_but(TMAZE, QUICK))
def test_the_policy_adds_the_noise_it_observes(name):
    """On the T-Maze, the first numbers of an observation are added to the logits while acting and while learning, and
    nothing else sees them; they last for an episode. (test_wrappers.py tests how they are drawn.)"""
    played, transitions = played_by(name), played_by(name).transitions
    obs, reset = np.asarray(transitions.obs), np.asarray(transitions.reset)
    noise, rest = obs[..., :4], obs[..., 4:]
    np.testing.assert_array_equal((noise[1:] != noise[:-1]).any(-1), reset[1:])
    assert abs(noise[reset].std() / played.args.logit_noise - 1) < 0.1
    quiet = np.concatenate([np.zeros_like(noise), rest], axis=-1)
    logits, *others = played.apply(played.params, obs, reset, played.memory)
    quiet_logits, *quiet_others = played.apply(played.params, quiet, reset, played.memory)
    assert_close(logits, quiet_logits + noise, atol=1e-5)
    assert_identical(others, quiet_others)  # value and memory
    assert played.errors(obs=quiet)[0] > 1e-2, "acting adds it"
    later = np.concatenate([np.roll(noise, 1, axis=0), rest], axis=-1)
    assert played.errors(obs=later)[0] > 1e-2, "ratio 1 notices noise of another episode"


def test_minibatch_keys_differ(script, monkeypatch):
    """Every epoch of every update shuffles again: six epochs in two updates have six different orders."""
    args = small_args(script, num_envs=16, num_minibatches=4, update_epochs=3)
    orders = [record_minibatches(script, args, jax.random.key(seed), monkeypatch) for seed in (1, 2)]
    epochs = np.concatenate([np.array([env for env, *_ in order]).reshape(3, -1) for order in orders])
    assert len(np.unique(epochs, axis=0)) == 6


# --------------------------------------------------------------------------------------------- Optimizer, learning rate
@pytest.mark.parametrize("total_timesteps", [1280, 1407])  # 10 updates and 10.99
@pytest.mark.parametrize("name", SCRIPTS)
def test_learning_rate_ends_where_it_should(name, total_timesteps):
    """If annealed, it falls linearly per update, to 0 exactly when training ends, and never below. Otherwise it is
    constant."""
    script = load(name)
    annealed = small_args(script, learning_rate=3e-3, anneal_lr=True, total_timesteps=total_timesteps)
    per_update = annealed.update_epochs * annealed.num_minibatches
    steps = annealed.num_updates * per_update
    assert annealed.num_updates == 10 and per_update == 4
    rates = np.array([float(annealed.learning_rate_at(jnp.int32(step))) for step in range(steps + 1)])
    np.testing.assert_allclose(rates, 3e-3 * (1 - np.arange(steps + 1) // per_update / 10), atol=1e-9)
    assert (rates[:-1] > 0).all() and rates[-1] == 0
    constant = small_args(script, learning_rate=3e-3, anneal_lr=False)
    rates = np.array([float(constant.learning_rate_at(jnp.int32(step))) for step in (0, 1, steps - 1, 10 * steps)])
    np.testing.assert_allclose(rates, 3e-3, rtol=1e-6)


class LineAgent:
    """Two parameters, and nothing that a loss could use: for tests that replace the loss."""

    def initial_memory(self, B: int):
        return {"of": jnp.arange(B, dtype=jnp.float32)}

    def init(self, key, obs, reset, memory):
        return {"w": jnp.array([0.5, 0.5])}

    def apply(self, params, obs, reset, memory):
        raise AssertionError("the loss is replaced")


def line_loss(params, *_):
    """A loss with the gradient (1, -2) everywhere, and its metrics."""
    return params["w"] @ jnp.array([1.0, -2.0]), {"losses/policy_loss": params["w"].sum()}


def train_state_of(script, args):
    """The TrainState that `init` makes for a LineAgent."""
    init = quick_jit(functools.partial(script.init, args, build(script, args)[0], LineAgent()))
    return init(jax.random.key(0)).train_state


def fake_batch(script, args):
    """-> batch, memory. Every value is the number of its environment, (T, B) or (B,); advantages are greater by 100,
    targets by 200."""
    environment = jnp.tile(np.arange(args.num_envs, dtype=np.float32), (args.num_steps, 1))
    transitions = script.Transition(**{name: environment for name in script.Transition._fields})
    return (transitions, environment + 100.0, environment + 200.0), {"of": environment[0]}


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_learning_rate_is_the_step_size(script, monkeypatch, anneal_lr):
    """Each step of Adam moves a parameter by the learning rate of that step, against the gradient. An update makes
    update_epochs * num_minibatches steps."""
    monkeypatch.setattr(script, "ppo_loss", line_loss)
    args = small_args(script, learning_rate=1e-2, anneal_lr=anneal_lr, num_minibatches=4, update_epochs=3)
    batch, memory = fake_batch(script, args)
    learn = quick_jit(lambda state: script.learn(args, state, jax.random.key(0), memory, batch))
    state = train_state_of(script, args)
    for update in range(args.num_updates):
        before = state
        state, metrics = learn(state)
        steps = range(12 * update, 12 * update + 12)
        assert state.step == steps[-1] + 1
        way = sum(float(args.learning_rate_at(step)) for step in steps)
        np.testing.assert_allclose(state.params["w"] - before.params["w"], [-way, way], rtol=1e-3)
        np.testing.assert_allclose(metrics["losses/grad_norm"], np.sqrt(5), rtol=1e-5)  # before it is clipped
    assert args.learning_rate_at(state.step) == (0 if anneal_lr else np.float32(1e-2))


def test_gradients_are_clipped(script):
    """Adam gets gradients of norm max_grad_norm at most; small ones are unchanged."""
    optimizer = train_state_of(script, small_args(script, max_grad_norm=0.5)).tx
    for gradient, expected in (([3.0, 4.0], [0.3, 0.4]), ([0.03, 0.04], [0.03, 0.04])):
        state = optimizer.update(jnp.array(gradient), optimizer.init(jnp.zeros(2)))[1]
        moments = [x for x in jax.tree.leaves(state) if x.shape == (2,)]
        np.testing.assert_allclose(moments[0], 0.1 * np.array(expected), rtol=1e-5)  # (1 - b1) g
        np.testing.assert_allclose(moments[1], 0.001 * np.array(expected) ** 2, rtol=1e-4)  # (1 - b2) g^2


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_the_optimizer_is_an_ordinary_optax_chain(script, monkeypatch, name):
    """If optax.adamw, or another optimizer, replaces Adam, then a step is what that optimizer does."""
    chosen = {
        "adamw": lambda rate, eps: optax.adamw(rate, eps=eps, weight_decay=10.0),
        "sgd": lambda rate, eps: optax.sgd(rate),
        "lion": lambda rate, eps: optax.lion(rate),
    }[name]
    monkeypatch.setattr(script.optax, "adam", chosen)
    monkeypatch.setattr(script, "ppo_loss", line_loss)
    args = small_args(script, learning_rate=1e-2, anneal_lr=False, num_minibatches=1, update_epochs=1)
    before, (batch, memory) = train_state_of(script, args), fake_batch(script, args)
    after, _ = quick_jit(lambda key: script.learn(args, before, key, memory, batch))(jax.random.key(0))
    clipped = 0.5 * np.array([1.0, -2.0]) / np.sqrt(5)  # to max_grad_norm
    step = {"adamw": np.sign(clipped) + 10 * 0.5, "sgd": clipped, "lion": np.sign(clipped)}[name]
    np.testing.assert_allclose(after.params["w"], 0.5 - 1e-2 * step, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------------- Flags
def unread_fields(source: str) -> set[str]:
    """Fields of Args that nothing reads as args.x, self.args.x, or within Args as self.x; checking a field
    (__post_init__) is not reading."""
    tree = ast.parse(source)
    cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = {node.target.id for node in cls.body if isinstance(node, ast.AnnAssign)}
    cls.body = [node for node in cls.body if getattr(node, "name", "") != "__post_init__"]

    def read(tree: ast.AST, *owners: str) -> set[str]:
        loads = [x for x in ast.walk(tree) if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Load)]
        return {x.attr for x in loads if ast.unparse(x.value) in owners}

    return fields - read(tree, "args", "self.args") - read(cls, "self")


@pytest.mark.parametrize("name", SCRIPTS + MEMORYMAZE)
def test_every_flag_is_read(name):
    """Each field of Args is read somewhere in the script."""
    assert unread_fields(inspect.getsource(load(name))) == set()


def test_unread_flags_are_noticed():
    """The test above can fail."""
    source = """
class Args:
    used: int = 1
    derived: int = 2
    only_checked: int = 3
    only_written: int = 4
    of_another: int = 5

    @property
    def twice(self):
        return 2 * self.derived

    def __post_init__(self):
        assert self.only_checked > 0

def f(args, other):
    args.only_written = 1
    return args.used + other.of_another
"""
    assert unread_fields(source) == {"only_checked", "only_written", "of_another"}


# --------------------------------------------------------------------------------------------------------- Minibatches
def record_minibatches(script, args, key, monkeypatch) -> list[tuple]:
    """Runs learn with a loss that only records its inputs -> environments of rollouts, advantages, targets, memory of
    each minibatch, in order."""
    seen = []

    def ppo_loss(params, args, apply_fn, memory, batch, advantage, target):
        for x in (*batch, advantage, target):
            assert x.shape == (args.num_steps, args.num_envs // args.num_minibatches)
        note = lambda *environments: seen.append(tuple(np.asarray(x).tolist() for x in environments))
        spread = sum(x.std(0).sum() for x in (*batch, advantage, target))  # 0: all steps of one environment
        jax.debug.callback(note, batch.obs[0], advantage[0], target[0], memory["of"], spread, ordered=True)
        return 0 * params["w"].sum(), {}

    monkeypatch.setattr(script, "ppo_loss", ppo_loss)
    state, (batch, memory) = train_state_of(script, args), fake_batch(script, args)
    learn = quick_jit(lambda key: script.learn(args, state, key, memory, batch))
    jax.block_until_ready(learn(key))
    jax.effects_barrier()
    return seen


def test_each_epoch_visits_each_environment_once(script, monkeypatch):
    """A minibatch is whole rollouts with their advantages, targets and memories, one from each block of M neighbours.
    An epoch uses every environment exactly once; epochs differ in their order."""
    args = small_args(script, num_envs=16, num_minibatches=4, update_epochs=3)
    G, M = 4, 4  # four blocks of four neighbours
    seen = record_minibatches(script, args, jax.random.key(0), monkeypatch)
    assert len(seen) == args.update_epochs * M
    for environments, advantage, target, memory, spread in seen:
        assert [env // M for env in environments] == list(range(G)), "one from each block"
        assert advantage == [env + 100.0 for env in environments]
        assert target == [env + 200.0 for env in environments]
        assert memory == environments
        assert spread == 0
    epochs = [[env for batch, *_ in seen[i : i + M] for env in batch] for i in range(0, len(seen), M)]
    assert all(sorted(epoch) == list(range(args.num_envs)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    blocks = np.array(epochs[0]).reshape(M, G).T % M  # the order within each block
    assert len(np.unique(blocks, axis=0)) > 1, "each block is shuffled separately"


# ---------------------------------------------------------------------------------------------------- Seeds and devices
# Otherwise Adam and the normalisation scale up the rounding errors of tiny gradients and advantages.
EXACT = {"adam_eps": 1e-3, "norm_adv": False}


@pytest.fixture(scope="module")
def single_runs(script):
    """-> init and update of one seed, jitted."""
    init, update = bind(script, tiny_args(script, **EXACT))
    return quick_jit(init), quick_jit(update)


@pytest.mark.slow
def test_update_is_pure(single_runs):
    """The same state gives the same bits twice, and the state itself does not change."""
    init, update = single_runs
    runner, *_ = update(init(jax.random.key(1)))
    before = jax.tree.map(lambda x: np.array(data(x)), runner)
    first, second = update(runner), update(runner)
    assert_identical(first, second)
    assert_identical(jax.tree.map(data, runner), before)
    assert first[0].train_state.step == 2 * 4, "two updates of two epochs of two minibatches"
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), first[0].train_state.params, runner.train_state.params)
    assert all(jax.tree.leaves(moved)), "every parameter learns"


class LaterEpisodes:
    """In environment i the first episode ends after i % 5 + 1 steps, later ones after one. Outcomes: the episode's
    number and its last action."""

    num_envs, default_params, outcomes = 64, None, {"charts/number": "number", "charts/action": "action"}

    def reset(self, key, params):
        return jnp.zeros((64, 1)), (jnp.zeros(64, int), jnp.zeros(64, int))

    def step(self, key, state, action, params):
        number, time = state
        done = (time == jnp.arange(64) % 5) | (number > 0)
        state = number + done, jnp.where(done, 0, time + 1)
        return jnp.zeros((64, 1)), state, jnp.zeros(64), done, {"number": 1.0 * number, "action": 1.0 * action}


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("greedy", [False, True])
def test_an_evaluation_counts_first_episodes(name, greedy):
    """It counts the first episode of each environment and no later one, with sampled or most probable actions."""
    agent = mock.Mock(initial_memory=lambda B: jnp.zeros((B, 1)))
    agent.apply = lambda logits, obs, reset, memory: (jnp.broadcast_to(logits, (1, 64, 2)), None, memory)
    logits = jnp.array([0.0, 0.1])
    result = load(name).evaluate(LaterEpisodes(), agent, logits, jax.random.key(0), greedy)
    assert not result["number"].any()
    assert result["action"].all() if greedy else 0.3 < result["action"].mean() < 0.7


@pytest.mark.slow
def test_seeds_together_equal_seeds_alone(script, single_runs):
    """After two updates, seeds 3, 4 and 5 in one vmap equal each seed alone."""
    args = tiny_args(script, seed=3, num_seeds=3, **EXACT)
    init, update = (quick_jit(jax.vmap(f)) for f in bind(script, args))
    together, *metrics = update(update(init(seed_keys(args)))[0])
    for i in range(3):
        init, update = single_runs
        alone, *alone_metrics = update(update(init(jax.random.key(3 + i)))[0])
        of_seed = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        assert_close(arrays_of(of_seed(together)), arrays_of(alone), atol=1e-4)
        for ours, expected in zip(metrics, alone_metrics, strict=True):  # losses and charts, then outcomes
            for name in expected:
                np.testing.assert_allclose(ours[name][i], expected[name], rtol=1e-3, atol=1e-4, err_msg=name)
    weights = np.concatenate([x.reshape(3, -1) for x in jax.tree.leaves(together.train_state.params)], axis=1)
    assert np.abs(weights[0] - weights[1]).max() > 0.1 and np.abs(weights[1] - weights[2]).max() > 0.1


@pytest.mark.parametrize("name", slow_but(SCRIPTS, QUICK))
def test_an_update_is_lowered_for_a_gpu(name, monkeypatch):
    """Without a GPU: an update lowers for CUDA, by the path that a GPU takes, and calls no CPU library."""
    script = load(name)
    init, update = bind(script, tiny_args(script))
    runner = jax.eval_shape(init, jax.random.key(0))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    program = jax.export.export(jax.jit(update), platforms=["cuda"])(runner).mlir_module()
    assert len(program) > 1e5 and "custom_call" not in program


@pytest.mark.parametrize("name", slow_but(SCRIPTS, ["ppo_galite_tmaze"]))
def test_initial_kernels_are_drawn_one_by_one(name):
    """There is no batch of QR decompositions: jaxlib 0.10 spreads it over the compute threads. If all of these wait for
    such batches, a run hangs before its first update."""
    script = load(name)
    init, _ = bind(script, tiny_args(script))
    program = jax.export.export(jax.jit(init), platforms=["cpu"])(jax.random.key(0)).mlir_module()
    batch_dims = re.findall(r'@lapack_s(?:geqrf|orgqr)_ffi.*num_batch_dims = "(\d)"', program)
    assert set(batch_dims) == ({"0"} if hasattr(script, "orthogonal") else set())  # a user's script may have others


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_four_devices_equal_one(name):
    """After two updates, four devices equal one, with one seed (environments spread) and, in the first script, with
    four (seeds spread). Per update, they exchange at most the size of a gradient. No device makes the worlds of Craftax
    that another one needs."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    result = subprocess.run(
        [sys.executable, TESTS / "devices.py", name], cwd=TESTS.parent, capture_output=True, text=True, timeout=3600,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    for run in json.loads(result.stdout.splitlines()[-1]):
        assert run["shards"] == run["expected shards"], run
        assert run["error"] <= 1e-4, run
        assert run["worlds"] == (run["shards"][1] if name in CRAFTAX else 0), run
        gradient, batch = run["bytes of parameters"], run["bytes of a minibatch"]
        assert gradient < batch / 2, "otherwise a batch could pass for a gradient"
        if run["num_seeds"] == 1:
            assert run["collectives"]["all-reduce"] >= 0.5 * gradient, "the gradient itself, otherwise it is not seen"
        for kind, size in run["collectives"].items():
            assert size <= (1.1 * gradient + 1024 if kind == "all-reduce" else 2048), run

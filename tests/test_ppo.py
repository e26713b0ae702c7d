"""PPO around the memory: the ratio before the first step, advantages, loss, keys, minibatches, seeds and devices."""

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import (
    FIRST,
    MYSTERYPATH,
    SCRIPTS,
    assert_close,
    assert_identical,
    bind,
    build,
    data,
    float64,
    load,
    quick_jit,
    random_params,
    small_args,
    stagger,
    tiny_args,
)

TESTS = Path(__file__).parent


@pytest.fixture(scope="module", params=FIRST)
def script(request):
    return load(request.param)


# ------------------------------------------------------------------------------------------------------------ Ratio 1
class Played:
    """The second of two rollouts in a row, acted with random parameters, and a way to recompute it."""

    def __init__(self, script):
        # 48 steps are three chunks of 16 and longer than a window of 5; episodes of 4 to 7 steps end everywhere.
        self.script, self.args = (
            script,
            small_args(script, num_steps=48, num_envs=32, total_timesteps=10**4, logit_noise=0.7),
        )
        self.env, self.agent, optimizer = build(script, self.args)
        runner = quick_jit(functools.partial(script.init, self.args, self.env, self.agent, optimizer))(
            jax.random.key(1)
        )
        self.params = random_params(runner.learner.params)
        runner = stagger(runner._replace(learner=runner.learner._replace(params=self.params)))
        # Compiled as in a real run: rounding in acting and in learning is what this compares.
        rollout = jax.jit(functools.partial(script.rollout, self.args, self.env, self.agent))
        runner, *_ = rollout(runner, jax.random.key(2))
        self.memory, self.noise = runner.memory, runner.noise
        self.after, self.transitions, self.infos, self.last_value = rollout(runner, jax.random.key(3))
        self.apply = jax.jit(self.agent.apply)

    def errors(self, reset=None, memory=None, noise=None) -> tuple[float, float]:
        """-> largest deviation of a log-probability and of a value from those acted with."""
        reset = self.transitions.reset if reset is None else reset
        memory = self.memory if memory is None else memory
        logits, value, _ = self.apply(self.params, self.transitions.obs, reset, memory)
        logits = logits + (self.transitions.noise if noise is None else noise)
        log_prob = self.script.log_prob_of(logits, self.transitions.action)
        return (
            float(np.abs(log_prob - self.transitions.log_prob).max()),
            float(np.abs(value - self.transitions.value).max()),
        )


@pytest.fixture(scope="module", params=SCRIPTS)
def played(request):
    return Played(load(request.param))


def test_ratio_is_one_before_the_first_gradient_step(played):
    """Log-probabilities and values recomputed over a rollout are those acted with, whatever the parameters."""
    reset = np.asarray(played.transitions.reset)
    assert reset[0].any() and reset[-1].any() and reset[1:-1].any(), "resets at step 0, in the middle and at T-1"
    assert not reset[0].all(), "some begin in mid-episode"
    assert max(np.abs(x).max() for x in jax.tree.leaves(float64(played.memory))) > 0.1, "with a memory"
    logits, *_ = played.apply(played.params, played.transitions.obs, reset, played.memory)
    assert np.abs(logits - logits.mean(-1, keepdims=True)).mean() > 0.3, "with a policy far from uniform"
    assert np.std(played.transitions.value) > 0.1
    assert max(played.errors()) <= 1e-4


FAULTS = {
    "a reset too late": lambda p: {"reset": np.roll(p.transitions.reset, 1, axis=0)},
    "a reset too early": lambda p: {"reset": np.roll(p.transitions.reset, -1, axis=0)},
    "no resets": lambda p: {"reset": np.zeros_like(p.transitions.reset)},
    "memory after the first step": lambda p: {
        "memory": p.apply(p.params, p.transitions.obs[:1], p.transitions.reset[:1], p.memory)[2]
    },
    "memory of the rollout's end": lambda p: {"memory": p.after.memory},
    "no memory": lambda p: {"memory": p.agent.initial_memory(p.args.num_envs)},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_ratio_one_notices(played, fault):
    """Each planted fault breaks ratio 1 by far, so the test above can fail."""
    assert min(played.errors(**FAULTS[fault](played))) > 1e-2


# ---------------------------------------------------------------------------------------------------------- Advantages
@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_gae_with_ends_in_every_place(script, gae_lambda):
    """Advantages are the discounted sums of their definition, for all 2^5 ways in which five steps can hold ends."""
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
            for k in range(t, T):  # the errors of this episode from t on
                bootstrap = 0.0 if done[k, b] else gamma * next_value[k, b]
                expected[t, b] += weight * (reward[k, b] + bootstrap - value[k, b])
                if done[k, b]:
                    break
                weight *= gamma * gae_lambda
    fields = {name: None for name in script.Transition._fields} | {"reward": reward, "value": value, "done": done}
    advantage = script.compute_gae(script.Transition(**fields), last_value, gamma, gae_lambda)
    np.testing.assert_allclose(advantage, expected, rtol=0, atol=1e-5)


def test_what_is_learnt_from_a_rollout(script, monkeypatch):
    """`update` learns from the rollout's own transitions and start memory, advantages of gae_lambda, and for the value
    returns of critic_lambda; it reports how much of these the values explain."""
    args = small_args(script, gae_lambda=0.7, critic_lambda=0.9)
    env, agent, optimizer = build(script, args)
    noted, seen = {}, {}
    original = script.rollout

    def rollout(args, env, agent, runner, key):
        noted["rollout"] = original(args, env, agent, runner, key)
        return noted["rollout"]

    def learn(args, agent, optimizer, learner, key, memory, batch):
        seen["memory"], seen["batch"] = memory, batch
        return learner.params, learner.opt_state, {}

    monkeypatch.setattr(script, "rollout", rollout)
    monkeypatch.setattr(script, "learn", learn)
    before = script.init(args, env, agent, optimizer, jax.random.key(5))
    _, metrics = script.update(args, env, agent, optimizer, before)
    _, transitions, _, last_value = noted["rollout"]
    assert_identical(seen["memory"], before.memory)
    assert_identical(seen["batch"][0], transitions)
    assert_close(seen["batch"][1], script.compute_gae(transitions, last_value, args.gamma, 0.7), atol=1e-6)
    target = np.asarray(transitions.value + script.compute_gae(transitions, last_value, args.gamma, 0.9))
    assert_close(seen["batch"][2], target, atol=1e-6)
    explained = 1 - (target - transitions.value).var() / target.var()
    np.testing.assert_allclose(metrics["losses/explained_variance"], explained, rtol=1e-4)


def test_no_bootstrap_at_a_time_limit(played):
    """A time limit counts as an end: its advantage is the reward minus the value, and the next step is a reset."""
    truncated = np.asarray(played.infos["truncated"])
    both = played.script.__name__ not in MYSTERYPATH  # its goal is further than the few steps of these episodes
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
class TableAgent:
    """Logits and values are parameters themselves, (T, B, ...): all that is left to test is the loss."""

    def apply(self, params, obs, reset, memory):
        return params["logits"], params["value"], memory


def numpy_loss(args, logits, value, batch, advantage, target):
    """The loss as in the paper of PPO, by loops over single steps, in float64."""
    T, B = batch.action.shape
    if args.norm_adv:
        mean = sum(advantage.flat) / advantage.size
        spread = (sum((x - mean) ** 2 for x in advantage.flat) / advantage.size) ** 0.5
        advantage = (advantage - mean) / (spread + 1e-8)
    sums = dict.fromkeys(("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac"), 0.0)
    for t, b in itertools.product(range(T), range(B)):
        odds = np.exp(logits[t, b] + batch.noise[t, b])
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
    """The loss, what it reports and its derivative are those of a float64 loop, on either side of every clip."""
    args = small_args(script, clip_vloss=clip_vloss, norm_adv=norm_adv, ent_coef=0.3, vf_coef=0.7, clip_coef=0.2)
    rng = np.random.default_rng(0)
    T, B, actions = 6, 4, 3
    params = {"logits": rng.normal(size=(T, B, actions)), "value": rng.normal(size=(T, B))}
    action = rng.integers(actions, size=(T, B))
    noise = rng.normal(size=(T, B, actions))
    odds = np.exp(params["logits"] + noise)
    log_softmax = np.log(odds / odds.sum(-1, keepdims=True))
    log_prob = np.take_along_axis(log_softmax, action[..., None], -1)[..., 0] + 0.3 * rng.normal(size=(T, B))
    fields = {name: None for name in script.Transition._fields}
    fields |= {"action": action, "log_prob": log_prob, "value": params["value"] + 0.3 * rng.normal(size=(T, B))}
    fields["noise"] = noise
    batch = script.Transition(**fields)
    advantage, target = 2 + 3 * rng.normal(size=(T, B)), rng.normal(size=(T, B))

    loss = functools.partial(numpy_loss, args, batch=batch, advantage=advantage, target=target)
    expected, expected_metrics = loss(**params)
    assert 0.2 < expected_metrics["losses/clipfrac"] < 0.8
    single = lambda tree: jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, tree)
    value_and_grad = quick_jit(jax.value_and_grad(script.ppo_loss, has_aux=True), static_argnums=(1, 2))
    (ours, metrics), gradient = value_and_grad(
        single(params), args, TableAgent(), None, *single((batch, advantage, target))
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
    loss = quick_jit(lambda batch: played.script.ppo_loss(
        played.params, played.args, played.agent, played.memory, batch, advantage, target))  # fmt: skip
    _, metrics = loss(played.transitions)
    assert abs(metrics["losses/approx_kl"]) < 1e-6
    assert metrics["losses/clipfrac"] == 0
    _, metrics = loss(played.transitions._replace(reset=np.roll(played.transitions.reset, 1, axis=0)))
    assert metrics["losses/approx_kl"] > 1e-3
    assert metrics["losses/clipfrac"] > 0.01


# ---------------------------------------------------------------------------------------------------------------- Keys
class UniformAgent:
    """Logits 0 whatever comes: its actions are the sampling noise and nothing else."""

    def initial_memory(self, B: int):
        return ()

    def init(self, key, obs, reset, memory):
        return {"w": jnp.zeros(1)}

    def apply(self, params, obs, reset, memory):
        return jnp.zeros((*reset.shape, 4)), jnp.zeros(reset.shape), memory


class KeyLog:
    """An environment that keeps the key and the actions of every step in its state, hands the key of every refresh to
    `note`, and otherwise passes on."""

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


def test_noise_differs_from_update_to_update(script, monkeypatch):
    """Over three updates no key is used twice, and no two steps see the same sampling noise."""
    args, updates = small_args(script, num_envs=32, logit_noise=0.0), 3
    env, _, optimizer = build(script, args)
    agent, keys, refresh_keys = UniformAgent(), {}, []
    append = lambda words: refresh_keys.append(np.asarray(words))
    note_refresh = lambda key: jax.debug.callback(append, jax.random.key_data(key))
    env = KeyLog(env, updates * args.num_steps, note_refresh)

    def note(name, update, key):
        def write(update, words):
            assert (name, int(update)) not in keys
            keys[name, int(update)] = np.asarray(words)

        jax.debug.callback(write, update, jax.random.key_data(key))

    def rollout(args, env, agent, runner, key):
        note("rollout", runner.learner.update, key)
        return original(args, env, agent, runner, key)

    def learn(args, agent, optimizer, learner, key, memory, batch):
        note("learn", learner.update, key)
        return learner.params, learner.opt_state, {}

    original = script.rollout
    monkeypatch.setattr(script, "rollout", rollout)
    monkeypatch.setattr(script, "learn", learn)
    runner = quick_jit(functools.partial(script.init, args, env, agent, optimizer))(jax.random.key(5))
    update = quick_jit(functools.partial(script.update, args, env, agent, optimizer))
    keys["seed", 0] = np.asarray(jax.random.key_data(jax.random.key(5)))
    for number in range(updates + 1):
        keys["learner", number] = np.asarray(jax.random.key_data(runner.learner.key))
        if number < updates:
            runner, _ = update(runner)
    jax.effects_barrier()
    _, time, env_keys, actions = runner.env_state
    assert time == updates * args.num_steps and len(keys) == 1 + 3 * updates + 1
    assert len(refresh_keys) == updates
    everything = np.concatenate([np.stack([*keys.values(), *refresh_keys]), env_keys])
    assert len(np.unique(everything, axis=0)) == len(everything) == len(keys) + updates * (1 + args.num_steps)

    # 32 actions out of four: chance makes two equal steps with probability 4^-32.
    assert len(np.unique(actions, axis=0)) == len(actions)
    assert np.abs(np.bincount(np.ravel(actions), minlength=4) / actions.size - 0.25).max() < 0.05
    # Nor do actions share their noise with the environment's step, or with any key noted.
    sample = quick_jit(jax.vmap(lambda key: jax.random.categorical(key, jnp.zeros((args.num_envs, 4)))))
    of_keys = np.asarray(sample(jax.random.wrap_key_data(everything)))
    assert not (of_keys[:, None] == actions).all(-1).any()


def test_logit_noise_lasts_an_episode(played):
    """Noise on the logits is drawn where an episode begins, anew in each environment, and kept to its end, across
    rollouts too; both acting and learning add it, and an evaluation does not."""
    args, transitions = played.args, played.transitions
    noise, reset = np.asarray(transitions.noise), np.asarray(transitions.reset)
    assert noise.shape == (args.num_steps, args.num_envs, 4)
    changed = (noise[1:] != noise[:-1]).any(-1)
    np.testing.assert_array_equal(changed, reset[1:])
    np.testing.assert_array_equal((noise[0] != played.noise).any(-1), reset[0])
    np.testing.assert_array_equal(noise[-1], played.after.noise)
    drawn = noise[reset]
    assert len(np.unique(drawn, axis=0)) == len(drawn) > 200
    assert abs(drawn.mean()) < 0.1 and abs(drawn.std() / args.logit_noise - 1) < 0.1
    assert played.errors(noise=0.0)[0] > 1e-2, "acting adds it"

    quiet = quick_jit(functools.partial(played.script.evaluate, args, played.env, played.agent, greedy=False))
    loud = dataclasses.replace(args, logit_noise=100.0)
    loud = quick_jit(functools.partial(played.script.evaluate, loud, played.env, played.agent, greedy=False))
    assert_identical(quiet(played.params, jax.random.key(0)), loud(played.params, jax.random.key(0)))


def test_minibatch_keys_differ(script, monkeypatch):
    """Every epoch of every update shuffles anew: the orders of six epochs in two updates are six different ones."""
    args = small_args(script, num_envs=16, num_minibatches=4, update_epochs=3)
    orders = [record_minibatches(script, args, jax.random.key(seed), monkeypatch) for seed in (1, 2)]
    epochs = np.concatenate([np.array([env for env, *_ in order]).reshape(3, -1) for order in orders])
    assert len(np.unique(epochs, axis=0)) == 6


# ------------------------------------------------------------------------------------------------------- Learning rate
def test_learning_rate_ends_where_it_should(script):
    """Annealed: the flag in the first update, 1 / num_updates of it in the last, never negative. Otherwise constant."""
    annealed = small_args(script, learning_rate=3e-3, anneal_lr=True)
    N = annealed.num_updates
    assert N == 10
    rates = np.array([script.learning_rate(annealed, jnp.int32(update)) for update in range(N)])
    np.testing.assert_allclose(rates, 3e-3 * np.arange(N, 0, -1) / N, rtol=1e-6)
    assert (rates > 0).all() and script.learning_rate(annealed, jnp.int32(N)) == 0
    constant = small_args(script, learning_rate=3e-3, anneal_lr=False)
    rates = np.array([script.learning_rate(constant, jnp.int32(update)) for update in (0, 1, N - 1, 10 * N)])
    np.testing.assert_allclose(rates, 3e-3, rtol=1e-6)


def fake_batch(script, args):
    """-> batch and memory in which everything is the number of its environment, (T, B) or (B,), advantages are greater
    by 100 and targets by 200."""
    environment = jnp.tile(np.arange(args.num_envs, dtype=np.float32), (args.num_steps, 1))
    transitions = script.Transition(**{name: environment for name in script.Transition._fields})
    return (transitions, environment + 100.0, environment + 200.0), {"of": environment[0]}


def test_learning_rate_is_the_step_size(script, monkeypatch):
    """The first step of Adam moves a parameter by learning_rate(update), in the direction against the gradient."""
    kl = {"losses/approx_kl": jnp.float32(0)}
    monkeypatch.setattr(script, "ppo_loss", lambda params, *_: (params["w"] @ jnp.array([1.0, -2.0]), kl))
    args = small_args(script, learning_rate=1e-2, anneal_lr=True, num_minibatches=1, update_epochs=1)
    optimizer, params = script.make_optimizer(args), {"w": jnp.array([0.5, 0.5])}
    batch, memory = fake_batch(script, args)
    learn = quick_jit(
        lambda update: script.learn(
            args, None, optimizer, script.Learner(params, optimizer.init(params), None, update), jax.random.key(0),
            memory, batch,
        )
    )  # fmt: skip
    for update in (0, 3, args.num_updates - 1):
        learned, _, metrics = learn(jnp.int32(update))
        rate = 1e-2 * (1 - update / args.num_updates)
        np.testing.assert_allclose(learned["w"] - params["w"], [-rate, rate], rtol=1e-4)
        np.testing.assert_allclose(metrics["charts/learning_rate"], rate, rtol=1e-6)
        np.testing.assert_allclose(metrics["losses/grad_norm"], np.sqrt(5), rtol=1e-5)  # before it is clipped


def test_gradients_are_clipped(script):
    """Adam gets gradients of norm max_grad_norm at most, small ones as they are."""
    optimizer = script.make_optimizer(small_args(script, max_grad_norm=0.5))
    for gradient, expected in (([3.0, 4.0], [0.3, 0.4]), ([0.03, 0.04], [0.03, 0.04])):
        state = optimizer.update(jnp.array(gradient), optimizer.init(jnp.zeros(2)))[1]
        moments = [x for x in jax.tree.leaves(state) if x.shape == (2,)]
        np.testing.assert_allclose(moments[0], 0.1 * np.array(expected), rtol=1e-5)  # (1 - b1) g
        np.testing.assert_allclose(moments[1], 0.001 * np.array(expected) ** 2, rtol=1e-4)  # (1 - b2) g^2


# --------------------------------------------------------------------------------------------------------------- Flags
def unread_fields(source: str) -> set[str]:
    """Fields of Args that nothing reads as args.x or self.x; to check a field (__post_init__) is not to read it."""
    tree = ast.parse(source)
    cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = {node.target.id for node in cls.body if isinstance(node, ast.AnnAssign)}
    cls.body = [node for node in cls.body if getattr(node, "name", "") != "__post_init__"]
    owners = ("args", "self", "self.args")
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and ast.unparse(node.value) in owners
    }
    return fields - read


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read(name):
    """No field of Args is only accepted: each is read somewhere in the script."""
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
    """Runs learn with a loss that only notes what it is given -> environments of rollouts, advantages, targets, memory
    of each minibatch, in order."""
    seen = []

    def ppo_loss(params, args, agent, memory, batch, advantage, target):
        for x in (*batch, advantage, target):
            assert x.shape == (args.num_steps, args.num_envs // args.num_minibatches)
        note = lambda *environments: seen.append(tuple(np.asarray(x).tolist() for x in environments))
        spread = sum(x.std(0).sum() for x in (*batch, advantage, target))  # 0: all steps of one environment
        jax.debug.callback(note, batch.obs[0], advantage[0], target[0], memory["of"], spread, ordered=True)
        return 0 * params["w"].sum(), {"losses/approx_kl": jnp.float32(0)}

    monkeypatch.setattr(script, "ppo_loss", ppo_loss)
    optimizer, params = script.make_optimizer(args), {"w": jnp.zeros(2)}
    batch, memory = fake_batch(script, args)
    learner = script.Learner(params, optimizer.init(params), None, jnp.int32(0))
    learn = quick_jit(lambda key: script.learn(args, None, optimizer, learner, key, memory, batch))
    jax.block_until_ready(learn(key))
    jax.effects_barrier()
    return seen


def test_each_epoch_visits_each_environment_once(script, monkeypatch):
    """A minibatch is whole rollouts with their own advantages, targets and memories, one from each block of M
    neighbours; an epoch takes every environment exactly once; epochs differ in their order."""
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
    assert len(np.unique(blocks, axis=0)) > 1, "each block is shuffled on its own"


def test_when_to_stop_learning_from_a_rollout(script, monkeypatch):
    """An epoch whose mean divergence exceeds target_kl is the last; without target_kl all are run, and only one, at
    half the learning rate, while the policy has more entropy than cautious_entropy."""

    def ppo_loss(params, args, agent, memory, batch, advantage, target):
        drift = jnp.abs(params["w"]).sum()  # grows by 0.1 a minibatch
        return -params["w"].sum() + 0 * target.sum(), {"losses/approx_kl": drift}

    monkeypatch.setattr(script, "ppo_loss", ppo_loss)
    params = {"w": jnp.zeros(1)}

    def learned(log_prob=-0.7, learning_rate=0.1, **changes):
        args = small_args(script, num_minibatches=2, learning_rate=learning_rate, cautious_entropy=0.8, **changes)
        optimizer = script.make_optimizer(args)
        learner = script.Learner(params, optimizer.init(params), None, jnp.int32(0))
        (transitions, *rest), memory = fake_batch(script, args)
        batch = (transitions._replace(log_prob=jnp.full_like(transitions.log_prob, log_prob)), *rest)
        learn = quick_jit(lambda key: script.learn(args, None, optimizer, learner, key, memory, batch))
        return learn(jax.random.key(0))

    after = {epochs: learned(update_epochs=epochs) for epochs in (1, 2, 5)}
    for epochs in after:  # a gradient of 1 throughout: Adam moves by the learning rate
        np.testing.assert_allclose(after[epochs][0]["w"], 0.2 * epochs, rtol=1e-3)
    # Divergences of the epochs: 0.05, 0.25, 0.45, ...
    for target_kl, epochs in ((1e-9, 1), (0.2, 2), (100.0, 5), (None, 5)):
        assert_close(learned(update_epochs=5, target_kl=target_kl), after[epochs], atol=1e-6)  # metrics included
    wandering = learned(update_epochs=5, log_prob=-0.9, learning_rate=0.2)  # one epoch, at half the rate
    assert_close(wandering, after[1], atol=1e-6)


# ---------------------------------------------------------------------------------------------------- Seeds and devices
@pytest.fixture(scope="module")
def single_runs(script):
    """-> init and update of one seed, jitted."""
    init, update = bind(script, tiny_args(script))
    return quick_jit(init), quick_jit(update)


def test_update_is_pure(single_runs):
    """The same state twice gives the same bits twice, and the state given stays as it was."""
    init, update = single_runs
    runner, _ = update(init(jax.random.key(1)))
    before = jax.tree.map(lambda x: np.array(data(x)), runner)
    first, second = update(runner), update(runner)
    assert_identical(first, second)
    assert_identical(jax.tree.map(data, runner), before)
    assert first[0].learner.update == 2
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), first[0].learner.params, runner.learner.params)
    assert all(jax.tree.leaves(moved)), "every parameter learns"


def test_seeds_together_equal_seeds_alone(script, single_runs):
    """After two updates the runs of seeds 3, 4 and 5 in one vmap are those of each seed alone."""
    args = tiny_args(script, seed=3, num_seeds=3)
    init, update = (quick_jit(jax.vmap(f)) for f in bind(script, args))
    together, metrics = update(update(init(script.seed_keys(args)))[0])
    for i in range(3):
        init, update = single_runs
        alone, alone_metrics = update(update(init(jax.random.key(3 + i)))[0])
        of_seed = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        assert_close(of_seed(together), alone, atol=1e-4)
        finite = [name for name in alone_metrics if np.isfinite(alone_metrics[name])]
        assert {"charts/episodic_return", "losses/policy_loss"} <= set(finite)
        for name in finite:
            np.testing.assert_allclose(metrics[name][i], alone_metrics[name], rtol=1e-3, atol=1e-4, err_msg=name)
    weights = np.concatenate([x.reshape(3, -1) for x in jax.tree.leaves(together.learner.params)], axis=1)
    assert np.abs(weights[0] - weights[1]).max() > 0.1 and np.abs(weights[1] - weights[2]).max() > 0.1


@pytest.mark.parametrize("name", SCRIPTS[:-1])  # the last would show nothing that its siblings do not
def test_four_devices_equal_one(name):
    """After two updates four devices give what one gives, with one seed (environments spread) and with four (seeds
    spread); what they exchange in an update is at most the size of a gradient."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    result = subprocess.run(
        [sys.executable, TESTS / "devices.py", name], cwd=TESTS.parent, capture_output=True, text=True, timeout=600,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    for run in json.loads(result.stdout.splitlines()[-1]):
        assert run["shards"] == run["expected shards"], run
        assert run["error"] <= 1e-4, run
        gradient, batch = run["bytes of parameters"], run["bytes of a minibatch"]
        assert gradient < batch / 2, "or a batch could pass for a gradient"
        if run["num_seeds"] == 1:
            assert run["collectives"]["all-reduce"] >= 0.5 * gradient, "the gradient itself, or it is not seen at all"
        for kind, size in run["collectives"].items():
            assert size <= (1.1 * gradient + 1024 if kind == "all-reduce" else 2048), run

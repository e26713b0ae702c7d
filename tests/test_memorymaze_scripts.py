"""The scripts whose environments are processes: their host loop, in tests and from the command line.

Code that is the same text in the other scripts (tests/test_sync.py) is tested with them.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
from pathlib import Path
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cli import (
    BATCH,
    ENVIRONMENT,
    alive,
    checkpoint,
    finish,
    folder_of,
    lasting,
    refusal,
    rows,
    run,
    snapshot,
    start,
    steps,
    wait_for_row,
    wait_until,
)
from common import (
    MEMORYMAZE,
    assert_close,
    assert_identical,
    deviation,
    float64,
    load,
    log_prob_of,
    quick_jit,
    random_params,
    slow_but,
    small_args,
)
from cue_maze import STEPS, in_turn, make_env
from gymnasium import spaces
from PIL import Image
from test_ppo import LineAgent
from test_runs import COLUMNS

FIRST = ["ppo_agalite_memorymaze"]  # for code that is the same text in all of them
SIZES = {"num_envs": 8, "num_steps": 18, "num_minibatches": 2, "total_timesteps": 10**4, "num_channels": 16}


@pytest.fixture(scope="module", params=slow_but(MEMORYMAZE, ["ppo_lstm_memorymaze"]))
def played(request):
    return Played(load(request.param))


@pytest.fixture(scope="module", params=FIRST)
def played_once(request):
    return Played(load(request.param))


class Played:
    """The second of two consecutive rollouts with random parameters in 8 cue tasks, and what led to it.

    Each pair of environments starts with an episode of another length.
    """

    def __init__(self, script):
        self.script, self.args = script, small_args(script, **SIZES)
        self.envs = in_turn([make_env(self.args, index) for index in range(8)])
        self.agent = script.ActorCritic(self.args, self.envs.single_action_space.n)
        init = functools.partial(script.init_learner, self.args, self.envs, self.agent)
        self.train_state = quick_jit(init)(jax.random.key(1))
        self.params = random_params(self.train_state.params)
        # Sums over residual blocks grow with each; twice as large, they would close the gates that follow.
        self.params["params"]["encoder"] = jax.tree.map(lambda x: x / 2, self.params["params"]["encoder"])
        self.train_state = self.train_state.replace(params=self.params)
        self.act = quick_jit(functools.partial(script.act, self.agent))
        self.initial_memory = self.agent.initial_memory(8)
        self.start = script.begin_episodes(self.args, self.envs, self.initial_memory, 0, 7)
        roll = functools.partial(script.host_rollout, self.args, self.envs, self.policy())
        self.middle, self.first, _, self.first_ended = roll(self.start, jax.random.key(2))
        self.memory = self.middle[-1]
        self.end, self.transitions, self.last_value, self.ended = roll(self.middle, jax.random.key(3))
        self.apply = quick_jit(self.agent.apply)

    def policy(self, greedy: bool = False):
        return functools.partial(self.act, self.params, greedy)

    def errors(self, reset=None, memory=None) -> tuple[float, float]:
        """-> largest deviation of log-probabilities and of values from those of the rollout."""
        taken = self.transitions
        reset, memory = taken.reset if reset is None else reset, self.memory if memory is None else memory
        logits, value, _ = self.apply(self.params, taken.obs, reset, memory)
        log_prob = log_prob_of(logits, taken.action)
        return float(np.abs(log_prob - taken.log_prob).max()), float(np.abs(value - taken.value).max())


def test_ratio_is_one_before_the_first_gradient_step(played):
    """Log-probabilities and values recomputed over a rollout equal those of acting, whatever the parameters."""
    reset = played.transitions.reset
    assert reset[0].any() and not reset[0].all() and reset[-1].any() and reset[1:-1].any()
    assert max(np.abs(x).max() for x in jax.tree.leaves(float64(played.memory))) > 0.1, "the memory is not empty"
    assert np.std(played.transitions.value) > 0.02 and np.std(played.transitions.log_prob) > 0.02
    assert max(played.errors()) <= 1e-4


FAULTS = {
    "a reset too late": lambda p: {"reset": np.roll(p.transitions.reset, 1, axis=0)},
    "no resets": lambda p: {"reset": np.zeros_like(p.transitions.reset)},
    "no memory": lambda p: {"memory": p.initial_memory},
    "memory of the rollout's end": lambda p: {"memory": p.end[-1]},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_ratio_one_notices(played, fault):
    """Each planted fault moves the ratio far from 1, so the test above can fail."""
    assert min(played.errors(**FAULTS[fault](played))) > 1e-2


def test_rollout_records_what_happened(played_once):
    """Observations, ends, rewards and last values are where they belong."""
    p = played_once
    both = jax.tree.map(lambda *x: np.concatenate(x), p.first, p.transitions)  # (2T, 8, ...), one after another
    colour = both.obs[:, :, 0, 0] > 0  # (2T, 8, 3)
    white, cue = colour.all(-1), np.where(colour[..., 0], 0, 1)
    is_cue = colour.any(-1) & ~white
    expected_reset = np.concatenate([np.ones((1, 8), bool), both.done[:-1]])
    assert (both.reset == expected_reset).all() and (both.reset == is_cue).all()
    first_end = [int(np.argmax(both.done[:, i])) for i in range(8)]
    assert first_end == [3, 3, 2, 2, 1, 1, 0, 0], "first episodes are shortened, to different lengths"
    for i in range(8):
        assert np.flatnonzero(both.done[:, i]).tolist() == list(range(first_end[i], len(both.done), STEPS))
        begin = 0
        for end in np.flatnonzero(both.done[:, i]):
            rewards = both.reward[begin : end + 1, i]
            right = white[end, i] and both.action[end, i] % 2 == cue[begin, i]
            assert rewards[:-1].sum() == 0 and rewards[-1] == float(right)
            begin = end + 1
    assert both.reward.any() and both.reward.dtype == np.float32 and both.obs.dtype == np.uint8

    counted = [(i, end) for i in range(8) for end in np.flatnonzero(both.done[:, i])[0 if i < 2 else 1 :]]
    ended = p.first_ended + p.ended
    assert len(ended) == len(counted), "shortened episodes do not count"
    assert sum(x[0] for x in ended) == sum(both.reward[end, i] for i, end in counted)
    assert {x[1] for x in ended} == {STEPS}
    obs, reset, memory = p.end
    np.testing.assert_allclose(p.last_value, p.apply(p.params, obs[None], reset[None], memory)[1][0], atol=1e-5)


def test_what_is_learnt_from_a_rollout(played_once, monkeypatch):
    """Learning gets the transitions, the memory at their start, advantages and value targets."""
    script, seen = played_once.script, {}
    args = dataclasses.replace(played_once.args, gae_lambda=0.7, anneal_lr=True)

    def learn(args, train_state, key, memory, batch):
        seen.update(key=key, memory=memory, batch=batch)
        return train_state.replace(step=train_state.step + args.num_minibatches * args.update_epochs), {}

    monkeypatch.setattr(script, "learn", learn)
    taken, memory, last_value = played_once.transitions, played_once.memory, played_once.last_value
    _, metrics = script.learn_from(args, played_once.train_state, "the key", memory, taken, last_value)
    transitions, advantage, target = seen["batch"]
    assert_identical(transitions, taken)
    assert_identical(seen["memory"], memory)
    assert seen["key"] == "the key"
    np.testing.assert_array_equal(advantage, script.compute_gae(taken, last_value, args.gamma, 0.7))
    np.testing.assert_array_equal(target, taken.value + advantage)
    explained = 1 - np.var(target - taken.value) / np.var(target)
    np.testing.assert_allclose(metrics["losses/explained_variance"], explained, rtol=1e-4)
    assert metrics["charts/learning_rate"] == np.float32(args.learning_rate), "that of this update, not of the next"


def test_an_update_learns_from_its_rollout(played_once):
    """The memory is that at the start of the rollout."""
    p, seen = played_once, []

    def learn(train_state, key, memory, transitions, last_value):
        seen.append((memory, transitions))
        return train_state.replace(step=train_state.step + 1), {}

    current, train_state = p.middle, p.train_state
    for number in range(2):
        start = current
        current, train_state, metrics, outcomes = p.script.host_update(p.args, p.envs, p.act, learn, start, train_state)
        memory, transitions = seen[number]
        assert_identical(memory, start[-1])
        assert_identical(transitions.obs[0], start[0])
        assert metrics["charts/episodes"] == transitions.done.sum()
        np.testing.assert_allclose(
            outcomes["charts/episodic_return"], transitions.reward.sum() / transitions.done.sum()
        )
        assert outcomes["charts/episodic_length"] == STEPS


def test_an_update_in_which_no_episode_ends(played_once, monkeypatch):
    """It reports that none ended, the numbers of the learning, and nothing that would stop the run as not finite."""
    p = played_once
    monkeypatch.setattr(p.script, "host_rollout", lambda *_: (p.end, p.transitions, p.last_value, []))
    learn = lambda train_state, *_: (train_state, {"losses/entropy": 1.5})
    *_, metrics, outcomes = p.script.host_update(p.args, p.envs, p.act, learn, p.middle, p.train_state)
    assert metrics == {"losses/entropy": 1.5, "charts/episodes": 0}
    assert set(outcomes) == {"charts/episodic_return", "charts/episodic_length"}
    assert np.isfinite([*outcomes.values()]).all()


def test_the_optimizer_clips_and_anneals(played_once):
    """Adam gets gradients of norm max_grad_norm at most, and moves a parameter by the learning rate of its step."""
    p = played_once
    args = dataclasses.replace(p.args, anneal_lr=True, max_grad_norm=0.5)
    optimizer = p.script.init_learner(args, p.envs, LineAgent(), jax.random.key(0)).tx
    state = optimizer.init(jnp.zeros(2))
    for step in range(3 * args.num_minibatches * args.update_epochs):
        move, state = optimizer.update(jnp.array([3.0, 4.0]), state)
        np.testing.assert_allclose(move, -args.learning_rate_at(step), rtol=1e-3)
        first_moment = next(x for x in jax.tree.leaves(state) if x.shape == (2,))
        np.testing.assert_allclose(first_moment, (1 - 0.9 ** (step + 1)) * np.array([0.3, 0.4]), rtol=1e-5)


def test_no_key_is_used_twice(played_once):
    """Neither in two updates, nor in an evaluation, nor by another seed."""
    p, keys, T = played_once, [], played_once.args.num_steps

    def act(params, greedy, key, *current):
        keys.append(key)
        return p.act(params, greedy, key, *current)

    def learn(train_state, key, *_):
        keys.append(key)
        return train_state.replace(step=train_state.step + 1), {}

    for seed in (1, 2):
        args = dataclasses.replace(p.args, seed=seed, eval_episodes=2 * T)
        current, train_state = p.middle, p.train_state
        for _ in range(2):
            current, train_state, *_ = p.script.host_update(args, p.envs, act, learn, current, train_state)
        p.script.host_evaluate(args, p.envs, p.initial_memory, functools.partial(act, p.params, False))
    words = [tuple(jax.random.key_data(key).tolist()) for key in keys]
    # A rollout takes T + 1 keys (the action of the last one is not used), the learning one. 8 environments play 36
    # episodes in at least two rollouts.
    assert len(words) >= 2 * (2 * (T + 2) + 2 * (T + 1)) and len(set(words)) == len(words)


def test_acting_and_learning_are_lowered_for_a_gpu(played_once, monkeypatch):
    """Like the test of an update in test_ppo.py."""
    p = played_once
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    learn = functools.partial(p.script.learn_from, p.args)
    for function, inputs in (
        (functools.partial(p.script.act, p.agent), (p.params, False, jax.random.key(0), *p.middle)),
        (learn, (p.train_state, jax.random.key(0), p.memory, p.transitions, p.last_value)),
    ):
        program = jax.export.export(jax.jit(function), platforms=["cuda"])(*inputs).mlir_module()
        assert len(program) > 1e4 and "custom_call" not in program


def test_evaluation_plays_new_episodes(played_once):
    """It plays as many whole episodes as requested, and with the same seed the same ones again."""
    p, results = played_once, []
    for seed in (1, 1, 2):
        args = dataclasses.replace(p.args, eval_episodes=19, seed=seed)
        results.append(p.script.host_evaluate(args, p.envs, p.initial_memory, p.policy()))
    for result in results:
        assert result.shape == (19, 2) and (result[:, 1] == STEPS).all()
    assert (results[0] == results[1]).all() and (results[0] != results[2]).any()


@pytest.mark.parametrize("returns, shown", [([3.0], "1 episodes: episodic_return 3"), ([3.0, 5.0], "± 13")])
@pytest.mark.parametrize("script", MEMORYMAZE)
def test_one_episode_has_no_interval(script, returns, shown, tmp_path, capsys, monkeypatch):
    """A report of one episode shows only its return, of two also Student's 95% interval: 3 and 5 give 4 ± 12.7."""
    module, played = load(script), np.stack([returns, np.full(len(returns), 20.0)], 1)
    monkeypatch.setattr(module, "host_evaluate", lambda *_: played)
    module.host_report(None, None, None, lambda *_: None, None, tmp_path, None)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.endswith(shown) for line in lines)


def test_greedy_is_the_most_probable_action(played_once):
    """`act` with greedy takes it. The log-probability is that of the action either way."""
    p = played_once
    logits, value, _ = p.apply(p.params, p.middle[0][None], p.middle[1][None], p.memory)
    for greedy in (False, True):
        action, log_prob, values, _ = p.act(p.params, greedy, jax.random.key(5), *p.middle)
        assert (action == logits[0].argmax(-1)).all() == greedy
        np.testing.assert_allclose(log_prob, log_prob_of(logits[0], action), atol=1e-5)
        np.testing.assert_allclose(values, value[0], atol=1e-5)


@pytest.mark.parametrize("name", MEMORYMAZE)
def test_first_episodes_are_shortened(name):
    """Those of training, each to another length, from whole to short; those of an evaluation are whole."""
    script = load(name)
    args = small_args(script, num_envs=4, num_minibatches=2)
    lengths = lambda args: [script.make_env(args, index).keywords["first_episode_steps"] for index in range(4)]
    assert lengths(args) == [1000, 750, 500, 250]
    assert lengths(dataclasses.replace(args, evaluate="a folder")) == [1000] * 4


def test_each_purpose_has_its_own_mazes(played_once):
    """Runs, updates and evaluations have different seeds of environments, and no two are equal."""
    seeds, p = [], played_once

    class Envs:
        def reset(self, seed):
            seeds.extend(seed)
            return None, {}

    for run_seed in (1, 2):
        for purpose in ((0, 0), (0, 20), (1,)):
            p.script.begin_episodes(dataclasses.replace(p.args, seed=run_seed), Envs(), None, *purpose)
    assert len(seeds) == len(set(seeds)) == 6 * 8
    # A few thousand environments rarely share one of 2^32 seeds, and often one of 10,000.
    many = dataclasses.replace(p.args, num_envs=4096, total_timesteps=10**6)
    p.script.begin_episodes(many, Envs(), None, 0, 0)
    assert len(set(seeds[-4096:])) == 4096


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """-> a function that runs main of a script without processes, until training begins -> what main passed on: the
    makers of the environments, the key of the parameters, and the seed and purpose of the first mazes."""

    def begin(name: str, start: int, **changes) -> dict:
        module, seen = load(name), {}

        def init_learner(args, envs, agent, key):
            return module.TrainState.create(apply_fn=None, params=jax.random.key_data(key), tx=optax.identity())

        def train(args, update, train_state, *_):
            seen["key"] = train_state.params
            raise SystemExit

        def workers(makers):
            seen["makers"] = makers
            return mock.Mock(single_action_space=spaces.Discrete(6))

        def begin_episodes(args, envs, initial_memory, *purpose):
            seen["mazes"] = args.seed, *purpose

        for function in (init_learner, train, begin_episodes):
            monkeypatch.setattr(module, function.__name__, function)
        monkeypatch.setattr(module, "Workers", workers)
        monkeypatch.setattr(module, "RecordEpisodeStatistics", lambda envs: envs)
        monkeypatch.setattr(module, "restore", lambda checkpoints, state: (start, state))
        resume = str(tmp_path) if start else ""
        args = small_args(module, num_envs=4, num_minibatches=2, runs_dir=str(tmp_path), resume=resume, **changes)
        with pytest.raises(SystemExit):
            module.main(args)
        return seen

    return begin


@pytest.mark.parametrize("name", MEMORYMAZE)
@pytest.mark.parametrize("start", [0, 20])
def test_main_passes_on_what_decides_a_run(name, start, begin):
    """The seed decides the parameters. A resumed run has other mazes than a new one. Each environment's first episode
    is shortened differently."""
    seen = begin(name, start, seed=5)
    assert_identical(seen["key"], jax.random.key_data(jax.random.key(5)))
    assert seen["mazes"] == (5, 0, start)
    assert [maker.keywords["first_episode_steps"] for maker in seen["makers"]] == [1000, 750, 500, 250]


@pytest.mark.parametrize("name", MEMORYMAZE)
def test_an_unforeseen_error_is_not_swallowed(name, begin, monkeypatch):
    """Like the test of the other scripts in test_cli.py."""
    monkeypatch.setattr(load(name), "ActorCritic", mock.Mock(side_effect=RuntimeError("unforeseen")))
    with pytest.raises(RuntimeError, match="unforeseen"):
        begin(name, 0)


@pytest.mark.parametrize(
    "name, count", list(zip(("agalite", "gtrxl", "lstm"), (2_461_319, 2_302_919, 2_988_455), strict=True))
)
def test_parameters_at_full_size(name, count):
    """The published sizes after the encoder of IMPALA, which has 622,144 parameters for 64 x 64 pixels."""
    script = load(f"ppo_{name}_memorymaze")
    agent = script.ActorCritic(script.Args(), 6)
    obs = jnp.zeros((1, 1, 64, 64, 3), jnp.uint8)
    shapes = jax.eval_shape(agent.init, jax.random.key(0), obs, jnp.ones((1, 1), bool), agent.initial_memory(1))
    sizes = jax.tree.map(lambda x: x.size, shapes["params"])
    assert sum(jax.tree.leaves(sizes["encoder"])) == 622_144
    assert sum(jax.tree.leaves(sizes)) == count


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMORYMAZE)
def test_initial_parameters(name):
    """The encoder's kernels have variance 1 / inputs, which keeps features small enough for an LSTM's gates. Both heads
    end with gain 0.01: actions are equally likely, values near 0. Biases are 0."""
    script, rng = load(name), np.random.default_rng(0)
    args = small_args(script, num_channels=16, d_actor=256, d_critic=256)  # the memory is small
    agent = script.ActorCritic(args, 6)
    obs, reset = rng.integers(0, 256, (1, 4, 64, 64, 3), np.uint8), np.ones((1, 4), bool)
    variables = quick_jit(agent.init)(jax.random.key(0), obs, reset, agent.initial_memory(4))
    params = float64(variables["params"])
    for path, x in jax.tree.leaves_with_path(params["encoder"]):
        if path[-1].key == "bias":
            assert not x.any()
        else:  # 432 numbers and more
            np.testing.assert_allclose(np.sqrt(len(x) * np.square(x).mean()), 1, atol=0.15)
    features = quick_jit(script.ImpalaEncoder().apply)({"params": variables["params"]["encoder"]}, obs)
    assert 0.05 < np.sqrt(np.square(features).mean()) < 1.5
    for last, outputs in (("Dense_2", 6), ("Dense_3", 1)):
        assert params[last]["kernel"].shape == (256, outputs)
        np.testing.assert_allclose(np.linalg.svd(params[last]["kernel"], compute_uv=False), 0.01, rtol=1e-4)
        assert not params[last]["bias"].any()
    logits, value, _ = quick_jit(agent.apply)(variables, obs, reset, agent.initial_memory(4))
    assert np.abs(jax.nn.softmax(logits) - 1 / 6).max() < 0.01 and np.abs(value).max() < 0.02


@pytest.mark.parametrize("name", FIRST)
def test_encoder_is_made_of_convolutions(name):
    """Its convolution and its pooling equal Flax's with padding SAME, in values and gradients."""
    script, rng = load(name), np.random.default_rng(0)
    kernel, bias, x = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((45, 7), 7, (2, 3, 8, 12, 5)))

    def ours(kernel, x):
        return script.max_pool(script.Conv3x3(7).apply({"params": {"kernel": kernel, "bias": bias}}, x))

    def theirs(kernel, x):
        y = nn.Conv(7, (3, 3)).apply({"params": {"kernel": kernel.reshape(3, 3, 5, 7), "bias": bias}}, x)
        return nn.max_pool(y.reshape(6, 8, 12, 7), (3, 3), (2, 2), "SAME").reshape(2, 3, 4, 6, 7)

    results = [
        jax.value_and_grad(lambda kernel, x, f=f: jnp.sin(f(kernel, x)).sum(), argnums=(0, 1))(kernel, x)
        for f in (ours, theirs)
    ]
    assert_close(*results, atol=1e-4)


@pytest.mark.parametrize("name", FIRST)
def test_encoder_is_impalas(name):
    """The whole encoder equals IMPALA's, written with Flax's convolutions."""
    script, rng = load(name), np.random.default_rng(0)
    obs = rng.integers(0, 256, (2, 1, 64, 64, 3), np.uint8)
    encoder = script.ImpalaEncoder(4)
    params = float64(random_params(jax.eval_shape(encoder.init, jax.random.key(0), obs)["params"]))
    convolutions = iter(params[f"Conv3x3_{i}"] for i in range(15))

    def convolve(x):
        layer = jax.tree.map(np.float32, next(convolutions))
        kernel = layer["kernel"].reshape(3, 3, x.shape[-1], -1)
        return nn.Conv(len(layer["bias"]), (3, 3)).apply({"params": layer | {"kernel": kernel}}, x)

    x = obs[:, 0] / np.float32(255)
    for _ in range(3):
        x = nn.max_pool(convolve(x), (3, 3), (2, 2), "SAME")
        for _ in range(2):
            y = convolve(nn.relu(x))
            x = x + convolve(nn.relu(y))
    last = params["Dense_0"]
    expected = nn.relu(nn.relu(x).reshape(2, -1) @ last["kernel"] + last["bias"])
    ours = quick_jit(encoder.apply)({"params": jax.tree.map(np.float32, params)}, obs)[:, 0]
    assert np.abs(expected).max() > 0.1 and deviation(ours, expected) < 1e-4


@pytest.mark.parametrize("name", MEMORYMAZE)
def test_learning_rate(name):
    """It is constant, or falls linearly per update, to 1 / num_updates of it in the last."""
    steps = 5 * 8 * 18 + 70  # half an update too many
    args = small_args(load(name), **SIZES | {"total_timesteps": steps}, update_epochs=3)
    assert args.learning_rate_at(17) == args.learning_rate and args.num_updates == 5
    args = dataclasses.replace(args, anneal_lr=True)
    rates = [float(args.learning_rate_at(jnp.int32(step))) for step in range(5 * 6)]
    np.testing.assert_allclose(rates, np.repeat(args.learning_rate * np.array([1, 0.8, 0.6, 0.4, 0.2]), 6), rtol=1e-6)


# --------------------------------------------------------------------------------------------------- The command line
def children(pid: int) -> list[int]:
    """The processes that a process has started and that still exist."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has just ended
            found += map(int, path.read_text().split())
    return found


def workers_of(process) -> list[int]:
    """The children that run the environments."""
    command = lambda pid: Path(f"/proc/{pid}/cmdline").read_bytes()
    return [pid for pid in children(process.pid) if b"spawn_main" in command(pid)]


def assert_gone(pids: list[int]):
    """They end soon, no orphans are left."""
    wait_until(lambda: not any(map(alive, pids)))


def begun(script, cwd, *flags, row=3, **options):
    """A run that is in progress, and its workers."""
    process = start(script, "--total-timesteps", 5000 * BATCH, *flags, cwd=cwd, **options)
    wait_for_row(process, cwd, row)
    pids = workers_of(process)
    assert len(pids) == 4
    return process, pids


@pytest.mark.slow
@pytest.mark.parametrize("script", MEMORYMAZE)
def test_run_leaves_what_it_promises(script, tmp_path):
    """A run leaves metrics, checkpoints, curve, video and evaluation; the terminal shows progress and results."""
    out, err = run(script, "--total-timesteps", "400", "--capture-video", "--track", cwd=tmp_path)
    folder = folder_of(tmp_path)
    table = rows(folder)
    expected = [(update, update * BATCH) for update in range(1, 400 // BATCH + 1)]
    assert [(int(row["update"]), int(row["global_step"])) for row in table] == expected
    assert {*COLUMNS} <= {*table[0]}
    assert all(float(row["charts/episodes"]) > 0 and 0 <= float(row["charts/episodic_return"]) <= 1 for row in table)
    assert all(np.isfinite(float(row[name])) for row in table for name in row if name.startswith("losses/"))
    assert steps(folder)[-1] == 400 // BATCH
    with Image.open(folder / "learning_curve.png") as image:
        assert min(image.size) > 100
    with Image.open(folder / "episode.gif") as video:
        assert video.n_frames == STEPS
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert {kind: x["episodic_length"] for kind, x in evaluation.items()} == {"sampled": [STEPS], "greedy": [STEPS]}
    assert list((folder / "wandb").rglob("*.wandb"))
    saved = checkpoint(folder)
    assert set(saved) == {"params", "opt_state", "step"}
    lines = out.splitlines()
    assert lines[0] == f"Run folder: {folder}" and lines[-1] == f"Results: {folder}"
    assert f"{sum(x.size for x in jax.tree.leaves(saved['params'])):,} parameters" in out
    assert "step/s" in err and "episodic_return=" in err
    assert "Evaluation, sampled actions, 10 episodes: episodic_return " in out
    assert "Traceback" not in err and "Warning" not in err
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}, "nothing outside runs/"


@pytest.mark.slow
@pytest.mark.parametrize("script", FIRST)
def test_resumed_run_goes_on_from_what_was_saved(script, tmp_path):
    """Parameters and optimizer are those of the checkpoint: two copies of a killed run, resumed separately, end with
    the same bits, close to those saved. The killed run leaves no orphans."""
    process, pids = begun(script, tmp_path, row=25)
    process.kill()
    finish(process, expect=-signal.SIGKILL)
    assert_gone(pids)
    folder = folder_of(tmp_path)
    saved, copy = steps(folder)[-1], tmp_path / "copy"
    assert saved >= 20 and saved % 20 == 0
    shutil.copytree(folder, copy)
    for each in (folder, copy):
        args = json.loads((each / "args.json").read_text())
        (each / "args.json").write_text(json.dumps(args | {"total_timesteps": (saved + 2) * BATCH}))
        run(script, "--resume", each, cwd=tmp_path, small=False)
    assert_identical(checkpoint(folder), checkpoint(copy))
    assert lasting(folder) == lasting(copy) and [int(row["update"]) for row in rows(folder)] == list(
        range(1, saved + 3)
    )
    before, after = (checkpoint(folder, number) for number in (saved, saved + 2))
    args = json.loads((folder / "args.json").read_text())
    counters = lambda state: [state["step"], *(x for x in jax.tree.leaves(state["opt_state"]) if np.ndim(x) == 0)]
    learnt = 2 * args["num_minibatches"] * args["update_epochs"]
    assert [int(x) for x in counters(after)] == [int(x) + learnt for x in counters(before)], "a new Adam counts from 0"
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before["params"], after["params"])
    assert 0 < max(jax.tree.leaves(moved)) < 0.05, "two updates away from those saved"

    before = snapshot(folder)
    run(script, "--evaluate", folder, cwd=tmp_path, small=False)
    after = snapshot(folder)
    assert {name for name in after if after[name] != before.get(name)} <= {"learning_curve.png"}


@pytest.mark.slow
@pytest.mark.parametrize("script", FIRST)
def test_killed_worker_is_named(script, tmp_path):
    """kill -9 of a worker ends the run with one sentence that names the worker and how to continue."""
    process, pids = begun(script, tmp_path, "--checkpoint-interval", 2)
    os.kill(pids[1], signal.SIGKILL)
    _, err = finish(process, expect=1)
    folder = folder_of(tmp_path)
    (sentence,) = [line for line in err.splitlines() if "was killed" in line]
    assert f"process {pids[1]}) was killed by SIGKILL" in sentence and f'--resume "{folder}"' in sentence
    assert "Traceback" not in err
    assert steps(folder)[-1] == len(rows(folder)) // 2 * 2
    assert_gone(pids)


@pytest.mark.slow
@pytest.mark.parametrize("script", FIRST)
def test_ctrl_c_saves_and_leaves_no_orphans(script, tmp_path):
    """Ctrl-C, which a terminal sends to all processes at once, ends the run after an update, which is saved."""
    process, pids = begun(script, tmp_path, start_new_session=True)
    os.killpg(process.pid, signal.SIGINT)
    out, err = finish(process, expect=128 + signal.SIGINT)
    folder = folder_of(tmp_path)
    assert steps(folder)[-1] == len(rows(folder)) and f'--resume "{folder}"' in out and "Traceback" not in err
    assert_gone(pids)


@pytest.mark.slow
@pytest.mark.parametrize("script", FIRST)
def test_devices_share_the_learning(script, tmp_path):
    """Four virtual devices give the parameters of one. They exchange gradients, so each computes a part."""
    flags = "--total-timesteps", 2 * 2 * BATCH, "--num-envs", 8, "--no-norm-adv", "--adam-eps", "1e-5"
    flags += "--learning-rate", "3e-3"  # so that parameters move by far more than the difference allowed
    many = ENVIRONMENT["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    folders = []
    for name, options in (("one", {}), ("four", {"env": ENVIRONMENT | {"XLA_FLAGS": many}})):
        (tmp_path / name).mkdir()
        out, _ = run(script, *flags, cwd=tmp_path / name, **options)
        folders.append(folder_of(tmp_path / name))
    assert re.search("^collectives: .*all-reduce", out, re.M)
    assert_close(*map(checkpoint, folders), atol=1e-4)
    for folder, count in zip(folders, (1, 4), strict=True):  # orbax saves how many devices each array was on
        shardings = json.loads((folder / "checkpoints" / "2" / "default" / "_sharding").read_text())
        assert {tuple(json.loads(x)["shape"]) for x in shardings.values()} == {(count,)}


REFUSED = [
    ("--num-envs 0", "--num-envs 0", "must be at least 1"),
    ("--num-envs 8 --num-minibatches 3", "--num-envs 8", "not divisible by --num-minibatches 3"),
    ("--env-id MemoryMaze-8x8-v0", "--env-id MemoryMaze-8x8-v0", "MemoryMaze-9x9-v0"),
    ("--total-timesteps 10", "--total-timesteps 10", "must be at least 4096"),  # less than one update
    ("--seed -1", "--seed -1", "must be at least 0"),
    ("--learning-rate nan", "--learning-rate nan", "must be at least 0"),
    ("--resume nowhere", "nowhere", "is not the folder of a run"),
    ("--num-seeds 2", "--num-seeds", ""),
]


@pytest.mark.parametrize("script", MEMORYMAZE)
@pytest.mark.parametrize("flags, value, rule", REFUSED)
def test_impossible_arguments_are_refused(script, flags, value, rule, capsys):
    """Impossible arguments are refused in a sentence with the value and the rule."""
    sentence = refusal(script, flags.split(), capsys)
    assert value in sentence and rule in sentence, sentence

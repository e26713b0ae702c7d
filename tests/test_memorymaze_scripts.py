"""The scripts whose environments are processes: what their host loop does, in tests and from the command line.

What they share with the others to the letter (tests/test_sync.py) is tested there.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli import (
    BATCH,
    ENVIRONMENT,
    checkpoint,
    finish,
    folder_of,
    lasting,
    rows,
    run,
    snapshot,
    start,
    steps,
    wait_for_row,
)
from common import MEMORYMAZE, assert_close, assert_identical, float64, learn_in_turn, load, random_params, small_args
from cue_maze import STEPS, InTurn, make_env
from PIL import Image
from test_distributed import start_two

from benchmarks.without_memory import forgetful

FIRST = MEMORYMAZE[:1]  # for what is the same text in all of them
SIZES = {"num_envs": 8, "num_steps": 18, "num_minibatches": 2, "total_timesteps": 10**4, "logit_noise": 0.7}


@pytest.fixture(scope="module", params=MEMORYMAZE)
def played(request):
    yield from play(request.param)


@pytest.fixture(scope="module", params=FIRST)
def played_once(request):
    yield from play(request.param)


class Played:
    """The second of two rollouts in a row, acted with random parameters in 8 cue tasks, and what led to it."""

    def __init__(self, script, crews):
        self.script, self.args = script, small_args(script, **SIZES)
        self.agent = script.ActorCritic(self.args, crews[0].single_action_space.n)
        self.optimizer = script.make_optimizer(self.args)
        space = crews[0].single_observation_space
        key = jax.random.key(1)
        self.learner = script.init_learner(self.args, self.agent, self.optimizer, space, key)
        self.params = random_params(self.learner.params)
        # Sums over residual blocks grow with each; twice as large they would close the gates behind.
        self.params["params"]["encoder"] = jax.tree.map(lambda x: x / 2, self.params["params"]["encoder"])
        self.halves = [script.Half(self.agent, workers) for workers in crews]
        for i, half in enumerate(self.halves):
            half.begin(np.random.SeedSequence([7, i]), whole=False)
        act = jax.jit(functools.partial(script.act, self.args, self.agent))
        roll = functools.partial(script.host_rollout, self.args, act, self.params, self.halves)
        self.first, _, self.first_ended = roll(jax.random.key(2))
        self.memory = jax.tree.map(lambda *x: np.concatenate(x), *[half.memory for half in self.halves])
        self.transitions, self.last_value, self.ended = roll(jax.random.key(3))
        self.apply = jax.jit(self.agent.apply)

    def errors(self, reset=None, memory=None) -> tuple[float, float]:
        """-> largest deviation of a log-probability and of a value from those acted with."""
        taken = self.transitions
        reset, memory = taken.reset if reset is None else reset, self.memory if memory is None else memory
        logits, value, _ = self.apply(self.params, taken.obs, reset, memory)
        log_prob = self.script.log_prob_of(logits + taken.noise, taken.action)
        return float(np.abs(log_prob - taken.log_prob).max()), float(np.abs(value - taken.value).max())


def play(name):
    script = load(name)
    # The last two environments begin with whole episodes, the others in mid-episode.
    shares = [0.25, 0.5, 0.75, 1.0]
    crews = [script.Workers([make_env(None, share) for share in shares]) for _ in range(2)]
    try:
        yield Played(script, crews)
    finally:
        for workers in crews:
            workers.close()


def test_ratio_is_one_before_the_first_gradient_step(played):
    """Log-probabilities and values recomputed over a rollout are those acted with, whatever the parameters."""
    reset = played.transitions.reset
    assert reset[0].any() and not reset[0].all() and reset[-1].any() and reset[1:-1].any()
    assert max(np.abs(x).max() for x in jax.tree.leaves(float64(played.memory))) > 0.1, "with a memory"
    assert np.std(played.transitions.value) > 0.02 and np.std(played.transitions.log_prob) > 0.02
    assert max(played.errors()) <= 1e-4


FAULTS = {
    "a reset too late": lambda p: {"reset": np.roll(p.transitions.reset, 1, axis=0)},
    "no resets": lambda p: {"reset": np.zeros_like(p.transitions.reset)},
    "no memory": lambda p: {"memory": p.agent.initial_memory(8)},
    "memory of the rollout's end": lambda p: {
        "memory": jax.tree.map(lambda *x: np.concatenate(x), *[half.memory for half in p.halves])
    },
}


@pytest.mark.parametrize("fault", FAULTS)
def test_ratio_one_notices(played, fault):
    """Each planted fault breaks ratio 1 by far, so the test above can fail."""
    assert min(played.errors(**FAULTS[fault](played))) > 1e-2


def test_rollout_records_what_happened(played_once):
    """Observations, ends, rewards, noise and last values stand where they belong, the halves side by side."""
    p = played_once
    both = jax.tree.map(lambda *x: np.concatenate(x), p.first, p.transitions)  # (2T, 8, ...), one after the other
    colour = both.obs[:, :, 0, 0] > 0  # (2T, 8, 3)
    white, cue = colour.all(-1), np.where(colour[..., 0], 0, 1)
    is_cue = colour.any(-1) & ~white
    expected_reset = np.concatenate([np.ones((1, 8), bool), both.done[:-1]])
    assert (both.reset == expected_reset).all() and (both.reset == is_cue).all()
    first_end = [int(np.argmax(both.done[:, i])) for i in range(8)]
    assert first_end == [0, 1, 2, 3] * 2, "the first episodes are cut short, each elsewhere"
    for i in range(8):
        assert np.flatnonzero(both.done[:, i]).tolist() == list(range(first_end[i], len(both.done), STEPS))
        begin = 0
        for end in np.flatnonzero(both.done[:, i]):
            assert (both.noise[begin : end + 1, i] == both.noise[begin, i]).all(), "one noise an episode"
            rewards = both.reward[begin : end + 1, i]
            right = white[end, i] and both.action[end, i] == cue[begin, i]
            assert rewards[:-1].sum() == 0 and rewards[-1] == float(right)
            begin = end + 1
    assert both.reward.any() and len(np.unique(both.noise[both.reset], axis=0)) == both.reset.sum()
    assert both.reward.dtype == np.float32 and both.obs.dtype == np.uint8

    whole = [(i, end) for i in range(8) for end in np.flatnonzero(both.done[:, i])[1:]]
    ended = p.first_ended + p.ended
    assert len(ended) == len(whole), "cut first episodes are not counted"
    assert sum(x[1] for x in ended) == sum(both.reward[end, i] for i, end in whole)
    assert {x[2] for x in ended} == {STEPS}
    reset, obs = (np.concatenate([getattr(half, name) for half in p.halves]) for name in ("reset", "obs"))
    memory = jax.tree.map(lambda *x: np.concatenate(x), *[half.memory for half in p.halves])
    np.testing.assert_allclose(p.last_value, p.apply(p.params, obs[None], reset[None], memory)[1][0], atol=1e-5)


def test_what_is_learnt_from_a_rollout(played_once, monkeypatch):
    """Learning gets the transitions, the start memory, advantages of gae_lambda, and for the value returns of
    critic_lambda; keys and counter move on."""
    script, seen = played_once.script, {}
    args = dataclasses.replace(played_once.args, gae_lambda=0.7, critic_lambda=0.9)

    def learn(args, agent, optimizer, learner, key, memory, batch):
        seen.update(key=key, memory=memory, batch=batch)
        return learner.params, learner.opt_state, {}

    monkeypatch.setattr(script, "learn", learn)
    taken, memory, last_value = played_once.transitions, played_once.memory, played_once.last_value
    setting = (args, played_once.agent, played_once.optimizer, played_once.learner)
    learner, metrics = script.learn_from(*setting, memory, taken, last_value)
    transitions, advantage, target = seen["batch"]
    assert_identical(transitions, taken)
    assert_identical(seen["memory"], memory)
    gae = functools.partial(script.compute_gae, taken, last_value, args.gamma)
    np.testing.assert_array_equal(advantage, gae(0.7))
    np.testing.assert_array_equal(target, taken.value + gae(0.9))
    explained = 1 - np.var(target - taken.value) / np.var(target)
    np.testing.assert_allclose(metrics["losses/explained_variance"], explained, rtol=1e-4)
    assert learner.update == played_once.learner.update + 1
    keys = [jax.random.key_data(k).tolist() for k in (learner.key, seen["key"], played_once.learner.key)]
    assert len(set(map(tuple, keys))) == 3


def test_evaluation_counts_each_environments_share(played_once):
    """As many episodes as asked for, each environment its share, whole ones, and the same again with the same seeds."""
    p = played_once
    args = dataclasses.replace(p.args, eval_episodes=19)
    choose = jax.jit(functools.partial(p.script.choose, p.agent, False))
    results = [p.script.host_evaluate(args, choose, p.params, p.halves, jax.random.key(i)) for i in (0, 0, 1)]
    for result in results:
        assert result.shape == (19, 2) and (result[:, 1] == STEPS).all()
    assert (results[0] == results[1]).all() and (results[0] != results[2]).any()


@pytest.mark.parametrize("name, count", list(zip(MEMORYMAZE, (2_988_455, 2_461_319, 2_304_967), strict=True)))
def test_parameters_at_full_size(name, count):
    """The published sizes behind the encoder of IMPALA, which has 622,144 parameters for 64 x 64 pixels."""
    script = load(name)
    agent = script.ActorCritic(script.Args(), 6)
    obs = jnp.zeros((1, 1, 64, 64, 3), jnp.uint8)
    shapes = jax.eval_shape(agent.init, jax.random.key(0), obs, jnp.ones((1, 1), bool), agent.initial_memory(1))
    sizes = jax.tree.map(lambda x: x.size, shapes["params"])
    assert sum(jax.tree.leaves(sizes["encoder"])) == 622_144
    assert sum(jax.tree.leaves(sizes)) == count


@pytest.mark.parametrize("name", MEMORYMAZE)
def test_parameters_at_first(name):
    """Kernels of the encoder have variance 1 / inputs, which keeps its features small enough for an LSTM's gates; both
    heads end with gain 0.01: all actions alike, values near 0. Biases are 0."""
    script, rng = load(name), np.random.default_rng(0)
    agent = script.ActorCritic(script.Args(), 6)
    obs, reset = rng.integers(0, 256, (1, 4, 64, 64, 3), np.uint8), np.ones((1, 4), bool)
    variables = jax.jit(agent.init)(jax.random.key(0), obs, reset, agent.initial_memory(4))
    params = float64(variables["params"])
    for path, x in jax.tree.leaves_with_path(params["encoder"]):
        if path[-1].key == "bias":
            assert not x.any()
        else:  # 432 numbers and more
            np.testing.assert_allclose(np.sqrt(len(x) * np.square(x).mean()), 1, atol=0.15)
    features = script.ImpalaEncoder().apply({"params": variables["params"]["encoder"]}, obs)
    assert 0.05 < np.sqrt(np.square(features).mean()) < 1.5
    for head in ("actor", "critic"):
        last = params[head]["Dense_1"]
        np.testing.assert_allclose(np.linalg.svd(last["kernel"], compute_uv=False), 0.01, rtol=1e-4)
        assert not last["bias"].any()
    logits, value, _ = agent.apply(variables, obs, reset, agent.initial_memory(4))
    assert np.abs(jax.nn.softmax(logits) - 1 / 6).max() < 0.01 and np.abs(value).max() < 0.02


@pytest.mark.parametrize("name", FIRST)
def test_encoder_is_made_of_convolutions(name):
    """Its convolution and its pooling are what Flax calls SAME, values and gradients."""
    import flax.linen as nn

    script, rng = load(name), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 8, 12, 5)), jnp.float32)
    ours, theirs = script.Conv3x3(7), nn.Conv(7, (3, 3))
    params = ours.init(jax.random.key(0), x)
    params["params"]["bias"] = jnp.asarray(rng.normal(size=7), jnp.float32)
    same = {"params": params["params"] | {"kernel": params["params"]["kernel"].reshape(3, 3, 5, 7)}}

    def pooled(x):
        y = nn.max_pool(x.reshape(6, 8, 12, -1), (3, 3), (2, 2), "SAME")
        return y.reshape(2, 3, 4, 6, -1)

    results = [
        jax.value_and_grad(lambda x, f=f, pool=pool: (jnp.sin(pool(f(x)))).sum())(x)
        for f, pool in (
            (functools.partial(ours.apply, params), script.max_pool), (functools.partial(theirs.apply, same), pooled)
        )
    ]  # fmt: skip
    assert_close(*results, atol=1e-4)


@pytest.mark.parametrize("name", MEMORYMAZE)
def test_every_flag_is_read(name):
    """No flag of Args goes unused."""
    script = load(name)
    names = {node.attr for node in ast.walk(ast.parse(inspect.getsource(script))) if isinstance(node, ast.Attribute)}
    assert {field.name for field in dataclasses.fields(script.Args)} <= names


# A cue in pictures of 8 x 8.
CUE = {
    "d_actor": 32, "d_critic": 32, "num_envs": 32, "num_steps": 16, "num_minibatches": 4, "update_epochs": 6,
    "norm_adv": False, "anneal_lr": True, "max_grad_norm": 0.3, "total_timesteps": 49_152,
}  # fmt: skip
LAYERS = {"num_layers": 1, "d_model": 64, "d_head": 32, "num_heads": 2, "learning_rate": 4e-4, "ent_coef": 0.02}
CHRONO = {"gate_init": "chrono", "chrono_t_max": 10.0}
SMALL = {
    "ppo_lstm_memorymaze": CHRONO | {"hidden_size": 32, "learning_rate": 1e-3, "ent_coef": 0.05},
    "ppo_agalite_memorymaze": CHRONO | LAYERS | {"d_ffc": 32, "eta": 2},
    "ppo_gtrxl_memorymaze": LAYERS | {"memory_len": 16},
}
# Evaluations within the budget of --total-timesteps, and before the last of those without memory.
CHECKS, LEAST = 12, 4


@pytest.mark.parametrize("name, enough", list(zip(MEMORYMAZE, (3, 1, 1), strict=True)))
def test_learns_with_memory_and_only_with_it(name, enough):
    """On so many seeds success comes to 0.9 in 200 episodes within the budget (`learn_in_turn` says what may fail).
    Without memory the same script is at 0.65 or below, chance being 0.5, after the time of the slowest. What sets
    AGaLiTe and GTrXL apart here learns on three seeds in tests/test_learning.py."""
    script, half = load(name), CUE["num_envs"] // 2
    args = script.Args(**CUE | SMALL[name], eval_episodes=200)
    # Two halves to train in, and two to evaluate in meanwhile.
    optimizer, crews = script.make_optimizer(args), [InTurn([make_env(args)] * half) for _ in range(4)]
    space, actions = crews[0].single_observation_space, crews[0].single_action_space.n
    shardings = script.batch_shardings(args)

    def learner_of(agent):
        """-> a function that trains with a seed and yields success in 200 episodes, CHECKS times."""
        act = jax.jit(functools.partial(script.act, args, agent))
        choose = jax.jit(functools.partial(script.choose, agent, False))
        first, learn = (
            jax.jit(functools.partial(*parts), out_shardings=shardings[-1])
            for parts in (
                (script.init_learner, args, agent, optimizer, space),
                (script.learn_from, args, agent, optimizer),
            )
        )
        halves = [script.Half(agent, crew) for crew in crews]

        def train(seed):
            runner = script.HostRunner(first(jax.random.key(seed)))
            for each, seeds_of_half in zip(halves[:2], np.random.SeedSequence(seed).spawn(2), strict=True):
                each.begin(seeds_of_half, whole=True)
            for done in range(1, args.num_updates + 1):
                runner, _ = script.host_update(args, act, learn, shardings, halves[:2], None, runner)
                if done % (args.num_updates // CHECKS) == 0:
                    assert act._cache_size() == 1, "compiled once"
                    params = script.local(runner.learner.params)
                    result = script.host_evaluate(args, choose, params, halves[2:], jax.random.key(seed))
                    assert choose._cache_size() == 1, "compiled once"
                    yield result[:, 0].mean()

        return train

    checks = learn_in_turn(learner_of(script.ActorCritic(args, actions)), enough)
    without = learner_of(forgetful(script.ActorCritic)(args, actions))
    # 0.65 leaves room for chance: 200 fair coins exceed it once in 100,000 times.
    assert list(itertools.islice(without(1), max(checks, LEAST)))[-1] <= 0.65


# --------------------------------------------------------------------------------------------------- The command line
def children(pid: int) -> list[int]:
    """The processes that a process has started and that have not ended."""
    pids = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in pids for child in path.read_text().split()]


def workers_of(process) -> list[int]:
    """Those of its children that play the environments."""
    command = lambda pid: Path(f"/proc/{pid}/cmdline").read_bytes()
    return [pid for pid in children(process.pid) if b"spawn_main" in command(pid)]


def assert_gone(pids: list[int]):
    deadline = time.time() + 20
    while any(Path(f"/proc/{pid}").exists() and b"Z" not in status(pid) for pid in pids):
        assert time.time() < deadline, "orphans"
        time.sleep(0.05)


def status(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()[0]
    except FileNotFoundError:
        return b"Z"


def begun(script, cwd, row=3, **options):
    """A run in the middle, and its workers."""
    process = start(script, "--total-timesteps", 5000 * BATCH, cwd=cwd, **options)
    wait_for_row(process, cwd, row)
    pids = workers_of(process)
    assert len(pids) == 4
    return process, pids


@pytest.mark.parametrize("script", MEMORYMAZE)
def test_run_leaves_what_it_promises(script, tmp_path):
    """A run leaves arguments, metrics, checkpoints, curve, video and evaluation; the terminal tells how it went."""
    out, err = run(script, "--total-timesteps", "400", "--capture-video", "--track", cwd=tmp_path)
    folder = folder_of(tmp_path)
    table = rows(folder)
    expected = [(update, update * BATCH) for update in range(1, 400 // BATCH + 1)]
    assert [(int(row["update"]), int(row["global_step"])) for row in table] == expected
    assert all(float(row["charts/episodes"]) > 0 and 0 <= float(row["charts/episodic_return"]) <= 1 for row in table)
    assert all(np.isfinite(float(row[name])) for row in table for name in row if name.startswith("losses/"))
    assert steps(folder)[-1] == 400 // BATCH
    with Image.open(folder / "learning_curve.png") as picture:
        assert min(picture.size) > 100
    with Image.open(folder / "videos" / "episode.gif") as video:
        assert video.n_frames == STEPS
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert {kind: x["episodic_length"] for kind, x in evaluation.items()} == {"sampled": [STEPS], "greedy": [STEPS]}
    assert list((folder / "wandb").rglob("*.wandb"))
    saved = checkpoint(folder)["runner"]
    assert set(saved) == {"params", "opt_state", "key", "update"}
    assert f"{sum(x.size for x in jax.tree.leaves(saved['params'])):,} parameters" in out
    assert "step/s" in err and "return=" in err and str(folder) in out.splitlines()[-1]
    assert "evaluation with sampled actions, 20 episodes: return " in out
    assert "Traceback" not in err and "Warning" not in err
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}, "nothing outside runs/"


@pytest.mark.parametrize("script", FIRST)
def test_resumed_run_goes_on_from_what_was_saved(script, tmp_path):
    """Parameters, optimiser, counter and key are those of the checkpoint: two copies of a killed run, resumed each on
    its own, come to the same bits, a little way from those saved."""
    process, pids = begun(script, tmp_path, row=25)
    process.kill()
    finish(process, expect=-signal.SIGKILL)
    assert_gone(pids)
    folder = folder_of(tmp_path)
    saved, copy = steps(folder)[-1], tmp_path / "copy"
    assert saved == 20
    shutil.copytree(folder, copy)
    for each in (folder, copy):
        args = json.loads((each / "args.json").read_text())
        (each / "args.json").write_text(json.dumps(args | {"total_timesteps": 22 * BATCH}))
        run(script, "--resume", each, cwd=tmp_path, small=False)
    assert_identical(checkpoint(folder), checkpoint(copy))
    assert lasting(folder) == lasting(copy) and [int(row["update"]) for row in rows(folder)] == list(range(1, 23))
    params = [checkpoint(folder, number)["runner"]["params"] for number in (20, 22)]
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), *params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.05, "two updates away from those saved"

    before = snapshot(folder)
    run(script, "--evaluate", folder, cwd=tmp_path, small=False)
    after = snapshot(folder)
    assert {name for name in after if after[name] != before.get(name)} <= {"learning_curve.png"}


@pytest.mark.parametrize("script", FIRST)
def test_killed_worker_is_named(script, tmp_path):
    """kill -9 of a worker ends the run with its name, a checkpoint and a way on; nobody is left behind."""
    process, pids = begun(script, tmp_path)
    os.kill(pids[1], signal.SIGKILL)
    _, err = finish(process, expect=1)
    folder = folder_of(tmp_path)
    said = err.strip().splitlines()[-1]
    assert f"process {pids[1]}" in said and "SIGKILL" in said and f"--resume {folder}" in said
    assert "Traceback" not in err
    assert steps(folder)[-1] == len(rows(folder)) and f"update {len(rows(folder))};" in said
    assert_gone(pids)


@pytest.mark.parametrize("script", FIRST)
def test_killed_run_leaves_no_orphans(script, tmp_path):
    """kill -9 of the run itself ends its workers too."""
    process, pids = begun(script, tmp_path)
    process.kill()
    finish(process, expect=-signal.SIGKILL)
    assert_gone(pids)


@pytest.mark.parametrize("script", FIRST)
def test_ctrl_c_saves_and_leaves_no_orphans(script, tmp_path):
    """Ctrl-C, which a terminal sends to all processes at once, ends the run after an update, saved."""
    process, pids = begun(script, tmp_path, start_new_session=True)
    os.killpg(process.pid, signal.SIGINT)
    out, err = finish(process, expect=128 + signal.SIGINT)
    folder = folder_of(tmp_path)
    assert steps(folder)[-1] == len(rows(folder)) and f"--resume {folder}" in out and "Traceback" not in err
    assert_gone(pids)


@pytest.mark.parametrize("script", FIRST)
def test_ctrl_c_ends_an_evaluation(script, tmp_path):
    """Ctrl-C after training, between the two evaluations, ends at once, in order, and says how to evaluate again."""
    env = ENVIRONMENT | {"PYTHONUNBUFFERED": "1"}
    flags = "--total-timesteps", BATCH, "--eval-episodes", 4000
    process = start(script, *flags, cwd=tmp_path, env=env, start_new_session=True)
    assert "parameters" in process.stdout.readline() and "sampled" in process.stdout.readline()
    pids = workers_of(process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = finish(process, expect=128 + signal.SIGINT)
    assert f"--evaluate {folder_of(tmp_path)}" in out and "Traceback" not in err and "leaked" not in err
    assert_gone(pids)


@pytest.mark.parametrize("script", FIRST)
def test_devices_share_the_learning(script, tmp_path):
    """Four virtual devices come to the parameters of one."""
    flags = "--total-timesteps", 2 * 2 * BATCH, "--num-envs", 8, "--no-norm-adv", "--adam-eps", "1e-5"
    many = ENVIRONMENT["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    folders = []
    for name, options in (("one", {}), ("four", {"env": ENVIRONMENT | {"XLA_FLAGS": many}})):
        (tmp_path / name).mkdir()
        out, _ = run(script, *flags, cwd=tmp_path / name, **options)
        assert "using" not in out, "all of them are used"
        folders.append(folder_of(tmp_path / name))
    assert_close(*(checkpoint(folder)["runner"] for folder in folders), atol=1e-4)


@pytest.mark.parametrize("script", FIRST)
def test_two_processes_train_together(script, tmp_path):
    """Each of two processes drives half of the environments; one program learns from both, and both end in peace."""
    for process in start_two(script, "--total-timesteps", 4 * BATCH, cwd=tmp_path):
        finish(process)
    folder = folder_of(tmp_path)
    assert steps(folder)[-1] == 4 and len(rows(folder)) == 4
    # 4 environments x 64 steps; the first episodes, cut after 2 or 4 steps, are not counted
    assert sum(float(row["charts/episodes"]) for row in rows(folder)) == 4 * 4 * 16 / STEPS - 4


@pytest.mark.parametrize("script", FIRST)
def test_two_processes_learn_as_one(script, tmp_path):
    """From the same rollouts, each with half of the environments, two processes come to the parameters of one."""
    flags = "--total-timesteps", 3 * BATCH, "--no-norm-adv", "--adam-eps", "1e-5", "--made-up-rollouts"
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    run(script, *flags, cwd=one)
    for process in start_two(script, *flags, cwd=two):
        finish(process)
    results = [checkpoint(folder_of(folder))["runner"] for folder in (one, two)]
    assert_close(*results, atol=1e-4)
    moments = jax.tree.leaves(results[0]["opt_state"])
    assert max(np.abs(x).max() for x in moments if x.dtype == np.float32) > 0.01, "with gradients to compare"


REFUSED = [
    ("--num-envs 7", "--num-envs 7", "must be even"),
    ("--num-envs 8 --num-minibatches 3", "--num-envs 8", "not divisible by --num-minibatches 3"),
    ("--env-id MemoryMaze-8x8-v0", "--env-id MemoryMaze-8x8-v0", "MemoryMaze-9x9-v0"),
    ("--total-timesteps 10", "--total-timesteps 10", "less than one update"),
    ("--seed -1", "--seed -1", "at least 0"),
    ("--learning-rate nan", "--learning-rate nan", "finite"),
    ("--resume a --evaluate b", "a", "is not the folder of a run"),
    ("--num-seeds 2", "--num-seeds", ""),
]


@pytest.mark.parametrize("script", MEMORYMAZE)
@pytest.mark.parametrize("flags, value, rule", REFUSED)
def test_impossible_arguments_are_refused(script, flags, value, rule, capsys):
    """What cannot work is refused in a sentence with the value and the rule."""
    with pytest.raises(SystemExit) as refused:
        load(script).parse_args(flags.split())
    assert refused.value.code != 0
    said = " ".join((str(refused.value) + capsys.readouterr().err).replace("│", " ").split())
    assert value in said and rule in said

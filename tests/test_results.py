"""benchmarks/results.py decides what README calls solved and what tables and curves show, corridors.py the same over
the length of the corridor. Results are compared with without_memory.py and random_policy.py; cue.py looks inside."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from common import FIRST, assert_close, build, load, quick_jit, random_observations, small_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import cue
import random_policy
import results
import without_memory
from corridors import Run, alone, best
from results import interval, main, recent, solved_at


def rows_of(*updates):
    names = ("charts/episodes", "charts/success_rate", "global_step", "elapsed")
    return [dict(zip(names, (*update, 100 * i, 60 * i), strict=True)) for i, update in enumerate(updates, 1)]


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(results.__file__).parent.glob("*.py")))
def test_benchmarks_find_what_they_import(name):
    """The names that they take from scripts and environments exist."""
    importlib.import_module(name)


def test_solved_needs_two_hundred_episodes():
    """199 successes in a row are not yet 200 episodes; the 200th decides."""
    assert solved_at(rows_of((199, 1.0))) is None
    assert solved_at(rows_of((199, 1.0), (0, ""), (1, 1.0))) == (300, 3.0)


def test_solved_is_the_first_time_and_forgets_old_failures():
    """Failures older than the window do not count, those inside do."""
    assert solved_at(rows_of((500, 0.0), (100, 1.0), (100, 1.0), (100, 0.0))) == (300, 3.0)
    assert solved_at(rows_of((500, 0.0), (100, 1.0), (100, 0.89))) is None
    assert solved_at(rows_of((100, 1.0), (100, 0.91), (100, 0.0))) == (200, 2.0)


def test_a_comparison_runs_alone(tmp_path, monkeypatch):
    """A second call, which would resume the runs of the first, is refused until the first ends."""
    monkeypatch.chdir(tmp_path)
    with alone(), pytest.raises(SystemExit, match="already running"):
        alone()
    alone().close()


def test_a_comparison_takes_just_its_own_runs(tmp_path, monkeypatch):
    """A run counts if all that affects its computation is as required, and as finished once it has been evaluated."""
    monkeypatch.chdir(tmp_path)
    run = Run("lstm", "published", 20, "3e5", seed=3)
    args = dataclasses.asdict(load("ppo_lstm_tmaze").parse_args(run.flags))
    folders = [tmp_path / "runs" / f"tmaze__ppo_lstm_tmaze__3__{i}" for i in range(4)]
    changes = {"learning_rate": 1e-3}, {"total_timesteps": 200_000}, {"d_actor": 64}, {"eval_episodes": 7}
    assert run.folder() is None and not run.finished()
    for folder, change in zip(folders, changes, strict=True):
        folder.mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps(args | change))
    assert run.folder() is None, "nothing was saved"
    for folder in folders:
        (folder / "checkpoints" / "0").mkdir(parents=True)
    assert run.folder().name == folders[3].name and not run.finished()
    (folders[3] / "evaluation.json").write_text("{}")
    assert run.finished()
    tuned = dataclasses.replace(run, size="small", learning_rate=1e-3)
    sizes = {"hidden_size": 92, "d_actor": 32, "d_critic": 32}
    assert tuned.folder() is None
    (folders[0] / "args.json").write_text(json.dumps(args | sizes | {"learning_rate": 1e-3}))
    assert tuned.folder().name == folders[0].name and not tuned.finished()


def test_the_learning_rate_kept_is_the_one_that_learnt_soonest(tmp_path, monkeypatch, capsys):
    """The mean over the updates in which an episode ended decides, not the last one. A single rate needs no run."""
    monkeypatch.chdir(tmp_path)
    trials = [Run("gru", "published", 80, "3e5", 100, 1, "small", rate) for rate in (1e-3, 2e-3)]
    assert best(trials[:1]) == 1e-3
    for i, (run, shares) in enumerate(zip(trials, (["", 0.9, 0.9], [0.5, "", 1.0]), strict=True)):
        folder = tmp_path / "runs" / f"tmaze__ppo_gru_tmaze__100__{i}"
        (folder / "checkpoints" / "0").mkdir(parents=True)
        args = dataclasses.asdict(load("ppo_gru_tmaze").parse_args(run.flags))
        (folder / "args.json").write_text(json.dumps(args))
        rows = "".join(f"{share},100\n" for share in shares)
        (folder / "metrics.csv").write_text("charts/success_rate,seed\n" + rows)
    assert best(trials) == 1e-3
    assert "0.001: 0.90, 0.002: 0.75" in capsys.readouterr().out


def test_each_seed_of_a_run_has_its_own_row(tmp_path, monkeypatch):
    """Success per seed is the evaluation's. A seed is solved if its rows say so and its evaluation confirms it."""
    monkeypatch.chdir(tmp_path)
    run = Run("gru", "published", 20, "3e5", seed=1, num_seeds=3)
    folder = tmp_path / "runs" / "tmaze__ppo_gru_tmaze__1__0"
    (folder / "checkpoints" / "0").mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(dataclasses.asdict(load("ppo_gru_tmaze").parse_args(run.flags))))
    success = {"sampled": {"success": [1.0, 0.5, 0.9]}, "greedy": {"success": [1.0, 0.4, 1.0]}}
    (folder / "evaluation.json").write_text(json.dumps(success))
    lines = [f"{100 * u},{s},{60 * u},200,{1.0 if u >= s else 0.1}" for u in (1, 2, 3) for s in (1, 2, 3)]
    head = "global_step,seed,elapsed,charts/episodes,charts/success_rate"
    (folder / "metrics.csv").write_text("\n".join([head, *lines]))
    rows = run.rows()
    assert [(row["seed"], row["success"], row["greedy"]) for row in rows] == [(1, 1, 1), (2, 0.5, 0.4), (3, 0.9, 1)]
    assert [row["solved_at"] for row in rows] == [100, None, None]
    assert rows[0]["model"] == "gru" and "num_seeds" not in rows[0]
    run = dataclasses.replace(run, num_seeds=2)
    assert run.folder() is None, "a run of other seeds"


def run_folder(path, exp_name, seed, **flags):
    """A run of the T-Maze whose success is 1 from the first update."""
    path.mkdir()
    (path / "args.json").write_text(json.dumps({"exp_name": exp_name, "seed": seed, **flags}))
    (path / "evaluation.json").write_text(json.dumps({kind: {"success": [1.0]} for kind in ("sampled", "greedy")}))
    head = "global_step,elapsed,charts/episodes,charts/success_rate,charts/episodic_length"
    (path / "metrics.csv").write_text("\n".join([head, *(f"{100 * u},{60 * u},200,1.0,{160 + u}" for u in (1, 2, 3))]))
    return str(path)


def test_table_of_settings(tmp_path):
    """Settings differ by scripts and flags, also by a flag that some scripts lack; a row sums up the seeds of one."""
    settings = ("gtrxl", 1, {"memory_len": 128}), ("gtrxl", 2, {"memory_len": 128}), ("gtrxl", 1, {"memory_len": 256})
    settings += (("lstm", 1, {"hidden_size": 600}),)
    folders = [run_folder(tmp_path / f"tmaze_{i}", name, seed, **x) for i, (name, seed, x) in enumerate(settings)]
    main(str(tmp_path / "table"), folders)
    _, _, head, _, *rows = (tmp_path / "table.md").read_text().splitlines()
    assert head.startswith("| exp_name | memory_len | seed | solved at step | minutes |")
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[:3] for row in cells] == [
        ["gtrxl", "128", "1"],
        ["gtrxl", "128", "2"],
        ["gtrxl", "128", "**all**"],
        ["gtrxl", "256", "1"],
        ["lstm", "", "1"],
    ]
    assert cells[0][3:5] == ["100", "1.0"] and cells[2][3] == "2 of 2, median 100"
    assert (tmp_path / "table.png").exists()


def test_runs_that_make_no_table(tmp_path):
    """The error names a run that has not ended, and one that is there twice."""
    once, again = (run_folder(tmp_path / f"tmaze_{i}", "gru", 1) for i in range(2))
    with pytest.raises(SystemExit, match="another run has the same flags and seed 1"):
        main(str(tmp_path / "table"), [once, again])
    Path(once, "evaluation.json").unlink()
    with pytest.raises(SystemExit, match="tmaze_0: has no evaluation.json"):
        main(str(tmp_path / "table"), [once])
    assert not (tmp_path / "table.md").exists()


def test_interval_is_students():
    """For three values, it is 4.303 standard errors on either side of their mean; one value has none."""
    mean, half = interval([0.2, 0.4, 0.9])
    np.testing.assert_allclose((mean, half), (0.5, 4.3027 * np.std([0.2, 0.4, 0.9], ddof=1) / 3**0.5), rtol=1e-4)
    assert np.isnan(interval([1.0])[1])


def test_curves_look_back_as_far_as_needed():
    """They average whole updates, weighted by their episodes, without updates in which none ended."""
    rows = rows_of((1, 0.0), (0, ""), (3, 1.0), (2, 0.5), (8, 0.0))
    assert [(mean, number) for _, mean, number in recent(rows, "charts/success_rate", 5)] == [
        (0, 1), (0.75, 4), (0.8, 5), (0, 8)
    ]  # fmt: skip


@pytest.mark.slow
def test_without_memory_no_step_knows_of_another():
    """Without its memory, the agent's outputs over a sequence are those of each step alone."""
    script = load(*FIRST)
    args = small_args(script)
    env, _ = build(script, args)
    agent, reset = without_memory.forgetful(script.ActorCritic)(args, 4), np.zeros((5, 3), bool)
    obs = random_observations(env, 0, (5, 3))
    params = quick_jit(agent.init)(jax.random.key(0), obs, reset, agent.initial_memory(3))
    apply = quick_jit(agent.apply)
    logits, value, memory = apply(params, obs, reset, agent.initial_memory(3))
    for t in range(5):
        assert_close(apply(params, obs[t : t + 1], reset[:1], memory)[:2], (logits[t : t + 1], value[t : t + 1]), 1e-5)


@pytest.mark.parametrize("name", FIRST)
def test_without_memory_trains_the_forgetful_agent(name, monkeypatch):
    """It has the name that its folder shows, and the command that resumes it."""
    script, started = load(name), []
    monkeypatch.setattr(script, "ActorCritic", script.ActorCritic)  # so that it is restored
    monkeypatch.setattr(script, "main", started.append)
    monkeypatch.setattr(sys, "argv", ["benchmarks/without_memory.py"])
    without_memory.main(f"{name}.py", "--seed", "3")
    assert [(args.exp_name, args.seed) for args in started] == [(f"{name}_without_memory", 3)]
    assert script.ActorCritic.__name__ == "Forgetful"
    assert sys.argv[0] == f"benchmarks/without_memory.py {name}.py"


@pytest.mark.parametrize("name", FIRST)
def test_a_random_policy_guesses(name, monkeypatch):
    """In a corridor of two cells, all its episodes end before the time limit, half of them with success."""
    monkeypatch.setattr(jax, "jit", quick_jit)
    script = load(name)
    args = small_args(script, corridor_len=2, max_episode_steps=100, eval_episodes=400, logit_noise=0.0)
    results = random_policy.evaluate(script, args)
    assert results["episodic_length"].shape == (400,) and results["episodic_length"].max() < 100
    assert 0.4 < results["success"].mean() < 0.6


def test_the_cue_explains_what_depends_on_it():
    """All of what is the cue itself, half of it plus noise of equal variance, nothing of noise or of a constant."""
    rng = np.random.default_rng(0)
    is_down = np.repeat([0.0, 1.0], 2000)
    noise = rng.normal(size=(4000, 3, 2))
    cue_itself = np.broadcast_to(is_down[:, None, None], noise.shape)
    explained = lambda x: float(cue.explained(x, is_down))
    assert explained(cue_itself) == pytest.approx(1, abs=1e-4)
    assert explained(cue_itself / cue_itself.std() + noise) == pytest.approx(0.5, abs=0.03)
    assert explained(noise) < 0.01 and explained(np.full((4000, 3), np.float32(0.1))) < 0.01


@pytest.mark.slow
def test_where_a_run_keeps_the_cue(tmp_path, monkeypatch, capsys):
    """At the entrance the cue explains everything. Without memory, nothing at the junction; a folder may be wrong."""
    monkeypatch.setattr(jax, "jit", quick_jit)
    script = load("ppo_lstm_tmaze")
    args = small_args(script, corridor_len=9, max_episode_steps=20)
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(args)))
    with pytest.raises(SystemExit, match="has no checkpoint"):
        cue.main("ppo_lstm_tmaze.py", str(tmp_path))
    env, agent = build(script, args)
    runner = jax.vmap(lambda seed: script.init(args, env, agent, jax.random.key(seed)))(jax.numpy.arange(2))
    with ocp.CheckpointManager(tmp_path / "checkpoints", item_handlers=ocp.StandardCheckpointHandler()) as checkpoints:
        checkpoints.save(1, args=ocp.args.StandardSave(runner))

    def table():
        cue.main("ppo_lstm_tmaze.py", str(tmp_path))
        header, _, *lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
        assert header == ["cell", "0", "2", "4", "6", "8"]
        return {name: [float(x) for x in shares] for name, *shares in lines}

    with_memory = table()
    assert len(with_memory) == 4 and {"output.logits", "output.value"} < set(with_memory)
    assert all(shares[0] == 1 for shares in with_memory.values())
    monkeypatch.setattr(script, "ActorCritic", without_memory.forgetful(script.ActorCritic))
    without = table()
    assert all(shares[0] == 1 and max(shares[1:]) < 0.02 for shares in without.values())
    assert max(with_memory["output.logits"][1:]) > 0.02, "even before training, an LSTM remembers for two steps"
    named = dataclasses.replace(args, exp_name="ppo_lstm_tmaze_without_memory")
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(named)))
    with pytest.raises(SystemExit, match="trained without memory"):
        cue.main("ppo_lstm_tmaze.py", str(tmp_path))

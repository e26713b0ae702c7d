"""benchmarks/results.py decides what README calls solved and what tables and curves show. Results are compared with
without_memory.py and random_policy.py; cue.py looks inside."""

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
from results import in_training, interval, main, recent, solved_at


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


def run_folder(path, exp_name, seed, **flags):
    """A run of the T-Maze whose success is 1 from the first update."""
    path.mkdir()
    flags = {"exp_name": exp_name, "seed": seed, "corridor_len": 160} | flags
    (path / "args.json").write_text(json.dumps(flags))
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
    _, _, head, _, *rows = (tmp_path / "table.md").read_text().split("\n\nMean")[0].splitlines()
    assert head.startswith("| exp_name | memory_len | seed | steps | solved at step | minutes until solved |")
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[:3] for row in cells] == [
        ["gtrxl", "128", "1"],
        ["gtrxl", "128", "2"],
        ["gtrxl", "128", "**all**"],
        ["gtrxl", "256", "1"],
        ["lstm", "", "1"],
    ]
    assert cells[0][3:6] == ["300", "100", "1.0"] and cells[2][4] == "2 of 2, median 100"
    assert (tmp_path / "table.png").exists()


def test_two_settings_are_compared(tmp_path, capsys):
    """Their difference has Welch's interval. A second table has the means over each tenth of the longest run."""
    folders = [run_folder(tmp_path / f"{i}", name, i % 3) for i, name in enumerate(["gru"] * 3 + ["lstm"] * 3)]
    for i, folder in enumerate(folders):
        evaluation = {kind: {"success": [0.9 - 0.1 * i]} for kind in ("sampled", "greedy")}
        Path(folder, "evaluation.json").write_text(json.dumps(evaluation))
    main(str(tmp_path / "table"), folders)
    text = (tmp_path / "table.md").read_text()
    difference = "success, sampled: 0.300 ± 0.227"  # by hand: 2.776 * sqrt(2 * 0.1**2 / 3)
    assert difference in text and difference in capsys.readouterr().out
    assert text.splitlines()[-1] == "| lstm |  |  |  | 1.000 |  |  | 1.000 |  |  | 1.000 |", (
        "updates end at 100, 200, 300"
    )


def test_means_over_the_tenths_of_a_run():
    """They weigh updates by their episodes; a tenth in which none ended has no mean."""
    rows = rows_of((1, 0.0), (3, 1.0), (0, ""), (4, 0.5))  # at steps 100, 200, 300 and 400
    assert in_training([rows], "success", 1000) == ["0.000", "1.000", "", "0.500"] + 6 * [""]
    assert in_training([rows, rows], "success", 4000) == ["0.625"] + 9 * [""]


def test_runs_that_make_no_table(tmp_path):
    """The error names a run that has not ended, one that is there twice, another task, and a forgotten name."""
    once, again = (run_folder(tmp_path / f"tmaze_{i}", "gru", 1) for i in range(2))
    with pytest.raises(SystemExit, match="is a folder"):
        main(once, [again])
    with pytest.raises(SystemExit, match="nowhere: not the folder of a run"):
        main(str(tmp_path / "table"), [str(tmp_path / "nowhere")])
    other = run_folder(tmp_path / "other", "gru", 2, env_id="MysteryPath-v0")
    args = json.loads(Path(other, "args.json").read_text())
    Path(other, "args.json").write_text(json.dumps({k: x for k, x in args.items() if k != "corridor_len"}))
    with pytest.raises(SystemExit, match="of several tasks"):
        main(str(tmp_path / "table"), [once, other])
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

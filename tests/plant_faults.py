"""Plants small faults, one at a time, in a copy of the repository, and prints which test catches each.

    python tests/plant_faults.py            # all of them, about an hour on one core
    python tests/plant_faults.py gae clip   # those whose name contains one of the words

Prints a table. A fault is caught if one of its tests fails. The exit status is the number of faults that were not
caught.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TMAZE, WRAPPERS = "ppo_agalite_tmaze.py", "envs/wrappers.py"
PPO, MEMORY = "tests/test_ppo.py -k agalite_tmaze", "tests/test_memory.py -k agalite_tmaze"
KILLED = "tests/test_runs.py::test_killed_run_resumes_bit_for_bit[ppo_agalite_tmaze]"

# name: file, text, faulty text, tests that should catch it
FAULTS = {
    "the memory is cleared a step late": (
        TMAZE, "jax.tree.map(cut, (reset, cos,", "jax.tree.map(cut, (jnp.roll(reset, 1, 0), cos,", MEMORY
    ),
    "the memory is never cleared": (
        TMAZE, "keep = 1.0 - reset[..., None, None]", "keep = 1.0 - 0.0 * reset[..., None, None]", MEMORY
    ),
    "on a GPU, a chunk forgets the one before": (TMAZE, "inflow.at[0].add(decay[0] * state)", "inflow", MEMORY),
    "kernels of heads are drawn as a batch": (
        "ppo_galite_tmaze.py", "sequential_vmap(lambda key: orthogonal(math.sqrt(2))(key, shape, dtype))(key)",
        "orthogonal(math.sqrt(2))(key, shape, dtype)", "tests/test_ppo.py -k one_by_one"
    ),
    "time is not counted from the start of an episode": (
        TMAZE, "jnp.where(reset, 2, tick + 1)", "(tick + 1)", "tests/test_agalite.py"
    ),
    "time starts at 1": (
        TMAZE, "jnp.where(reset, 2, tick + 1)", "jnp.where(reset, 1, tick + 1)", "tests/test_agalite.py"
    ),
    "both cosines of an odd r count twice": (TMAZE, ".at[self.args.r // 2 :].set(1.0)", "", "tests/test_agalite.py"),
    "p1 and p2 are exchanged": (
        TMAZE, "beta, gamma, p1, p2, p3))", "beta, gamma, p2, p1, p3))", "tests/test_agalite.py"
    ),
    "the gate's bias has the wrong sign": (
        TMAZE, "nn.sigmoid(z_y + z_x - bias)", "nn.sigmoid(z_y + z_x + bias)", "tests/test_agalite.py"
    ),
    "GTrXL sees one step less": (
        "ppo_gtrxl_tmaze.py", "positions[::-1])", "positions[::-1]).at[..., 0].set(-jnp.inf)", "tests/test_gtrxl.py"
    ),
    "GTrXL sees other episodes": (
        "ppo_gtrxl_tmaze.py", "jnp.moveaxis(same_episode, -1, 1)", "jnp.moveaxis(same_episode | True, -1, 1)",
        "tests/test_memory.py -k gtrxl_tmaze"
    ),
    "an LSTM that is not reset": (
        "ppo_lstm_tmaze.py", "jnp.where(reset[:, None], 0.0, m)", "m", "tests/test_memory.py -k lstm_tmaze"
    ),
    "the recurrent kernel's gradient is a step late": (
        "ppo_gru_tmaze.py", '"tbi,tbj->ij", previous,', '"tbi,tbj->ij", jnp.roll(previous, 1, 0),',
        "tests/test_rnn.py"
    ),
    "the memory is not stored": (TMAZE, "obs=obs, reset=done, memory=memory)", "obs=obs, reset=done)", PPO),
    "the memory after the rollout is learnt from": (
        TMAZE, "learn(args, runner.train_state, learn_key, start.memory,",
        "learn(args, runner.train_state, learn_key, runner.memory,", PPO
    ),
    "the first observation is not marked": (
        TMAZE, "env_state=env_state, obs=obs, reset=done", "env_state=env_state, obs=obs", PPO
    ),
    "GAE takes the flag of the start for that of the end": (
        TMAZE, "discount = gamma * (1 - transition.done)", "discount = gamma * (1 - transition.reset)", PPO
    ),
    "GAE leaves out the last value": (
        TMAZE, "(jnp.zeros_like(last_value), last_value)", "(0 * last_value, 0 * last_value)", PPO
    ),
    "GAE goes on past the end": (
        TMAZE, "advantage = delta + discount * gae_lambda", "advantage = delta + gamma * gae_lambda", PPO
    ),
    "value targets use the other lambda": (
        TMAZE, "args.gamma, args.critic_lambda)", "args.gamma, args.gae_lambda)", PPO
    ),
    "the ratio has the log-probability of another step": (
        TMAZE, "batch.action) - batch.log_prob", "batch.action) - jnp.roll(batch.log_prob, 1, 0)", PPO
    ),
    "the ratio is clipped on the wrong side": (
        TMAZE, "-jnp.minimum(ratio * advantage", "-jnp.maximum(ratio * advantage", PPO
    ),
    "the value is clipped the wrong way": (
        TMAZE, "jnp.maximum(squared_error, jnp.square", "jnp.minimum(squared_error, jnp.square", PPO
    ),
    "the entropy bonus is a penalty": (TMAZE, "policy_loss - args.ent_coef", "policy_loss + args.ent_coef", PPO),
    "advantages keep their mean": (TMAZE, "(advantage - advantage.mean())", "advantage", PPO),
    "a minibatch has the memory of other environments": (
        TMAZE, "lambda x: choose(x, chosen), memory)", "lambda x: choose(x, (chosen + 1) % K), memory)", PPO
    ),
    "a minibatch has environments twice": (
        TMAZE, "jax.random.permutation(key, K)", "jax.random.randint(key, (K,), 0, K)", PPO
    ),
    "the learning rate is not annealed": (
        TMAZE, "* (1 - update / self.num_updates) if self.anneal_lr", "if self.anneal_lr", PPO
    ),
    "the learning rate ends an update too soon": (
        TMAZE, "(1 - update / self.num_updates", "(1 - (update + 1) / self.num_updates", PPO
    ),
    "gradients are not clipped": (
        TMAZE, "optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adam)", "optax.chain(adam)", PPO
    ),
    "each update has the same noise": (TMAZE, "start = runner._replace(key=key, ", "start = runner._replace(", PPO),
    "each seed has the same noise": (
        TMAZE, "init(args, env, agent, jax.random.key(seed))", "init(args, env, agent, jax.random.key(0 * seed))",
        "tests/test_cli.py -k several_seeds"
    ),
    "the value ignores the time limit": (
        TMAZE, "value = value * (1 - self.args.gamma**steps_left if self.args.gamma < 1 else 1)", "value = value", PPO
    ),
    "the time limit comes a step too late": (
        TMAZE, "self.args.gamma**steps_left", "self.args.gamma**(steps_left + 1)", PPO
    ),
    "means are over all steps": (
        TMAZE, "jnp.sum(x * transitions.done) / jnp.maximum(num_ended, 1)", "jnp.sum(x) / jnp.maximum(num_ended, 1)",
        "tests/test_ppo.py tests/test_runs.py -k agalite_tmaze"
    ),
    "an evaluation counts later episodes": (
        TMAZE, "jnp.where(done & ~finished, info[name], old)", "jnp.where(done, info[name], old)",
        "tests/test_ppo.py tests/test_runs.py -k agalite_tmaze"
    ),
    "a checkpoint has another key": (
        TMAZE, "args=ocp.args.StandardSave(state))",
        "args=ocp.args.StandardSave(state._replace(key=jax.vmap(jax.random.key)(jnp.arange(num_seeds)))))",
        KILLED
    ),
    "a resumed run repeats a row": (
        TMAZE, 'int(row["update"]) <= start]', 'int(row["update"]) <= start + 1]', KILLED
    ),
    "NaN is saved": (TMAZE, "if not np.isfinite(value)]", "if value is None]", "tests/test_faults.py -k diverging"),
    "an evaluation has exploration noise": (
        TMAZE, "dataclasses.replace(args, logit_noise=0.0)", "args",
        "tests/test_cli.py::test_evaluations_have_no_exploration_noise[ppo_agalite_tmaze]"
    ),
    "an evaluation shares keys with the training": (
        TMAZE, '"greedy"), start=3)', '"greedy"), start=1)', "tests/test_ppo.py -k noise_differs"
    ),
    "the seed is not read": (
        TMAZE, "shardings[0])(args.seed + jnp", "shardings[0])(jnp",
        "tests/test_cli.py::test_the_seed_decides_what_is_drawn[ppo_agalite_tmaze]"
    ),
    "workers are started before the signals are blocked": (
        "envs/workers.py", "signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_PARENT)\n\n    def", "pass\n\n    def",
        "tests/test_workers.py -k signals"
    ),
    "noise is drawn in each step": (
        WRAPPERS, "return jnp.append(state.noise, obs), state._replace",
        "return jnp.append(jax.random.normal(key, (self.size,)), obs), state._replace",
        "tests/test_wrappers.py"
    ),
    "all environments reset to the same state": (
        WRAPPERS, "math.gcd(self.num_fresh, 4)", "1", "tests/test_wrappers.py"
    ),
    "the pool is not refreshed": (
        WRAPPERS, "_replace(pool=self._draw_pool(key, params), ", "_replace(", "tests/test_wrappers.py"
    ),
    "the return goes on after the end": (
        WRAPPERS, "(first_obs, first_state), (obs, state))",
        "(first_obs, first_state._replace(episodic_return=state.episodic_return)), (obs, state))",
        "tests/test_wrappers.py"
    ),
    "the cue is seen twice": (
        "envs/tmaze.py", "self._observation(jnp.zeros(2),", "self._observation(jnp.ones(2) * (state.time == 1),",
        "tests/test_tmaze.py"
    ),
    "the junction costs nothing": (
        "envs/tmaze.py", "jnp.where(success, 4.0, -1.0), -0.1)",
        "jnp.where(success, 4.0, -1.0), -0.1 * ~(state.position == junction))", "tests/test_tmaze.py"
    ),
    "Mystery Path: a fall goes unseen": (
        "envs/mysterypath.py", "8 * state.off_path + state.rotation", "state.rotation", "tests/test_mysterypath.py"
    ),
    "the learning rate falls over a part of an update": (
        TMAZE, "(1 - update / self.num_updates)", "(1 - update / (self.total_timesteps / self.batch_size))", PPO
    ),
    "negative rates are accepted": (TMAZE, '"logit_noise learning_rate adam_eps', '"adam_eps', "tests/test_cli.py"),
    "the environments start from the key of the next update": (
        TMAZE, "env.reset(env_key, env.default_params)\n    reset", "env.reset(key, env.default_params)\n    reset",
        "tests/test_ppo.py -k init_uses"
    ),
    "an evaluation does not depend on the seed": (
        TMAZE, "(args.seed + jnp.arange(args.num_seeds))\n    margin", "(jnp.arange(args.num_seeds))\n    margin",
        "tests/test_ppo.py -k noise_differs"
    ),
    "the learning rate is that of the next update": (
        TMAZE, "learning_rate_at(runner.train_state.step)", "learning_rate_at(train_state.step)",
        "tests/test_ppo.py -k what_is_learnt"
    ),
    "a video repeats its noise": (
        WRAPPERS, "key, action_key, env_key = jax.random.split(key, 3)\n        logits",
        "_, action_key, env_key = jax.random.split(key, 3)\n        logits", "tests/test_wrappers.py -k video"
    ),
    "an unforeseen error ends with exit status 0": (
        TMAZE, "    except OSError as error:\n        raise SystemExit(f'{error}. If",
        "    except RuntimeError as error:\n        print(error)\n"
        "    except OSError as error:\n        raise SystemExit(f'{error}. If",
        "tests/test_cli.py -k unforeseen"
    ),
    "GTrXL's embedding is orthogonal": (
        "ppo_gtrxl_tmaze.py", 'nn.Dense(args.d_model, name="embedding")', 'dense(args.d_model, name="embedding")',
        "tests/test_gtrxl.py -k initial"
    ),
    "Memory Maze: the learning rate is constant": (
        "ppo_agalite_memorymaze.py", "optax.adam(args.learning_rate_at,", "optax.adam(args.learning_rate_at(0),",
        "tests/test_memorymaze_scripts.py -k clips_and_anneals"
    ),
    "Memory Maze: a resumed run plays its first mazes again": (
        "ppo_agalite_memorymaze.py", "initial_memory, 0, start)", "initial_memory, 0, 0)",
        "tests/test_memorymaze_scripts.py -k main_passes"
    ),
    "Memory Maze: an update in which no episode ends": (
        "ppo_agalite_memorymaze.py", "np.mean(episodes or [(0.0, 0.0)], axis=0)", "np.mean(episodes, axis=0)",
        "tests/test_memorymaze_scripts.py -k no_episode_ends"
    ),
    "Memory Maze: the next maze depends on the last one": (
        "envs/memorymaze.py", "            target.initialize_episode_mjcf(random)", "            pass",
        "tests/test_memorymaze.py"
    ),
    "Memory Maze: an encoder without the relu between its convolutions": (
        "ppo_agalite_memorymaze.py", "Conv3x3(features)(nn.relu(y))", "Conv3x3(features)(y)",
        "tests/test_memorymaze_scripts.py -k impalas"
    ),
    "Craftax: bits in the wrong order": (
        "envs/craftax.py", "packbits(view != 0, axis=-1)", 'packbits(view != 0, axis=-1, bitorder="little")',
        "tests/test_craftax.py"
    ),
}  # fmt: skip


def caught_by(file: str, text: str, faulty: str, tests: str) -> str | None:
    """The first test that fails with the fault, None if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__", "docs"))
        source = (copy / file).read_text()
        assert source.count(text) == 1, f"{source.count(text)} times in {file}: {text}"
        (copy / file).write_text(source.replace(text, faulty))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.M)
    assert done.returncode in (0, 1) and bool(failed) == (done.returncode == 1), done.stdout[-2000:] + done.stderr
    return failed[1] if failed else None


def main(words: list[str]) -> int:
    missed = 0
    print("| fault | caught by |\n| --- | --- |")
    for name, fault in FAULTS.items():
        if not words or any(word in name for word in words):
            test = caught_by(*fault)
            missed += test is None
            print(f"| {name} | {f'`{test}`' if test else '**nothing**'} |", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

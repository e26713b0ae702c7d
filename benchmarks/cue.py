"""Where a trained agent of the T-Maze keeps the cue, from the entrance to the junction.

    python benchmarks/cue.py ppo_agalite_tmaze.py runs/tmaze__ppo_agalite_tmaze__5__...

The agent is made to walk straight to the junction in 512 episodes. For each array of its memory, for its logits and its
value, the table shows the share of the variance between episodes that the cue explains: 1 if all episodes with the same
cue are alike, about 0 if the cue makes no difference. The rest comes from the distractors. If a run has several seeds,
this reads the first.
"""

import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

sys.path.insert(0, str(Path(__file__).parents[1]))
from envs.tmaze import RIGHT  # noqa: E402

EPISODES = 512


def explained(x, is_down):
    """Share of the variance of x (B, ...) that the cue explains; is_down (B,) is 1 or 0."""
    x = x.reshape(len(x), -1) - x.reshape(len(x), -1).mean(0)
    share, total = is_down.mean(), jnp.square(x).mean(0).sum()
    down, up = is_down @ x / is_down.sum(), (1 - is_down) @ x / (1 - is_down).sum()  # means of the two cues
    between = (share * jnp.square(down) + (1 - share) * jnp.square(up)).sum()
    return jnp.where(total > 0, between / total, 0.0)


def walk(script, args, params) -> dict[str, jax.Array]:
    """-> for each array, what the cue explains after each step, (corridor_len,)."""
    env = script.make_env(args, EPISODES)
    agent = script.ActorCritic(args, env.action_space(env.default_params).n)
    first_obs, env_state = env.reset(jax.random.key(0), env.default_params)
    is_down = first_obs[:, agent.num_actions + 1]  # behind the noise and the steps left, see ActorCritic

    def step(carry, key):
        env_state, obs, reset, memory = carry
        logits, value, memory = agent.apply(params, obs[None], reset[None], memory)
        arrays = jax.tree.leaves_with_path({"memory": memory, "output": {"logits": logits[0], "value": value[0]}})
        shares = {jax.tree_util.keystr(path, simple=True, separator="."): explained(x, is_down) for path, x in arrays}
        obs, env_state, _, reset, _ = env.step(key, env_state, jnp.full(EPISODES, RIGHT), env.default_params)
        return (env_state, obs, reset, memory), shares

    carry = env_state, first_obs, jnp.ones(EPISODES, bool), agent.initial_memory(EPISODES)
    return jax.lax.scan(step, carry, jax.random.split(jax.random.key(1), args.corridor_len))[1]


def main(path: str, run_dir: str) -> None:
    script, folder = importlib.import_module(Path(path).stem), Path(run_dir).absolute()
    args = script.parse_args(["--evaluate", str(folder), "--logit-noise", "0"])
    checkpoints = ocp.CheckpointManager(folder / "checkpoints", item_handlers=ocp.StandardCheckpointHandler())
    if checkpoints.latest_step() is None:
        raise SystemExit(f"{folder} has no checkpoint")
    saved = checkpoints.restore(checkpoints.latest_step(), args=ocp.args.StandardRestore())
    params = jax.tree.map(lambda x: x[0], saved["train_state"]["params"])
    table = jax.jit(lambda params: walk(script, args, params))(params)
    cells = [(args.corridor_len - 1) * i // 4 for i in range(5)]
    print(f"| cell | {' | '.join(map(str, cells))} |\n" + "| --- " * 6 + "|")
    for name, shares in table.items():
        print(f"| {name} | {' | '.join(f'{shares[cell]:.3f}' for cell in cells)} |")


if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(sys.argv[1]).name.endswith("_tmaze.py"):
        raise SystemExit(f"usage: {sys.argv[0]} ppo_<memory>_tmaze.py RUN_FOLDER")
    main(*sys.argv[1:])

"""Where a trained agent of the T-Maze keeps the cue, from the entrance to the junction.

    python benchmarks/cue.py ppo_agalite_tmaze.py runs/tmaze__ppo_agalite_tmaze__5__...

The agent is made to walk straight to the junction in 512 episodes: its own actions are ignored, so that at each step
all episodes are in the same cell and differ only in the cue and the distractors. For five cells, the table shows which
share of the variance between episodes the cue explains, in each array of the memory after the step, in the logits and
in the value: 1 if episodes with the same cue are all alike, about 0.002 by chance. Layers are counted from 0. If a run
has several seeds, this reads the first.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.scripts import load
from envs.tmaze import RIGHT

EPISODES = 512


def explained(x, is_down):
    """Variance of the two cues' means, as a share of the variance of x (B, ...). is_down (B,) is 1 or 0: the cue."""
    flat, fraction = x.reshape(len(x), -1), is_down.mean()  # (B, n), ()
    mean_down, mean_up = is_down @ flat / is_down.sum(), (1 - is_down) @ flat / (1 - is_down).sum()  # (n,) each
    of_means, total = fraction * (1 - fraction) * jnp.square(mean_down - mean_up).sum(), flat.var(axis=0).sum()
    return jnp.where(total > 0, of_means / total, 0.0)


def walk(script, args, params) -> dict[str, jax.Array]:
    """-> for each array, the share that the cue explains in each cell, (corridor_len,)."""
    env = script.make_env(args, EPISODES)
    agent = script.ActorCritic(args, env.action_space(env.default_params).n)
    first_obs, env_state = env.reset(jax.random.key(0), env.default_params)
    is_down = first_obs[:, agent.num_actions + 1]  # an observation: noise (4,), steps left (1,), cue (down, up), ...

    def step(carry, key):
        env_state, obs, reset, memory = carry
        logits, value, memory = agent.apply(params, obs[None], reset[None], memory)  # (1, B, A), (1, B)
        arrays = jax.tree.leaves_with_path({"memory": memory, "output": {"logits": logits[0], "value": value[0]}})
        shares = {jax.tree_util.keystr(path, simple=True, separator="."): explained(x, is_down) for path, x in arrays}
        obs, env_state, _, done, _ = env.step(key, env_state, jnp.full(EPISODES, RIGHT), env.default_params)
        return (env_state, obs, done, memory), shares

    carry = env_state, first_obs, jnp.ones(EPISODES, bool), agent.initial_memory(EPISODES)
    return jax.lax.scan(step, carry, jax.random.split(jax.random.key(1), args.corridor_len))[1]


def main(path: str, run_dir: str) -> None:
    script, folder = load(path, "_tmaze.py"), Path(run_dir).absolute()
    args = script.parse_args(["--evaluate", str(folder), "--logit-noise", "0"])  # the flags of the run, without noise
    if args.exp_name.endswith("_without_memory"):
        raise SystemExit(f"{folder} was trained without memory, which this script would give back")
    checkpoints = ocp.CheckpointManager(folder / "checkpoints", item_handlers=ocp.StandardCheckpointHandler())
    if checkpoints.latest_step() is None:
        raise SystemExit(f"{folder} has no checkpoint")
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # whatever devices the run had
    saved = checkpoints.restore(checkpoints.latest_step(), args=ocp.args.StandardRestore(fallback_sharding=one_device))
    params = jax.tree.map(lambda x: x[0], saved["train_state"]["params"])  # of the first seed
    table = jax.jit(lambda params: walk(script, args, params))(params)
    cells = [(args.corridor_len - 1) * i // 4 for i in range(5)]  # from the entrance to the junction
    print(f"| cell | {' | '.join(map(str, cells))} |\n" + "| --- " * (len(cells) + 1) + "|")
    for name, shares in table.items():
        print(f"| {name} | {' | '.join(f'{shares[cell]:.3f}' for cell in cells)} |")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(f"usage: {sys.argv[0]} ppo_<memory>_tmaze.py RUN_FOLDER")
    main(*sys.argv[1:])

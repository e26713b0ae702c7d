"""Records from Memory Gym what tests/test_mysterypath.py compares with, and the sprites of envs/mysterypath.py.

    python3.11 -m venv memory-gym && memory-gym/bin/pip install memory-gym==1.0.2
    memory-gym/bin/python tests/record_mysterypath.py

Memory Gym (Pleines et al. 2023; github.com/MarcoMeter/drl-memory-gym) pins old versions of gymnasium and pygame, hence
the separate virtual environment. The same seeds give the same files. It writes

- envs/mysterypath.npz: `sprites` (2, 8, 15, 15, 3), without and with the red cross, by rotation in steps of 45 degrees;
- tests/fixtures/mysterypath_generator.npz: 1,000 sets of random draws and the paths they gave, and the lengths
  and tiles of 10,000 paths;
- tests/fixtures/<environment id>.npz, one for each: draws, actions, rewards, ends and the CRC-32 of every image of
  E episodes, one after another, and all pixels of the first few.
"""

import os
import sys
import zlib
from pathlib import Path

os.environ["SDL_VIDEODRIVER"] = "dummy"
import gymnasium
import memory_gym  # noqa: F401 (registers the environments)
import numpy as np
import pygame
from gymnasium.utils.seeding import np_random

ROOT = Path(__file__).resolve().parents[1]
# The options with which the AGaLiTe paper's authors reset the Easy variants; all others are Memory Gym's defaults.
EASY = {"show_origin": True, "show_goal": True, "reward_path_progress": 0.1}
IDS = {
    "MysteryPath-Grid-Easy-v0": ("MysteryPath-Grid-v0", EASY),
    "MysteryPath-Easy-v0": ("MysteryPath-v0", EASY),
    "MysteryPath-Grid-v0": ("MysteryPath-Grid-v0", {}),
    "MysteryPath-v0": ("MysteryPath-v0", {}),
}
NOOP, TURN_LEFT, TURN_RIGHT, FORWARD = range(4)
WALLS, BORDER_WALLS, NOISE = 16, 8, 84  # most draws of each kind that a path can take


class RecordingGenerator:
    """Draws what Memory Gym's own generator would, and records (range or number of choices, outcome)."""

    def __init__(self, seed: int):
        self.generator, _ = np_random(seed)
        self.drawn = []

    def integers(self, low, high):
        self.drawn.append(((low, high), int(self.generator.integers(low, high))))
        return self.drawn[-1][1]

    def choice(self, items):
        self.drawn.append((len(items), int(self.generator.choice(len(items)))))
        return items[self.drawn[-1][1]]

    def draws(self) -> dict:
        """-> the draws of one path by purpose, in the order drawn; lists are padded with -1."""
        kinds, values = zip(*self.drawn, strict=True)
        border, noise = kinds.index(2) + 1, kinds.index((1, 9))
        assert kinds[:3] == (4, (0, 7), (0, 7)) and kinds[3:19] == ((0, 100),) * WALLS and border == 20
        assert set(kinds[noise:]) == {(1, 9)}

        def padded(values, length, dtype):
            return np.array(values + (-1,) * (length - len(values)), dtype)

        return {
            "origin": np.int8(values[0]),
            "ends": np.array(values[1:3], np.int8),
            "walls": np.array(values[3:19], np.int8),
            "wall_count": np.int8(values[19]),
            "border_choice": padded(values[border:noise], BORDER_WALLS, np.int8),
            "border_choices": padded(kinds[border:noise], BORDER_WALLS, np.int8),  # how many tiles to choose from
            "noise": padded(values[noise:], NOISE, np.int8),
        }


def make(name: str):
    return gymnasium.make(name, disable_env_checker=True).unwrapped


def reset(env, seed: int, options: dict):
    """-> first image (84, 84, 3), draws. Equals env.reset(seed=seed, options=options), which records nothing."""
    env._np_random = RecordingGenerator(seed)
    obs, _ = env.reset(options=options)
    return obs, env._np_random.draws()


def path_of(env) -> list[tuple[int, int]]:
    """-> tiles (x, y) from start to goal."""
    return [(node.x, node.y) for node in reversed(env.mystery_path.path)]


def path_arrays(env) -> dict:
    tiles = np.zeros((7, 7), bool)
    tiles[tuple(zip(*path_of(env), strict=True))] = True
    return {"path": tiles, "start": np.array(env.start, np.int8), "goal": np.array(env.end, np.int8)}


def stack(rows: list[dict]) -> dict:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def next_tile(env) -> tuple[int, int] | None:
    """The next tile of the path; None if the agent is not on the path."""
    path, tile = path_of(env), tuple(int(i) for i in env.normalized_agent_position)
    return path[path.index(tile) + 1] if tile in path and not env.is_off_path else None


def seek_on_grid(env) -> int:
    """The action that leads to the goal. It looks at the path, which an agent cannot."""
    target = next_tile(env)
    if target is None:
        return NOOP
    x, y = env.agent.grid_position
    heading = {(0, -1): 0, (-1, 0): 90, (0, 1): 180, (1, 0): 270}[target[0] - x, target[1] - y]
    turn = (heading - env.agent.rotation) % 360
    return {0: FORWARD, 90: TURN_LEFT, 180: TURN_LEFT, 270: TURN_RIGHT}[turn]


def seek_in_continuum(env) -> int:
    target = next_tile(env)
    if target is None:
        return NOOP
    way = [12 * i + 6 - center for i, center in zip(target, env.agent.rect.center, strict=True)]
    horizontal, vertical = (0 if abs(d) < 2 else 1 if d < 0 else 2 for d in way)
    return 3 * horizontal + vertical


def on_grid(env) -> bool:
    return "Grid" in type(env).__name__


def seek(env) -> int:
    return seek_on_grid(env) if on_grid(env) else seek_in_continuum(env)


def steps_to_goal(env, seed: int, options: dict) -> int:
    reset(env, seed, options)
    steps, done = 0, False
    while not done:
        _, _, done, _, info = env.step(native(env, seek(env)))
        steps += 1
    assert info["success"]
    return steps


def native(env, action: int):
    """The action in Memory Gym's format."""
    return action if on_grid(env) else list(divmod(action, 3))


def random_policy(env, seed: int, repeat: float):
    """-> a function of time that gives random actions, each repeated with probability `repeat`."""
    rng, last = np.random.default_rng(seed), [0]

    def act(time):
        if rng.random() >= repeat:
            last[0] = int(rng.integers(4 if on_grid(env) else 9))
        return last[0]

    return act


def seeking_policy(env, seed: int, noise: float = 0.0, wait: int = 0):
    """-> a function of time that waits and then seeks the goal, with a share `noise` of random actions."""
    rng, random = np.random.default_rng(seed), random_policy(env, seed, repeat=0)
    return lambda time: NOOP if time < wait else random(time) if rng.random() < noise else seek(env)


def make_policy(env, seed: int, options: dict):
    """One of seven policies, in turn. It changes the environment's state: reset it afterwards."""
    grid = on_grid(env)
    slack = (128 if grid else 512) - steps_to_goal(env, seed, options)
    return [
        seeking_policy(env, seed),
        random_policy(env, seed, repeat=0.0 if grid else 0.8),
        seeking_policy(env, seed, noise=0.1),
        seeking_policy(env, seed, noise=0.3),
        random_policy(env, seed, repeat=0.5 if grid else 0.9),
        seeking_policy(env, seed, wait=slack),  # reaches the goal in the last step
        seeking_policy(env, seed, wait=slack + 1),  # would reach it one step later
    ][seed % 7]


def record_episode(env, seed: int, options: dict) -> tuple[dict, list[dict], np.ndarray]:
    """-> data per episode, data per step, images (T + 1, 84, 84, 3)."""
    policy = make_policy(env, seed, options)
    obs, draws = reset(env, seed, options)
    episode = draws | path_arrays(env)
    images, steps, done = [obs], [], False
    while not done:
        action = policy(len(steps))
        before, moves = env.agent.rect.center, action == FORWARD if on_grid(env) else action != NOOP
        moves = moves and not env.is_off_path
        obs, reward, done, truncated, info = env.step(native(env, action))
        assert not truncated  # Memory Gym reports its time limit as an ordinary end
        images.append(obs)
        steps.append(
            {
                "action": np.uint8(action),
                "reward": np.float32(reward),
                "done": np.bool_(done),
                # What happened, for the test to count.
                "fell": np.bool_(env.is_off_path and not done),
                "bumped": np.bool_(moves and env.agent.rect.center == before),
                "rotation": np.uint8(env.agent.rotation // 45),
            }
        )
    episode |= {"length": np.int16(len(steps)), "success": np.bool_(info["success"])}
    return episode, steps, np.stack(images)


def record_episodes(env_id: str, num_episodes: int = 105, num_shown: int = 4) -> dict:
    name, options = IDS[env_id]
    env = make(name)
    first_seed = 1000 * (1 + list(IDS).index(env_id))
    episodes, steps, crc, shown = [], [], [], []
    for i in range(num_episodes):
        episode, episode_steps, images = record_episode(env, first_seed + i, options)
        episodes.append(episode)
        steps += episode_steps
        crc += [zlib.crc32(image.tobytes()) for image in images]
        if i < num_shown:
            shown.append(images)
    return stack(episodes) | stack(steps) | {"crc": np.array(crc, np.uint32), "pictures": np.concatenate(shown)}


def record_generator(num_recorded: int = 1000, num_counted: int = 10_000) -> dict:
    env, rows = make("MysteryPath-Grid-v0"), []
    lengths, tiles = np.zeros(50, np.int32), np.zeros((7, 7), np.int32)
    for seed in range(num_counted):
        _, draws = reset(env, seed, {})
        arrays = path_arrays(env)
        lengths[arrays["path"].sum()] += 1
        tiles += arrays["path"]
        if seed < num_recorded:
            rows.append(draws | arrays)
        if seed < 20:  # recording must change nothing
            recorded = path_of(env)
            env._np_random = None
            env.reset(seed=seed, options={})
            assert path_of(env) == recorded
    return stack(rows) | {"lengths": lengths, "tiles": tiles}


def record_sprites() -> dict:
    """The agent and the cross as pygame draws them, cut to 15 x 15 with the agent's center at (8, 8).

    Transparent pixels are 1 in all channels; no sprite has this colour.
    """
    env = make("MysteryPath-v0")
    env.reset(seed=0)
    cross = pygame.surfarray.array3d(env.fall_off_surface)  # its center is (5, 5)
    sprites = np.ones((2, 8, 15, 15, 3), np.uint8)
    for rotation, surface in enumerate(env.agent.character_surfaces):  # their center is (14, 14)
        pixels = pygame.surfarray.array3d(surface)
        opaque = (pixels != surface.get_colorkey()[:3]).any(-1)
        assert opaque.sum() == opaque[6:21, 6:21].sum() and (pixels[opaque] != 1).all()
        sprites[:, rotation] = np.where(opaque[..., None], pixels, 1)[6:21, 6:21]
    sprites[1, :, 3:13, 3:13] = np.where(cross.any(-1, keepdims=True), cross, sprites[1, :, 3:13, 3:13])
    return {"sprites": sprites}


def main():
    fixtures = ROOT / "tests" / "fixtures"
    fixtures.mkdir(exist_ok=True)
    files = {ROOT / "envs" / "mysterypath.npz": record_sprites}
    files |= {fixtures / "mysterypath_generator.npz": record_generator}
    files |= {fixtures / f"{env_id}.npz": lambda env_id=env_id: record_episodes(env_id) for env_id in IDS}
    for path, record in files.items():
        np.savez_compressed(path, **record())
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()

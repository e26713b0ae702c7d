"""Mystery Path of Memory Gym, and the AGaLiTe paper's Easy variants of it, in pure JAX.

An agent must cross a grid on a path that it cannot see. Each step off the path puts it back at the start, and only its
memory keeps it from trying the same way again. This module reimplements Memory Gym 1.0.2 (Pleines et al. 2023, "Memory
Gym: Partially Observable Challenges to Memory-Based Agents", github.com/MarcoMeter/drl-memory-gym), and equals it in
every pixel, reward and episode end (tests/test_mysterypath.py). The Easy variants are those of Pramanik et al. 2024.
Every function is pure and takes one environment: `jax.vmap` makes the batch.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces
from PIL import Image, ImageDraw, ImageFont

SIDE, TILE = 7, 12  # tiles per side, pixels per tile
TILES, SIZE = SIDE * SIDE, SIDE * TILE  # tiles of the grid, pixels per side of the image
MARGIN = 6  # pixels that the agent's center keeps from the edge of the image

# Actions on the grid. Without a grid, action 3 h + v moves by h and v, each 0: none, 1: left or up, 2: right or down.
NOOP, TURN_LEFT, TURN_RIGHT, FORWARD = range(4)
# The agent's rotation r is 45 r degrees counter-clockwise from up. By rotation: the direction it faces, and without a
# grid its speed in pixels per step along each axis; on a diagonal, int(3 / sqrt(2)) = 2.
HEADING = np.array([(0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1)])
SPEED = np.array([3, 2] * 4)
ROTATION = np.array([0, 0, 4, 2, 1, 3, 6, 7, 5])  # by action 3 h + v; action 0 does not turn

# Tiles are numbered SIDE * x + y. The neighbours of a tile are right, left, down and up, in this order; a step off
# the grid leads to the tile itself.
X, Y = np.divmod(np.arange(TILES), SIDE)
ON_BORDER = (X % (SIDE - 1) == 0) | (Y % (SIDE - 1) == 0)
within = lambda coordinate: np.clip(coordinate, 0, SIDE - 1)
NEIGHBOURS = SIDE * within(X[:, None] + [1, -1, 0, 0]) + within(Y[:, None] + [0, 0, 1, -1])  # (49, 4)
DISTANCE = np.hypot(X[:, None] - X, Y[:, None] - Y).astype(np.float32)  # (49, 49)

# The agent without and with the red cross, by rotation, (2, 8, 15, 15, 3) with its center at (8, 8), as recorded by
# tests/record_mysterypath.py. Each is in the middle of a canvas so large that, whatever the agent's position, the image
# is a window of it: (16, 156, 3 * 156), as rows of bytes.
SPRITES = np.load(Path(__file__).with_suffix(".npz"))["sprites"]
TRANSPARENT = 1  # no colour of a sprite has this value in any channel
CANVAS_CENTER = SIZE - MARGIN
CANVAS = np.pad(
    SPRITES.reshape(16, 15, 15, 3),
    ((0, 0), *[(CANVAS_CENTER - 8, CANVAS_CENTER - 7)] * 2, (0, 0)),
    constant_values=TRANSPARENT,
).reshape(16, 2 * CANVAS_CENTER, -1)

# For render: names of the actions, by the number of actions, and colours.
ACTION_NAMES = {
    4: ("wait", "turn left", "turn right", "forward"),
    9: ("stay", "up", "down", "left", "left, up", "left, down", "right", "right, up", "right, down"),
}
INK, DIM, FLOOR, AGENT, GOOD, BAD = "#2b2f36", "#8d949e", "#e1e5eb", "#3267a8", "#3f8f5a", "#b8463f"
START, GOAL, PATH, MET = "#3d5fe0", "#3fc05a", "#ffffff", "#f3d9a9"


class EnvParams(NamedTuple):
    max_episode_steps: int  # the time limit
    progress_reward: float  # for each tile of the path at the first visit, except start and goal
    show_start: bool  # as a blue tile
    show_goal: bool  # as a green tile


# The last two have Memory Gym's defaults. The Easy ones, the paper's, show start and goal and reward progress. In all
# four, a red cross shows where the agent fell, which costs nothing.
ENVIRONMENTS = {
    "MysteryPath-Grid-Easy-v0": EnvParams(128, 0.1, True, True),
    "MysteryPath-Easy-v0": EnvParams(512, 0.1, True, True),
    "MysteryPath-Grid-v0": EnvParams(128, 0.0, False, False),
    "MysteryPath-v0": EnvParams(512, 0.1, False, False),
}


class Route(NamedTuple):
    start: jax.Array  # () int32 tile
    goal: jax.Array  # () int32 tile
    path: jax.Array  # (49,) bool, the tiles from start to goal, both included


class EnvState(NamedTuple):
    route: Route
    met: jax.Array  # (49,) bool, tiles of the path that the agent has been paid for
    position: jax.Array  # (2,) int32, the agent's center in pixels
    rotation: jax.Array  # () int32, in units of 45 degrees, 0: up, 2: left
    off_path: jax.Array  # () bool, whether it fell in the last step and will be put back in the next
    time: jax.Array  # () int32, steps taken in this episode


def center(tile: jax.Array) -> jax.Array:
    """-> (2,) pixels."""
    return TILE * jnp.stack([tile // SIDE, tile % SIDE]) + TILE // 2


class MysteryPath:
    """A grid of 7 x 7 tiles with an invisible path from one border to the opposite one.

    Observation, (84, 84, 3) uint8, [x, y, channel] as Memory Gym has it: to look at one, transpose it. It shows the
    agent, a red cross while it is off the path and, if params say so, start and goal.

    env_id is one of ENVIRONMENTS. With "Grid" the actions are 0 wait, 1 turn left, 2 turn right, 3 one tile forward.
    Without it the 9 actions are the moves 3 h + v, horizontally and vertically 0: not, 1: left or up, 2: right or down.

    The goal ends the episode with +1. A tile of the path that is met for the first time pays params.progress_reward.
    In the step after a fall the agent is put back at the start, whatever its action.

    Raises ValueError for an unknown env_id.
    """

    outcomes = {"charts/success_rate": "success"}  # metric: the entry of info, averaged over episodes that ended

    def __init__(self, env_id: str = "MysteryPath-Grid-Easy-v0"):
        if env_id not in ENVIRONMENTS:
            raise ValueError(f"env_id {env_id}: there are {', '.join(ENVIRONMENTS)}")
        self.on_grid = "Grid" in env_id
        self.default_params = ENVIRONMENTS[env_id]

    def action_space(self, params: EnvParams) -> spaces.Discrete:
        return spaces.Discrete(4 if self.on_grid else 9)

    def observation_space(self, params: EnvParams) -> spaces.Box:
        return spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)

    def reset(self, key: jax.Array, params: EnvParams) -> tuple[jax.Array, EnvState]:
        """-> first observation (84, 84, 3), state. Finding a path costs as much as many steps: see PooledReset."""
        state = self.begin(find_path(sample_draws(key)))
        return self.observe(state, params), state

    def begin(self, route: Route) -> EnvState:
        """-> the first state of an episode on this route."""
        zero, no = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
        return EnvState(route, jnp.zeros(TILES, bool), center(route.start), zero, no, zero)

    def step(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[str, jax.Array]]:
        """-> observation, state, reward () float32, done () bool, info with "success" and "truncated", () bool each.

        Nothing is random in it: key may be None.
        """
        route = state.route
        position, rotation = self._move(state, action)
        position = jnp.where(state.off_path, center(route.start), position)
        rotation = jnp.where(state.off_path, state.rotation, rotation)

        x, y = position // TILE
        tile = SIDE * x + y
        success, on_path = tile == route.goal, route.path[tile]
        progress = on_path & ~state.met[tile] & (tile != route.start) & ~success
        reward = jnp.where(success, 1.0, jnp.where(progress, params.progress_reward, 0.0)).astype(jnp.float32)
        met = state.met | (progress & (jnp.arange(TILES) == tile))

        state = EnvState(route, met, position, rotation, ~on_path, state.time + 1)
        truncated = ~success & (state.time >= params.max_episode_steps)
        info = {"success": success, "truncated": truncated}
        return self.observe(state, params), state, reward, success | truncated, info

    def _move(self, state: EnvState, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        """-> position and rotation after an action on the path. A move stops at the edge of the image."""
        if self.on_grid:
            rotation = (state.rotation + 2 * (action == TURN_LEFT) - 2 * (action == TURN_RIGHT)) % 8
            pixels = TILE * (action == FORWARD)
        else:
            rotation = jnp.where(action == NOOP, state.rotation, jnp.asarray(ROTATION)[action])
            pixels = jnp.where(action == NOOP, 0, jnp.asarray(SPEED)[rotation])
        position = state.position + pixels * jnp.asarray(HEADING)[rotation]
        return jnp.clip(position, MARGIN, SIZE - MARGIN).astype(jnp.int32), rotation.astype(jnp.int32)

    def observe(self, state: EnvState, params: EnvParams) -> jax.Array:
        """-> the image of a state, (84, 84, 3) uint8."""
        row, column = jnp.arange(SIZE) // TILE, jnp.arange(3 * SIZE) // (3 * TILE)  # tile coordinates x and y
        channel = jnp.arange(3 * SIZE) % 3

        def colour(tile, shown, of_channel):  # (84, 252), a tile that is full in one channel
            return ((row == tile // SIDE) & shown)[:, None] & ((column == tile % SIDE) & (channel == of_channel))

        tiles = colour(state.route.start, params.show_start, 2) | colour(state.route.goal, params.show_goal, 1)
        x, y = CANVAS_CENTER - state.position
        sprite = 8 * state.off_path + state.rotation
        window = jax.lax.dynamic_slice(jnp.asarray(CANVAS), (sprite, x, 3 * y), (1, SIZE, 3 * SIZE))[0]
        image = jnp.where(window == TRANSPARENT, tiles * np.uint8(255), window)
        return image.reshape(SIZE, SIZE, 3)

    def render(self, state: EnvState, params: EnvParams, action=None, probabilities=None, reward=None) -> Image.Image:
        """-> one frame, (640, 240) RGB: the state before the action, the action and its reward. None is not drawn.

        On the left the hidden path, beside it what the agent sees. state is that of one environment, probabilities
        (4,) or (9,) the policy the action came from. Not for jit.
        """
        names, state = ACTION_NAMES[self.action_space(params).n], jax.device_get(state)
        # Everything is drawn at twice its size and halved at the end, which smooths the edges.
        image = Image.new("RGB", (1280, 480), "white")
        draw = ImageDraw.Draw(image)
        cell, left, top = 48, 40, 88

        def text(x, y, string, fill=INK, size=26, anchor="lm"):
            draw.text((x, y), string, fill, ImageFont.load_default(size), anchor)

        text(40, 44, f"step {int(state.time) + 1} of {int(params.max_episode_steps)}")
        if action is not None:
            text(320, 44, names[int(action)])
        if reward is not None:
            text(560, 44, f"reward {float(reward):+.1f}")

        # The path; tiles that have been met are shaded.
        start, goal = int(state.route.start), int(state.route.goal)
        for tile in range(TILES):
            fill = MET if state.met[tile] else PATH if state.route.path[tile] else INK
            fill = {start: START, goal: GOAL}.get(tile, fill)
            x, y = left + cell * (tile // SIDE), top + cell * (tile % SIDE)
            draw.rectangle((x + 1, y + 1, x + cell - 2, y + cell - 2), fill, outline=DIM)
        text(left + 168, 452, "path (hidden from the agent)", DIM, 23, "mm")

        # The agent as an arrow that points where it looks, and the cross where it has fallen.
        x, y = (origin + cell / TILE * int(i) for origin, i in zip((left, top), state.position, strict=True))
        dx, dy = HEADING[int(state.rotation)] / np.hypot(*HEADING[int(state.rotation)])
        draw.ellipse((x - 20, y - 20, x + 20, y + 20), AGENT)
        corners = ((15, 0), (-8, 10), (-8, -10))
        draw.polygon([(x + a * dx - b * dy, y + a * dy + b * dx) for a, b in corners], "white")
        if state.off_path:
            for slope in (-1, 1):
                draw.line((x - 20, y - 20 * slope, x + 20, y + 20 * slope), BAD, 8)

        text(416 + 168, 452, "what the agent sees", DIM, 23, "mm")

        # What the action leads to.
        if action is not None:
            step = jax.jit(type(self).step, static_argnums=0)
            _, after, _, _, info = step(self, None, state, action, params)
            endings = [(info["success"], "goal, +1", GOOD), (info["truncated"], "time limit", INK)]
            for happened, name, colour in [*endings, (after.off_path, "off the path", BAD)]:
                if happened:
                    draw.rounded_rectangle((960, 18, 1240, 70), 12, colour)
                    text(1100, 44, name, "white", 28, "mm")
                    break

        if probabilities is not None:
            height = min(46, 336 // len(names))
            for i, (name, p) in enumerate(zip(names, probabilities, strict=True)):
                y, colour = top + height * (i + 0.5), AGENT if i == action else DIM
                text(948, y, name, colour, 24, "rm")
                draw.rectangle((964, y - 12, 1152, y + 12), FLOOR)
                draw.rectangle((964, y - 12, 964 + 188 * float(p), y + 12), colour)
                text(1240, y, f"{float(p):.0%}", colour, 24, "rm")
            text(1058, 452, "policy", DIM, 23, "mm")

        image = image.resize((640, 240), Image.Resampling.LANCZOS)
        observe = jax.jit(type(self).observe, static_argnums=0)
        view = Image.fromarray(np.asarray(observe(self, state, params)).swapaxes(0, 1))
        image.paste(view.resize((168, 168), Image.Resampling.NEAREST), (208, 44))  # with every pixel as it is
        return image


class Draws(NamedTuple):
    """All that is random in a path, in the order in which Memory Gym draws it."""

    origin: jax.Array  # () int32 in [0, 4): the start is at the left, right, upper or lower border, the goal opposite
    ends: jax.Array  # (2,) int32 in [0, 7): where on their borders start and goal are
    walls: jax.Array  # (16,) int32 in [0, 100): tile (1 + i // 4, 1 + i % 4) is a wall if it is less than 33
    wall_count: jax.Array  # () int32 in [0, 2): 4 or 8 walls on the border
    border: jax.Array  # (8,) float32 in [0, 1): each of them is tile floor(border * n) of the n still possible
    noise: jax.Array  # (84,) int32 in [1, 9): costs of the steps in the order in which the search looks at them


def sample_draws(key: jax.Array) -> Draws:
    keys = jax.random.split(key, 6)
    return Draws(
        origin=jax.random.randint(keys[0], (), 0, 4),
        ends=jax.random.randint(keys[1], (2,), 0, SIDE),
        walls=jax.random.randint(keys[2], (16,), 0, 100),
        wall_count=jax.random.randint(keys[3], (), 0, 2),
        border=jax.random.uniform(keys[4], (8,)),
        noise=jax.random.randint(keys[5], (84,), 1, 9),
    )


def build_walls(draws: Draws, start: jax.Array, goal: jax.Array) -> jax.Array:
    """-> (49,) bool. No wall of the border stands beside an inner one, so there is always a way round it."""
    inner = jnp.zeros((SIDE, SIDE), bool).at[1:5, 1:5].set((draws.walls < 33).reshape(4, 4))
    # Memory Gym leaves out the border's tiles beside a wall, also diagonally, and the ends with the tiles beside them.
    beside_wall = jax.lax.reduce_window(inner, False, jnp.logical_or, (3, 3), (1, 1), "SAME").ravel()
    distance = jnp.asarray(DISTANCE)
    possible = ON_BORDER & ~beside_wall & (distance[start] > 1) & (distance[goal] > 1)

    def add_wall(i, possible):
        n = possible.sum()
        choice = jnp.floor(draws.border[i] * n).astype(jnp.int32)
        chosen = possible & (jnp.cumsum(possible) == choice + 1) & (i < 4 + 4 * draws.wall_count)
        return possible & ~chosen

    left = jax.lax.fori_loop(0, 8, add_wall, possible)
    return inner.ravel() | (possible & ~left)


NOT_IN_LIST = np.iinfo(np.int32).max


class Search(NamedTuple):
    """The state of the search for a path, (49,) each: one number per tile."""

    current: jax.Array  # () int32, the tile to expand
    place: jax.Array  # int32, 64 * (place in the list of open tiles) + tile; NOT_IN_LIST if not in it
    blocked: jax.Array  # bool, walls and tiles that have been expanded
    cost: jax.Array  # int32, of the way that a tile was first reached on
    previous: jax.Array  # int32, the tile it was last reached from
    listed: jax.Array  # () int32, how many tiles have been put in the list
    drawn: jax.Array  # () int32, how many of draws.noise have been used


def find_path(draws: Draws) -> Route:
    """The path that Memory Gym finds with these draws.

    It is A* with two peculiarities that shape the paths. Not the best open tile is expanded but the first in the list
    that is better than the head of the list, or the head if there is none. And a tile in the list that is reached on a
    cheaper way changes its predecessor, but not its cost.
    """
    last = SIDE - 1
    first_end, second_end = draws.ends[0], draws.ends[1]
    horizontal, reverse = draws.origin < 2, draws.origin % 2 == 1
    from_, to = jnp.where(reverse, last, 0), jnp.where(reverse, 0, last)
    start = jnp.where(horizontal, SIDE * from_ + first_end, SIDE * first_end + from_)
    goal = jnp.where(horizontal, SIDE * to + second_end, SIDE * second_end + to)
    tile, neighbours, distance = jnp.arange(TILES), jnp.asarray(NEIGHBOURS), jnp.asarray(DISTANCE)

    def expand(s: Search) -> Search:
        place, blocked = jnp.where(tile == s.current, NOT_IN_LIST, s.place), s.blocked | (tile == s.current)
        cost, previous, listed, drawn = s.cost, s.previous, s.listed, s.drawn
        for i in range(4):
            neighbour = neighbours[s.current, i]
            considered = ~blocked[neighbour]
            new_cost = s.cost[s.current] + draws.noise[drawn]
            new = considered & (place[neighbour] == NOT_IN_LIST)
            cheaper = considered & (new_cost < cost[neighbour])
            here = tile == neighbour
            place = jnp.where(here & new, 64 * listed + neighbour, place)
            cost = jnp.where(here & new, new_cost, cost)
            previous = jnp.where(here & (new | cheaper), s.current, previous)
            listed, drawn = listed + new, drawn + considered
        # Sums of a whole number and the root of one: those that differ do so by 0.002 or more, so float32 will do.
        estimate = cost + distance[goal]
        head = place.min()
        better = jnp.where(estimate < estimate[head % 64], place, NOT_IN_LIST).min()
        current = jnp.where(better == NOT_IN_LIST, head, better) % 64
        return Search(current, place, blocked, cost, previous, listed, drawn)

    zeros, zero = jnp.zeros(TILES, jnp.int32), jnp.zeros((), jnp.int32)
    search = Search(start, zeros + NOT_IN_LIST, build_walls(draws, start, goal), zeros, zeros, zero, zero)
    search = jax.lax.while_loop(lambda s: s.current != goal, expand, search)

    def step_back(tile_path):
        at, path = tile_path
        return search.previous[at], path | (tile == at)

    _, path = jax.lax.while_loop(lambda x: x[0] != start, step_back, (goal, tile == start))
    return Route(start, goal, path)

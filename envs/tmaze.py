"""The T-Maze of the AGaLiTe paper (Pramanik et al. 2024, after Bakker 2001), in pure JAX.

A cue is shown at the first step of a corridor. At the other end the agent must turn as the cue showed, so it must
remember the cue on the way. Every function is pure and takes one environment: `jax.vmap` makes the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces
from PIL import Image, ImageDraw, ImageFont

UP, DOWN, LEFT, RIGHT = range(4)
POSITION_BITS = 8

# For render: names and directions of the actions, and colours.
ACTION_NAMES = ("up", "down", "left", "right")
DIRECTIONS = ((0, -1), (0, 1), (-1, 0), (1, 0))
INK, DIM, FLOOR, AGENT, CUE, GOOD, BAD = "#2b2f36", "#8d949e", "#e1e5eb", "#3267a8", "#d98a1f", "#3f8f5a", "#b8463f"


class EnvParams(NamedTuple):
    corridor_len: int  # positions 0 .. corridor_len - 1; the last one is the junction
    max_episode_steps: int  # the time limit


class EnvState(NamedTuple):
    position: jax.Array  # () int32
    cue: jax.Array  # () int32, 0: up is correct, 1: down is correct
    time: jax.Array  # () int32, steps taken in this episode


class TMaze:
    """A corridor with a cue at its start and a junction at its end.

    Observation, (10 + num_distractors,) float32: 2 cue bits, (0, 1) for "up" and (1, 0) for "down" at the first step
    and (0, 0) afterwards; the position as an 8-bit Gray code, most significant bit first; distractor bits, 0 at the
    first step and fair coins afterwards. Actions: 0 up, 1 down, 2 left, 3 right.

    In the corridor left and right move by one cell, and up and down do nothing. At the junction left and right do
    nothing, and up or down ends the episode, with +4 if it agrees with the cue and -1 if not. Any other step costs 0.1.

    Raises ValueError for sizes that cannot work.
    """

    outcomes = {"charts/success_rate": "success"}  # metric: the entry of info, averaged over episodes that ended

    def __init__(self, corridor_len: int = 160, num_distractors: int = 6, max_episode_steps: int = 1000):
        if corridor_len < 2:
            raise ValueError(f"corridor_len {corridor_len}: the cue would be in sight at the junction, so at least 2")
        if corridor_len > 2**POSITION_BITS:
            raise ValueError(f"corridor_len {corridor_len}: the position is an 8-bit Gray code, so at most 256")
        if num_distractors < 0:
            raise ValueError(f"num_distractors {num_distractors}: a number of observation bits, so at least 0")
        if max_episode_steps < corridor_len:
            raise ValueError(
                f"max_episode_steps {max_episode_steps}: to walk the corridor and turn takes at least {corridor_len}"
            )
        if max_episode_steps >= 2**31:
            raise ValueError(f"max_episode_steps {max_episode_steps}: counted in 32 bits, so at most {2**31 - 1}")
        self.num_distractors = num_distractors
        self.default_params = EnvParams(corridor_len, max_episode_steps)

    def action_space(self, params: EnvParams) -> spaces.Discrete:
        return spaces.Discrete(4)

    def observation_space(self, params: EnvParams) -> spaces.Box:
        return spaces.Box(0.0, 1.0, (2 + POSITION_BITS + self.num_distractors,), np.float32)

    def reset(self, key: jax.Array, params: EnvParams) -> tuple[jax.Array, EnvState]:
        """-> first observation (10 + num_distractors,), state. The cue is a fair coin."""
        zero = jnp.zeros((), jnp.int32)
        state = EnvState(position=zero, cue=jax.random.bernoulli(key).astype(jnp.int32), time=zero)
        cue_bits = jnp.stack([state.cue, 1 - state.cue])
        return self._observation(cue_bits, state.position, jnp.zeros(self.num_distractors)), state

    def step(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[str, jax.Array]]:
        """-> observation, state, reward () float32, done () bool, info with "success" and "truncated", () bool each."""
        junction = params.corridor_len - 1
        at_junction = state.position == junction  # where left and right do nothing, as published
        turned = at_junction & (action <= DOWN)
        success = turned & (action == state.cue)
        reward = jnp.where(turned, jnp.where(success, 4.0, -1.0), -0.1)

        move = (action == RIGHT).astype(jnp.int32) - (action == LEFT)
        position = jnp.where(at_junction, junction, jnp.maximum(state.position + move, 0))
        state = EnvState(position, state.cue, state.time + 1)

        truncated = ~turned & (state.time >= params.max_episode_steps)
        distractors = jax.random.bernoulli(key, shape=(self.num_distractors,))
        obs = self._observation(jnp.zeros(2), state.position, distractors)
        return obs, state, reward, turned | truncated, {"success": success, "truncated": truncated}

    def _observation(self, cue_bits: jax.Array, position: jax.Array, distractors: jax.Array) -> jax.Array:
        gray = position ^ (position >> 1)
        position_bits = (gray >> jnp.arange(POSITION_BITS - 1, -1, -1)) & 1
        return jnp.concatenate([cue_bits, position_bits, distractors]).astype(jnp.float32)

    def render(self, state: EnvState, params: EnvParams, action=None, probabilities=None, reward=None) -> Image.Image:
        """-> one frame, (640, 240) RGB: the state before the action, the action and its reward. None is not drawn.

        state is that of one environment, probabilities (4,) the policy the action came from. Not for jit.
        """
        position, cue, time = (int(x) for x in state)
        junction, limit = int(params.corridor_len) - 1, int(params.max_episode_steps)
        turned = action is not None and position == junction and action <= DOWN
        # Everything is drawn at twice its size and halved at the end, which smooths the edges.
        image = Image.new("RGB", (1280, 480), "white")
        draw = ImageDraw.Draw(image)

        def text(x, y, string, fill=INK, size=26, anchor="mm"):
            draw.text((x, y), string, fill, ImageFont.load_default(size), anchor, align="center")

        def arrow(x, y, direction, size, **style):
            dx, dy = DIRECTIONS[int(direction)]
            shape = ((1, 0), (0, 0.8), (0, 0.3), (-1, 0.3), (-1, -0.3), (0, -0.3), (0, -0.8))
            draw.polygon([(x + size * (a * dx - b * dy), y + size * (a * dy + b * dx)) for a, b in shape], **style)

        text(40, 44, f"step {time + 1} of {limit}", anchor="lm")
        text(290, 44, f"position {position} of {junction}", anchor="lm")
        if reward is not None:
            text(570, 44, f"reward {float(reward):+.1f}", anchor="lm")

        # The cue as the agent sees it at the first step; after that only the spectator is reminded of it.
        hidden = dict(fill="white", outline=DIM, width=3)
        style, card, colour, caption = hidden, "white", DIM, "cue (hidden\nfrom the agent)"
        if time == 0:
            style, card, colour, caption = dict(fill=CUE), "#fdf3e1", CUE, "cue\n(shown now)"
        draw.rounded_rectangle((40, 128, 200, 288), 16, card, colour, 3)
        arrow(120, 208, cue, 54, **style)
        text(120, 330, caption, colour, 23)

        # The cells around the agent, with the arms of the junction once they come into view.
        cell, cells, left, middle = 64, 10, 262, 208
        first = max(0, min(position - cells // 2, junction + 1 - cells))
        last = min(first + cells - 1, junction)
        for i in range(first, last + 1):
            x = left + cell * (i - first)
            reach = 112 if i == junction else 31
            draw.rectangle((x + 1, middle - reach, x + cell - 2, middle + reach), FLOOR)
            text(x + cell / 2, middle + reach + 21, str(i), DIM, 20)
        if first > 0:
            text(left - 20, middle, "…", DIM)
        x = left + cell * (last - first + 1)
        if last < junction:
            text(x + 18, middle, "…", DIM)
        else:
            y = middle + 92 * DIRECTIONS[cue][1]
            draw.ellipse((x - 46, y - 14, x - 18, y + 14), **hidden)
            text(x - cell - 10, y, "goal", DIM, 20, "rm")
        x = left + cell * (position - first) + cell / 2
        draw.ellipse((x - 25, middle - 25, x + 25, middle + 25), AGENT)
        if action is not None:
            arrow(x, middle, action, 15, fill="white")

        # How the episode ends, if this action ends it.
        outcome = None
        if turned:
            outcome = ("correct turn, +4", GOOD) if action == cue else ("wrong turn, -1", BAD)
            arrow(x, middle + 50 * DIRECTIONS[int(action)][1], action, 25, fill=outcome[1])
        elif action is not None and time + 1 >= limit:
            outcome = ("time limit", INK)
        if outcome:
            draw.rounded_rectangle((960, 18, 1240, 70), 12, outcome[1])
            text(1100, 44, outcome[0], "white", 28)

        if probabilities is not None:
            for i, (name, p) in enumerate(zip(ACTION_NAMES, probabilities, strict=True)):
                y, colour = 139 + 46 * i, AGENT if i == action else DIM
                text(1018, y, name, colour, anchor="rm")
                draw.rectangle((1034, y - 13, 1162, y + 13), FLOOR)
                draw.rectangle((1034, y - 13, 1034 + 128 * float(p), y + 13), colour)
                text(1240, y, f"{float(p):.0%}", colour, anchor="rm")
            text(1098, 330, "policy", DIM, 23)

        # The whole corridor: the cells above are its darker part, the dot is the agent.
        start, now, end = (46 + 1182 * i / junction for i in (first, position, last))
        draw.rectangle((40, 414, 1234, 426), FLOOR)
        draw.rectangle((start - 6, 414, end + 6, 426), "#b4bcc7")
        draw.rectangle((1222, 396, 1234, 444), FLOOR)
        draw.ellipse((now - 10, 410, now + 10, 430), AGENT)
        text(40, 460, "start", DIM, 20, "lm")
        text(1240, 460, "junction", DIM, 20, "rm")
        return image.resize((640, 240), Image.Resampling.LANCZOS)

"""Craftax (Matthews et al. 2024, ICML), an open world of crafting and fighting on nine floors: the package `craftax`.

The package plays the game. Added here: observations in 27 times fewer bytes (Classic: 21), truncation separated from
termination, achievements by name, and images. Every function is pure and takes one environment: `jax.vmap` makes the
batch.
"""

import functools
import importlib
import math
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces
from PIL import Image, ImageDraw, ImageFont

from envs.wrappers import EpisodeStatistics

# The colours of render, and the side of one square of the world on the package's drawing.
INK, DIM, FLOOR, CHOSEN = "#2b2f36", "#8d949e", "#e1e5eb", "#3267a8"
SQUARE = 16


class Game(NamedTuple):
    module: str  # its place in the package
    view: tuple[int, int, int]  # rows, columns and channels of the visible map, the first part of an observation
    num_numbers: int  # the rest of an observation: inventory, health and so on, direction, light
    max_return: float  # the sum of the rewards of all achievements

    @property
    def num_bits(self) -> int:
        return math.prod(self.view)

    @property
    def obs_size(self) -> int:
        return self.num_bits + self.num_numbers

    @property
    def packed_size(self) -> int:
        return math.ceil(self.num_bits / 8) + 4 * self.num_numbers


GAMES = {
    "Craftax-Symbolic-v1": Game("craftax.craftax", (9, 11, 83), 51, 226.0),
    "Craftax-Classic-Symbolic-v1": Game("craftax.craftax_classic", (7, 9, 21), 22, 22.0),
}


def pack(obs: jax.Array) -> jax.Array:
    """(..., 8268) float32 -> (..., 1232) uint8; in Classic (..., 1345) -> (..., 254).

    An entry of the map says whether a square holds one kind of block, item or creature, or is lit: it is 0 or 1 and
    takes one bit. The numbers after the map keep their four bytes, so nothing is lost. If the map ever holds anything
    but 0 and 1, all numbers become NaN, so that training stops.

    Raises ValueError for any other size.
    """
    game = next((game for game in GAMES.values() if game.obs_size == obs.shape[-1]), None)
    if game is None:
        raise ValueError(f"an observation of {obs.shape[-1]} numbers: Craftax has 8268, Craftax Classic 1345")
    view, numbers = jnp.split(obs, [game.num_bits], axis=-1)
    is_binary = ((view == 0) | (view == 1)).all(-1, keepdims=True)
    numbers = jnp.where(is_binary, numbers, jnp.nan)
    number_bytes = jax.lax.bitcast_convert_type(numbers, jnp.uint8)  # (..., num_numbers, 4)
    number_bytes = number_bytes.reshape(*obs.shape[:-1], 4 * game.num_numbers)
    return jnp.concatenate([jnp.packbits(view != 0, axis=-1), number_bytes], axis=-1)


def unpack(packed: jax.Array) -> jax.Array:
    """The inverse of pack: (..., 1232) uint8 -> (..., 8268) float32; in Classic (..., 254) -> (..., 1345).

    Raises ValueError for any other size.
    """
    game = next((game for game in GAMES.values() if game.packed_size == packed.shape[-1]), None)
    if game is None:
        raise ValueError(f"a packed observation of {packed.shape[-1]} bytes: Craftax has 1232, Craftax Classic 254")
    view, number_bytes = jnp.split(packed, [game.packed_size - 4 * game.num_numbers], axis=-1)
    view = jnp.unpackbits(view, axis=-1, count=game.num_bits).astype(jnp.float32)
    number_bytes = number_bytes.reshape(*packed.shape[:-1], game.num_numbers, 4)
    return jnp.concatenate([view, jax.lax.bitcast_convert_type(number_bytes, jnp.float32)], axis=-1)


class Craftax:
    """Craftax or Craftax Classic, without automatic reset.

    Observation, (1232,) uint8, in Classic (254,): what the package observes, packed by `pack`; `unpack` restores it.
    Actions: 43, in Classic 17, in the order of `action_names`. Unlocking an achievement pays its reward, once per
    episode (1 to 8, in Classic 1), and each point of health gained or lost adds or subtracts 0.1.

    An episode ends by death, by victory over the last boss (not in Classic), or at params.max_timesteps (100000, in
    Classic 10000).

    Raises ValueError for an unknown env_id.
    """

    def __init__(self, env_id: str = "Craftax-Symbolic-v1"):
        if env_id not in GAMES:
            raise ValueError(f"env_id {env_id}: there are {' and '.join(GAMES)}")
        self.env_id = env_id
        self.game = GAMES[env_id]
        self.max_return = self.game.max_return

    # Imported at first use, because the import runs JAX, and jax.distributed must be initialised before that. If the
    # first use is inside jit, ensure_compile_time_eval keeps the package's constants from becoming tracers.
    @functools.cached_property
    def package_env(self):
        """The package's own environment."""
        with jax.ensure_compile_time_eval():
            from craftax.craftax_env import make_craftax_env_from_name

            return make_craftax_env_from_name(self.env_id, auto_reset=False)

    @functools.cached_property
    def achievements(self) -> tuple[str, ...]:
        """The names of the achievements, 67 or 22, in the order of info["achievements"]."""
        return self._names("Achievement")

    @functools.cached_property
    def action_names(self) -> tuple[str, ...]:
        return self._names("Action")

    def _names(self, enum: str) -> tuple[str, ...]:
        with jax.ensure_compile_time_eval():
            members = getattr(importlib.import_module(f"{self.game.module}.constants"), enum)
        return tuple(member.name.lower() for member in sorted(members, key=lambda member: member.value))

    @property
    def default_params(self):
        return self.package_env.default_params

    def action_space(self, params) -> spaces.Discrete:
        return spaces.Discrete(self.package_env.action_space(params).n)

    def observation_space(self, params) -> spaces.Box:
        return spaces.Box(0, 255, (self.game.packed_size,), np.uint8)

    def reset(self, key: jax.Array, params) -> tuple[jax.Array, Any]:
        """-> first observation (1232,) uint8, state: another world for each key."""
        obs, state = self.package_env.reset(key, params)
        # Classic's first state has weakly typed numbers, and a step makes some of them strong. Without this conversion,
        # jit would compile a script's `update` twice.
        return pack(obs), jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), state)

    def step(
        self, key: jax.Array, state, action: jax.Array, params
    ) -> tuple[jax.Array, Any, jax.Array, jax.Array, dict[str, jax.Array]]:
        """-> observation, state, reward () float32, done () bool, info.

        info has "truncated" () bool, true if only the time limit ended the episode, and "achievements" (67,) bool,
        those that the episode has unlocked so far.
        """
        obs, state, reward, done, _ = self.package_env.step(key, state, action, params)
        # The package returns only done, so evaluate its terminal condition again without the time limit.
        without_limit = params.replace(max_timesteps=jnp.iinfo(jnp.int32).max)
        truncated = done & ~self.package_env.is_terminal(state, without_limit)
        return pack(obs), state, reward, done, {"truncated": truncated, "achievements": state.achievements}

    def render(self, state, params, action=None, probabilities=None, reward=None) -> Image.Image:
        """-> one frame, RGB: the state before the action, the action and its reward. None is not drawn.

        state is that of one environment, probabilities (actions,) the policy the action came from; the likeliest are
        shown. (640, 416) pixels, in Classic (576, 288). Not for jit. The first frame takes some 10 seconds to prepare.
        """
        pixels = Image.fromarray(np.asarray(pixel_renderer(self.game.module)(state)).astype(np.uint8))
        world = pixels.resize((2 * pixels.width, 2 * pixels.height), Image.Resampling.NEAREST)
        image = Image.new("RGB", (world.width + 288, world.height), "white")
        image.paste(world)
        draw = ImageDraw.Draw(image)

        def text(x, y, string, fill=INK, anchor="lm"):
            draw.text((x, y), string, fill, ImageFont.load_default(14), anchor)

        left, right = world.width + 16, image.width - 16
        names = [name.replace("_", " ") for name in self.action_names]
        text(left, 20, f"step {int(state.timestep) + 1}")
        text(right, 20, f"{int(state.achievements.sum())} of {len(self.achievements)} achievements", anchor="rm")
        if action is not None:
            text(left, 50, names[int(action)], CHOSEN)
        if reward is not None:
            text(right, 50, f"reward {float(reward):+.1f}", anchor="rm")
        if probabilities is not None:
            probabilities = np.asarray(probabilities)
            for row, i in enumerate(np.argsort(-probabilities, kind="stable")[: (image.height - 80) // 22]):
                y, colour = 86 + 22 * row, CHOSEN if action is not None and i == int(action) else DIM
                text(left, y, names[i], colour)
                draw.rectangle((left + 150, y - 7, left + 210, y + 7), FLOOR)
                draw.rectangle((left + 150, y - 7, left + 150 + 60 * float(probabilities[i]), y + 7), colour)
                text(right, y, f"{probabilities[i]:.0%}", colour, "rm")
        return image


class CraftaxStatistics(EpisodeStatistics):
    """Around Craftax: adds the outcomes of the episode so far to info; in the step that ends it they are final.

    "score" is the return in percent of the sum of all rewards for achievements, as in the literature.
    "achievements/collect_wood" and so on say whether the episode has unlocked it.
    """

    @property
    def outcomes(self) -> dict[str, str]:
        """The entry of info for each metric, to be averaged over the episodes that ended."""
        charts = {f"charts/{name}": name for name in ("episodic_return", "episodic_length", "score")}
        return charts | {f"achievements/{name}": f"achievements/{name}" for name in self.achievements}

    def step(self, key, state, action, params):
        obs, state, reward, done, info = super().step(key, state, action, params)
        info["score"] = 100 * info["episodic_return"] / self.max_return
        unlocked = zip(self.achievements, info["achievements"], strict=True)
        info |= {f"achievements/{name}": x for name, x in unlocked}
        return obs, state, reward, done, info


@functools.cache
def pixel_renderer(module: str):
    """The package's drawing of a state, -> (rows, columns, 3) float32 from 0 to 255.

    The package would prepare its textures in three sizes, which takes a minute, and write them into its own folder,
    which may be read-only. One size takes seconds and need not be kept.
    """
    constants, renderer = (importlib.import_module(f"{module}.{name}") for name in ("constants", "renderer"))
    with mock.patch.object(
        renderer, "load_all_textures", lambda: {SQUARE: constants.load_all_textures_given_size(SQUARE)}
    ):
        return jax.jit(renderer.make_craftax_pixel_renderer(SQUARE))

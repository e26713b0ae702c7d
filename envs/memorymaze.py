"""Memory Maze (Pasukonis et al. 2022): find the object whose colour frames the image, again and again, in one maze.

The package `memory-maze` contains the rules, the mazes and the physics, on dm_control and MuJoCo. Observations and
rewards are the same here, to the last pixel (tests/compare_memorymaze.py plays whole episodes of both). This module is
faster, because

- at each of the 50 physics substeps per step, the package asks in a Python loop over all contacts whether a target is
  touched. Here MuJoCo's array of contacts is compared at once;
- the package draws everything in the maze. Here the walls and floor outside of the camera's view are left out;
- the package loads 84 texture files for each new maze, only 11 of which differ. Here these are loaded once, and all
  mazes share them;
- no step has to wait for a new maze: it is built in small parts, one per step, at the start of the previous episode.

The package has no options for any of this. So this module runs the package's own code and replaces its few slow parts
with unittest.mock; otherwise it would have to copy hundreds of lines of the package.

Importing this module registers MemoryMaze-9x9-v0, -11x11-, -13x13- and -15x15- with Gymnasium. It needs neither the
package nor OpenGL: the first reset loads them. The package's __init__ needs `gym`, which is abandoned, so only the
parts that do without it are imported.
"""

import importlib.util
import logging
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import gymnasium
import numpy as np
from gymnasium import spaces
from PIL import Image, ImageDraw

MAX_STEPS = {"9x9": 1000, "11x11": 2000, "13x13": 3000, "15x15": 4000}  # 4 steps per simulated second
ACTIONS = ("noop", "forward", "left", "right", "forward+left", "forward+right")
CONTROLS = ((0.0, 0.0), (-1.0, 0.0), (0.0, -1.0), (0.0, 1.0), (-1.0, -1.0), (-1.0, 1.0))  # roll, steer
SUBSTEPS = 50  # of physics in a step
PATIENCE = 300  # seconds for a renderer to draw its first image
VIEW, LARGE_VIEW = 64, 384  # width of an observation, and of each half of a rendered image, in pixels


class MissingDependency(RuntimeError):
    """Memory Maze needs something that is not installed; the message names it and says how to get it."""


def choose_renderer() -> str:
    """-> a value of MUJOCO_GL that works here. Raises MissingDependency if none does.

    A renderer that cannot start may crash the process, and after the import of one it is too late for another. So each
    is tried in a separate process. The choice is stored in an environment variable for the processes started later.
    """
    wanted = os.environ.get("MUJOCO_GL", "").lower()
    if wanted and os.environ.get("MEMORY_MAZE_GL_WORKS") == wanted:
        return wanted
    reasons = []
    os.environ.pop("PYOPENGL_PLATFORM", None)  # dm_control sets it; a leftover of another choice would make it fail
    for name in [wanted] if wanted else ["egl", "osmesa", "glfw"]:
        environment = os.environ | {"MUJOCO_GL": name, "DISABLE_RENDER_THREAD_OFFLOADING": "1"}  # as in import_game()
        # Some renderers start without a screen and fail at the first image, so draw one.
        script = "from dm_control import mujoco\nmujoco.Physics.from_xml_string('<mujoco/>').render(64, 64)"
        command = [sys.executable, "-c", script]
        try:
            probe = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            reasons.append(f"{name}: no image after {PATIENCE} s")
            continue
        if probe.returncode == 0:
            os.environ["MUJOCO_GL"] = os.environ["MEMORY_MAZE_GL_WORKS"] = name
            return name
        reasons.append(f"{name}: {(probe.stderr.splitlines() or [f'exit status {probe.returncode}'])[-1]}")
    tried = f" Tried {'; '.join(reasons)}"
    if wanted:
        raise MissingDependency(f"MUJOCO_GL={wanted} draws no image here. Unset MUJOCO_GL to try others." + tried)
    raise MissingDependency(
        "No OpenGL draws an image here, and Memory Maze needs it: on Debian or Ubuntu install libegl1 and libgl1, or "
        "libosmesa6. No GPU or screen is needed." + tried
    )


def check_requirements():
    """Raises MissingDependency if a package or a renderer is missing."""
    for name in ("dm_control", "mujoco", "labmaze", "memory_maze"):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise MissingDependency(
                f"Memory Maze needs the package {name}: pip install -r requirements.txt, with Python 3.11 (the package "
                "labmaze, which generates the mazes, does not support 3.13 and later)."
            )
    choose_renderer()


@cache
def import_game() -> types.SimpleNamespace:
    """-> the modules of the game. Raises MissingDependency."""
    check_requirements()
    # Mesa would start a thread for each core in each process; for images this small, more than one gains nothing.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    # dm_control would draw with OSMesa in another thread, and fail at exit if an environment was not closed.
    os.environ.setdefault("DISABLE_RENDER_THREAD_OFFLOADING", "1")
    if "memory_maze" not in sys.modules:
        # Registers an empty package of this name and path, so its __init__, which imports gym, does not run.
        package = types.ModuleType("memory_maze")
        package.__path__ = list(importlib.util.find_spec("memory_maze").submodule_search_locations)
        sys.modules["memory_maze"] = package
    import mujoco
    from dm_control import _render, mjcf
    from dm_control.composer import environment
    from dm_control.mujoco.wrapper import MjModel
    from memory_maze import tasks

    # dm_control warns at each reset that the ball has no free joint.
    logging.getLogger("absl").addFilter(lambda record: "no free joint" not in str(record.msg))
    return types.SimpleNamespace(
        mujoco=mujoco,
        mjcf=mjcf,
        tasks=tasks,
        MjModel=MjModel,
        Hooks=environment._EnvironmentHooks,
        GL=_render.Renderer,
    )


@dataclass
class Episode:
    """An episode: physics, targets, and which of them are touched. Initially as the package leaves it after reset."""

    model: Any  # mujoco.MjModel
    data: Any  # mujoco.MjData
    random: np.random.RandomState  # chooses the next target, as in the package
    target: int  # the object to find, an index into the following four lists
    touched: list[bool]
    geoms: list[int]  # of the targets, in the model
    materials: list[int]
    colors: list[np.ndarray]  # (3,), 0 to 1


class XmlBuilder:
    """Replaces dm_control's XML tree while the package's code adds walls and floor. It takes a tenth of the time.

    The tree would check, name and store each of about 300 elements, and then turn them into one XML string. This class
    writes the string at once.
    """

    def __init__(self, texture_names: dict[str, str]):
        self.texture_names = texture_names
        self.geom = {}  # always empty; the package calls geom.clear() before it adds walls
        self.lines = []

    def add(self, tag: str, **attributes) -> str:
        self.lines.append(f"<{tag} " + " ".join(f'{k}="{self._text(x)}"' for k, x in attributes.items()) + "/>")
        return attributes["name"]

    def _text(self, value) -> str:
        if isinstance(value, str | int):
            return str(value)
        if hasattr(value, "full_identifier"):
            return self.texture_names[value.full_identifier]
        return " ".join(repr(float(x)) for x in value)


class MazeFactory:
    """Builds mazes of one size with the package's code, except for the XML of walls and floor, and the textures.

    The package's environment would compile a model with all textures; here its parts are taken without making the
    environment. For another seed the package would build everything again; here, only what depends on the seed.
    """

    def __init__(self, size: str):
        self.modules = import_game()
        tasks = self.modules.tasks
        with mock.patch.object(tasks.composer, "Environment", lambda **parts: types.SimpleNamespace(**parts)):
            self.task = getattr(tasks, f"memory_maze_{size}")(seed=0).task
        self.arena = self.task._maze_arena
        self.hooks = self.modules.Hooks(self.task)
        self.arena.regenerate = self._regenerate

        # Without walls: the ball, the targets, the textures. Of several equal textures only the first stays.
        tree = self.task.root_entity.mjcf_model
        root, self.files = ElementTree.fromstring(tree.to_xml_string()), tree.get_assets()
        assets, first, self.texture_names = root.find("asset"), {}, {}
        for texture in assets.findall("texture"):
            name = texture.get("name")
            self.texture_names[name] = first.setdefault(texture.get("file", name), name)
            if self.texture_names[name] != name:
                assets.remove(texture)
        self.textured = ElementTree.tostring(root, "unicode")

        # The template of an episode's model. Its textures are one pixel each: the Renderer has the real ones.
        for texture in assets.findall("texture"):
            kind = {name: texture.get(name) for name in ("name", "class", "type")}
            texture.attrib.clear()
            texture.attrib.update(kind, builtin="flat", width="1", height="1")
        # Each element goes where dm_control would put it, so that it gets the same number as in the package.
        world = root.find("worldbody")
        assets.insert(1, ElementTree.Comment("materials"))
        world.insert(list(world).index(world.find("geom[@name='ground']")) + 1, ElementTree.Comment("geoms"))
        world.find("body[@name='maze_body']").append(ElementTree.Comment("walls"))
        for target in self.task._targets:
            name = self._attachment(target).full_identifier
            world.find(f"body[@name='{name}']").set("pos", f"position of {name}")
        self.template = ElementTree.tostring(root, "unicode")

    def textured_model(self):
        """-> a mujoco.MjModel with the real textures, and without walls."""
        return self.modules.mujoco.MjModel.from_xml_string(self.textured, self.files)

    def build(self, seed: int) -> Iterator[Episode | None]:
        """Yields None after each build step, and finally the Episode: the package's first one with that seed."""
        mjcf, task, arena = self.modules.mjcf, self.task, self.arena
        random = np.random.RandomState(seed)
        # As in the package's constructor, the first number drawn is the maze's seed.
        arena._maze = self._text_maze(random.randint(2147483648))
        yield
        for target in task._targets:  # untouched, as in a new environment: the hooks' first draw depends on it
            target.initialize_episode_mjcf(random)
        self.hooks.initialize_episode_mjcf(random)
        yield
        xml = self._xml()
        yield
        model = self.modules.MjModel.from_xml_string(xml)
        yield
        physics = mjcf.Physics.from_model(model)
        yield
        self.hooks.after_compile(physics, random)
        yield
        with physics.reset_context():
            self.hooks.initialize_episode(physics, random)
        yield
        targets = task._targets
        yield Episode(
            model=physics.model.ptr,
            data=physics.data.ptr,
            random=random,
            target=task._current_target_ix,
            touched=[target.activated for target in targets],
            geoms=[physics.bind(target.geom).element_id for target in targets],
            materials=[physics.bind(target.material).element_id for target in targets],
            colors=task._target_colors,
        )

    def _text_maze(self, seed: int):
        maze = self.arena._maze
        names = ("height", "width", "max_rooms", "room_min_size", "room_max_size", "max_variations", "spawns_per_room")
        options = {name: getattr(maze, name) for name in names}
        return type(maze)(objects_per_room=maze.objects_per_room, simplify=True, random_seed=seed, **options)

    def _regenerate(self, random):
        self.materials, self.geoms, self.walls = (XmlBuilder(self.texture_names) for _ in range(3))
        root = types.SimpleNamespace(asset=self.materials, worldbody=self.geoms)
        self.arena._texturing_geom_names, self.arena._texturing_material_names = [], []
        with mock.patch.multiple(self.arena, _mjcf_root=root, _maze_body=self.walls):
            type(self.arena).regenerate(self.arena, random)

    def _attachment(self, target):
        return self.modules.mjcf.get_attachment_frame(target.mjcf_model)

    def _xml(self) -> str:
        xml = self.template
        for name, builder in (("materials", self.materials), ("geoms", self.geoms), ("walls", self.walls)):
            xml = xml.replace(f"<!--{name}-->", "".join(builder.lines))
        for body in map(self._attachment, self.task._targets):
            xml = xml.replace(f"position of {body.full_identifier}", " ".join(repr(float(x)) for x in body.pos))
        return xml


class Renderer:
    """Draws the view of a camera, with OpenGL, in the thread that made it.

    side: width of OpenGL's buffer in pixels, so of the largest image. The package's buffer has 640 x 480; its size does
    not change an image.
    """

    def __init__(self, factory: MazeFactory, side: int):
        self.mujoco, self.side = factory.modules.mujoco, side
        self.gl = factory.modules.GL(side, side)
        model = factory.textured_model()
        self.textures = self._on_gl(self._make_context, model)
        self.names = self._texture_names(model)
        self.options, self.perturbation = self.mujoco.MjvOption(), self.mujoco.MjvPerturb()
        self.context = None

    def load(self, episode: Episode):
        """From now on `draw` draws the maze of this episode."""
        self.unload()
        self.model, self.data = model, data = episode.model, episode.data
        assert self._texture_names(model) == self.names
        self.context = self._on_gl(self._make_context, model)
        self.own_textures = self.context.texture.copy()
        self.context.texture[:] = self.textures.texture
        self.scene = self.mujoco.MjvScene(model, model.ngeom + 100)
        self.groups = model.geom_group.copy()

        # (walls and floor, 4, 3), the positions of their corners: they are flat and never move.
        [flat] = np.nonzero((model.geom_type == self.mujoco.mjtGeom.mjGEOM_PLANE) & (model.geom_matid >= 0))
        axes = data.geom_xmat[flat].reshape(-1, 3, 3)[..., :2]  # (n, 3, 2): for each of n, two directions along it
        offsets = np.array([(-1, -1), (-1, 1), (1, -1), (1, 1)]) * model.geom_size[flat, None, :2]  # (n, 4, 2)
        self.flat, self.corners = flat, data.geom_xpos[flat, None] + np.einsum("nij,nkj->nki", axes, offsets)

    def draw(self, camera: str, side: int, everything: bool = True) -> np.ndarray:
        """-> (side, side, 3) uint8. Unless `everything`, it leaves out the walls and floor that are out of view."""
        mujoco, model, data = self.mujoco, self.model, self.data
        view = mujoco.MjvCamera()
        view.fixedcamid = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
        view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        model.geom_group[:] = self.groups
        if not everything:
            model.geom_group[self.flat[self._out_of_view(view.fixedcamid)]] = 5  # a group that is not drawn
        mujoco.mjv_updateScene(
            model, data, self.options, self.perturbation, view, mujoco.mjtCatBit.mjCAT_ALL.value, self.scene
        )
        image, rectangle = np.empty((side, side, 3), np.uint8), mujoco.MjrRect(0, 0, side, side)
        self._on_gl(mujoco.mjr_render, rectangle, self.scene, self.context)
        self._on_gl(mujoco.mjr_readPixels, image, None, rectangle, self.context)
        return image[::-1]

    def _out_of_view(self, camera: int) -> np.ndarray:
        """-> (walls and floor,) bool: all four corners are beyond the same border of the square image.

        A camera looks along its -z, with x to the right and y up. Walls behind others are drawn, too: where two walls
        meet, a pixel of the one behind may show.
        """
        corners = self.corners - self.data.cam_xpos[camera]
        x, y, z = np.moveaxis(corners @ self.data.cam_xmat[camera].reshape(3, 3), -1, 0)  # (n, 4) each
        # Within the image, |x| and |y| are at most this. With 1e-3 more, no wall is lost to rounding.
        reach = -z * np.tan(np.radians(self.model.cam_fovy[camera]) / 2) + 1e-3
        return (x > reach).all(1) | (x < -reach).all(1) | (y > reach).all(1) | (y < -reach).all(1) | (z > 0).all(1)

    def _on_gl(self, function, *args):
        with self.gl.make_current() as thread:
            return thread.call(function, *args)

    def _make_context(self, model):
        model.vis.global_.offwidth = model.vis.global_.offheight = self.side
        model.vis.quality.shadowsize = 0  # no light casts shadows; the package's unused map of them takes 64 MB
        context = self.mujoco.MjrContext(model, self.mujoco.mjtFontScale.mjFONTSCALE_50)
        self.mujoco.mjr_setBuffer(self.mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
        return context

    def _texture_names(self, model) -> list[str]:
        return [model.tex(i).name for i in range(model.ntex)]

    def unload(self):
        if self.context:
            self.context.texture[:] = self.own_textures  # the shared ones stay for the next episode
            self._on_gl(self.context.free)
            self.context = None

    def close(self):
        self.unload()
        self._on_gl(self.textures.free)
        self.gl.free()


def episode_seed(seed: int, number: int) -> int:
    """-> the package's seed for episode `number` (0, 1, ...) after reset(seed=seed)"""
    return seed if number == 0 else int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


class MemoryMaze(gymnasium.Env):
    """Memory Maze of one size, as a Gymnasium environment.

    Observation: (64, 64, 3) uint8, framed by the colour of the object to find. Actions: see ACTIONS. Reward: 1 for
    touching that object, after which another one is chosen; else 0. Episodes end only by their time limit, after
    MAX_STEPS[size] steps: they are truncated, never terminated.

    reset(seed=s) decides everything: the following episode is the package's first one with seed=s, and the k-th one
    after it (k = 1, 2, ...) is the package's first one with the seed that SeedSequence([s, k]) generates. An episode
    does not depend on the actions of earlier ones. Without any seed, s is drawn from the system's entropy.

    With render_mode="rgb_array", render() gives a larger image of the agent's view, and beside it the maze from above.
    It has no side effects.

    size: a key of MAX_STEPS. first_episode_steps: length of the very first episode. If that is shorter than the others,
    its last info has "shortened": True. It is for vector environments: all episodes have the same length, so without
    it all environments would reset in the same step.

    Raises ValueError for impossible arguments, MissingDependency if something is not installed.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, size: str = "9x9", render_mode: str | None = None, first_episode_steps: int | None = None):
        if size not in MAX_STEPS:
            raise ValueError(f"size {size}: there are {', '.join(MAX_STEPS)}")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode {render_mode}: there are None and rgb_array")
        if first_episode_steps is not None and not 1 <= first_episode_steps <= MAX_STEPS[size]:
            raise ValueError(f"first_episode_steps {first_episode_steps}: {size} has 1 to {MAX_STEPS[size]} steps")
        check_requirements()
        self.size, self.render_mode, self.first_episode_steps = size, render_mode, first_episode_steps
        self.observation_space = spaces.Box(0, 255, (VIEW, VIEW, 3), np.uint8)
        self.action_space = spaces.Discrete(len(ACTIONS))
        self.factory = self.renderer = self.build = None  # made by reset: some environments only show their spaces

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.is_first = self.factory is None
        if self.is_first:
            self.factory = MazeFactory(self.size)
            self.renderer = Renderer(self.factory, VIEW if self.render_mode is None else LARGE_VIEW)
        if seed is not None or self.build is None:
            self.seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
            self._start_building(0)
        while self.next_episode is None:
            self.next_episode = next(self.build)
        self.episode = self.next_episode
        self.renderer.load(self.episode)
        self._start_building(self.number + 1)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: int):
        reward = self._move(int(action))
        self.steps += 1
        if self.next_episode is None:
            self.next_episode = next(self.build)
        truncated = self.steps == MAX_STEPS[self.size]
        info = {}
        if self.is_first and self.steps == self.first_episode_steps and not truncated:
            truncated, info = True, {"shortened": True}
        return self._observe(), reward, False, truncated, info

    def _start_building(self, number: int):
        """Starts to build episode `number`; its build steps follow, one per step of the current episode."""
        self.number, self.next_episode, self.build = number, None, self.factory.build(episode_seed(self.seed, number))

    def _move(self, action: int) -> float:
        """-> reward, after a quarter of a second. Only the targets react to a touch."""
        episode, mujoco = self.episode, self.renderer.mujoco
        model, data, contacts = episode.model, episode.data, []
        data.ctrl[:] = CONTROLS[action]
        for _ in range(SUBSTEPS):
            mujoco.mj_step2(model, data)
            mujoco.mj_step1(model, data)
            contacts.append(data.contact.geom.copy())  # a copy: the next substep overwrites the array
        if data.warning.number.any():
            raise RuntimeError("MuJoCo warns that the physics has become unstable")
        self.contacts = np.concatenate(contacts)  # (contacts of all substeps, 2), pairs of geoms; kept for a test
        for i, geom in enumerate(episode.geoms):
            episode.touched[i] |= bool((self.contacts == geom).any())

        reward = 0.0
        for i, material in enumerate(episode.materials):
            if episode.touched[i]:
                if i == episode.target:
                    reward = 1.0
                    episode.target = self._choose_target()
                episode.touched[i] = False
                model.mat_rgba[material, 3] = 1  # a target touched at the very start is invisible until now
        return reward

    def _choose_target(self) -> int:
        """-> a target that is not being touched"""
        while True:
            target = self.episode.random.randint(len(self.episode.touched))
            if not self.episode.touched[target]:
                return target

    def _observe(self) -> np.ndarray:
        return self._add_border(self.renderer.draw("walker/egocentric", VIEW, everything=False))

    def _add_border(self, image: np.ndarray) -> np.ndarray:
        """-> the image with a border in the colour of the target, of 2 pixels in 64"""
        width = 2 * len(image) // VIEW
        framed = np.empty_like(image)
        framed[:] = self.episode.colors[self.episode.target] * 255 * 0.7
        framed[width:-width, width:-width] = image[width:-width, width:-width]
        return framed

    def render(self) -> np.ndarray:
        """-> (384, 768, 3) uint8"""
        if self.render_mode is None:
            raise ValueError('render() needs render_mode="rgb_array"')
        view = self._add_border(self.renderer.draw("walker/egocentric", LARGE_VIEW))
        return np.concatenate([view, self.renderer.draw("top_camera", LARGE_VIEW)], axis=1)

    def close(self):
        if self.renderer:
            self.renderer.close()
            self.factory = self.renderer = None


for _size in MAX_STEPS:
    gymnasium.register(f"MemoryMaze-{_size}-v0", entry_point=MemoryMaze, kwargs={"size": _size})


def record_video(env: gymnasium.Env, policy, memory, seed: int, path: Path, max_steps: int = 300) -> None:
    """Saves one episode with sampled actions, at most max_steps of it, as a GIF, and closes env.

    policy is an ActorCritic with its parameters: obs (1, 1, ...), reset (1, 1), memory -> logits (1, 1, A), value,
    memory. Gymnasium's RecordVideo does the same, but needs moviepy.
    """
    (obs, _), rng = env.reset(seed=seed), np.random.default_rng(seed)
    ended, frames, total = False, [], 0.0
    while not ended and len(frames) < max_steps:
        logits, _, memory = policy(obs[None, None], np.array([[not frames]]), memory)
        action = int(np.argmax(np.asarray(logits[0, 0]) + rng.gumbel(size=logits.shape[-1])))
        image = Image.fromarray(env.render())
        text = f"step {len(frames)}   return {total:g}   {ACTIONS[action]}"
        ImageDraw.Draw(image).text((12, 12), text, fill="white", stroke_width=2, stroke_fill="black")
        frames.append(image.quantize(64))
        obs, reward, terminated, truncated, _ = env.step(action)
        ended, total = terminated or truncated, total + float(reward)
    env.close()
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[120] * (len(frames) - 1) + [2000], loop=0)

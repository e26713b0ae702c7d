"""PPO with GTrXL, a gated transformer that attends to a window of past steps, on Mystery Path.

    python ppo_gtrxl_mysterypath.py --env-id MysteryPath-Grid-Easy-v0 --memory-len 128

A path from one border of a 7 x 7 grid to the opposite one is hidden; a step beside it sends the agent back to
the start. From pictures of 84 x 84 pixels the agent must find out by trial where the path goes, and remember it. The
task is Memory Gym's (Pleines et al., ICLR 2023); the memory is GTrXL: Parisotto et al., "Stabilizing Transformers for
Reinforcement Learning", ICML 2020 (arXiv 1910.06764).

What to learn here: what a window of past steps costs, and how far it sees, beside a memory of constant size. `diff`
with ppo_agalite_mysterypath.py shows that: all but the memory and its settings is the same text.

What to expect: it learns the cue of small pictures (tests/test_learning.py). Mystery Path itself, 150M steps as
published, has not been run; for a size that a CPU can do, see the one for AGaLiTe in README.

Letters of the axes, time first throughout:
    T time steps   B environments   S seeds   D d_model   H heads   d d_head   M memory_len   L layers   C block length
"""

import argparse
import csv
import dataclasses
import functools
import json
import logging
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from tqdm import tqdm

from envs.mysterypath import MysteryPath
from envs.wrappers import EpisodeStatistics, PooledReset

# ------------------------------------------------------------------------------------------------------------ Arguments


def whole_number(text: str) -> int:
    """Reads 1e6 as well as 1000000."""
    if not float(text).is_integer():
        raise ValueError(f"{text} is not a whole number")
    return int(float(text))


WholeNumber = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1, metavar="INT", instance_from_str=lambda words: whole_number(words[0]),
        is_instance=lambda value: isinstance(value, int), str_from_instance=lambda value: [str(value)],
    ),
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Args:
    exp_name: str = "ppo_gtrxl_mysterypath"
    """name of the experiment, part of the run folder's name"""
    seed: int = 1
    """decides everything: parameters, environments, actions, minibatches"""
    num_seeds: int = 1
    """how many seeds to train at once: seed, seed + 1, ..."""
    total_timesteps: WholeNumber = 150_000_000
    """environment steps per seed (1e6 is understood)"""
    checkpoint_interval: int = 20
    """updates between two checkpoints"""
    checkpoint_envs: bool = True
    """keep environments and memories in checkpoints too
    without them a checkpoint is small, and at a resume all episodes begin anew"""
    resume: str = ""
    """folder of an interrupted run to continue, bit for bit"""
    evaluate: str = ""
    """folder of a run whose newest checkpoint is evaluated, without training"""
    eval_episodes: int = 200
    """episodes of an evaluation
    each in an environment of its own"""
    capture_video: bool = False
    """draw an episode of the final policy as an animated picture in the run folder"""
    track: bool = False
    """log to Weights & Biases too (WANDB_MODE=offline needs no account)"""
    wandb_project_name: str = "memory-ppo"
    """project in Weights & Biases"""
    wandb_entity: str | None = None
    """team or user in Weights & Biases"""
    distributed: bool = False
    """this is one of several processes that train together, see README"""

    env_id: str = "MysteryPath-Grid-Easy-v0"
    """the environment
    MysteryPath-Grid-Easy-v0, or MysteryPath-Easy-v0 with free movement
    without Easy start and goal are out of sight, and on the grid progress pays nothing"""

    num_channels: int = 32
    """channels of the encoder's first convolution; the others have twice as many"""
    num_layers: int = 4
    """layers of the memory"""
    d_model: int = 128
    """width D between the layers"""
    d_head: int = 64
    """width d of an attention head"""
    num_heads: int = 4
    """attention heads H in a layer"""
    memory_len: int = 128
    """steps M before its own that a step sees in each layer
    published: 128, 64 and 32"""
    d_actor: int = 256
    """hidden width of the policy head"""
    d_critic: int = 256
    """hidden width of the value head"""

    num_envs: int = 128
    """environments B stepped together"""
    num_steps: int = 128
    """steps T of a rollout, also the length of backpropagation through time"""
    learning_rate: float = 2.5e-4
    """step size of Adam"""
    anneal_lr: bool = False
    """decrease the learning rate linearly, update by update, towards 0 after the last"""
    adam_eps: float = 1e-8
    """epsilon of Adam"""
    gamma: float = 0.99
    """discount per step"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation, for the policy"""
    critic_lambda: float = 0.95
    """lambda of the returns that the value learns; 1, plain discounted returns, carries an end to its start at once
    published: as --gae-lambda; change both together"""
    num_minibatches: int = 8
    """minibatches in an epoch, each of whole rollouts of num_envs / num_minibatches environments"""
    update_epochs: int = 3
    """passes over each rollout"""
    cautious_entropy: float = 10.0
    """while actions have more entropy (nats), one pass only, at half the learning rate
    published: never; 10 is more than any policy over 9 actions has"""
    norm_adv: bool = True
    """normalise advantages in each minibatch"""
    clip_coef: float = 0.2
    """how far the probability ratio may move from 1 before its gradient is cut"""
    clip_vloss: bool = False
    """clip the value loss too, with the same coefficient"""
    ent_coef: float = 3e-4
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 5.0
    """gradients are scaled down to this global norm"""
    logit_noise: float = 0.0
    """standard deviation of a noise on the logits, drawn once an episode while training (published: none)"""
    target_kl: float | None = None
    """leave out the remaining epochs of an update once the approximate KL divergence of one exceeds this"""

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        return self.total_timesteps // self.batch_size

    def __post_init__(self):
        def require(holds: bool, name: str, rule: str):
            if not holds:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: {rule}")

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (float, float | None) and value is not None:
                require(math.isfinite(value), field.name, "must be a finite number")
                require(value >= 0, field.name, "must be at least 0")
            elif field.type in (int, WholeNumber) and field.name != "seed":
                require(value >= 1, field.name, "must be at least 1")
        require(0 <= self.seed <= 2**31 - self.num_seeds, "seed", "must be at least 0 and below 2^31")
        require("/" not in self.exp_name, "exp_name", "is part of a folder's name, so no / in it")
        for name in ("gamma", "gae_lambda", "critic_lambda"):
            require(getattr(self, name) <= 1, name, "must be at most 1")
        for name in ("learning_rate", "clip_coef", "max_grad_norm", "adam_eps"):
            require(getattr(self, name) > 0, name, "must be above 0")
        require(self.d_model % 2 == 0, "d_model", "must be even, half of the positions are sines")
        rule = f"not divisible by --num-minibatches {self.num_minibatches}, and a minibatch is made of whole rollouts"
        require(self.num_envs % self.num_minibatches == 0, "num_envs", rule)
        rule = f"less than one update, --num-envs {self.num_envs} x --num-steps {self.num_steps} steps"
        require(self.num_updates >= 1, "total_timesteps", rule)
        require(not (self.resume and self.evaluate), "resume", "cannot be combined with --evaluate; give one of them")
        try:
            make_env(self, 1)
        except ValueError as error:  # the environment checks its own sizes
            name, rule = str(error).split(" ", 1)
            raise ValueError(f"--{name.replace('_', '-')} {rule}") from None


def make_env(args: Args, num_envs: int) -> PooledReset:
    # Who knows its path takes 13.5 steps on the grid on average, so a rollout hardly ever needs more than these.
    return PooledReset(EpisodeStatistics(MysteryPath(args.env_id)), num_envs, pool_size=max(1, args.num_steps // 8))


# ---------------------------------------------------------------------------------------------------------------- Model
orthogonal = nn.initializers.orthogonal(math.sqrt(2))


def blockwise(init, num_blocks: int):
    """Initialises an (n, num_blocks * m) kernel as num_blocks kernels of (n, m), each on its own."""

    def init_blocks(key, shape, dtype=jnp.float32):
        keys = jax.random.split(key, num_blocks)
        return jnp.concatenate([init(k, (shape[0], shape[1] // num_blocks), dtype) for k in keys], axis=1)

    return init_blocks


class GRUGate(nn.Module):
    """In place of a residual sum: how much of x to keep, how much of a sub-block's output y to let in (GTrXL, eq. 6).

    x, y (T, B, D) -> (T, B, D). The bias of 2 lets in sigmoid(-2) = 0.12 at first: close to the identity.
    """

    kernel_init: Any = orthogonal

    @nn.compact
    def __call__(self, x, y):
        D = x.shape[-1]
        dense = functools.partial(nn.Dense, use_bias=False)
        from_y = dense(3 * D, kernel_init=blockwise(self.kernel_init, 3), name="W")(y)  # (T, B, 3D)
        from_x = dense(2 * D, kernel_init=blockwise(self.kernel_init, 2), name="U")(x)  # (T, B, 2D)
        reset_y, update_y, candidate_y = jnp.split(from_y, 3, axis=-1)
        reset_x, update_x = jnp.split(from_x, 2, axis=-1)
        bias = self.param("bias", nn.initializers.constant(2.0), (D,))
        reset = nn.sigmoid(reset_y + reset_x)
        update = nn.sigmoid(update_y + update_x - bias)
        candidate = nn.tanh(candidate_y + dense(D, kernel_init=self.kernel_init, name="U_candidate")(reset * x))
        return (1 - update) * x + update * candidate


class WindowMemory(NamedTuple):
    """The last M steps, oldest first."""

    inputs: jax.Array  # (B, L, M, D), what each layer read
    visible: jax.Array  # (B, M) bool, whether a step belongs to the episode that is going on


def sinusoids(length: int, D: int) -> np.ndarray:
    """R_n of the distances n = 0 .. length - 1 (Transformer-XL), all sines before all cosines -> (length, D)."""
    angles = np.arange(length)[:, None] * 10000.0 ** (-2 * np.arange(D // 2) / D)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def window_attention(q, k, v, content_bias, position_bias, positions, episode):
    """Attention of each step to itself and the M steps before it in its episode, with relative positions.

        score(i, j) = ((q_i + content_bias) . k_j + (q_i + position_bias) . positions_{i-j}) / sqrt(d)

    q (T, B, H, d) of the steps; k, v (M + T, B, H, d) and episode (M + T, B), a number for each, of the M steps before
    them too; biases (H, d); positions (M + 1, H, d) of the distances 0 .. M. -> (T, B, H, d).

    Queries go in N blocks of C steps, and a block reads the M + C keys in sight of any of its steps. C is the largest
    divisor of T up to M: a prime T makes blocks of one step, which is slow.
    """
    T, M, d = len(q), len(positions) - 1, q.shape[-1]
    C = max(n for n in range(1, min(T, M) + 1) if T % n == 0)
    first = jnp.arange(0, T, C)[:, None]
    queries, keys = first + jnp.arange(C), first + jnp.arange(M + C)  # (N, C), (N, M + C)
    q, k, v = q[queries], k[keys], v[keys]  # (N, C, B, H, d), (N, M + C, B, H, d)
    content = jnp.einsum("nibhd,njbhd->nbhij", q + content_bias, k)  # (N, B, H, C, M + C)
    by_distance = jnp.einsum("nibhd,mhd->nbhim", q + position_bias, positions[::-1])  # (N, B, H, C, M + 1), M .. 0
    # Key j is m = j - i steps after the oldest that query i sees: row i has to move by i to the right.
    flat = jnp.pad(by_distance, [(0, 0)] * 4 + [(0, C)]).reshape(*by_distance.shape[:3], C * (M + 1 + C))
    position = flat[..., : C * (M + C)].reshape(content.shape)
    m = jnp.arange(M + C) - jnp.arange(C)[:, None]
    same_episode = episode[M + queries][:, :, None] == episode[keys][:, None]  # (N, C, M + C, B)
    in_sight = (m >= 0) & (m <= M) & jnp.moveaxis(same_episode, -1, 1)  # (N, B, C, M + C)
    score = jnp.where(in_sight[:, :, None], (content + position) / math.sqrt(d), -jnp.inf)
    return jnp.einsum("nbhij,njbhd->nibhd", nn.softmax(score), v).reshape(T, *v.shape[2:])


class GTrXLAttention(nn.Module):
    """Relative attention over a window. x (T, B, D), past (M, B, D) -> (T, B, D)."""

    args: Args

    @nn.compact
    def __call__(self, x, past, episode, content_bias, position_bias):
        T, B, D = x.shape
        M, H, d = self.args.memory_len, self.args.num_heads, self.args.d_head
        tokens = nn.LayerNorm()(jnp.concatenate([past, x]))  # (M + T, B, D)
        k, v = jnp.split(nn.Dense(2 * H * d, name="key_value")(tokens).reshape(M + T, B, 2 * H, d), 2, axis=2)
        q = nn.Dense(H * d, name="query")(x).reshape(T, B, H, d)  # of x itself, as the authors have it
        positions = nn.Dense(H * d, name="position")(sinusoids(M + 1, D)).reshape(M + 1, H, d)
        y = window_attention(q, k, v, content_bias, position_bias, positions, episode)
        return nn.Dense(D, name="out")(y.reshape(T, B, H * d))


class GTrXLLayer(nn.Module):
    """A transformer layer, normalised before each sub-block and gated after it. x (T, B, D) -> (T, B, D)."""

    args: Args

    @nn.compact
    def __call__(self, x, past, episode, content_bias, position_bias):
        D = self.args.d_model
        y = GTrXLAttention(self.args, name="attention")(x, past, episode, content_bias, position_bias)
        x = GRUGate(nn.initializers.lecun_normal())(x, nn.relu(y))
        z = nn.relu(nn.Dense(D)(nn.LayerNorm()(x)))
        z = nn.relu(nn.Dense(D)(z))
        return GRUGate(nn.initializers.lecun_normal())(x, z)


class GTrXL(nn.Module):
    """x (T, B, n), reset (T, B), memory -> (T, B, D), memory after the last step.

    reset[t] says that x[t] is the first of an episode: nothing before it is seen from there on.
    """

    args: Args

    @nn.nowrap
    def initial_memory(self, B: int) -> WindowMemory:
        L, M, D = self.args.num_layers, self.args.memory_len, self.args.d_model
        return WindowMemory(jnp.zeros((B, L, M, D)), jnp.zeros((B, M), bool))

    @nn.compact
    def __call__(self, x, reset, memory: WindowMemory):
        M = self.args.memory_len
        # Episodes are numbered from 0, the one going on when the memory was handed over; -1 is out of sight.
        episode = jnp.concatenate([jnp.where(memory.visible.T, 0, -1), jnp.cumsum(reset, axis=0)])  # (M + T, B)
        biases = [
            self.param(name, nn.initializers.zeros, (self.args.num_heads, self.args.d_head))
            for name in ("content_bias", "position_bias")  # u and v of Transformer-XL, shared by all layers
        ]
        x = nn.relu(nn.Dense(self.args.d_model, name="embedding")(x))  # (T, B, D)
        inputs = []
        for i in range(self.args.num_layers):
            past = jax.lax.stop_gradient(jnp.moveaxis(memory.inputs[:, i], 1, 0))  # (M, B, D)
            inputs.append(jnp.concatenate([past, x])[-M:])
            x = GTrXLLayer(self.args)(x, past, episode, *biases)
        return x, WindowMemory(jnp.moveaxis(jnp.stack(inputs), 2, 0), (episode[-M:] == episode[-1]).T)


class Head(nn.Module):
    """Dense, tanh, Dense. x (T, B, D) -> (T, B, outputs)."""

    hidden: int
    outputs: int
    gain: float = math.sqrt(2)
    bias: float = 0.0

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(self.hidden, kernel_init=orthogonal)(x))
        last = nn.initializers.orthogonal(self.gain), nn.initializers.constant(self.bias)
        return nn.Dense(self.outputs, kernel_init=last[0], bias_init=last[1])(x)


def patches(x, size: int, stride: int):
    """What each position of a convolution without padding sees. (..., H, W, C) -> (..., h, w, size * size * C).

    Squares of stride x stride are joined first, then neighbours of these, so the stride divides size, H and W.
    """
    *batch, H, W, C = x.shape
    H, W, n = H // stride, W // stride, size // stride
    x = x.reshape(*batch, H, stride, W, stride, C).swapaxes(-4, -3).reshape(*batch, H, W, stride * stride * C)
    h, w = H - n + 1, W - n + 1
    return jnp.concatenate([x[..., i : i + h, j : j + w, :] for i in range(n) for j in range(n)], axis=-1)


class ConvEncoder(nn.Module):
    """Pictures (T, B, 84, 84, 3) of 0 .. 255 -> (T, B, 98 * channels), by the three convolutions of Mnih et al. 2015.

    They are written as products of matrices: in a loop on a CPU, as here, the gradients of XLA's own convolutions take
    about twenty times as long (benchmarks/encoder.py).
    """

    channels: int = 32

    @nn.compact
    def __call__(self, obs):
        conv = lambda features, x: nn.relu(nn.Dense(features, kernel_init=orthogonal)(x))
        x = conv(self.channels, patches(obs, 8, 4) / 255.0)  # (T, B, 20, 20, channels)
        x = conv(2 * self.channels, patches(x, 4, 2))  # (T, B, 9, 9, 2 * channels)
        x = conv(2 * self.channels, patches(x, 3, 1))  # (T, B, 7, 7, 2 * channels)
        return x.reshape(*x.shape[:2], -1)


def in_pieces(encoder: nn.Module, obs):
    """encoder(obs), (T, B, ...) -> (T, B, features).

    On a CPU some eight pictures at a time, and once more in the backward pass: what lies between picture and features
    then stays in its cache, which is twice as fast (benchmarks/encoder.py) and takes less memory.
    """
    if jax.default_backend() != "cpu":
        return encoder(obs)
    T, B = obs.shape[:2]
    k = math.gcd(T, max(8 // B, 1))  # time steps at once
    piece = nn.remat(lambda encoder, carry, obs: (carry, encoder(obs)))
    piece = nn.scan(piece, variable_broadcast="params", split_rngs={"params": False})
    _, x = piece(encoder, None, obs.reshape(T // k, k, B, *obs.shape[2:]))  # (T / k, k, B, features)
    return x.reshape(T, B, -1)


class ActorCritic(nn.Module):
    """obs (T, B, 84, 84, 3), reset (T, B), memory -> logits (T, B, actions), value (T, B), new memory.

    One call serves acting (T = 1) and learning (T = num_steps).
    """

    args: Args
    num_actions: int

    @nn.nowrap
    def initial_memory(self, B: int) -> WindowMemory:
        return GTrXL(self.args, parent=None).initial_memory(B)

    @nn.compact
    def __call__(self, obs, reset, memory: WindowMemory):
        x = in_pieces(ConvEncoder(self.args.num_channels, name="encoder"), obs)  # (T, B, 98 * channels)
        x, memory = GTrXL(self.args, name="memory")(x, reset, memory)  # (T, B, D)
        logits = Head(self.args.d_actor, self.num_actions, name="actor")(x)
        value = Head(self.args.d_critic, 1, name="critic")(x).squeeze(-1)
        return logits, value, memory


# ------------------------------------------------------------------------------------------------------------------ PPO
class Transition(NamedTuple):
    """A rollout, each field (T, B, ...)."""

    obs: jax.Array
    reset: jax.Array  # obs is the first of an episode
    noise: jax.Array  # (T, B, actions), on the logits
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    reward: jax.Array
    done: jax.Array  # this action ended the episode


class Learner(NamedTuple):
    params: Any
    opt_state: Any
    key: jax.Array  # split anew in every update
    update: jax.Array  # () int32, updates done


class RunnerState(NamedTuple):
    """All that changes during training, and, unless told otherwise, what a checkpoint holds."""

    learner: Learner
    env_state: Any
    obs: jax.Array  # (B, ...), the next to act on
    reset: jax.Array  # (B,) bool, obs is the first of an episode
    memory: Any
    noise: jax.Array  # (B, actions), on the logits of this episode


def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Adam on clipped gradients; `learn` multiplies by the learning rate."""
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.scale_by_adam(eps=args.adam_eps))


def init(args: Args, env, agent: nn.Module, optimizer, key: jax.Array) -> RunnerState:
    params_key, env_key, key = jax.random.split(key, 3)
    obs, env_state = env.reset(env_key, env.default_params)
    reset = jnp.ones(args.num_envs, bool)
    memory = agent.initial_memory(args.num_envs)
    params = agent.init(params_key, obs[None], reset[None], memory)
    learner = Learner(params, optimizer.init(params), key, jnp.zeros((), jnp.int32))
    num_actions = env.action_space(env.default_params).n
    return RunnerState(learner, env_state, obs, reset, memory, jnp.zeros((args.num_envs, num_actions)))


def log_prob_of(logits: jax.Array, action: jax.Array) -> jax.Array:
    """(..., actions), (...) -> (...)"""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), action[..., None], axis=-1).squeeze(-1)


def rollout(args: Args, env, agent: nn.Module, runner: RunnerState, key: jax.Array):
    """Acts for T steps -> runner after them, transitions (T, B), infos (T, B), value of the observation then (B,)."""
    params = runner.learner.params
    keys = jax.random.split(key, args.num_steps + 1)
    runner = runner._replace(env_state=env.refresh(keys[-1], runner.env_state, env.default_params))

    def step(runner, key):
        noise_key, act_key, env_key = jax.random.split(key, 3)
        new_noise = args.logit_noise * jax.random.normal(noise_key, runner.noise.shape)
        noise = jnp.where(runner.reset[:, None], new_noise, runner.noise)  # (B, actions)
        logits, value, memory = agent.apply(params, runner.obs[None], runner.reset[None], runner.memory)
        logits, value = logits[0] + noise, value[0]  # (B, actions), (B,)
        action = jax.random.categorical(act_key, logits)
        obs, env_state, reward, done, info = env.step(env_key, runner.env_state, action, env.default_params)
        log_prob = log_prob_of(logits, action)
        transition = Transition(runner.obs, runner.reset, noise, action, log_prob, value, reward, done)
        return RunnerState(runner.learner, env_state, obs, done, memory, noise), (transition, info | {"done": done})

    runner, (transitions, infos) = jax.lax.scan(step, runner, keys[:-1])
    _, last_value, _ = agent.apply(params, runner.obs[None], runner.reset[None], runner.memory)
    return runner, transitions, infos, last_value[0]


def compute_gae(transitions: Transition, last_value: jax.Array, gamma: float, gae_lambda: float) -> jax.Array:
    """Generalised advantage estimation (Schulman et al. 2016) -> (T, B). After an end, time limits too, comes 0."""

    def step(carry, transition):
        advantage, next_value = carry
        discount = gamma * (1 - transition.done)
        error = transition.reward + discount * next_value - transition.value
        advantage = error + discount * gae_lambda * advantage
        return (advantage, transition.value), advantage

    return jax.lax.scan(step, (jnp.zeros_like(last_value), last_value), transitions, reverse=True)[1]


def ppo_loss(params, args: Args, agent: nn.Module, memory, batch: Transition, advantage, target):
    """The clipped objective on whole rollouts (T, b), recomputed from the memory stored at their start."""
    logits, value, _ = agent.apply(params, batch.obs, batch.reset, memory)
    logits = logits + batch.noise
    log_ratio = log_prob_of(logits, batch.action) - batch.log_prob
    ratio = jnp.exp(log_ratio)
    if args.norm_adv:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    clipped_ratio = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -jnp.minimum(ratio * advantage, clipped_ratio * advantage).mean()

    error = jnp.square(value - target)
    if args.clip_vloss:
        clipped_value = batch.value + jnp.clip(value - batch.value, -args.clip_coef, args.clip_coef)
        error = jnp.maximum(error, jnp.square(clipped_value - target))
    value_loss = 0.5 * error.mean()

    entropy = -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(-1).mean()
    return policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss, {
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/approx_kl": (ratio - 1 - log_ratio).mean(),
        "losses/clipfrac": (jnp.abs(ratio - 1) > args.clip_coef).mean(),
    }


def learning_rate(args: Args, update: jax.Array) -> jax.Array:
    """Constant; or linear, from --learning-rate in the first update to 1 / num_updates of it in the last."""
    return args.learning_rate * (1 - update / args.num_updates if args.anneal_lr else jnp.ones(()))


def learn(args: Args, agent: nn.Module, optimizer, learner: Learner, key, memory, batch):
    """Epochs of minibatches of whole rollouts -> params, opt_state, metrics averaged over the minibatches.

    batch: transitions, advantages and what the value is to learn, (T, B, ...) each; memory at the rollout's start.
    Environments stand in G blocks of M = num_minibatches neighbours, and a minibatch takes one at random from each
    block. So, where the blocks are spread over devices, no rollout ever leaves its device.
    """
    G, M = args.num_envs // args.num_minibatches, args.num_minibatches
    batch = jax.tree.map(lambda x: x.reshape(args.num_steps, G, M, *x.shape[2:]), batch)  # (T, G, M, ...)
    memory = jax.tree.map(lambda x: x.reshape(G, M, *x.shape[1:]), memory)  # (G, M, ...)
    # A policy that still wanders sees advantages that are mostly noise; a second pass would only learn that by heart.
    cautious = -batch[0].log_prob.mean() > args.cautious_entropy
    step_size = learning_rate(args, learner.update) * jnp.where(cautious, 0.5, 1.0)

    def minibatch(learned, member):  # member (G,), which environment of each block
        params, opt_state = learned
        start_memory = jax.vmap(lambda x, i: jax.tree.map(lambda x: x[i], x))(memory, member)  # (G, ...)
        rollouts = jax.vmap(lambda x, i: jax.tree.map(lambda x: x[:, i], x), (1, 0), 1)(batch, member)  # (T, G, ...)
        grads, metrics = jax.grad(ppo_loss, has_aux=True)(params, args, agent, start_memory, *rollouts)
        direction, opt_state = optimizer.update(grads, opt_state)
        params = jax.tree.map(lambda p, d: p - step_size * d, params, direction)
        return (params, opt_state), metrics | {"losses/grad_norm": optax.tree.norm(grads)}

    def epoch(carry):
        number, learned, kl, total = carry
        order = jnp.argsort(jax.random.uniform(jax.random.fold_in(key, number), (G, M)), axis=1)  # permutes each block
        learned, metrics = jax.lax.scan(minibatch, learned, order.T)
        metrics = jax.tree.map(jnp.mean, metrics)
        return number + 1, learned, metrics["losses/approx_kl"], jax.tree.map(jnp.add, total, metrics)

    def another(carry):
        number, _, kl, _ = carry
        limit = math.inf if args.target_kl is None else args.target_kl
        return (number < jnp.where(cautious, 1, args.update_epochs)) & (kl <= limit)

    learned = learner.params, learner.opt_state
    nothing = jax.tree.map(lambda x: jnp.zeros((), x.dtype), jax.eval_shape(minibatch, learned, jnp.arange(G))[1])
    number, learned, _, total = jax.lax.while_loop(another, epoch, (0, learned, jnp.float32(0), nothing))
    return *learned, jax.tree.map(lambda x: x / number, total) | {"charts/learning_rate": step_size}


def update(args: Args, env, agent: nn.Module, optimizer, runner: RunnerState) -> tuple[RunnerState, dict]:
    """A rollout, and the learning from it."""
    learner, start_memory = runner.learner, runner.memory
    key, rollout_key, learn_key = jax.random.split(learner.key, 3)
    runner, transitions, infos, last_value = rollout(args, env, agent, runner, rollout_key)
    advantage = compute_gae(transitions, last_value, args.gamma, args.gae_lambda)  # (T, B)
    target = transitions.value + compute_gae(transitions, last_value, args.gamma, args.critic_lambda)  # (T, B)
    batch = (transitions, advantage, target)
    params, opt_state, metrics = learn(args, agent, optimizer, learner, learn_key, start_memory, batch)

    ended = infos["done"]
    over_ended = lambda x: jnp.sum(x * ended) / ended.sum()  # NaN, an empty cell, if no episode ended
    metrics |= {
        "losses/explained_variance": 1 - jnp.var(target - transitions.value) / jnp.var(target),
        "losses/param_norm": optax.tree.norm(params),
        "charts/episodic_return": over_ended(infos["episodic_return"]),
        "charts/episodic_length": over_ended(infos["episodic_length"]),
        "charts/episodes": ended.sum(),
    }
    metrics |= {name: over_ended(infos[entry]) for name, entry in env.outcomes.items()}
    return runner._replace(learner=Learner(params, opt_state, key, learner.update + 1)), metrics


def evaluate(args: Args, env, agent: nn.Module, params, key: jax.Array, greedy: bool) -> dict[str, jax.Array]:
    """One fresh episode in each of env.num_envs environments, each to its own end -> return, length, outcomes (E,)."""
    key, reset_key = jax.random.split(key)
    obs, env_state = env.reset(reset_key, env.default_params)
    nobody = jnp.zeros(env.num_envs, bool)
    info = jax.eval_shape(lambda: env.step(key, env_state, nobody * 0, env.default_params)[-1])
    entries = ("episodic_return", "episodic_length", *env.outcomes.values())
    result = {entry: jnp.zeros_like(info[entry]) for entry in entries}

    def step(carry):
        key, env_state, obs, reset, memory, finished, result = carry
        key, act_key, env_key = jax.random.split(key, 3)
        logits, _, memory = agent.apply(params, obs[None], reset[None], memory)
        action = logits[0].argmax(-1) if greedy else jax.random.categorical(act_key, logits[0])
        obs, env_state, _, done, info = env.step(env_key, env_state, action, env.default_params)
        result = {name: jnp.where(done & ~finished, info[name], old) for name, old in result.items()}
        return key, env_state, obs, done, memory, finished | done, result

    start = (key, env_state, obs, ~nobody, agent.initial_memory(env.num_envs), nobody, result)
    return jax.lax.while_loop(lambda carry: ~carry[5].all(), step, start)[-1]


# ------------------------------------------------------------------------------------------------------------- Plumbing
# Flags that do not touch the computation, so that a run may be resumed with others.
FREE_FLAGS = {"resume", "evaluate", "checkpoint_interval", "eval_episodes", "capture_video", "distributed"}
FREE_FLAGS |= {"track", "wandb_project_name", "wandb_entity"}


def parse_args(argv: list[str] | None = None) -> Args:
    """Reads the command line. With --resume or --evaluate the run's own arguments are the defaults, and binding."""
    existing = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    existing.add_argument("--resume")
    existing.add_argument("--evaluate")
    existing = existing.parse_known_args(argv)[0]  # first, since it decides what the other flags are judged by
    folder = existing.resume or existing.evaluate
    if not folder:
        return tyro.cli(Args, args=argv)
    try:
        saved = Args(**json.loads((Path(folder) / "args.json").read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"{folder} is not the folder of a run of this script: {error}") from None
    args = tyro.cli(Args, args=argv, default=saved)
    free = FREE_FLAGS if args.anneal_lr else FREE_FLAGS | {"total_timesteps"}
    for name, value in dataclasses.asdict(saved).items():
        if name not in free and getattr(args, name) != value:
            flag = f"--{name.replace('_', '-')}"
            why = ", to whose end its learning rate falls" if name == "total_timesteps" else ""
            made = f"{folder} was made with {flag} {value}{why}"
            raise SystemExit(f"{flag} {getattr(args, name)}: {made}; leave the flag out")
    return args


def seed_keys(args: Args) -> jax.Array:
    return jax.vmap(jax.random.key)(jnp.arange(args.seed, args.seed + args.num_seeds))


def make_shardings(args: Args) -> tuple[RunnerState, NamedSharding]:
    """Seeds over the devices as far as they divide, then blocks of environments -> of a runner, of the metrics."""
    seeds = math.gcd(args.num_seeds, jax.device_count())
    blocks = math.gcd(args.num_envs // args.num_minibatches, jax.device_count() // seeds)
    if seeds * blocks < jax.device_count():
        rule = "--num-seeds x --num-envs / --num-minibatches does not divide among more"
        if jax.process_count() > 1:
            raise SystemExit(f"only {seeds * blocks} of {jax.device_count()} devices could be used: {rule}")
        print(f"using {seeds * blocks} of {jax.device_count()} devices: {rule}")
    devices = jax.devices()[: seeds * blocks]
    mesh = jax.make_mesh((seeds, blocks), ("seed", "env"), (AxisType.Auto, AxisType.Auto), devices=devices)
    by_seed, by_env = NamedSharding(mesh, PartitionSpec("seed")), NamedSharding(mesh, PartitionSpec("seed", "env"))
    return RunnerState(by_seed, by_env, by_env, by_env, by_env, by_env), NamedSharding(mesh, PartitionSpec())


@jax.jit
def checksum(tree) -> jax.Array:
    """The sum of all 32-bit words, to tell a checkpoint whose bytes have changed on disk."""

    def words(x):
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return jax.lax.bitcast_convert_type(x, jnp.uint32) if x.dtype == jnp.float32 else x.astype(jnp.uint32)

    return sum(jnp.sum(words(x), dtype=jnp.uint32) for x in jax.tree.leaves(tree))


def checkpointed(args: Args, runner):
    """What a checkpoint holds of a runner."""
    return runner if args.checkpoint_envs else runner.learner


def save(args: Args, checkpoints: ocp.CheckpointManager, number: int, runner) -> None:
    """Writes the checkpoint after update `number`, whole or not at all, unless it is there."""
    runner = checkpointed(args, runner)
    tree = {"runner": runner, "checksum": checksum(runner)}
    try:
        written = number in checkpoints.all_steps() or checkpoints.save(number, args=ocp.args.StandardSave(tree))
    except Exception as error:  # a full disk is a ValueError in tensorstore
        raise OSError(f"checkpoint {number} could not be written: {error}") from None
    if not written:
        raise OSError(f"checkpoint {number} was not written")


def restore(checkpoints: ocp.CheckpointManager, like):
    """The newest checkpoint that is whole; damaged ones are set aside."""
    target = ocp.args.StandardRestore({"runner": like, "checksum": checksum(like)})
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            saved = checkpoints.restore(step, args=target)
            if saved["checksum"] == checksum(saved["runner"]):
                return saved["runner"]
            reason = "its checksum is wrong"
        except Exception as error:  # damage shows as almost anything; orbax raises the bare class too
            reason = (str(error) or repr(error)).splitlines()[0][:100]
        damaged = checkpoints.directory / f"damaged_{step}_{int(time.time())}"
        if jax.process_index() == 0:
            (checkpoints.directory / str(step)).rename(damaged)
        multihost_utils.sync_global_devices("set aside")
        checkpoints.reload()  # or it would take the step for saved
        print(f"checkpoint {step} is damaged ({reason}), set aside as {damaged}")
    raise SystemExit(f"{checkpoints.directory} holds no checkpoint that can be read; begin the run anew")


def cut_metrics(path: Path, columns: list[str], last: int) -> None:
    """Leaves metrics.csv with its rows up to update `last`, none if it is new."""
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    with path.with_suffix(".new").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(row for row in rows if None not in row.values() and int(row["update"]) <= last)
    path.with_suffix(".new").replace(path)  # at every moment one of them is whole


def headline(columns) -> dict[str, str]:
    """What to show of a run at a glance, by its short name: the return, and success or score, whichever there is."""
    shown = {"return": "charts/episodic_return", "success": "charts/success_rate", "score": "charts/score"}
    return {name: column for name, column in shown.items() if column in columns}


def interval(values) -> str:
    """Mean and half of its 95% interval, in the normal approximation."""
    values = np.asarray(values, float)
    half = f" ± {1.96 * values.std() / math.sqrt(values.size):.2g}" if values.size > 1 else ""
    return f"{values.mean():.3g}{half}"


def catch_signals() -> list[int]:
    """From now on Ctrl-C and SIGTERM only go into the list returned, to be seen after an update; a second one kills."""
    signals = []

    def handle(number, frame):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return signals


def agreed(signals: list[int]) -> int:
    """The signal that any of the processes got, 0 for none: all have to stop after the same update."""
    mine = np.int32(signals[-1] if signals else 0)
    return int(mine if jax.process_count() == 1 else multihost_utils.process_allgather(mine).max())


def updates_done(learner: Learner) -> int:
    return int(learner.update.addressable_data(0).ravel()[0])  # the same for all seeds


def train(args: Args, prepare, runner, folder: Path, checkpoints, tracker):
    """Updates until the end or a signal, with rows in metrics.csv and checkpoints -> the trained runner.

    prepare(runner) gives what makes an update of it, compiled, and the names of its metrics.
    """
    start_time, chief, signals = time.time(), jax.process_index() == 0, catch_signals()
    first = updates_done(runner.learner)
    compiled, names = prepare(runner)
    columns = ["update", "seed", "global_step", "elapsed", "charts/SPS", *names]
    if chief:
        cut_metrics(folder / "metrics.csv", columns, first)
    bar = tqdm(
        total=args.num_updates * args.batch_size, initial=first * args.batch_size,
        unit="step", unit_scale=True, disable=not chief,
    )  # fmt: skip

    with open(folder / "metrics.csv" if chief else os.devnull, "a", newline="", buffering=1) as file, bar:
        save(args, checkpoints, first, runner)
        loop_time = time.time()
        for number in range(first + 1, args.num_updates + 1):
            runner, metrics = compiled(runner)
            metrics = {name: np.asarray(value) for name, value in metrics.items()}  # (S,) each
            for name in set(metrics) - {"losses/explained_variance"}:
                if name.startswith("losses/") and not np.isfinite(metrics[name]).all():
                    seed = args.seed + np.flatnonzero(~np.isfinite(metrics[name]))[0]
                    raise SystemExit(
                        f"update {number}, seed {seed}: {name} is not finite. This update is not saved; the last good "
                        f"checkpoint is {checkpoints.latest_step()} in {folder}. Try a smaller --learning-rate"
                    )
            seconds, steps = time.time() - loop_time, (number - first) * args.batch_size * args.num_seeds
            row = {"update": number, "global_step": number * args.batch_size, "charts/SPS": round(steps / seconds)}
            row["elapsed"] = round(time.time() - start_time, 1)
            rows = [
                row | {"seed": args.seed + i} | {n: x[i].item() for n, x in metrics.items() if np.isfinite(x[i])}
                for i in range(args.num_seeds)
            ]
            csv.DictWriter(file, columns).writerows(rows)
            if tracker:
                prefix = (lambda row: f"seed_{row['seed']}/") if args.num_seeds > 1 else (lambda row: "")
                tracker.log({prefix(row) + name: value for row in rows for name, value in row.items()} | row)
            shown = {name: metrics[column] for name, column in headline(columns).items()}
            if np.isfinite(shown["return"]).all():
                bar.set_postfix({name: interval(value) for name, value in shown.items()}, refresh=False)
            bar.update(args.batch_size)

            stop = agreed(signals)
            if stop or number % args.checkpoint_interval == 0 or number == args.num_updates:
                save(args, checkpoints, number, runner)
            if stop:
                print(f"\nstopped and saved after update {number}; to go on: python {sys.argv[0]} --resume {folder}")
                raise SystemExit(128 + stop)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    return runner


def plot_learning_curve(folder: Path) -> None:
    """Return, and success or score, over environment steps, a line a seed."""
    reader = csv.DictReader((folder / "metrics.csv").open())
    rows, names = list(reader), headline(reader.fieldnames).values()
    figure = Figure(figsize=(4.5 * len(names), 3.5), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for seed in dict.fromkeys(row["seed"] for row in rows):
            curve = [(int(row["global_step"]), float(row[name])) for row in rows if row["seed"] == seed and row[name]]
            axis.plot(*np.array(curve).reshape(-1, 2).T, label=f"seed {seed}", alpha=0.8)
        axis.set(xlabel="environment steps", ylabel=name.removeprefix("charts/").replace("_", " "))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(folder / "learning_curve.png", dpi=150)


def record_video(args: Args, agent: nn.Module, params, key: jax.Array, path: Path) -> None:
    """Plays one episode, or its first 1000 steps, with sampled actions and draws it as an animated picture."""
    env = make_env(args, 1).unwrapped
    apply, step = jax.jit(agent.apply), jax.jit(env.step)
    key, reset_key = jax.random.split(key)
    obs, state = env.reset(reset_key, env.default_params)
    memory, done, frames = agent.initial_memory(1), True, []
    while not (frames and done) and len(frames) < 1000:
        key, act_key, env_key = jax.random.split(key, 3)
        logits, _, memory = apply(params, obs[None, None], jnp.array([[done]]), memory)
        action, before = jax.random.categorical(act_key, logits[0, 0]), state
        obs, state, reward, done, _ = step(env_key, state, action, env.default_params)
        frames.append(env.render(before, env.default_params, action, jax.nn.softmax(logits[0, 0]), reward))
    path.parent.mkdir(exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[60] * (len(frames) - 1) + [2000], loop=0)


def report(args: Args, agent: nn.Module, runner: RunnerState, folder: Path, replicated: NamedSharding, tracker) -> None:
    """Evaluates the final parameters, with sampled and with greedy actions, and draws what there is to see."""
    env, results = make_env(args, args.eval_episodes), {}
    for number, kind in enumerate(("sampled", "greedy")):
        run = jax.vmap(functools.partial(evaluate, args, env, agent, greedy=kind == "greedy"))
        keys = jax.vmap(jax.random.fold_in, (0, None))(seed_keys(args), number)
        result = jax.jit(run, out_shardings=replicated)(runner.learner.params, keys)
        result = {name: np.asarray(value) for name, value in result.items()}  # (S, E) each
        results[kind] = {name: value.mean(1).tolist() for name, value in result.items()}
        episodes = f"{args.eval_episodes} episodes" + (
            f" of each of {args.num_seeds} seeds" if args.num_seeds > 1 else ""
        )
        # What has a / in its name is one of many, like Craftax's achievements: for the file alone.
        shown = [f"{name.removeprefix('episodic_')} {interval(x)}" for name, x in result.items() if "/" not in name]
        print(f"evaluation with {kind} actions, {episodes}: {', '.join(shown)}")
    if jax.process_index() > 0:
        return
    (folder / "evaluation.json").write_text(json.dumps(results, indent=2))
    plot_learning_curve(folder)
    if args.capture_video:
        params = jax.tree.map(lambda x: x[0], runner.learner.params)
        record_video(args, agent, params, jax.random.key(args.seed), folder / "videos" / "episode.gif")
    if tracker:
        tracker.log({f"eval/{name}": np.mean(value) for name, value in results["sampled"].items()})
        tracker.finish()
    print(f"all of it is in {folder}")


def start_tracker(args: Args, folder: Path):
    """Weights & Biases, where asked for."""
    if not args.track or jax.process_index() > 0:
        return None
    import wandb

    project = {"project": args.wandb_project_name, "entity": args.wandb_entity, "config": dataclasses.asdict(args)}
    try:
        return wandb.init(**project, name=folder.name, id=folder.name, resume="allow", dir=folder)
    except wandb.errors.UsageError as error:
        raise SystemExit(f"--track: {error}. Run `wandb login` once, or set WANDB_MODE=offline") from None


def main(args: Args) -> None:
    if args.distributed:  # the processes find each other through their cluster, or JAX_COORDINATOR_ADDRESS and these
        given = {name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
        jax.distributed.initialize(**{name: int(value) for name, value in given.items() if value})
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs the traceback of what it then raises

    env = make_env(args, args.num_envs)
    agent, optimizer = ActorCritic(args, env.action_space(env.default_params).n), make_optimizer(args)
    sharded, replicated = make_shardings(args)
    bound = [jax.vmap(functools.partial(function, args, env, agent, optimizer)) for function in (init, update)]
    init_seeds = jax.jit(bound[0], out_shardings=sharded)
    update_seeds = jax.jit(bound[1], out_shardings=(sharded, replicated), donate_argnums=0)
    prepare = lambda runner: (update_seeds.lower(runner).compile(), jax.eval_shape(update_seeds, runner)[1])

    existing = args.resume or args.evaluate
    now = int(multihost_utils.broadcast_one_to_all(np.int32(time.time())))  # the same in all processes
    folder = Path(existing or f"runs/{args.env_id}__{args.exp_name}__{args.seed}__{now}").absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    handler = ocp.StandardCheckpointHandler()  # named here, or an empty newest step makes all of them unreadable
    try:
        if not existing and jax.process_index() == 0:
            folder.mkdir(parents=True)
            (folder / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2))
        tracker = start_tracker(args, folder)
        runner = init_seeds(seed_keys(args))
        size = sum(x[0].size for x in jax.tree.leaves(runner.learner.params))
        print(f"{folder}: {size:,} parameters, {args.num_updates} updates of {args.batch_size} steps")
        with ocp.CheckpointManager(folder / "checkpoints", options=options, item_handlers=handler) as checkpoints:
            if existing:
                saved = restore(checkpoints, checkpointed(args, runner))
                if args.checkpoint_envs:
                    runner = saved
                else:  # other episodes than those that the run began with
                    keys = jax.vmap(jax.random.fold_in, (0, None))(seed_keys(args), updates_done(saved))
                    runner = init_seeds(keys)._replace(learner=saved)
            if not args.evaluate:
                runner = train(args, prepare, runner, folder, checkpoints, tracker)
        report(args, agent, runner, folder, replicated, tracker)
    except OSError as error:
        raise SystemExit(f"{folder}: {error}. The checkpoints in it are intact; --resume goes on from there") from None


if __name__ == "__main__":
    main(parse_args())

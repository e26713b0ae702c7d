"""PPO with AGaLiTe, a linear transformer with gated memory of constant size, on Memory Maze.

    python ppo_agalite_memorymaze.py --env-id MemoryMaze-9x9-v0

In a maze drawn anew for each episode lie objects of different colours. From pictures of 64 x 64 pixels the agent must
find the one whose colour frames them, again and again, and so does well to remember where each of them is
(Pasukonis et al., "Evaluating Long-Term Memory in 3D Mazes", ICLR 2023). The memory is AGaLiTe: Pramanik, Elelimy,
Machado and White, "AGaLiTe: Approximate Gated Linear Transformers for Online Reinforcement Learning", TMLR 2024
(arXiv 2310.15719), behind the residual encoder of IMPALA (Espeholt et al. 2018). Its authors show results on Memory
Maze, but published no code for it.

What to learn here: how PPO goes with environments that are processes on the CPU. The rollout is a loop on the host, in
which one half of the environments steps while the agent acts for the other; all that comes after it is the same text
as in ppo_agalite_mysterypath.py. To compare memories, `diff` with ppo_lstm_memorymaze.py or ppo_gtrxl_memorymaze.py.

What to expect: README's small size finds about one object an episode after 750k steps, 70 minutes on a CPU core, and
a random policy 0.16. Not trained at the published size; the environment's authors give their agents 100M steps. A small
cue task it learns, and only with its memory (tests/test_memorymaze_scripts.py).

Letters of the axes, time first throughout:
    T time steps   B environments   b environments of a half   D d_model   H heads   d d_head   e eta
    F distinct frequencies
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
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from tqdm import tqdm

from envs.memorymaze import ACTIONS, MAX_STEPS, CannotRun
from envs.workers import WorkerDied, WorkerFailed, Workers

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
    exp_name: str = "ppo_agalite_memorymaze"
    """name of the experiment, part of the run folder's name"""
    seed: int = 1
    """decides everything: parameters, environments, actions, minibatches"""
    total_timesteps: WholeNumber = 100_000_000
    """environment steps per seed (1e6 is understood)"""
    checkpoint_interval: int = 20
    """updates between two checkpoints"""
    resume: str = ""
    """folder of an interrupted run to continue, bit for bit
    here the mazes, and what was remembered of them, begin anew; all else goes on as it was"""
    evaluate: str = ""
    """folder of a run whose newest checkpoint is evaluated, without training"""
    eval_episodes: int = 32
    """episodes of an evaluation
    shared out evenly over the environments, before any begins"""
    capture_video: bool = False
    """draw an episode of the final policy as an animated picture in the run folder"""
    track: bool = False
    """log to Weights & Biases too (WANDB_MODE=offline needs no account)"""
    wandb_project_name: str = "memory-ppo"
    """project in Weights & Biases"""
    wandb_entity: str | None = None
    """team or user in Weights & Biases"""
    distributed: bool = False
    """this is one of several processes that train together, see README
    each drives its share of the environments"""

    env_id: str = "MemoryMaze-9x9-v0"
    """the environment
    MemoryMaze-9x9-v0, -11x11-, -13x13- or -15x15-, with 3 to 6 objects, for 1000 to 4000 steps"""

    num_channels: int = 16
    """channels of the encoder's first convolution; the others have twice as many"""
    num_layers: int = 4
    """layers of the memory"""
    d_model: int = 128
    """width D between the layers"""
    d_head: int = 64
    """width d of an attention head"""
    d_ffc: int = 128
    """hidden width of the feed-forward block"""
    num_heads: int = 4
    """attention heads H in a layer"""
    eta: int = 4
    """expansion of keys and queries, from d to eta * d
    published: 4 and 8 on Mystery Path"""
    r: int = 2
    """cosine frequencies that approximate the outer product of values and keys"""
    gate_init: Literal["chrono", "published"] = "published"
    """forget gates that start with memories of 1 to chrono-t-max steps (Tallec and Ollivier 2018), or the authors'"""
    chrono_t_max: float = 300.0
    """longest initial memory in steps, with --gate-init chrono"""
    d_actor: int = 256
    """hidden width of the policy head"""
    d_critic: int = 256
    """hidden width of the value head"""

    num_envs: int = 32
    """environments B stepped together
    each is a process (Mystery Path as published: 128)"""
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
    published: never; 10 is more than any policy over 6 actions has"""
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

    # Flags of the other scripts that cannot be given here: the mazes are processes, neither vmapped nor saved.
    num_seeds = 1
    checkpoint_envs = False

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
        require(0 <= self.seed < 2**31, "seed", "must be at least 0 and below 2^31")
        require("/" not in self.exp_name, "exp_name", "is part of a folder's name, so no / in it")
        for name in ("gamma", "gae_lambda", "critic_lambda"):
            require(getattr(self, name) <= 1, name, "must be at most 1")
        for name in ("learning_rate", "clip_coef", "max_grad_norm", "adam_eps"):
            require(getattr(self, name) > 0, name, "must be above 0")
        require(self.chrono_t_max > 1, "chrono_t_max", "must be above 1, the shortest memory")
        known = [f"MemoryMaze-{size}-v0" for size in MAX_STEPS]
        require(self.env_id in known, "env_id", f"there are {', '.join(known)}")
        require(self.num_envs % 2 == 0, "num_envs", "must be even, one half steps while the agent acts for the other")
        rule = f"not divisible by --num-minibatches {self.num_minibatches}, and a minibatch is made of whole rollouts"
        require(self.num_envs % self.num_minibatches == 0, "num_envs", rule)
        rule = f"less than one update, --num-envs {self.num_envs} x --num-steps {self.num_steps} steps"
        require(self.num_updates >= 1, "total_timesteps", rule)
        require(not (self.resume and self.evaluate), "resume", "cannot be combined with --evaluate; give one of them")


def make_env(args: Args, share: float = 1.0) -> Callable[..., gymnasium.Env]:
    """What makes an environment, in a process of its own. Its very first episode ends after that share of its steps:
    mazes all take equally long, and so would all be drawn anew at once."""
    steps = max(1, round(share * MAX_STEPS[args.env_id.split("-")[1]]))
    known_as = f"envs.memorymaze:{args.env_id}"  # Gymnasium imports the module that registers it
    return functools.partial(gymnasium.make, known_as, first_episode_steps=steps, disable_env_checker=True)


# ---------------------------------------------------------------------------------------------------------------- Model
orthogonal = nn.initializers.orthogonal(math.sqrt(2))
lecun_normal = nn.initializers.lecun_normal()


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


class LayerMemory(NamedTuple):
    """What one attention layer remembers; all zeros at the start of an episode."""

    keys: jax.Array  # (B, F, H, e, d), gated sums of cos(w t) * key
    values: jax.Array  # (B, F, H, d), gated sums of cos(w t) * value
    norm: jax.Array  # (B, H, e, d), gated sum of keys


class Memory(NamedTuple):
    """What an agent carries from step to step."""

    tick: jax.Array  # (B,) int32, the time t of the cosines within their common period
    layers: tuple[LayerMemory, ...]


FIRST_TICK = 2  # the authors start their counter at 1 and add 1 before the first use


def cosine_frequencies(r: int) -> tuple[np.ndarray, np.ndarray]:
    """The cosines of the r frequencies w in linspace(-pi, pi, r), each distinct |w| once (cos is even).

    -> cos(w t) (period, F) for t within the common period of all, and how many of the r share each |w| (F,).
    """
    half_period = max(r - 1, 1)  # w = pi n / half_period with a whole number n
    n, count = np.unique(np.abs(2 * np.arange(r) - half_period), return_counts=True)
    t = np.arange(2 * half_period)
    return np.cos(np.pi * t[:, None] * n / half_period).astype(np.float32), count


def gated_linear_attention(memory: LayerMemory, keep, cosines, count, k, q, v, beta, gamma, p1, p2, p3):
    """The recurrence of AGaLiTe (Algorithm 2 of the paper), step by step, with the large arrays made and used inside.

        norm_t   = (1 - gamma_t) norm_{t-1}   + gamma_t k_t            (B, H, e, d), k and gamma expanded by p1 and p3
        keys_t   = (1 - gamma_t) keys_{t-1}   + gamma_t k_t cos(w t)   the same for each frequency w
        values_t = (1 - beta_t)  values_{t-1} + beta_t  v_t cos(w t)   (B, H, d) for each frequency w
        out_t    = sum_w values_t (keys_t . q_t) / (2 r norm_t . q_t)  (B, H, d), q expanded by p2

    k, q, v, beta, gamma (T, B, H, d) and p1, p2, p3 (T, B, H, e) come with their activations applied. keep (T, B) is 0
    where an episode begins, which forgets what came before, else 1. cosines (T, B, F), count (F,) as above.
    -> memory after the last step, out (T, B, H, d).

    Backpropagation keeps the memory at every 16th step and recomputes the rest (jax.checkpoint). One array for each
    frequency, and outer products as einsums, whose derivatives are dot products, are several times faster on a CPU
    than one stacked array and broadcasts, whose derivatives are reductions (benchmarks/attention.py).
    """
    T, F = len(k), len(count)

    def step(state, inputs):
        keys, values, norm = state
        keep, cosines, k, v, beta, gamma, p1, p2, p3 = inputs
        gate = jnp.einsum("bhe,bhd->bhed", p3, gamma)
        inflow = gate * jnp.einsum("bhe,bhd->bhed", p1, k)
        decay = (1 - gate) * keep[:, None, None, None]
        value_decay = (1 - beta) * keep[:, None, None]
        norm = decay * norm + inflow
        keys = tuple(decay * keys[f] + inflow * cosines[:, f, None, None, None] for f in range(F))
        values = tuple(value_decay * values[f] + beta * v * cosines[:, f, None, None] for f in range(F))
        read = functools.partial(jnp.einsum, "bhe,bhed->bhd", p2)
        return (keys, values, norm), (tuple(map(read, keys)), values, read(norm))

    chunk = math.gcd(T, 16)
    inputs = (keep, cosines, k, v, beta, gamma, p1, p2, p3)
    chunks = jax.tree.map(lambda x: x.reshape(T // chunk, chunk, *x.shape[1:]), inputs)
    state = tuple(jnp.moveaxis(memory.keys, 1, 0)), tuple(jnp.moveaxis(memory.values, 1, 0)), memory.norm
    state, outputs = jax.lax.scan(jax.checkpoint(functools.partial(jax.lax.scan, step)), state, chunks)
    keys, values, norm = jax.tree.map(lambda x: x.reshape(T, *x.shape[2:]), outputs)  # (T, B, H, d), read by p2
    dot_q = lambda x: jnp.einsum("tbhd,tbhd->tbh", x, q)[..., None]
    out = sum(n * values[f] * dot_q(keys[f]) for f, n in enumerate(count.tolist()))
    out = out / (2 * count.sum() * dot_q(norm) + 1e-5)
    return LayerMemory(jnp.stack(state[0], 1), jnp.stack(state[1], 1), state[2]), out


class AGaLiTeAttention(nn.Module):
    """Attention without softmax at constant cost a step (section 4 of the paper). u (T, B, D) -> (T, B, D), memory."""

    args: Args

    @nn.compact
    def __call__(self, u, keep, cosines, memory: LayerMemory):
        T, B, D = u.shape
        H, d, e = self.args.num_heads, self.args.d_head, self.args.eta
        chrono = float(self.args.gate_init == "chrono")

        def kernel_init(key, shape):
            """One orthogonal (D, 5Hd) matrix cut into five; with chrono, gates hardly depend on the input at first."""
            kernels = orthogonal(key, (D, 5 * H * d)).reshape(D, 5, H * d).swapaxes(0, 1)
            return kernels.at[3:].multiply(1 - 0.7 * chrono)

        def bias_init(key, shape):
            """With chrono, a gate of sigmoid(-log x) = 1 / (1 + x) remembers for about x ~ U(1, t_max) steps."""
            memory_steps = jax.random.uniform(key, (2, H * d), minval=1.0, maxval=self.args.chrono_t_max)
            return jnp.zeros(shape).at[3:].set(-chrono * jnp.log(memory_steps))

        def expansion_bias_init(key, shape, dtype):
            return jnp.zeros((3, H * e), dtype).at[2].set(chrono).reshape(shape)  # sigmoid(1) = 0.73 in place of 0.5

        kernel = self.param("kernel", kernel_init, (5, D, H * d))
        bias = self.param("bias", bias_init, (5, H * d))
        # Five products, not one of (D, 5Hd): on a CPU, cutting its result and gluing its gradient cost more than it.
        k, q, v, beta, gamma = ((u @ kernel[i] + bias[i]).reshape(T, B, H, d) for i in range(5))
        p = nn.Dense(3 * H * e, kernel_init=orthogonal, bias_init=expansion_bias_init, name="expansion")(u)
        p1, p2, p3 = jnp.moveaxis(p.reshape(T, B, 3, H, e), 2, 0)  # (T, B, H, e) each

        k, q, p1, p2 = nn.relu(k), nn.relu(q), nn.relu(p1), nn.relu(p2)
        beta, gamma, p3 = nn.sigmoid(beta), nn.sigmoid(gamma), nn.sigmoid(p3)
        _, count = cosine_frequencies(self.args.r)
        memory, out = gated_linear_attention(memory, keep, cosines, count, k, q, v, beta, gamma, p1, p2, p3)
        return nn.Dense(D, kernel_init=orthogonal, name="out")(out.reshape(T, B, H * d)), memory


class AGaLiTeLayer(nn.Module):
    """A transformer layer, normalised before each sub-block and gated after it. x (T, B, D) -> (T, B, D), memory."""

    args: Args

    @nn.compact
    def __call__(self, x, keep, cosines, memory: LayerMemory):
        y, memory = AGaLiTeAttention(self.args, name="attention")(nn.LayerNorm()(x), keep, cosines, memory)
        x = GRUGate()(x, nn.relu(y))
        z = nn.relu(nn.Dense(self.args.d_ffc, kernel_init=orthogonal)(nn.LayerNorm()(x)))  # (T, B, d_ffc)
        z = nn.relu(nn.Dense(self.args.d_model, kernel_init=orthogonal)(z))
        return GRUGate()(x, z), memory


class AGaLiTe(nn.Module):
    """x (T, B, n), reset (T, B), memory -> (T, B, D), memory after the last step.

    reset[t] says that x[t] is the first of an episode: all that was remembered is cleared before x[t] is read.
    """

    args: Args

    @nn.nowrap
    def initial_memory(self, B: int) -> Memory:
        H, d, e = self.args.num_heads, self.args.d_head, self.args.eta
        F = len(cosine_frequencies(self.args.r)[1])
        layer = LayerMemory(jnp.zeros((B, F, H, e, d)), jnp.zeros((B, F, H, d)), jnp.zeros((B, H, e, d)))
        return Memory(jnp.full(B, FIRST_TICK - 1, jnp.int32), (layer,) * self.args.num_layers)

    @nn.compact
    def __call__(self, x, reset, memory: Memory):
        t = jnp.arange(len(x))[:, None]
        last_reset = jax.lax.cummax(jnp.where(reset, t, -1))  # (T, B), -1 before the first
        tick = jnp.where(last_reset < 0, memory.tick + 1 + t, FIRST_TICK + t - last_reset)
        table, _ = cosine_frequencies(self.args.r)
        tick = tick % len(table)  # a whole number within one period: exact however long the run
        cosines = jnp.asarray(table)[tick]  # (T, B, F)

        x = nn.relu(nn.Dense(self.args.d_model, kernel_init=orthogonal, name="embedding")(x))  # (T, B, D)
        layers = []
        for layer_memory in memory.layers:
            x, layer_memory = AGaLiTeLayer(self.args)(x, 1.0 - reset, cosines, layer_memory)
            layers.append(layer_memory)
        return x, Memory(tick[-1], tuple(layers))


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


class Conv3x3(nn.Module):
    """A convolution of 3 x 3 with zeros around. (..., H, W, C) -> (..., H, W, features).

    Written as products of matrices: in a loop on a CPU, where learning happens, the gradients of XLA's own are slow
    (benchmarks/encoder.py shows it for the encoder of Mystery Path).
    """

    features: int

    @nn.compact
    def __call__(self, x):
        H, W, C = x.shape[-3:]
        kernel = self.param("kernel", lecun_normal, (9 * C, self.features)).reshape(3, 3 * C, self.features)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(1, 1), (1, 1), (0, 0)])
        rows = jnp.concatenate([x[..., j : j + W, :] for j in range(3)], axis=-1)  # (..., H + 2, W, 3C)
        return sum(rows[..., i : i + H, :, :] @ kernel[i] for i in range(3)) + bias


def max_pool(x):
    """The largest of 3 x 3 at every second position. (..., H, W, C) -> (..., H/2, W/2, C), H and W even."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, 1), (0, 1), (0, 0)], constant_values=-jnp.inf)
    x = functools.reduce(jnp.maximum, [x[..., i : x.shape[-3] - 2 + i : 2, :, :] for i in range(3)])
    return functools.reduce(jnp.maximum, [x[..., j : x.shape[-2] - 2 + j : 2, :] for j in range(3)])


class ImpalaEncoder(nn.Module):
    """Pictures (T, B, H, W, 3) of 0 .. 255 -> (T, B, 256), by the residual network of IMPALA (Espeholt et al. 2018).

    Its kernels start as IMPALA's do, with variance 1 / inputs. With the other layers' gain sqrt 2 the six residual sums
    would grow to features so large that many of an LSTM's gates begin saturated.
    """

    channels: int = 16

    @nn.compact
    def __call__(self, obs):
        x = obs / 255.0
        for features in (self.channels, 2 * self.channels, 2 * self.channels):
            x = max_pool(Conv3x3(features)(x))  # half as high and wide
            for _ in range(2):
                y = Conv3x3(features)(nn.relu(x))
                x = x + Conv3x3(features)(nn.relu(y))
        x = nn.relu(x).reshape(*x.shape[:2], -1)  # (T, B, H/8 * W/8 * 2 * channels)
        return nn.relu(nn.Dense(256, kernel_init=lecun_normal)(x))


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
    """obs (T, B, 64, 64, 3), reset (T, B), memory -> logits (T, B, actions), value (T, B), new memory.

    One call serves acting (T = 1) and learning (T = num_steps).
    """

    args: Args
    num_actions: int

    @nn.nowrap
    def initial_memory(self, B: int) -> Memory:
        return AGaLiTe(self.args, parent=None).initial_memory(B)

    @nn.compact
    def __call__(self, obs, reset, memory: Memory):
        x = in_pieces(ImpalaEncoder(self.args.num_channels, name="encoder"), obs)  # (T, B, 256)
        x, memory = AGaLiTe(self.args, name="memory")(x, reset, memory)  # (T, B, D)
        # Acting at random earns 1 in some 6000 steps: the first policy is near uniform, and the first value near 0.
        logits = Head(self.args.d_actor, self.num_actions, gain=0.01, name="actor")(x)
        value = Head(self.args.d_critic, 1, gain=0.01, name="critic")(x).squeeze(-1)
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


# What seeds of episodes begin with, lest those of an evaluation be met in training.
TRAINING, EVALUATION = range(2)


class HostRunner(NamedTuple):
    """What goes from update to update; a checkpoint is its learner. The episodes, and what the agent remembers of them,
    are in `Half` and begin anew at a resume."""

    learner: Learner


class Half:
    """Half of a process' environments, each in a worker process, and where the agent stands in them: (b, ...) each."""

    def __init__(self, agent: nn.Module, workers: Workers):
        self.agent, self.workers = agent, workers

    def begin(self, seeds: np.random.SeedSequence, whole: bool):
        """New episodes, decided by the seeds. whole: they are not cut short (`make_env`), so they count."""
        b = self.workers.num_envs
        self.obs, _ = self.workers.reset(seed=seeds.generate_state(b).tolist())
        self.reset = np.ones(b, bool)  # obs is the first of an episode
        nothing = self.agent.initial_memory(b), jnp.zeros((b, self.agent.num_actions))
        self.memory, self.noise = jax.device_put(nothing, jax.local_devices()[0])  # said, or act is compiled once more
        self.episodic_return, self.episodic_length = np.zeros(b), np.zeros(b, int)
        self.whole = np.full(b, whole)  # the episode that goes on was not cut short

    def receive(self) -> tuple[np.ndarray, np.ndarray, list[tuple[int, float, int]]]:
        """Waits for the workers' step -> reward, done, and (environment, return, length) of whole episodes now over."""
        self.obs, reward, terminated, truncated, _ = self.workers.step_wait()
        self.reset = done = terminated | truncated
        self.episodic_return += reward
        self.episodic_length += 1
        over = np.flatnonzero(done & self.whole)
        ended = [(int(i), float(self.episodic_return[i]), int(self.episodic_length[i])) for i in over]
        self.whole |= done
        self.episodic_return[done], self.episodic_length[done] = 0, 0
        return reward.astype(np.float32), done, ended


def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Adam on clipped gradients; `learn` multiplies by the learning rate."""
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.scale_by_adam(eps=args.adam_eps))


def init_learner(args: Args, agent: nn.Module, optimizer, obs_space: gymnasium.Space, key: jax.Array) -> Learner:
    params_key, key = jax.random.split(key)
    obs = jnp.zeros((1, 1, *obs_space.shape), obs_space.dtype)
    params = agent.init(params_key, obs, jnp.ones((1, 1), bool), agent.initial_memory(1))
    return Learner(params, optimizer.init(params), key, jnp.zeros((), jnp.int32))


def log_prob_of(logits: jax.Array, action: jax.Array) -> jax.Array:
    """(..., actions), (...) -> (...)"""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), action[..., None], axis=-1).squeeze(-1)


def act(args: Args, agent: nn.Module, params, key: jax.Array, obs, reset, noise, memory):
    """One step of the agent in b environments -> noise, action, its log-probability, value, memory."""
    noise_key, act_key = jax.random.split(key)
    noise = jnp.where(reset[:, None], args.logit_noise * jax.random.normal(noise_key, noise.shape), noise)
    logits, value, memory = agent.apply(params, obs[None], reset[None], memory)
    logits, value = logits[0] + noise, value[0]  # (b, actions), (b,)
    action = jax.random.categorical(act_key, logits)
    return noise, action, log_prob_of(logits, action), value, memory


def host_rollout(args: Args, acts, params, halves: list[Half], key: jax.Array):
    """Acts for T steps -> transitions (T, B), value of the observation then (B,), whole episodes that ended.

    acts is `act`, compiled. B are this process' own environments, the first half before the second, which take turns:
    while the workers of one step, the agent acts for the other.
    """
    keys = jax.random.split(key, (args.num_steps, 2))  # (T, 2)
    steps, ended = ([], []), []

    def receive(half, taken):
        reward, done, over = half.receive()
        taken[-1] = taken[-1]._replace(reward=reward, done=done)
        ended.extend(over)

    for t in range(args.num_steps):
        for half, taken, step_key in zip(halves, steps, keys[t], strict=True):
            if t > 0:
                receive(half, taken)
            acted = acts(params, step_key, half.obs, half.reset, half.noise, half.memory)
            half.noise, action, log_prob, value, half.memory = acted
            half.workers.step_async(np.asarray(action))
            taken.append(Transition(half.obs, half.reset, half.noise, action, log_prob, value, None, None))
    for half, taken in zip(halves, steps, strict=True):
        receive(half, taken)

    in_turn = [taken for both in zip(*steps, strict=True) for taken in both]  # 2T times (b, ...)
    side_by_side = lambda *x: np.stack(x).reshape(args.num_steps, -1, *x[0].shape[1:])  # one copy of the whole
    transitions = jax.tree.map(side_by_side, *in_turn)  # (T, B, ...)
    last = [acts(params, key, half.obs, half.reset, half.noise, half.memory)[3] for half in halves]
    return transitions, np.concatenate(last), ended


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


def learn_from(args: Args, agent: nn.Module, optimizer, learner: Learner, memory, transitions, last_value):
    """The learning from a rollout -> learner, metrics."""
    key, _, learn_key = jax.random.split(learner.key, 3)  # the second is for the rollout, in host_update
    advantage = compute_gae(transitions, last_value, args.gamma, args.gae_lambda)  # (T, B)
    target = transitions.value + compute_gae(transitions, last_value, args.gamma, args.critic_lambda)  # (T, B)
    batch = (transitions, advantage, target)
    params, opt_state, metrics = learn(args, agent, optimizer, learner, learn_key, memory, batch)
    metrics |= {
        "losses/explained_variance": 1 - jnp.var(target - transitions.value) / jnp.var(target),
        "losses/param_norm": optax.tree.norm(params),
    }
    return Learner(params, opt_state, key, learner.update + 1), metrics


def local(tree):
    """What is the same on all devices, as it is on this process' first."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def told(error: Exception) -> str:
    """What to say of it: where in a worker it was raised, if anywhere, and last the sentence."""
    return "\n".join([*getattr(error, "__notes__", []), str(error)])


def unless_one_fails(function, *arguments):
    """function(*arguments) in every process, or an exception in every one if a worker of one has failed in it."""
    try:
        result, failed = function(*arguments), None
    except (WorkerDied, WorkerFailed) as error:
        result, failed = None, error
    if agreed([1] if failed else []):
        raise failed or WorkerDied("A worker of another process has failed")
    return result


def host_update(args: Args, acts, learns, shardings, halves: list[Half], checkpoints, runner: HostRunner):
    """A rollout in this process' environments, and the learning from those of all -> runner, metrics (1,) each.

    acts and learns are `act` and `learn_from`, compiled.
    """
    learner = runner.learner
    params, key = local((learner.params, learner.key))
    rollout_key = jax.random.fold_in(jax.random.split(key, 3)[1], jax.process_index())  # learn_from has the others
    memory = jax.tree.map(lambda *x: np.concatenate(x), *[half.memory for half in halves])
    try:
        transitions, last_value, ended = unless_one_fails(host_rollout, args, acts, params, halves, rollout_key)
    except (WorkerDied, WorkerFailed) as error:
        number = updates_done(learner)
        save(args, checkpoints, number, runner)
        how = f"saved after update {number}; to go on: python {sys.argv[0]} --resume {checkpoints.directory.parent}"
        raise SystemExit(f"{told(error)}; {how}") from None
    by_time, by_env, _ = shardings
    spread = lambda sharding, tree: jax.tree.map(
        functools.partial(jax.make_array_from_process_local_data, sharding), tree
    )
    batch = spread(by_env, memory), spread(by_time, transitions), spread(by_env, last_value)
    learner, metrics = learns(learner, *batch)

    totals = np.array([[len(ended), *np.sum([x[1:] for x in ended], axis=0)]] if ended else np.zeros((1, 3)))
    totals = totals if jax.process_count() == 1 else multihost_utils.process_allgather(totals[0])
    episodes, returns, lengths = totals.sum(0)
    mean = lambda total: total / episodes if episodes else math.nan  # NaN, an empty cell, if no episode ended
    metrics |= {"charts/episodic_return": mean(returns), "charts/episodic_length": mean(lengths)}
    metrics = {name: np.asarray(value).reshape(1) for name, value in (metrics | {"charts/episodes": episodes}).items()}
    return HostRunner(learner), metrics


def choose(agent: nn.Module, greedy: bool, params, key: jax.Array, obs, reset, memory):
    """The policy's action in b environments -> action, memory."""
    logits, _, memory = agent.apply(params, obs[None], reset[None], memory)
    return logits[0].argmax(-1) if greedy else jax.random.categorical(key, logits[0]), memory


def host_evaluate(args: Args, chooses, params, halves: list[Half], key: jax.Array) -> np.ndarray:
    """This process' share of args.eval_episodes fresh episodes, each to its own end -> returns and lengths (E, 2).

    chooses is `choose`, compiled.
    Each environment has its number of episodes before they begin; taking those that end first would favour short ones.
    """
    index, num_envs = jax.process_index(), sum(half.workers.num_envs for half in halves)
    share = lambda number, among: number // among + (np.arange(among) < number % among)
    left = np.split(share(share(args.eval_episodes, jax.process_count())[index], num_envs), 2)
    seeds = np.random.SeedSequence([EVALUATION, args.seed, index]).spawn(2)
    for half, half_seeds in zip(halves, seeds, strict=True):
        half.begin(half_seeds, whole=True)
    results, waits = [], [False, False]
    while any(rest.any() for rest in left):
        for i, half in enumerate(halves):
            if waits[i]:
                for environment, *result in half.receive()[2]:
                    if left[i][environment] > 0:
                        left[i][environment] -= 1
                        results.append(result)
            waits[i] = left[i].any()
            if waits[i]:
                key, act_key = jax.random.split(key)
                action, half.memory = chooses(params, act_key, half.obs, half.reset, half.memory)
                half.workers.step_async(np.asarray(action))
    return np.array(results).reshape(-1, 2)


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


def batch_shardings(args: Args) -> tuple[NamedSharding, NamedSharding, NamedSharding]:
    """Blocks of environments over the devices -> of what is (T, B, ...), of what is (B, ...), of the learner."""
    blocks = math.gcd(args.num_envs // args.num_minibatches, jax.device_count())
    if blocks < jax.device_count():
        rule = "--num-envs / --num-minibatches does not divide among more"
        if jax.process_count() > 1:
            raise SystemExit(f"only {blocks} of {jax.device_count()} devices could be used: {rule}")
        print(f"using {blocks} of {jax.device_count()} devices: {rule}")
    mesh = jax.make_mesh((blocks,), ("env",), (AxisType.Auto,), devices=jax.devices()[:blocks])
    by_time, by_env, same = PartitionSpec(None, "env"), PartitionSpec("env"), PartitionSpec()
    return NamedSharding(mesh, by_time), NamedSharding(mesh, by_env), NamedSharding(mesh, same)


def batch_shapes(args: Args, agent: nn.Module, obs_space: gymnasium.Space, shardings):
    """What learning is compiled for -> memory, transitions, last value, as shapes and shardings."""
    T, B, (by_time, by_env, _) = args.num_steps, args.num_envs, shardings
    over_time = lambda dtype, *shape: jax.ShapeDtypeStruct((T, B, *shape), dtype, sharding=by_time)
    memory = jax.eval_shape(lambda: agent.initial_memory(B))
    memory = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_env), memory)
    number, flag = over_time(jnp.float32), over_time(jnp.bool_)
    obs, noise = over_time(obs_space.dtype, *obs_space.shape), over_time(jnp.float32, agent.num_actions)
    transitions = Transition(obs, flag, noise, over_time(jnp.int32), number, number, number, flag)
    return memory, transitions, jax.ShapeDtypeStruct((B,), jnp.float32, sharding=by_env)


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


def stop_when_told(folder: Path) -> None:
    """From now on Ctrl-C and SIGTERM end the program, by way of `finally`, so that the workers end in order."""

    def handle(number, frame):
        print(f"\nstopped; to evaluate again: python {sys.argv[0]} --evaluate {folder}")
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


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


def host_record_video(args: Args, chooses, agent: nn.Module, params, key: jax.Array, path: Path) -> None:
    """Plays the first 300 steps of an episode with sampled actions and draws them as an animated picture."""
    env = make_env(args)(render_mode="rgb_array")
    (obs, _), memory, done, frames, total = env.reset(seed=args.seed), agent.initial_memory(1), False, [], 0.0
    while not done and len(frames) < 300:
        key, act_key = jax.random.split(key)
        action, memory = chooses(params, act_key, obs[None], np.array([not frames]), memory)
        picture = Image.fromarray(env.render())
        text = f"step {len(frames)}   return {total:g}   {ACTIONS[int(action[0])]}"
        ImageDraw.Draw(picture).text((12, 12), text, fill="white", stroke_width=2, stroke_fill="black")
        frames.append(picture.quantize(64))
        obs, reward, terminated, truncated, _ = env.step(int(action[0]))
        done, total = terminated or truncated, total + reward
    env.close()
    path.parent.mkdir(exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[120] * (len(frames) - 1) + [2000], loop=0)


def gather_rows(rows: np.ndarray, most: int) -> np.ndarray:
    """The rows (n, k) of all processes, of at most so many each."""
    if jax.process_count() == 1:
        return rows
    padded = np.full((most, rows.shape[1]), np.nan)
    padded[: len(rows)] = rows
    padded = multihost_utils.process_allgather(padded).reshape(-1, rows.shape[1])
    return padded[~np.isnan(padded[:, 0])]


def host_report(args: Args, agent: nn.Module, runner: HostRunner, folder: Path, halves: list[Half], tracker) -> None:
    """Evaluates the final parameters, with sampled and with greedy actions, and draws what there is to see."""
    params, results, chief = local(runner.learner.params), {}, jax.process_index() == 0
    kinds = {kind: jax.jit(functools.partial(choose, agent, kind == "greedy")) for kind in ("sampled", "greedy")}
    for number, (kind, chooses) in enumerate(kinds.items()):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(args.seed), number), jax.process_index())
        rows = unless_one_fails(host_evaluate, args, chooses, params, halves, key)
        rows = gather_rows(rows, args.eval_episodes)  # (E, 2)
        result = dict(zip(("episodic_return", "episodic_length"), rows.T, strict=True))
        results[kind] = {name: [float(value.mean())] for name, value in result.items()}
        if chief:
            shown = [f"{name.removeprefix('episodic_')} {interval(x)}" for name, x in result.items()]
            print(f"evaluation with {kind} actions, {args.eval_episodes} episodes: {', '.join(shown)}")
    if chief:
        (folder / "evaluation.json").write_text(json.dumps(results, indent=2))
        plot_learning_curve(folder)
        if args.capture_video:
            path = folder / "videos" / "episode.gif"
            host_record_video(args, kinds["sampled"], agent, params, jax.random.key(args.seed), path)
        if tracker:
            tracker.log({f"eval/{name}": np.mean(value) for name, value in results["sampled"].items()})
            tracker.finish()
        print(f"all of it is in {folder}")
    multihost_utils.sync_global_devices("reported")  # a process that ends sooner would end the others


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
    if args.num_envs % (2 * jax.process_count()):
        raise SystemExit(f"--num-envs {args.num_envs}: must divide into halves of {jax.process_count()} processes")
    shardings = batch_shardings(args)
    replicated = shardings[-1]

    existing = args.resume or args.evaluate
    now = int(multihost_utils.broadcast_one_to_all(np.int32(time.time())))  # the same in all processes
    folder = Path(existing or f"runs/{args.env_id}__{args.exp_name}__{args.seed}__{now}").absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    handler = ocp.StandardCheckpointHandler()  # named here, or an empty newest step makes all of them unreadable
    crews = []
    try:
        mine = args.num_envs // jax.process_count()
        shares = np.ones(mine) if args.evaluate else 1 - np.arange(mine) / mine
        try:
            for number in range(2):
                crews.append(Workers([make_env(args, share) for share in shares[number::2]]))
        except OSError as error:
            rule = f"its processes could not be started ({error}); take fewer, or raise ulimit -n and -u"
            raise SystemExit(f"--num-envs {args.num_envs}: {rule}") from None
        obs_space, num_actions = crews[0].single_observation_space, crews[0].single_action_space.n
        agent, optimizer = ActorCritic(args, num_actions), make_optimizer(args)
        halves = [Half(agent, workers) for workers in crews]
        acts = jax.jit(functools.partial(act, args, agent))
        learns = jax.jit(functools.partial(learn_from, args, agent, optimizer), out_shardings=replicated)

        if not existing and jax.process_index() == 0:
            folder.mkdir(parents=True)
            (folder / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2))
        tracker = start_tracker(args, folder)
        init = jax.jit(functools.partial(init_learner, args, agent, optimizer, obs_space), out_shardings=replicated)
        runner = HostRunner(init(jax.random.key(args.seed)))
        size = sum(x.size for x in jax.tree.leaves(runner.learner.params))
        print(f"{folder}: {size:,} parameters, {args.num_updates} updates of {args.batch_size} steps")
        with ocp.CheckpointManager(folder / "checkpoints", options=options, item_handlers=handler) as checkpoints:
            if existing:
                runner = HostRunner(restore(checkpoints, checkpointed(args, runner)))

            def prepare(runner):
                """Begins the episodes, decided by the seed, the update and the process, and compiles."""
                which = [TRAINING, args.seed, updates_done(runner.learner), jax.process_index()]
                params, key = local((runner.learner.params, runner.learner.key))
                for half, seeds in zip(halves, np.random.SeedSequence(which).spawn(2), strict=True):
                    unless_one_fails(half.begin, seeds, False)
                    acts(params, key, half.obs, half.reset, half.noise, half.memory)
                shapes = (runner.learner, *batch_shapes(args, agent, obs_space, shardings))
                compiled, names = learns.lower(*shapes).compile(), jax.eval_shape(learns, *shapes)[1]
                names = [*names, "charts/episodic_return", "charts/episodic_length", "charts/episodes"]
                return functools.partial(host_update, args, acts, compiled, shardings, halves, checkpoints), names

            if not args.evaluate:
                runner = train(args, prepare, runner, folder, checkpoints, tracker)
        stop_when_told(folder)
        host_report(args, agent, runner, folder, halves, tracker)
    except (CannotRun, WorkerDied, WorkerFailed) as error:
        saved = f"; what was saved is in {folder}" if (folder / "checkpoints").exists() else ""
        raise SystemExit(f"{told(error)}{saved}") from None
    except OSError as error:
        raise SystemExit(f"{folder}: {error}. The checkpoints in it are intact; --resume goes on from there") from None
    finally:
        for workers in crews:
            workers.close()


if __name__ == "__main__":
    main(parse_args())

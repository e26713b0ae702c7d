"""PPO with GTrXL, a gated transformer that attends to a window of past steps, on Memory Maze.

    python ppo_gtrxl_memorymaze.py --env-id MemoryMaze-9x9-v0

Objects of different colours lie in a maze that is new in each episode. The agent sees 64 x 64 pixels. Again and again
it has to find the object whose colour frames the image, so it should remember where the objects are. The task is Memory
Maze (Pasukonis et al., ICLR 2023). The memory is GTrXL (Parisotto et al., ICML 2020, arXiv 1910.06764). The agent is
trained with PPO (Schulman et al. 2017).
"Published" means by AGaLiTe's authors, for whom GTrXL is a baseline (Pramanik et al., TMLR 2024, arXiv 2310.15719).

What to learn here: how to train with environments that are CPU processes. The rollout is a loop on the host, in Python
(`host_rollout`); only acting and learning are compiled (`act`, `learn_from`). A resumed run starts in new mazes. Memory
and learning are those of ppo_gtrxl_tmaze.py. To compare memories, `diff` this file with ppo_lstm_memorymaze.py.
The defaults, 100M steps, were not run.

Axes: T steps, B environments, S = 1 seed, A actions, n inputs, D d_model, H heads, d d_head, L layers, M memory_len.
"""

import csv
import dataclasses
import functools
import json
import logging
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax.linen.initializers import constant, lecun_normal, orthogonal
from flax.training.train_state import TrainState
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from jax.experimental.multihost_utils import process_allgather
from matplotlib.figure import Figure
from scipy.special import stdtrit
from tqdm import tqdm

from envs.memorymaze import MAX_STEPS, MissingDependency, record_video
from envs.workers import WorkerDied, Workers


# ------------------------------------------------------------------------------------------------------------ Arguments
@dataclasses.dataclass(frozen=True)
class Args:
    # The run. `python ppo_gtrxl_memorymaze.py --help` shows these comments.
    exp_name: str = Path(__file__).stem  # part of the name of the run folder
    runs_dir: str = "runs"  # where the run folder is made
    seed: int = 1  # decides parameters, environments, actions and minibatches
    total_timesteps: float = 1e8  # environment steps per seed
    checkpoint_interval: int = 20  # updates between two checkpoints
    resume: str = ""  # folder of an interrupted run: continue from its newest checkpoint (with new episodes)
    evaluate: str = ""  # folder of a run: evaluate its newest checkpoint, do not train
    eval_episodes: int = 32  # episodes of the evaluation (in --num-envs parallel environments)
    capture_video: bool = False  # save one episode of the final policy as a GIF (its first 300 steps)
    track: bool = False  # also log to Weights & Biases, to WANDB_PROJECT (WANDB_MODE=offline needs no account)

    # The environment
    env_id: str = "MemoryMaze-9x9-v0"  # name of the environment (also 11x11, 13x13, 15x15; 3 to 6 objects)

    # The model
    num_channels: int = 16  # channels of the encoder's first convolution (and first stage; twice as many in the others)
    num_layers: int = 4  # transformer layers
    d_model: int = 128  # width D of the residual stream
    d_head: int = 64  # width d of an attention head
    num_heads: int = 4  # attention heads H
    memory_len: int = 128  # past steps M that a layer attends to; L layers reach back L * M (Mystery Path: 32 to 128)
    d_actor: int = 256  # hidden width of the policy head
    d_critic: int = 256  # hidden width of the value head

    # PPO. We found no published settings for Memory Maze: these are Mystery Path's, with fewer environments
    num_envs: int = 32  # parallel environments B (each is a process; Mystery Path: 128)
    num_steps: int = 128  # steps T of a rollout, and of backpropagation through time
    learning_rate: float = 2.5e-4  # of Adam
    anneal_lr: bool = False  # decrease the learning rate linearly to 0, once per update
    adam_eps: float = 1e-8  # epsilon of Adam
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # lambda of the advantages
    num_minibatches: int = 8  # minibatches per epoch, each of num_envs / num_minibatches environments
    update_epochs: int = 3  # passes over each rollout
    norm_adv: bool = True  # normalise the advantages of each minibatch
    clip_coef: float = 0.2  # clipping range of the ratio
    clip_vloss: bool = False  # also clip the change of the value, to clip_coef
    ent_coef: float = 3e-4  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 5.0  # gradients are clipped to this norm (0: no learning)

    batch_size = property(lambda self: self.num_envs * self.num_steps)
    num_updates = property(lambda self: int(self.total_timesteps) // self.batch_size)

    def learning_rate_at(self, step):  # step: the number of gradient steps before this one
        update = step // (self.update_epochs * self.num_minibatches)
        return self.learning_rate * (1 - update / self.num_updates) if self.anneal_lr else self.learning_rate

    def __post_init__(self):
        sizes = "checkpoint_interval eval_episodes num_channels num_layers d_model d_head num_heads memory_len"
        sizes += " d_actor d_critic num_envs num_steps num_minibatches update_epochs"
        rates = "learning_rate adam_eps clip_coef ent_coef vf_coef max_grad_norm"
        rules = (sizes, 1, 2**40), (rates, 0, 2**40), ("gamma gae_lambda", 0, 1)
        for names, low, high in (*rules, ("seed", 0, 2**30), ("total_timesteps", self.batch_size, 2**60)):
            for name in names.split():
                if not low <= (value := getattr(self, name)) <= high:
                    bound = f"at most {high}" if value > high else f"at least {low}"
                    raise ValueError(f"--{name.replace('_', '-')} {value}: must be {bound}")
        if self.num_envs % self.num_minibatches:
            raise ValueError(f"--num-envs {self.num_envs}: not divisible by --num-minibatches {self.num_minibatches}")
        if self.d_model % 2:
            raise ValueError(f"--d-model {self.d_model}: must be even, since half of a position vector is sines")
        if self.env_id not in (known := [f"MemoryMaze-{size}-v0" for size in MAX_STEPS]):
            raise ValueError(f"--env-id {self.env_id}: must be one of {', '.join(known)}")


def make_env(args: Args, index: int = 0):
    """-> a function that makes environment `index`, in a worker (0 also in the main process, for its spaces)."""
    steps = MAX_STEPS[args.env_id.split("-")[1]]  # the key is 9x9 in MemoryMaze-9x9-v0
    # All episodes have the same length. Training shortens the first ones, or all environments would reset at once.
    first_steps = steps if args.evaluate else steps - index * steps // args.num_envs
    options = {"disable_env_checker": True, "first_episode_steps": first_steps}
    return functools.partial(gymnasium.make, f"envs.memorymaze:{args.env_id}", **options)


# ---------------------------------------------------------------------------------------------------------------- Model
dense = functools.partial(nn.Dense, kernel_init=orthogonal(math.sqrt(2)))


class GRUGate(nn.Module):
    """GTrXL's gate in place of the residual sum x + y (Parisotto et al. 2020, eq. 6). x, y (T, B, D) -> (T, B, D)."""

    kernel_init: Any = orthogonal(math.sqrt(2))  # GTrXL passes lecun_normal instead

    @nn.compact
    def __call__(self, x, y):
        D = x.shape[-1]
        kernels = lambda *names: jnp.concatenate([self.param(name, self.kernel_init, (D, D)) for name in names], axis=1)
        bias = self.param("bias", constant(2.0), (D,))  # initially z is about sigmoid(-2) = 12%: most of x passes
        # One product with (D, 3D) is faster than three with (D, D).
        r_y, z_y, h_y = jnp.split(y @ kernels("Wr", "Wz", "Wg"), 3, axis=-1)  # (T, B, D) each
        r_x, z_x = jnp.split(x @ kernels("Ur", "Uz"), 2, axis=-1)
        r, z = nn.sigmoid(r_y + r_x), nn.sigmoid(z_y + z_x - bias)
        h = nn.tanh(h_y + (r * x) @ kernels("Ug"))
        return (1 - z) * x + z * h


class WindowMemory(NamedTuple):
    """The last M steps, oldest first."""

    inputs: tuple[jax.Array, ...]  # (B, M, D) for each of the L layers: its input, normalised
    visible: jax.Array  # (B, M) bool, the step belongs to the episode in progress


def sinusoids(length: int, D: int) -> np.ndarray:
    """The position vectors of the distances 0 to length - 1, first all sines, then all cosines -> (length, D)."""
    angles = np.arange(length)[:, None] * 10000.0 ** (-2 * np.arange(D // 2) / D)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def window_attention(q, tokens, Wk, Wv, content_bias, position_bias, positions, episode):
    """Attention of each step to itself and to the M steps before it, within its episode -> (T, B, H, d).

        score(i, j) = ((q_i + content_bias) . (tokens_j Wk) + (q_i + position_bias) . positions_{i-j}) / sqrt(d)

    q (T, B, H, d) are the queries. tokens (B, M + T, D) begin at step -M; Wk and Wv (D, H, d) turn them into keys and
    values. episode (M + T, B) numbers the episode of each token. The two biases are (H, d). positions (M + 1, H, d) has
    a vector for each distance i - j from 0 to M.

    Time is cut into N blocks of C steps, each with the M + C tokens that its steps may see: the cost is linear in T.
    """
    T, M, d = len(q), len(positions) - 1, q.shape[-1]
    C = min(T, M)  # smaller blocks compute more keys twice, larger ones score more pairs outside the window

    def blocks(x, size, axis=0):  # -> (N, ...), with size steps on the axis of time
        # Steps of zeros fill the last block. They come last, so no other step sees them.
        x = jnp.pad(x, [(0, -T % C if i == axis else 0) for i in range(x.ndim)])
        return jnp.stack([jax.lax.slice_in_dim(x, start, start + size, axis=axis) for start in range(0, T, C)])

    q, tokens, episode = blocks(q, C), blocks(tokens, M + C, axis=1), blocks(episode, M + C)
    # einsum picks the cheaper order. When learning, mostly tokens Wk first, the keys. When acting (T = 1), q Wk first,
    # so that the keys of the whole window are not computed again in each step. Likewise with Wv below.
    content = jnp.einsum("nibhd,nbjD,Dhd->nbhij", q + content_bias, tokens, Wk)  # (N, B, H, C, M + C)

    # In a block, key M + i is query i's own step. Column m of by_offset is for key i + m, at distance M - m, so row i
    # must move i columns to the right (the relative shift of Transformer-XL). For that, C entries of -inf pad each row
    # to M + C + 1, and the flattened array is cut into rows of M + C: each starts one column further to the right than
    # the row above. The entries of -inf land on the keys outside the window, before i and after M + i, and mask them.
    by_offset = jnp.einsum("nibhd,mhd->nbhim", q + position_bias, positions[::-1])  # (N, B, H, C, M + 1)
    rows = jnp.pad(by_offset, [(0, 0)] * 4 + [(0, C)], constant_values=-jnp.inf)  # (N, B, H, C, M + C + 1)
    aligned = rows.reshape(*rows.shape[:3], -1)[..., :-C].reshape(content.shape)  # (N, B, H, C, M + C)

    same_episode = episode[:, M:, None] == episode[:, None]  # (N, C, M + C, B), of query and key
    same_episode = jnp.moveaxis(same_episode, -1, 1)[:, :, None]  # (N, B, 1, C, M + C)
    score = jnp.where(same_episode, (content + aligned) / math.sqrt(d), -jnp.inf)
    out = jnp.einsum("nbjD,nbhij,Dhd->nibhd", tokens, nn.softmax(score), Wv)  # (N, C, B, H, d)
    return out.reshape(-1, *out.shape[2:])[:T]


class GTrXLAttention(nn.Module):
    """Each step attends to itself and M before it. x (T, B, D), tokens (B, M+T, D), episode (M+T, B) -> (T, B, D)."""

    args: Args

    @nn.compact
    def __call__(self, x, tokens, episode, content_bias, position_bias):
        T, B, D = x.shape
        M, H, d = self.args.memory_len, self.args.num_heads, self.args.d_head
        kernel = lambda name: self.param(name, nn.initializers.lecun_normal(), (D, H * d)).reshape(D, H, d)
        Wk, Wv, bv = kernel("Wk"), kernel("Wv"), self.param("bv", constant(0.0), (H, d))
        scale, bias = self.param("scale", constant(1.0), (D,)), self.param("bias", constant(0.0), (D,))
        # tokens lack LayerNorm's scale and bias: keys and values are (scale * tokens + bias) W + b. The scale goes into
        # W, so that acting need not scale its window in each step. A bias common to all keys, or to all positions,
        # shifts all scores of a query alike, which softmax cancels: keys and positions have none, unlike published. One
        # common to all values is added to the output, because the weights sum to 1.
        Wk, Wv, bv = scale[:, None, None] * Wk, scale[:, None, None] * Wv, bv + jnp.einsum("D,Dhd->hd", bias, Wv)
        q = nn.Dense(H * d, name="q")(x).reshape(T, B, H, d)  # of x without LayerNorm, as published
        positions = nn.Dense(H * d, use_bias=False, name="position")(sinusoids(M + 1, D)).reshape(M + 1, H, d)
        out = window_attention(q, tokens, Wk, Wv, content_bias, position_bias, positions, episode) + bv
        return nn.Dense(D, name="out")(out.reshape(T, B, H * d))


class GTrXL(nn.Module):
    """x (T, B, n), reset (T, B), memory -> (T, B, D), memory after the last step. Flax's initialisers, as published."""

    args: Args

    @nn.compact
    def __call__(self, x, reset, memory: WindowMemory):
        args, M = self.args, self.args.memory_len
        # Episode 0 is in progress when the memory ends, and each reset starts the next. -1: an earlier one, or no step.
        episode = jnp.concatenate([jnp.where(memory.visible.T, 0, -1), jnp.cumsum(reset, axis=0)])  # (M + T, B)
        bias = lambda name: self.param(name, constant(0.0), (args.num_heads, args.d_head))
        biases = bias("content_bias"), bias("position_bias")  # u and v of Transformer-XL, shared by all layers
        gate = functools.partial(GRUGate, kernel_init=nn.initializers.lecun_normal())

        x = nn.relu(nn.Dense(args.d_model, name="embedding")(x))  # (T, B, D)
        normalise, inputs = nn.LayerNorm(use_scale=False, use_bias=False, name="normalise"), []
        for past in jax.lax.stop_gradient(memory.inputs):  # (B, M, D) each; earlier rollouts get no gradient
            tokens = jnp.concatenate([past, jnp.swapaxes(normalise(x), 0, 1)], axis=1)  # (B, M + T, D)
            inputs.append(tokens[:, -M:])
            y = GTrXLAttention(args)(x, tokens, episode, *biases)
            x = gate()(x, nn.relu(y))
            y = nn.relu(nn.Dense(args.d_model)(nn.LayerNorm()(x)))
            x = gate()(x, nn.relu(nn.Dense(args.d_model)(y)))
        return x, WindowMemory(tuple(inputs), (episode[-M:] == episode[-1]).T)


class Conv3x3(nn.Module):
    """A 3 x 3 convolution, (..., H, W, C) -> (..., H, W, features), as a product: faster on a CPU (docs/speed.md)."""

    features: int

    @nn.compact
    def __call__(self, x):
        *shape, W, C = x.shape
        kernel = self.param("kernel", lecun_normal(), (9 * C, self.features))
        bias = self.param("bias", constant(0.0), (self.features,))
        pad = lambda x, rows, columns: jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [rows, columns, (0, 0)])
        x = pad(x, (0, 0), (1, 1))
        near = jnp.concatenate([x[..., j : j + W, :] for j in range(3)], axis=-1)  # (..., H, W, 3 C), left to right
        if jax.default_backend() == "cpu":  # on several GPUs, it would gather all environments on each
            near = near.reshape(-1, 3 * C)  # XLA computes the kernel's gradient twice as fast if these are a matrix
        y = (near @ jnp.hstack(jnp.split(kernel, 3))).reshape(*shape, W, -1)  # (..., H, W, 3 features)
        down, here, up = jnp.split(y, 3, axis=-1)  # what a pixel adds to those below, itself, those above
        return pad(down[..., :-1, :, :], (1, 0), (0, 0)) + here + pad(up[..., 1:, :, :], (0, 1), (0, 0)) + bias


def max_pool(x):
    """Max-pooling, 3 x 3, stride 2: (..., H, W, C) -> (..., H / 2, W / 2, C). Flax's has slow gradients on a CPU."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, 1), (0, 1), (0, 0)], constant_values=-jnp.inf)
    x = functools.reduce(jnp.maximum, [x[..., i : x.shape[-3] - 2 + i : 2, :, :] for i in range(3)])
    return functools.reduce(jnp.maximum, [x[..., j : x.shape[-2] - 2 + j : 2, :] for j in range(3)])


class ImpalaEncoder(nn.Module):
    """IMPALA's residual network (Espeholt et al. 2018). Images (T, B, 64, 64, 3) uint8 -> (T, B, 256)."""

    channels: int = 16

    @nn.compact
    def __call__(self, obs):
        x = obs / 255.0
        for features in (self.channels, 2 * self.channels, 2 * self.channels):
            x = max_pool(Conv3x3(features)(x))  # half the height and width
            for _ in range(2):
                y = Conv3x3(features)(nn.relu(x))
                x = x + Conv3x3(features)(nn.relu(y))
        x = nn.relu(x).reshape(*x.shape[:2], -1)  # (T, B, 8 * 8 * 2 * channels)
        # IMPALA's initial kernels. With a gain of sqrt(2), features are so large that an LSTM's gates saturate.
        return nn.relu(nn.Dense(256, kernel_init=lecun_normal())(x))


def in_pieces(encoder: nn.Module, obs):
    """encoder(obs), (T, B, ...) -> (T, B, n). On a CPU in pieces that fit its cache: 8 images, or one step if B > 8."""
    if jax.default_backend() != "cpu":
        return encoder(obs)
    T, B = obs.shape[:2]
    steps = math.gcd(T, max(8 // B, 1))  # per piece; divides T
    encode = nn.remat(lambda encoder, carry, obs: (carry, encoder(obs)))  # computed again in the backward pass
    scan = nn.scan(encode, variable_broadcast="params", split_rngs={"params": False})
    _, x = scan(encoder, None, obs.reshape(T // steps, steps, B, *obs.shape[2:]))  # (T / steps, steps, B, n)
    return x.reshape(T, B, -1)


class ActorCritic(nn.Module):
    """obs (T, B, 64, 64, 3), reset (T, B), memory -> logits (T, B, A), value (T, B), memory. To act, T is 1."""

    args: Args
    num_actions: int

    @nn.nowrap
    def initial_memory(self, B: int) -> WindowMemory:
        L, M, D = self.args.num_layers, self.args.memory_len, self.args.d_model
        return WindowMemory((jnp.zeros((B, M, D)),) * L, jnp.zeros((B, M), bool))

    @nn.compact
    def __call__(self, obs, reset, memory: WindowMemory):
        x = in_pieces(ImpalaEncoder(self.args.num_channels, name="encoder"), obs)  # (T, B, 256)
        x, memory = GTrXL(self.args)(x, reset, memory)  # (T, B, D)
        actor, critic = nn.tanh(dense(self.args.d_actor)(x)), nn.tanh(dense(self.args.d_critic)(x))
        # With a gain of 0.01 the first policy is nearly uniform and the first value nearly 0, as fits rare rewards.
        logits = nn.Dense(self.num_actions, kernel_init=orthogonal(0.01))(actor)  # (T, B, A)
        value = nn.Dense(1, kernel_init=orthogonal(0.01))(critic).squeeze(-1)  # (T, B)
        return logits, value, memory


# ------------------------------------------------------------------------------------------------------------------ PPO
class Transition(NamedTuple):
    """The steps of a rollout, (T, B, ...) each."""

    obs: jax.Array
    reset: jax.Array  # obs starts an episode
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    reward: jax.Array
    done: jax.Array  # the action ended the episode


def init_learner(args: Args, envs, agent: nn.Module, key: jax.Array) -> TrainState:
    """-> a new learner. Its parameters are made for one step of observations (1, B, 64, 64, 3)."""
    obs, reset = jnp.zeros((1, *envs.observation_space.shape), jnp.uint8), jnp.ones((1, args.num_envs), bool)
    params = agent.init(key, obs, reset, agent.initial_memory(args.num_envs))
    adam = optax.adam(args.learning_rate_at, eps=args.adam_eps)
    optimizer = optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adam)
    return TrainState.create(apply_fn=agent.apply, params=params, tx=optimizer)


def act(agent: nn.Module, params, greedy, key: jax.Array, obs, reset, memory):
    """One step of the agent in B environments -> action, log-probability and value, (B,) each, memory."""
    logits, value, memory = agent.apply(params, obs[None], reset[None], memory)  # (1, B, A), (1, B)
    action = jnp.where(greedy, logits[0].argmax(-1), jax.random.categorical(key, logits[0]))
    log_prob = -optax.softmax_cross_entropy_with_integer_labels(logits[0], action)
    return action, log_prob, value[0], memory


def begin_episodes(args: Args, envs, initial_memory, *purpose: int):
    """Starts episodes -> obs, reset, memory. purpose selects the mazes: (0, updates so far) or, to evaluate, (1,)."""
    seeds = np.random.SeedSequence([args.seed, *purpose]).generate_state(args.num_envs)
    obs, _ = envs.reset(seed=seeds.tolist())
    return obs, np.ones(args.num_envs, bool), initial_memory


def host_rollout(args: Args, envs, act_fn, current, key: jax.Array):
    """Acts for T steps -> current, transitions (T, B, ...), value of the next observation (B,), finished episodes.

    act_fn is `act`, compiled, with its params and greedy. current is (obs, reset, memory), (B, ...) each, the input of
    the next `act`. Finished episodes are pairs of return and length, without those that make_env shortened.
    """
    transitions, episodes, (obs, reset, memory) = [], [], current
    for step_key in jax.random.split(key, args.num_steps):
        action, log_prob, value, memory = act_fn(step_key, obs, reset, memory)
        next_obs, reward, terminated, truncated, infos = envs.step(np.asarray(action))  # (B, 64, 64, 3); (B,) each
        done = terminated | truncated
        transitions.append(Transition(obs, reset, action, log_prob, value, np.float32(reward), done))
        obs, reset = next_obs, done
        if done.any():
            whole = done & ~infos["final_info"].get("shortened", np.False_)
            episodes += zip(infos["episode"]["r"][whole], infos["episode"]["l"][whole], strict=True)
    _, _, last_value, _ = act_fn(key, obs, reset, memory)  # its action is not used
    transitions = jax.tree.map(lambda *x: np.stack(x), *transitions)  # T times (B, ...) -> (T, B, ...)
    return (obs, reset, memory), transitions, last_value, episodes


def compute_gae(transitions: Transition, last_value: jax.Array, gamma: float, gae_lambda: float) -> jax.Array:
    """GAE (Schulman et al. 2016) -> advantages (T, B). Truncation counts as termination: the value after it is 0."""

    def step(carry, transition):
        next_advantage, next_value = carry
        discount = gamma * (1 - transition.done)
        delta = transition.reward + discount * next_value - transition.value
        advantage = delta + discount * gae_lambda * next_advantage
        return (advantage, transition.value), advantage

    _, advantages = jax.lax.scan(step, (jnp.zeros_like(last_value), last_value), transitions, reverse=True)
    return advantages


def ppo_loss(params, args: Args, apply_fn, memory, batch: Transition, advantage, target):
    """PPO's clipped loss on a minibatch: G rollouts (T, G, ...) from their start memory (G, ...) -> loss, metrics."""
    logits, value, _ = apply_fn(params, batch.obs, batch.reset, memory)
    log_ratio = -optax.softmax_cross_entropy_with_integer_labels(logits, batch.action) - batch.log_prob
    ratio = jnp.exp(log_ratio)
    if args.norm_adv:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    clipped_ratio = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -jnp.minimum(ratio * advantage, clipped_ratio * advantage).mean()

    squared_error = jnp.square(value - target)
    if args.clip_vloss:
        clipped_value = batch.value + jnp.clip(value - batch.value, -args.clip_coef, args.clip_coef)
        squared_error = jnp.maximum(squared_error, jnp.square(clipped_value - target))
    value_loss = 0.5 * squared_error.mean()

    entropy = -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(-1).mean()
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
    return loss, {
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/approx_kl": (ratio - 1 - log_ratio).mean(),  # k3 of joschu.net/blog/kl-approx.html
        "losses/clipfrac": (jnp.abs(ratio - 1) > args.clip_coef).mean(),
    }


def learn(args: Args, train_state: TrainState, key: jax.Array, memory, batch):
    """Epochs over minibatches of whole rollouts -> train_state, metrics averaged over the minibatches.

    memory (B, ...): the memory before the first step. batch: transitions, advantages and value targets, (T, B, ...).
    Environments form G groups of K = num_minibatches neighbours. A minibatch has G environments, one of each group. So
    if the groups are spread over devices, each device has its share of each minibatch, and no rollout moves.
    """
    G, K = args.num_envs // args.num_minibatches, args.num_minibatches
    batch = jax.tree.map(lambda x: x.reshape(args.num_steps, G, K, *x.shape[2:]), batch)
    memory = jax.tree.map(lambda x: x.reshape(G, K, *x.shape[1:]), memory)

    def minibatch_step(train_state, chosen):  # chosen (G,): which of the K environments of each group
        choose = jax.vmap(lambda group, i: group[i])  # (G, K, ...), (G,) -> (G, ...); vmap keeps it within each device
        start_memory = jax.tree.map(lambda x: choose(x, chosen), memory)
        rollouts = jax.tree.map(lambda x: jax.vmap(choose, (0, None))(x, chosen), batch)  # (T, G, ...)
        grad = jax.grad(ppo_loss, has_aux=True)
        grads, metrics = grad(train_state.params, args, train_state.apply_fn, start_memory, *rollouts)
        return train_state.apply_gradients(grads=grads), metrics | {"losses/grad_norm": optax.tree.norm(grads)}

    def epoch_step(train_state, key):
        order = jax.vmap(lambda key: jax.random.permutation(key, K))(jax.random.split(key, G))  # (G, K)
        return jax.lax.scan(minibatch_step, train_state, order.T)  # one column of order for each minibatch

    train_state, metrics = jax.lax.scan(epoch_step, train_state, jax.random.split(key, args.update_epochs))
    return train_state, jax.tree.map(jnp.mean, metrics)


def learn_from(args: Args, train_state: TrainState, key: jax.Array, start_memory, transitions: Transition, last_value):
    """The learning from one rollout -> train_state, metrics."""
    advantage = compute_gae(transitions, last_value, args.gamma, args.gae_lambda)
    target = transitions.value + advantage
    new_train_state, metrics = learn(args, train_state, key, start_memory, (transitions, advantage, target))
    return new_train_state, metrics | {
        "charts/learning_rate": args.learning_rate_at(train_state.step),
        "losses/explained_variance": 1 - jnp.var(target - transitions.value) / (jnp.var(target) + 1e-8),
    }


def host_update(args: Args, envs, act_jit, learn_jit, current, train_state: TrainState):
    """One rollout and the learning from it -> current, train_state, metrics, outcomes: means over finished episodes."""
    rollout_key, learn_key = jax.random.split(jax.random.fold_in(jax.random.key(args.seed), int(train_state.step)))
    act_fn = functools.partial(act_jit, train_state.params, False)  # False: not greedy
    _, _, start_memory = current
    current, transitions, last_value, episodes = host_rollout(args, envs, act_fn, current, rollout_key)
    train_state, metrics = learn_jit(train_state, learn_key, start_memory, transitions, last_value)
    mean_return, mean_length = np.mean(episodes or [(0.0, 0.0)], axis=0)  # `train` drops the zeros if no episode ended
    outcomes = {"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}
    return current, train_state, metrics | {"charts/episodes": len(episodes)}, outcomes


def host_evaluate(args: Args, envs, initial_memory, act_fn) -> np.ndarray:
    """Plays eval_episodes new episodes -> returns and lengths (eval_episodes, 2)."""
    key = jax.random.fold_in(jax.random.key(args.seed), 2**31)  # host_update folds in gradient steps: smaller numbers
    current, episodes = begin_episodes(args, envs, initial_memory, 1), []
    while len(episodes) < args.eval_episodes:
        key, rollout_key = jax.random.split(key)
        current, _, _, ended = host_rollout(args, envs, act_fn, current, rollout_key)
        episodes += ended
    return np.array(episodes[: args.eval_episodes])  # the first to end: no bias, since all are equally long


# ------------------------------------------------------------------------------------------------------------------ Run
def parse_args(argv: list[str] | None = None) -> Args:
    """Reads the command line. With --resume or --evaluate, the defaults are that run's flags."""

    def run_dir_flag(resume: str = "", evaluate: str = "") -> str:  # a first pass reads only these two flags
        return resume or evaluate

    run_dir, _ = tyro.cli(run_dir_flag, args=argv, add_help=False, return_unknown_args=True)
    if not run_dir:
        return tyro.cli(Args, args=argv)
    try:
        saved = Args(**json.loads((Path(run_dir) / "args.json").read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"{run_dir} is not the folder of a run of this script: {error}") from None
    args = tyro.cli(Args, args=argv, default=saved)
    may_change = "resume checkpoint_interval eval_episodes capture_video track distributed".split()
    may_change += [] if saved.anneal_lr else ["total_timesteps"]  # an annealed learning rate depends on it
    for name, value in vars(saved).items():
        if args.resume and name not in may_change and (new := getattr(args, name)) != value:
            raise SystemExit(f"--{name.replace('_', '-')} is {value!r} in {run_dir} and cannot be {new!r}")
    return args


def restore(checkpoints: ocp.CheckpointManager, like) -> tuple[int, Any]:
    """Restores the newest readable checkpoint with the types and devices of `like` -> number of its update, state."""
    types_of = lambda tree: {k: f"{x.dtype}{list(x.shape)}" for k, x in ocp.tree.to_flat_dict(tree, sep="/").items()}
    here = types_of(jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
    for number in sorted(checkpoints.all_steps(), reverse=True):
        try:
            there = types_of(checkpoints.item_metadata(number))
            if there == here:
                return number, checkpoints.restore(number, args=ocp.args.StandardRestore(like))
        except Exception as error:  # damage raises many kinds; a run still in progress may have deleted it
            print(f"Checkpoint {number} cannot be read: {error!r:.100}")
            continue
        name = next(name for name in here | there if there.get(name) != here.get(name))
        types = f"{name} is {there.get(name, 'missing')} there and {here.get(name, 'missing')} here"
        raise SystemExit(f"Checkpoint {number} in {checkpoints.directory} does not fit this script: {types}")
    raise SystemExit(f"{checkpoints.directory} has no checkpoint that can be read: start the run again")


def open_metrics(path: Path, columns: list[str], earlier: list[dict]) -> csv.DictWriter:
    """Starts metrics.csv with the rows of an earlier part of the run, if there was one -> a writer of more rows."""
    file = path.with_suffix(".new").open("w", buffering=1, newline="")  # written line by line
    writer = csv.DictWriter(file, dict.fromkeys(columns) | (earlier or [{}])[0])  # also columns that only old rows have
    writer.writeheader()
    writer.writerows(earlier)
    path.with_suffix(".new").replace(path)  # the old file stays until the new one is whole
    return writer


def train(args: Args, update, state, start: int, run_dir: Path, checkpoints, tracker, headline: list[str]):
    """Runs updates start + 1 to num_updates of all seeds, with metrics and checkpoints -> the state after them."""
    signals, writer, steps, chief = [], None, args.batch_size, jax.process_index() == 0

    def note(signum, _):
        signals.append(signum)
        signal.signal(signum, signal.SIG_DFL)  # the same signal again kills

    nohup = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()  # stays ignored
    noted = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1} - nohup
    if chief and args.resume and start < args.num_updates:  # the run may be longer now, or have other flags
        (run_dir / "args.new").write_text(json.dumps(vars(args) | {"resume": ""}, indent=2))
        (run_dir / "args.new").replace(run_dir / "args.json")  # the old file stays until the new one is whole
    earlier = list(csv.DictReader((run_dir / "metrics.csv").open())) if start else []
    earlier = [row for row in earlier if None not in row.values() and int(row["update"]) <= start]  # None: cut short
    start_time = time.time() - float(earlier[-1]["elapsed"] if earlier else 0)
    bar = tqdm(initial=start * steps, total=args.num_updates * steps, unit="step", unit_scale=True, disable=not chief)
    bar.mininterval = 0.1 if sys.stderr.isatty() else 30  # seconds between two lines of a log file

    for number in range(start + 1, args.num_updates + 1):
        update_time = time.time()
        state, metrics, outcomes = update(state)
        metrics, outcomes = jax.tree.map(np.atleast_1d, (metrics, outcomes))  # (S,) each, on the host
        if number == start + 1:  # until the first update has been compiled and made, a signal ends the run at once
            for signum in noted:
                signal.signal(signum, note)
        num_seeds, now = len(metrics["charts/episodes"]), time.time()
        for i in range(num_seeds):
            row = {"update": number, "seed": args.seed + i, "global_step": number * steps}
            row |= {"elapsed": round(now - start_time, 1), "charts/SPS": round(num_seeds * steps / (now - update_time))}
            row |= {name: values[i] for name, values in metrics.items()}
            if bad := [name for name, value in row.items() if not np.isfinite(value)]:
                raise SystemExit(f"\nUpdate {number} is not saved: {bad[0]} of seed {row['seed']} is not finite")
            if row["charts/episodes"]:  # else there are no means, and their cells stay empty
                row |= {name: values[i] for name, values in outcomes.items()}
            if chief:
                writer = writer or open_metrics(run_dir / "metrics.csv", [*row, *outcomes], earlier)
                writer.writerow(row)
            if tracker:
                prefix = f"seed_{row['seed']}/" if num_seeds > 1 else ""
                tracker.log({prefix + name: x for name, x in row.items()}, step=row["global_step"])
        if metrics["charts/episodes"].all():  # else there is no mean to show
            bar.set_postfix({name.split("/")[1]: f"{outcomes[name].mean():.3g}" for name in headline}, refresh=False)
        bar.update(steps)
        stop = int(process_allgather(np.int32(max(signals, default=0))).max())  # a signal to one stops all
        if stop or number % args.checkpoint_interval == 0 or number == args.num_updates:
            try:
                for unreadable in [n for n in checkpoints.all_steps() if n >= number]:  # `restore` passed over them
                    checkpoints.delete(unreadable)
                checkpoints.save(number, args=ocp.args.StandardSave(state))
            except Exception as error:  # a full disk is a ValueError of tensorstore
                raise OSError(f"checkpoint {number} cannot be written: {error}") from None
        if stop:
            bar.write(f'Stopped after update {number}, saved. To continue: python {sys.argv[0]} --resume "{run_dir}"')
            raise SystemExit(128 + stop)
    bar.close()
    for signum in noted:  # from here on, a signal ends the run
        signal.signal(signum, signal.SIG_DFL)
    return state


def plot_learning_curves(run_dir: Path, names: list[str]) -> None:
    """Draws columns of metrics.csv over environment steps, one line per seed. Leaves out a row that is cut short."""
    table = np.genfromtxt(run_dir / "metrics.csv", delimiter=",", names=True, deletechars="", invalid_raise=False)
    figure = Figure(figsize=(6 * len(names), 3.5), layout="constrained")
    for i, name in enumerate(names, start=1):
        axis = figure.add_subplot(1, len(names), i, xlabel="environment steps", ylabel=name)
        for seed in np.unique(table["seed"]):
            axis.plot("global_step", name, data=table[table["seed"] == seed], label=f"seed {seed:.0f}")
    axis.legend()
    figure.savefig(run_dir / "learning_curve.png", dpi=150)


def host_report(args: Args, envs, initial_memory, act_jit, params, run_dir: Path, tracker) -> None:
    """Evaluates the parameters with sampled and with greedy actions."""
    results = {}
    margin = lambda x: stdtrit(x.size - 1, 0.975) * x.std(ddof=1) / math.sqrt(x.size)  # half of a 95% interval
    for kind in ("sampled", "greedy"):
        act_fn = functools.partial(act_jit, params, kind == "greedy")
        returns, lengths = host_evaluate(args, envs, initial_memory, act_fn).T
        results[kind] = {"episodic_return": [returns.mean()], "episodic_length": [lengths.mean()]}
        shown = f"{returns.mean():.3g}" + (f" ± {margin(returns):.2g}" if returns.size > 1 else "")
        print(f"Evaluation, {kind} actions, {returns.size} episodes: episodic_return {shown}")
    (run_dir / "evaluation.json").write_text(json.dumps(results, indent=2))
    if tracker:
        tracker.summary.update({f"eval/{name}": values[0] for name, values in results["sampled"].items()})


def main(args: Args) -> None:
    for library in ("absl", "asyncio"):  # they log the tracebacks of errors that orbax raises anyway
        logging.getLogger(library).setLevel(logging.CRITICAL)
    existing, tracker, headline = args.resume or args.evaluate, None, ["charts/episodic_return"]
    run_dir = Path(existing or f"{args.runs_dir}/{args.env_id}__{args.exp_name}__{args.seed}__{time.time()}").absolute()
    try:
        envs = RecordEpisodeStatistics(Workers([make_env(args, index) for index in range(args.num_envs)]))
        agent = ActorCritic(args, envs.single_action_space.n)
        if args.track:
            import wandb  # not above, because it takes a second

            try:
                tracker = wandb.init(id=run_dir.name, name=run_dir.name, dir=run_dir, resume="allow", config=vars(args))
            except wandb.Error as error:
                raise SystemExit(f"--track: {str(error).splitlines()[0]}") from None
        if not existing:
            run_dir.mkdir(parents=True, exist_ok=args.track)  # W&B has made it
            (run_dir / "args.json").write_text(json.dumps(vars(args), indent=2))

        # Axis B is spread over as many devices as divide the number of groups in `learn`.
        count = max(n for n in range(1, jax.device_count() + 1) if args.num_envs // args.num_minibatches % n == 0)
        mesh = jax.sharding.Mesh(jax.devices()[:count], ("device",))
        sharding = lambda *axes: jax.NamedSharding(mesh, jax.P(*axes))  # without axes: a copy on each device
        replicated, by_env, time_first = sharding(), sharding("device"), sharding(None, "device")  # by_env: (B, ...)
        initial_memory = jax.device_put(agent.initial_memory(args.num_envs), by_env)
        act_inputs = (replicated,) * 3 + (by_env,) * 3  # params, greedy, key; obs, reset, memory
        learn_inputs = (replicated,) * 2 + (by_env, time_first, by_env)  # train_state, key; memory, transitions, value
        act_jit = jax.jit(functools.partial(act, agent), in_shardings=act_inputs, out_shardings=by_env)
        learn_jit = jax.jit(functools.partial(learn_from, args), in_shardings=learn_inputs, out_shardings=replicated)
        init_jit = jax.jit(functools.partial(init_learner, args, envs, agent), out_shardings=replicated)

        print(f"Run folder: {run_dir}\nCompiling ...", flush=True)
        train_state = init_jit(jax.random.key(args.seed))
        size = sum(x.size for x in jax.tree.leaves(train_state.params))
        print(f"{size:,} parameters, {args.num_updates} updates of {args.batch_size:,} steps", flush=True)
        handler, read_only = ocp.StandardCheckpointHandler(), args.evaluate != ""
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False, read_only=read_only)
        checkpoints = ocp.CheckpointManager(run_dir / "checkpoints", options=options, item_handlers=handler)
        start, train_state = restore(checkpoints, train_state) if existing else (0, train_state)
        if not args.evaluate:
            current = begin_episodes(args, envs, initial_memory, 0, start)

            def update(train_state):  # `current` stays outside of the state: a checkpoint cannot hold mazes
                nonlocal current
                current, *result = host_update(args, envs, act_jit, learn_jit, current, train_state)
                return result

            train_state = train(args, update, train_state, start, run_dir, checkpoints, tracker, headline)

        if (run_dir / "metrics.csv").exists():  # an evaluation does not need it
            plot_learning_curves(run_dir, headline)
        host_report(args, envs, initial_memory, act_jit, train_state.params, run_dir, tracker)
        envs.close()
        if args.capture_video:
            env, policy = make_env(args)(render_mode="rgb_array"), functools.partial(agent.apply, train_state.params)
            record_video(env, jax.jit(policy), agent.initial_memory(1), args.seed, run_dir / "episode.gif")
        print(f"Results: {run_dir}")
    except MissingDependency as error:
        raise SystemExit(error) from None
    except (WorkerDied, OSError) as error:
        raise SystemExit(f'{error}. If there are checkpoints, --resume "{run_dir}" continues from the newest') from None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training begins, Ctrl-C ends the run at once
    main(parse_args())

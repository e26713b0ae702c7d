"""PPO with GaLiTe, the gated linear transformer that AGaLiTe approximates, on the T-Maze.

    python ppo_galite_tmaze.py --corridor-len 160  # solved with 3 seeds of 3, within 1.5M steps

The agent sees a cue at the start of a corridor. At the other end, 159 steps later, it must turn as the cue showed.
Its memory is GaLiTe (Pramanik et al., TMLR 2024, arXiv 2310.15719); it is trained with PPO (Schulman et al. 2017).

What to learn here: how linear attention works with a matrix as memory, and how to differentiate it without storing all
matrices (`gated_outer_products`). To compare: ppo_agalite_tmaze.py, where a few vectors replace the matrix.

Axes: T steps, B environments, S seeds, A actions, n inputs, D d_model, H heads, d d_head, e eta.
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
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax.linen.initializers import constant, orthogonal
from flax.training.train_state import TrainState
from jax.custom_batching import sequential_vmap
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather
from matplotlib.figure import Figure
from scipy.special import stdtrit
from tqdm import tqdm

from envs.tmaze import TMaze
from envs.wrappers import AutoReset, EpisodeNoise, EpisodeStatistics, TimeAwareObservation, VectorEnv, record_video


# ------------------------------------------------------------------------------------------------------------ Arguments
@dataclasses.dataclass(frozen=True)
class Args:
    # The run. `python ppo_galite_tmaze.py --help` shows these comments.
    exp_name: str = Path(__file__).stem  # part of the name of the run folder
    runs_dir: str = "runs"  # where the run folder is made
    seed: int = 1  # decides parameters, environments, actions and minibatches
    num_seeds: int = 1  # how many seeds to train at once: seed, seed + 1, ...
    total_timesteps: float = 1.5e6  # environment steps per seed (published: 5e6)
    checkpoint_interval: int = 20  # updates between two checkpoints
    resume: str = ""  # folder of an interrupted run: continue from its newest checkpoint
    evaluate: str = ""  # folder of a run: evaluate its newest checkpoint, do not train
    eval_episodes: int = 200  # episodes of the evaluation (each in its own environment)
    capture_video: bool = False  # save one episode of the final policy as a GIF (of the first seed)
    track: bool = False  # also log to Weights & Biases, to WANDB_PROJECT (WANDB_MODE=offline needs no account)
    distributed: bool = False  # this is one of several processes that train together (docs/usage.md)

    # The environment
    corridor_len: int = 160  # cells of the corridor, including the junction (published: 120 to 200)
    num_distractors: int = 6  # random observation bits
    max_episode_steps: int = 1000  # time limit; counts as the end of the episode, without bootstrapping, as published
    logit_noise: float = 0.7  # exploration: scale of the noise on the logits, drawn once per episode (published: 0)

    # The model
    num_layers: int = 4  # transformer layers
    d_model: int = 128  # width D of the residual stream
    d_head: int = 64  # width d of an attention head
    d_ffc: int = 128  # hidden width of the feed-forward block
    num_heads: int = 4  # attention heads H
    eta: int = 2  # expansion e of keys and queries, from d to e * d
    chrono_steps: float = 300.0  # gates start so that values last 1 to this many steps (1: as published)
    d_actor: int = 128  # hidden width of the policy head
    d_critic: int = 128  # hidden width of the value head
    initial_value: float = -10.0  # initial bias of the critic: -0.1 / (1 - gamma), for never arriving (published: 0)

    # PPO
    num_envs: int = 32  # parallel environments B (published: 8)
    num_steps: int = 512  # steps T of a rollout, and of backpropagation through time (published: 256)
    learning_rate: float = 3e-3  # of Adam (published, for A2C: 1e-4)
    anneal_lr: bool = True  # decrease the learning rate linearly to 0, once per update (published: constant)
    adam_eps: float = 1e-8  # epsilon of Adam
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.9  # lambda of the advantages (published: 0.95)
    critic_lambda: float = 1.0  # lambda of the value targets (published: 0.95)
    num_minibatches: int = 8  # minibatches per epoch, each of num_envs / num_minibatches environments (published: 1)
    update_epochs: int = 1  # passes over each rollout
    norm_adv: bool = True  # normalise the advantages of each minibatch (published: no)
    clip_coef: float = 0.2  # clipping range of the ratio
    clip_vloss: bool = False  # also clip the change of the value, to clip_coef
    ent_coef: float = 0.01  # weight of the entropy bonus (published, for A2C: 0.001)
    vf_coef: float = 0.05  # weight of the value loss (published: 1 in this convention)
    max_grad_norm: float = 0.5  # gradients are clipped to this norm (0: no learning)

    batch_size = property(lambda self: self.num_envs * self.num_steps)
    num_updates = property(lambda self: int(self.total_timesteps) // self.batch_size)

    def learning_rate_at(self, step):  # step: the number of gradient steps before this one
        update = step // (self.update_epochs * self.num_minibatches)
        return self.learning_rate * (1 - update / self.num_updates) if self.anneal_lr else self.learning_rate

    def __post_init__(self):
        sizes = "num_seeds checkpoint_interval eval_episodes num_layers d_model d_head d_ffc num_heads eta"
        sizes += " chrono_steps d_actor d_critic num_envs num_steps num_minibatches update_epochs"
        rates = "logit_noise learning_rate adam_eps clip_coef ent_coef vf_coef max_grad_norm"
        rules = (sizes, 1, 2**40), (rates, 0, 2**40), ("gamma gae_lambda critic_lambda", 0, 1)
        for names, low, high in (*rules, ("seed", 0, 2**30), ("total_timesteps", self.batch_size, 2**60)):
            for name in names.split():
                if not low <= (value := getattr(self, name)) <= high:
                    bound = f"at most {high}" if value > high else f"at least {low}"
                    raise ValueError(f"--{name.replace('_', '-')} {value}: must be {bound}")
        if self.num_envs % self.num_minibatches:
            raise ValueError(f"--num-envs {self.num_envs}: not divisible by --num-minibatches {self.num_minibatches}")
        make_env(self, 1)  # raises ValueError for impossible arguments of the environment


def make_env(args: Args, num_envs: int) -> VectorEnv:
    env = EpisodeStatistics(TMaze(args.corridor_len, args.num_distractors, args.max_episode_steps))
    return VectorEnv(AutoReset(EpisodeNoise(TimeAwareObservation(env), scale=args.logit_noise)), num_envs)


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


class MatrixMemory(NamedTuple):
    """The memory of one layer; all zeros when an episode starts."""

    matrix: jax.Array  # (B, H, d, d, e)
    norm: jax.Array  # (B, H, d, e)


def gated_outer_products(memory: MatrixMemory, reset, k, q, v, beta, gamma, p1, p2, p3):
    """GaLiTe's recurrence (section 3 of the paper) -> memory after the last step, out (T, B, H, d).

        norm_t   = (1 - gamma_t) * norm_{t-1} + gamma_t k_t                                      (B, H, d, e)
        matrix_t = (1 - outer(beta_t, gamma_t)) * matrix_{t-1} + outer(beta_t v_t, gamma_t k_t)  (B, H, d, d, e)
        out_t    = matrix_t q_t / (norm_t . q_t + 1e-10)                                         (B, H, d)

    k, q and gamma (T, B, H, d) are expanded to (T, B, H, d, e) by outer products with p1, p2 and p3, in this order.
    Inputs: k, q, v, beta, gamma (T, B, H, d) and p1, p2, p3 (T, B, H, e) after their activations; reset (T, B).

    Time is cut into chunks of C steps. The forward pass keeps only the memory before each chunk; the backward pass
    computes a chunk again (jax.checkpoint). On a CPU a chunk is a loop over its steps, which fit into the cache. On a
    GPU, launching the kernels of a step takes longer than running them, so an associative scan computes a whole chunk.
    """
    on_cpu = jax.default_backend() == "cpu"
    T, C = len(k), min(len(k), 16 if on_cpu else 64)  # not tuned
    expand = functools.partial(jnp.einsum, "...d,...e->...de")
    outer = functools.partial(jnp.einsum, "...i,...de->...ide")

    def recurrence(state, decay, inflow):  # -> decay_t state_{t-1} + inflow_t; on a GPU, of all C steps
        if on_cpu:
            return decay * state + inflow
        # Two steps in a row are again such a step: a2 (a1 s + b1) + b2 = (a1 a2) s + (b1 a2 + b2).
        combine = lambda earlier, later: (earlier[0] * later[0], earlier[1] * later[0] + later[1])
        inflow = inflow.at[0].add(decay[0] * state)  # the state before the chunk enters with its first step
        return jax.lax.associative_scan(combine, (decay, inflow))[1]

    def attend(memory, inputs):  # one step on a CPU; on a GPU a chunk, whose shapes start with an axis C
        reset, k, q, v, beta, gamma, p1, p2, p3 = inputs
        keep = 1.0 - reset[..., None, None, None]  # (B, 1, 1, 1)
        gamma, q = expand(gamma, p3), expand(q, p2)  # (B, H, d, e)
        new_k = gamma * expand(k, p1)  # (B, H, d, e)
        norm = recurrence(memory.norm, keep * (1 - gamma), new_k)
        decay = keep[..., None] * (1 - outer(beta, gamma))  # (B, H, d, d, e)
        matrix = recurrence(memory.matrix, decay, outer(beta * v, new_k))
        total = jnp.einsum("...de,...de->...", norm, q) + 1e-10  # (B, H)
        out = jnp.einsum("...ide,...de->...i", matrix, q) / total[..., None]  # (B, H, d)
        return jax.tree.map(lambda x: x if on_cpu else x[-1], MatrixMemory(matrix, norm)), out

    def cut(x):  # (T, ...) -> (N, C, ...); zeros fill the last of N chunks, where gates of 0 leave the memory as it is
        return jnp.pad(x, [(0, -T % C)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, C, *x.shape[1:])

    inputs = jax.tree.map(cut, (reset, k, q, v, beta, gamma, p1, p2, p3))
    chunk = functools.partial(jax.lax.scan, attend) if on_cpu else attend  # -> memory, out (C, B, H, d)
    memory, out = jax.lax.scan(jax.checkpoint(chunk), memory, inputs)
    return memory, out.reshape(-1, *v.shape[1:])[:T]  # without the steps that fill the last chunk


class GaLiTeAttention(nn.Module):
    """Attention without softmax, with a matrix as memory (section 3 of the paper). x (T, B, D) -> (T, B, D)."""

    args: Args

    @nn.compact
    def __call__(self, x, reset, memory: MatrixMemory):
        T, B, D = x.shape
        H, d, e = self.args.num_heads, self.args.d_head, self.args.eta
        # Each head has its own maps: H dense layers side by side -> (T, B, H, n). Their kernels are drawn one after the
        # other, because batches of QR decompositions can block each other on a CPU (jaxlib 0.10).
        draw = lambda key, shape, dtype: sequential_vmap(lambda key: orthogonal(math.sqrt(2))(key, shape, dtype))(key)
        axes = {"out_axes": 2, "axis_size": H, "variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        of_x = functools.partial(nn.vmap(nn.Dense, in_axes=None, **axes), kernel_init=draw)
        of_query = functools.partial(nn.vmap(nn.Dense, in_axes=2, **axes), kernel_init=draw)
        # Initially, gamma is about 1 / (1 + s) and remembers for about s steps (Tallec and Ollivier 2018).
        gamma_init = lambda *args: -jnp.log(jax.random.uniform(*args, minval=1.0, maxval=self.args.chrono_steps))

        k, v, beta, query = (of_x(d, name=name)(x) for name in ("k", "v", "beta", "query"))  # (T, B, H, d) each
        gamma = of_x(d, bias_init=gamma_init, name="gamma")(x)  # (T, B, H, d)
        p1, p3 = of_x(e, name="p1")(x), of_x(e, name="p3")(x)  # (T, B, H, e) each
        q, p2 = of_query(d, name="q")(query), of_query(e, name="p2")(query)  # as published, maps of a map of x
        k, q, p1, p2 = nn.relu(k), nn.relu(q), nn.relu(p1), nn.relu(p2)
        beta, gamma, p3 = nn.sigmoid(beta), nn.sigmoid(gamma), nn.sigmoid(p3)
        memory, out = gated_outer_products(memory, reset, k, q, v, beta, gamma, p1, p2, p3)
        return dense(D, name="out")(out.reshape(T, B, H * d)), memory


class GaLiTe(nn.Module):
    """x (T, B, n), reset (T, B), memory -> (T, B, D), memory after the last step."""

    args: Args

    @nn.compact
    def __call__(self, x, reset, memory: tuple[MatrixMemory, ...]):
        args = self.args
        x = dense(args.d_model, name="embedding")(x)  # (T, B, D), without an activation, as published
        layers = []
        for layer_memory in memory:
            y, layer_memory = GaLiTeAttention(args)(nn.LayerNorm()(x), reset, layer_memory)
            x = GRUGate()(x, nn.relu(y))
            y = nn.relu(dense(args.d_ffc)(nn.LayerNorm()(x)))
            x = GRUGate()(x, nn.relu(dense(args.d_model)(y)))
            layers.append(layer_memory)
        return x, tuple(layers)


class ActorCritic(nn.Module):
    """obs (T, B, n), reset (T, B), memory -> logits (T, B, A), value (T, B), memory. To act, T is 1.

    A memory is any pytree of arrays (B, ...); where reset is true, it is cleared before that observation is read.
    Observations begin with noise (A,), which is added to the logits, and the steps left (1,), which scale the value.
    """

    args: Args
    num_actions: int

    @nn.nowrap
    def initial_memory(self, B: int) -> tuple[MatrixMemory, ...]:
        H, d, e = self.args.num_heads, self.args.d_head, self.args.eta
        return (MatrixMemory(jnp.zeros((B, H, d, d, e)), jnp.zeros((B, H, d, e))),) * self.args.num_layers

    @nn.compact
    def __call__(self, obs, reset, memory: tuple[MatrixMemory, ...]):
        noise, steps_left, obs = jnp.split(obs, [self.num_actions, self.num_actions + 1], axis=-1)
        x, memory = GaLiTe(self.args)(obs, reset, memory)  # (T, B, D)
        actor, critic = nn.tanh(dense(self.args.d_actor)(x)), nn.tanh(dense(self.args.d_critic)(x))
        logits = nn.Dense(self.num_actions, kernel_init=orthogonal(0.1))(actor) + noise  # (T, B, A)
        value = dense(1, bias_init=constant(self.args.initial_value))(critic)
        # n equal rewards are worth 1 - gamma^n of endless ones. Without a discount, endless ones have no finite value.
        value = value * (1 - self.args.gamma**steps_left if self.args.gamma < 1 else 1)
        return logits, value.squeeze(-1), memory  # (T, B, A), (T, B)


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


class RunnerState(NamedTuple):
    """Everything that changes during training: what a checkpoint holds."""

    train_state: TrainState  # parameters and optimizer
    key: jax.Array
    env_state: Any
    obs: jax.Array  # (B, ...), the next observation to act on
    reset: jax.Array  # (B,) bool, obs starts an episode
    memory: Any  # a pytree of arrays (B, ...)


def init(args: Args, env, agent: nn.Module, key: jax.Array) -> RunnerState:
    params_key, env_key, key = jax.random.split(key, 3)
    obs, env_state = env.reset(env_key, env.default_params)
    reset, memory = jnp.ones(args.num_envs, bool), agent.initial_memory(args.num_envs)
    params = agent.init(params_key, obs[None], reset[None], memory)
    adam = optax.adam(args.learning_rate_at, eps=args.adam_eps)
    optimizer = optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adam)
    train_state = TrainState.create(apply_fn=agent.apply, params=params, tx=optimizer)
    return RunnerState(train_state, key, env_state, obs, reset, memory)


def rollout(args: Args, env, runner: RunnerState, key: jax.Array):
    """Acts for T steps -> runner, transitions and infos (T, B, ...), value of the observation after them (B,)."""
    policy = functools.partial(runner.train_state.apply_fn, runner.train_state.params)

    def step(runner, key):
        action_key, env_key = jax.random.split(key)
        logits, value, memory = policy(runner.obs[None], runner.reset[None], runner.memory)  # (1, B, A), (1, B)
        action = jax.random.categorical(action_key, logits[0])
        obs, env_state, reward, done, info = env.step(env_key, runner.env_state, action, env.default_params)
        log_prob = -optax.softmax_cross_entropy_with_integer_labels(logits[0], action)
        transition = Transition(runner.obs, runner.reset, action, log_prob, value[0], reward, done)
        runner = runner._replace(env_state=env_state, obs=obs, reset=done, memory=memory)
        return runner, (transition, info)

    runner, (transitions, infos) = jax.lax.scan(step, runner, jax.random.split(key, args.num_steps))
    _, last_value, _ = policy(runner.obs[None], runner.reset[None], runner.memory)
    return runner, transitions, infos, last_value[0]


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


def update(args: Args, env, runner: RunnerState):
    """One rollout and the learning from it -> runner, metrics, outcomes: means over the episodes that ended."""
    key, refresh_key, rollout_key, learn_key = jax.random.split(runner.key, 4)
    env_state = env.refresh(refresh_key, runner.env_state, env.default_params)  # some tasks prepare episodes here
    start = runner._replace(key=key, env_state=env_state)
    runner, transitions, infos, last_value = rollout(args, env, start, rollout_key)
    advantage = compute_gae(transitions, last_value, args.gamma, args.gae_lambda)
    target = transitions.value + compute_gae(transitions, last_value, args.gamma, args.critic_lambda)
    train_state, metrics = learn(args, runner.train_state, learn_key, start.memory, (transitions, advantage, target))

    num_ended = transitions.done.sum()
    mean_over_ended = lambda x: jnp.sum(x * transitions.done) / jnp.maximum(num_ended, 1)
    outcomes = {name: mean_over_ended(infos[entry]) for name, entry in env.outcomes.items()}
    metrics |= {
        "charts/episodes": num_ended,
        "charts/learning_rate": args.learning_rate_at(runner.train_state.step),
        "losses/explained_variance": 1 - jnp.var(target - transitions.value) / (jnp.var(target) + 1e-8),
    }
    return runner._replace(train_state=train_state), metrics, outcomes


def evaluate(env, agent: nn.Module, params, key: jax.Array, greedy: bool) -> dict[str, jax.Array]:
    """Plays one whole episode in each of the B environments -> the entries of info that env.outcomes names, (B,)."""
    B = env.num_envs
    key, reset_key = jax.random.split(key)
    obs, env_state = env.reset(reset_key, env.default_params)
    results = {name: jnp.zeros(B) for name in env.outcomes.values()}

    def step(carry):
        key, env_state, obs, reset, memory, finished, results = carry
        key, action_key, env_key = jax.random.split(key, 3)
        logits, _, memory = agent.apply(params, obs[None], reset[None], memory)
        action = jnp.where(greedy, logits[0].argmax(-1), jax.random.categorical(action_key, logits[0]))
        obs, env_state, _, done, info = env.step(env_key, env_state, action, env.default_params)
        results = {name: jnp.where(done & ~finished, info[name], old) for name, old in results.items()}
        return key, env_state, obs, done, memory, finished | done, results

    carry = (key, env_state, obs, jnp.ones(B, bool), agent.initial_memory(B), jnp.zeros(B, bool), results)
    *_, results = jax.lax.while_loop(lambda carry: ~carry[-2].all(), step, carry)  # until all have finished
    return results


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


def make_shardings(args: Args):
    """-> shardings of what `update` returns: by seed (axis 0) if devices share them evenly, else by environment (1)."""
    available, groups = jax.device_count(), args.num_envs // args.num_minibatches  # groups of environments in `learn`
    by_seed = args.num_seeds % available == 0
    count = available if by_seed else max(n for n in range(1, available + 1) if groups % n == 0)
    if count < available:
        used = f"{count} of {available} devices: --num-envs / --num-minibatches is not divisible by more"
        if jax.process_count() > 1:  # a process without a device would wait forever
            raise SystemExit(f"--distributed can use only {used}")
        print(f"Using {used}")
    mesh = jax.sharding.Mesh(jax.devices()[:count], ("device",))
    sharding = lambda *axes: jax.NamedSharding(mesh, jax.P(*axes))  # without axes: a copy on each device
    replicated, by_env = sharding(), sharding(None, "device")
    runner = sharding("device") if by_seed else RunnerState(replicated, replicated, by_env, by_env, by_env, by_env)
    return runner, replicated, replicated


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


def report(args: Args, env, agent: nn.Module, params, run_dir: Path, tracker) -> None:
    """Evaluates the parameters of all seeds in env, with sampled and with greedy actions."""
    results, keys = {}, jax.vmap(jax.random.key)(args.seed + jnp.arange(args.num_seeds))
    margin = lambda x: stdtrit(x.size - 1, 0.975) * x.std(ddof=1) / math.sqrt(x.size)  # half of a 95% interval
    evaluate_seeds = jax.jit(jax.vmap(functools.partial(evaluate, env, agent), in_axes=(0, 0, None)))
    for number, kind in enumerate(("sampled", "greedy"), start=3):  # fold_in with 0 to 2 gives the keys of `init`
        result = evaluate_seeds(params, jax.vmap(jax.random.fold_in, (0, None))(keys, number), kind == "greedy")
        results[kind] = {name: values.mean(1).tolist() for name, values in result.items()}  # values (S, B)
        # Intervals are over seeds, or over the episodes of one seed. Names with a slash (Craftax's) are not printed.
        over = {name: x.mean(1) if args.num_seeds > 1 else x[0] for name, x in result.items() if "/" not in name}
        shown = [f"{name} {x.mean():.3g}" + (f" ± {margin(x):.2g}" if x.size > 1 else "") for name, x in over.items()]
        print(f"Evaluation, {kind} actions, {env.num_envs} episodes per seed: {', '.join(shown)}")
    (run_dir / "evaluation.json").write_text(json.dumps(results, indent=2))
    if tracker:
        tracker.summary.update({f"eval/{name}": np.mean(values) for name, values in results["sampled"].items()})


def main(args: Args) -> None:
    if args.distributed:
        try:
            jax.distributed.initialize(shutdown_timeout_seconds=10**6)  # all wait for the chief's evaluation
        except (ValueError, RuntimeError) as error:
            raise SystemExit(f"--distributed needs SLURM, MPI or a cloud (else --no-distributed): {error}") from None
    for library in ("absl", "asyncio"):  # they log the tracebacks of errors that orbax raises anyway
        logging.getLogger(library).setLevel(logging.CRITICAL)
    env = make_env(args, args.num_envs)
    agent = ActorCritic(args, env.action_space(env.default_params).n)
    headline = ["charts/episodic_return", "charts/success_rate"]

    # For all seeds: S becomes the first axis of each array. init runs seed by seed: on a CPU, a vmap of QR may hang.
    shardings = make_shardings(args)  # of a RunnerState, of metrics, of outcomes
    init_seeds = lambda seeds: jax.lax.map(lambda seed: init(args, env, agent, jax.random.key(seed)), seeds)
    update_seeds = jax.jit(jax.vmap(functools.partial(update, args, env)), out_shardings=shardings, donate_argnums=0)
    existing, chief, tracker = args.resume or args.evaluate, jax.process_index() == 0, None
    s, ns = broadcast_one_to_all(np.array(divmod(time.time_ns(), 10**9), np.int32))  # one time for all, as int32
    run_dir = Path(existing or f"{args.runs_dir}/tmaze__{args.exp_name}__{args.seed}__{s}.{ns:09}").absolute()
    try:
        if chief and args.track:
            import wandb  # not above, because it takes a second

            try:
                tracker = wandb.init(id=run_dir.name, name=run_dir.name, dir=run_dir, resume="allow", config=vars(args))
            except wandb.Error as error:
                raise SystemExit(f"--track: {str(error).splitlines()[0]}") from None
        if chief and not existing:
            run_dir.mkdir(parents=True, exist_ok=args.track)  # W&B has made it
            (run_dir / "args.json").write_text(json.dumps(vars(args), indent=2))
        print(f"Run folder: {run_dir}\nCompiling, which takes about half a minute ...", flush=True)
        runner = jax.jit(init_seeds, out_shardings=shardings[0])(args.seed + jnp.arange(args.num_seeds))
        size = sum(x[0].size for x in jax.tree.leaves(runner.train_state.params))  # of one seed
        print(f"{size:,} parameters, {args.num_updates} updates of {args.batch_size:,} steps", flush=True)
        handler, read_only = ocp.StandardCheckpointHandler(), args.evaluate != ""
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False, read_only=read_only)
        checkpoints = ocp.CheckpointManager(run_dir / "checkpoints", options=options, item_handlers=handler)
        start, runner = restore(checkpoints, runner) if existing else (0, runner)
        if not args.evaluate:
            runner = train(args, update_seeds, runner, start, run_dir, checkpoints, tracker, headline)
        params = process_allgather(runner.train_state.params, tiled=True)  # numpy arrays, whole in each process
        if chief:
            no_noise = dataclasses.replace(args, logit_noise=0.0)
            if (run_dir / "metrics.csv").exists():  # an evaluation does not need it
                plot_learning_curves(run_dir, headline)
            report(args, make_env(no_noise, args.eval_episodes), agent, params, run_dir, tracker)
            if args.capture_video:
                policy = functools.partial(agent.apply, jax.tree.map(lambda x: x[0], params))
                record_video(make_env(no_noise, 1), policy, agent.initial_memory(1), args.seed, run_dir / "episode.gif")
            print(f"Results: {run_dir}")
    except OSError as error:
        raise SystemExit(f'{error}. If there are checkpoints, --resume "{run_dir}" continues from the newest') from None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training begins, Ctrl-C ends the run at once
    main(parse_args())

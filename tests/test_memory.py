"""The memory of every script's agent must last from call to call, and be cleared at a reset."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import (
    QUICK,
    SCRIPTS,
    assert_close,
    build,
    deviation,
    float64,
    load,
    quick_jit,
    random_observations,
    random_params,
    slow_but,
    small_args,
)

T, B = 50, 3
RESETS = np.zeros((T, B), bool)
RESETS[[0, 17, 18, T - 1], 0] = True  # at the start, consecutive, at the end
RESETS[[16, 34], 1] = True  # at places where the sequence is cut; starts in mid-episode
# The third has no reset: longer than any chunk or memory window.


class Case:
    """A small agent with random parameters, observations, and a memory in mid-episode."""

    def __init__(self, name: str):
        script = load(name)
        args = small_args(script)
        env, agent = build(script, args)
        earlier, self.obs = random_observations(env, 0, (2, T, B))
        self.other_obs = random_observations(env, 1, (T, B))
        blank = agent.initial_memory(B)
        params = jax.eval_shape(agent.init, jax.random.key(0), self.obs, RESETS, blank)
        self.params, apply = random_params(params), quick_jit(agent.apply)
        self.apply = lambda obs, reset, memory: apply(self.params, obs, reset, memory)
        _, _, self.memory = self.apply(earlier, np.zeros((T, B), bool), blank)
        self.logits, self.value, self.end = self.apply(self.obs, RESETS, self.memory)


@pytest.fixture(scope="module", params=slow_but(SCRIPTS, QUICK))
def case(request):
    return Case(request.param)


def test_the_batch_is_the_first_axis_of_a_memory(case):
    """This holds for every array of a memory, before and after a call."""
    arrays = jax.tree.leaves((case.memory, case.end))
    assert arrays and all(x.shape[0] == B for x in arrays)


CHUNKS = {"single": (1,) * T, "16+34": (16, 34), "34+16": (34, 16), "1+48+1": (1, 48, 1)}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_one_pass_equals_any_cut_into_chunks(case, chunks):
    """One call over T steps equals single steps and any chunks, if the memory is passed from call to call."""
    assert sum(chunks) == T
    memory, outputs, start = case.memory, [], 0
    for n in chunks:
        logits, value, memory = case.apply(case.obs[start : start + n], RESETS[start : start + n], memory)
        outputs.append((logits, value))
        start += n
    logits, value = (np.concatenate(x) for x in zip(*outputs, strict=True))
    assert_close((logits, value, memory), (case.logits, case.value, case.end), atol=1e-4)


def test_the_past_is_remembered_until_a_reset(case):
    """After a reset, nothing depends on earlier steps or on the initial memory; before it, outputs do."""
    rng = np.random.default_rng(1)

    def garbage(x):
        if not np.issubdtype(x.dtype, np.floating):
            return x[::-1] if x.dtype == bool else x + 3  # a mask, a counter
        return np.float32(10 * rng.normal(size=x.shape))

    # An environment that resets at the start forgets the memory; another one does not.
    logits, value, end = case.apply(case.obs, RESETS, jax.tree.map(garbage, case.memory))
    assert_close((logits[:, 0], value[:, 0]), (case.logits[:, 0], case.value[:, 0]), atol=1e-6)
    assert np.abs(logits[:16, 1] - case.logits[:16, 1]).max() > 1e-2
    assert_close((logits[16:, 1], value[16:, 1]), (case.logits[16:, 1], case.value[16:, 1]), atol=1e-6)
    assert np.abs(value[:, 2] - case.value[:, 2]).max() > 1e-2
    # The final memory forgets as the outputs do.
    more = lambda memory: case.apply(case.obs[:1], np.zeros((1, B), bool), memory)[:2]
    (logits, value), (expected_logits, expected_value) = more(end), more(case.end)
    assert_close((logits[:, :2], value[:, :2]), (expected_logits[:, :2], expected_value[:, :2]), atol=1e-6)

    # Other observations up to a reset change the outputs before it and none after it.
    obs = case.obs.copy()
    for b, end in enumerate((17, 34, 1)):
        obs[:end, b] = case.other_obs[:end, b]
    logits, value, _ = case.apply(obs, RESETS, case.memory)
    for b, reset in ((0, 17), (1, 34)):
        assert np.abs(logits[:reset, b] - case.logits[:reset, b]).max() > 1e-2
        assert_close((logits[reset:, b], value[reset:, b]), (case.logits[reset:, b], case.value[reset:, b]), atol=1e-6)
    assert np.abs(logits[1:, 2] - case.logits[1:, 2]).max() > 1e-3, "one observation is remembered later"


def test_environments_do_not_mix(case):
    """Each environment's outputs depend only on its own observations, resets and memory."""
    logits, value, end = case.apply(case.obs[:, ::-1], RESETS[:, ::-1], jax.tree.map(lambda x: x[::-1], case.memory))
    end = jax.tree.map(lambda x: x[::-1], end)
    assert_close((logits[:, ::-1], value[:, ::-1], end), (case.logits, case.value, case.end), atol=1e-5)


@pytest.mark.parametrize("name", ["ppo_agalite_tmaze", "ppo_galite_tmaze"])
def test_linear_attention_is_the_same_on_a_gpu(name, monkeypatch):
    """There, a chunk is an associative scan, not a loop: outputs, memory and all derivatives stay the same."""
    script, rng, T = load(name), np.random.default_rng(0), 150  # more than a chunk, and not a multiple of it
    args = small_args(script, num_layers=1)
    env, agent = build(script, args)
    obs, reset = random_observations(env, 0, (T, B)), rng.random((T, B)) < 0.05
    memory = jax.tree.map(lambda x: np.abs(rng.normal(size=x.shape)).astype(x.dtype), agent.initial_memory(B))
    params = random_params(jax.eval_shape(agent.init, jax.random.key(0), obs, reset, memory))
    weights, results, programs = rng.normal(size=(T, B, 4)), [], []
    with jax.enable_x64(True):  # in float32 the rounding of a gradient depends on the CPU
        params, obs, memory = jax.tree.map(jnp.asarray, float64((params, obs, memory)))
        for backend in ("cpu", "gpu"):
            monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)

            def weighted_sum(params, memory):
                logits, value, end = agent.apply(params, obs, reset, memory)
                return (weights * logits).sum() + value.sum(), (logits, value, end)

            gradients = jax.grad(weighted_sum, (0, 1), has_aux=True, allow_int=True)
            programs.append(str(jax.make_jaxpr(gradients)(params, memory)))
            (of_params, of_memory), outputs = quick_jit(gradients)(params, memory)
            floats = [x for x in jax.tree.leaves(of_memory) if x.dtype == np.float64]  # not that of a counter
            results.append(float64((of_params, floats, outputs)))
    assert programs[0] != programs[1], "otherwise one path is compared with itself"
    assert deviation(*results) < 1e-10

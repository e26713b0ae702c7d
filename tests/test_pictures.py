"""Agents that see images: the encoder's convolutions, and images that stay bytes until they reach it."""

from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import MEMORYMAZE, MYSTERYPATH, build, count_parameters, load, quick_jit, slow_but, small_args

script = load("ppo_agalite_mysterypath")  # the encoder is the same text in all scripts


@pytest.mark.parametrize("channels", [4, 5])
@pytest.mark.parametrize("size, stride", [(8, 4), (4, 2), (3, 1)])
def test_patches_times_a_kernel_is_a_convolution(size, stride, channels):
    """patches(x) @ kernel is Flax's convolution without padding, for the sizes the encoder uses. Bytes stay bytes,
    whether or not four of them are moved at once."""
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 20, 16, channels), np.uint8)
    x = np.float32(images) / 255
    of_bytes = script.patches(jnp.array(images), size, stride)
    np.testing.assert_array_equal(of_bytes, np.rint(255 * script.patches(x, size, stride)))
    conv = nn.Conv(7, (size, size), stride, padding="VALID", use_bias=False)
    params = conv.init(jax.random.key(0), x)
    n = size // stride
    kernel = params["params"]["kernel"].reshape(n, stride, n, stride, channels, 7).swapaxes(1, 2).reshape(-1, 7)
    np.testing.assert_allclose(script.patches(x, size, stride) @ kernel, conv.apply(params, x), atol=1e-5)


def test_encoder_scales_images_and_has_the_published_sizes():
    """Pixels become 0 .. 1 before the first product; kernels have the shapes of Mnih et al., 8x8x3x32 and so on."""
    obs = np.random.default_rng(0).integers(0, 256, (2, 1, 84, 84, 3), np.uint8)
    encoder = script.ConvEncoder()
    params = jax.eval_shape(encoder.init, jax.random.key(0), obs)["params"]
    shapes = [params[f"Dense_{i}"]["kernel"].shape for i in range(3)]
    assert shapes == [(8 * 8 * 3, 32), (4 * 4 * 32, 64), (3 * 3 * 64, 64)]
    params = quick_jit(encoder.init)(jax.random.key(0), obs)
    features = quick_jit(encoder.apply)(params, obs)
    assert features.shape == (2, 1, 7 * 7 * 64)
    kernels = [params["params"][f"Dense_{i}"]["kernel"] for i in range(3)]
    x = np.float32(obs) / 255
    for kernel, (size, stride) in zip(kernels, ((8, 4), (4, 2), (3, 1)), strict=True):
        x = nn.relu(script.patches(x, size, stride) @ kernel)  # biases are initially 0
    np.testing.assert_allclose(features.ravel(), x.ravel(), atol=1e-4)


@pytest.mark.parametrize("name", MYSTERYPATH)
def test_encode_tiles_is_one_convolution_without_overlap(name):
    """Each tile's features depend on its 12 x 12 pixels alone, as in Flax's convolution with that size and stride."""
    args = small_args(load(name), num_channels=5, encode_tiles=True)
    obs = np.random.default_rng(0).integers(0, 256, (2, 3, 84, 84, 3), np.uint8)
    agent = load(name).ActorCritic(args, 4)
    init = lambda key: agent.init(key, obs, np.ones((2, 3), bool), agent.initial_memory(3))
    params = quick_jit(init)(jax.random.key(0))["params"]["encoder"]
    kernel, bias = params["Dense_0"]["kernel"], params["Dense_0"]["bias"]
    assert params.keys() == {"Dense_0"} and kernel.shape == (12 * 12 * 3, 5)
    features = quick_jit(load(name).ConvEncoder(5, tiles=True).apply)({"params": params}, obs)
    conv = nn.Conv(5, (12, 12), (12, 12), padding="VALID")
    expected = nn.relu(conv.apply({"params": {"kernel": kernel.reshape(12, 12, 3, 5), "bias": bias}}, obs / 255.0))
    np.testing.assert_allclose(features, expected.reshape(2, 3, 7 * 7 * 5), atol=1e-5)


@pytest.mark.parametrize(
    "name", [name for name in MYSTERYPATH + MEMORYMAZE if hasattr(load(name).Args, "num_channels")]
)
def test_num_channels_is_the_first_convolution_and_half_of_the_others(name):
    """Defaults are the published 32, 64, 64 and IMPALA's 16, 32, 32; the flag changes the agent's encoder."""
    script = load(name)
    size, blocks = (84, 1) if name in MYSTERYPATH else (64, 5)  # IMPALA's three stages have five convolutions each

    def widths(args):
        agent, obs = script.ActorCritic(args, 4), np.zeros((1, 8, size, size, 3), np.uint8)
        init = lambda key: agent.init(key, obs, np.ones((1, 8), bool), agent.initial_memory(8))
        encoder = jax.eval_shape(init, jax.random.key(0))["params"]["encoder"]
        kernels = [x for x in jax.tree.leaves(encoder) if x.ndim >= 2]
        return sorted(x.shape[-1] for x in kernels if x.shape[-1] != 256)

    published = 32 if name in MYSTERYPATH else 16
    for args, first in ((script.Args(), published), (script.Args(num_channels=5), 5)):
        assert widths(args) == [first] * blocks + [2 * first] * 2 * blocks


@pytest.mark.parametrize("T, B, steps", slow_but([(6, 3, 2), (16, 1, 8), (3, 16, 1)], [(6, 3, 2)]))
@pytest.mark.parametrize("name", ["ppo_agalite_mysterypath", "ppo_agalite_memorymaze"])
def test_pieces_change_no_number_and_are_for_a_cpu_only(name, T, B, steps):
    """in_pieces equals the encoder in values and gradients, `steps` steps at once; a GPU gets all images at once."""
    script = load(name)
    encoder, size = (script.ConvEncoder, 36) if name in MYSTERYPATH else (script.ImpalaEncoder, 16)

    class InPieces(nn.Module):
        @nn.compact
        def __call__(self, obs):
            return script.in_pieces(encoder(name="encoder"), obs)

    def values_and_gradients(backend):
        """-> both, compiled for a CPU while the script assumes this backend, and their jaxpr."""
        loss = lambda params, obs: (jnp.square(x := InPieces().apply(params, obs)).sum(), x)
        function = jax.grad(loss, has_aux=True)
        with mock.patch("jax.default_backend", lambda: backend):
            return quick_jit(function)(params, obs), str(jax.make_jaxpr(function)(params, obs))

    obs = np.random.default_rng(0).integers(0, 256, (T, B, size, size, 3), np.uint8)
    params = quick_jit(InPieces().init)(jax.random.key(0), obs)
    pieces, jaxpr = values_and_gradients("cpu")
    at_once, jaxpr_at_once = values_and_gradients("gpu")
    assert f"u8[{steps},{B},{size},{size},3]" in jaxpr and "scan[" in jaxpr and "scan[" not in jaxpr_at_once
    assert at_once[1].shape[:2] == (T, B) and np.std(at_once[1]) > 0.01
    for ours, theirs in zip(jax.tree.leaves(pieces), jax.tree.leaves(at_once), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("name", MYSTERYPATH)
def test_a_rollout_keeps_bytes(name):
    """The observations of a rollout are stored as bytes, a quarter of what floats would take."""
    script = load(name)
    args = small_args(script)
    env, agent = build(script, args)
    runner = jax.eval_shape(lambda key: script.init(args, env, agent, key), jax.random.key(0))
    rollout = lambda runner, key: script.rollout(args, env, runner, key)
    _, transitions, _, _ = jax.eval_shape(rollout, runner, jax.random.key(1))
    assert transitions.obs.dtype == np.uint8 and transitions.obs.shape == (16, 8, 84, 84, 3)


@pytest.mark.parametrize("name, count", [("ppo_agalite_mysterypath", 2_283_237), ("ppo_gtrxl_mysterypath", 2_124_837)])
def test_parameters_of_the_published_agents(name, count):
    """The default sizes, which are the published ones, give this count."""
    script = load(name)
    assert count_parameters(script, script.Args(num_envs=8, num_minibatches=1)) == count

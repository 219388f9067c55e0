"""Every way of training, where it must work: under clipping, in a private round, on pruned and quantized models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedrobust import ops, trees
from fedrobust.attacks import pgd
from fedrobust.compression import (
    calibrate,
    dequantize,
    fake_quantize,
    fake_quantize_inputs,
    find_channels,
    integer_apply,
    masks,
    quantize,
    shrink,
)
from fedrobust.defenses import (
    adversarial_loss,
    align_gradients,
    fast_attack,
    free_update,
    linf_ascent,
    mean,
    trades_loss,
)
from fedrobust.federated import fedavg, local_update, map_clients
from fedrobust.losses import cross_entropy
from fedrobust.privacy import Plan, clipped_grad, private_grad, require_isolated
from fedrobust.types import Batch, Cohort

KEY = jax.random.key(0)
EPS = 0.1
COMPILED = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles faster
rng = np.random.default_rng(0)
IMAGE = rng.uniform(size=(4, 6, 6, 1)).astype(np.float32)
LABEL = np.array([0, 1, 2, 1], np.int32)
PARAMS = {"a": rng.normal(size=(36, 6)).astype(np.float32) / 3, "b": rng.normal(size=(6, 3)).astype(np.float32)}
KERNELS = {
    "a": rng.normal(size=(3, 3, 1, 4)).astype(np.float32) / 2,
    "b": rng.normal(size=(36, 3)).astype(np.float32) / 3,
}


def apply(params, x):
    return jnp.tanh(x.reshape(len(x), -1) @ params["a"]) @ params["b"]


def convolutional(params, x):
    x = ops.max_pool(jnp.tanh(ops.conv(x, params["a"])), (2, 2))
    return x.reshape(len(x), -1) @ params["b"]


def fake_quantized(params, x):
    """Predicts with the rounded weights."""
    return apply(fake_quantize(params), x)


@functools.cache
def ranges():
    return calibrate(apply, PARAMS, IMAGE)


def fake_on_integers(params, x):
    """Predicts with rounded weights on rounded inputs of the layers, as served on integers."""
    return fake_quantize_inputs(apply, ranges())(fake_quantize(params), x)


def steps(objective=optax.softmax_cross_entropy_with_integer_labels):
    return pgd(
        norm="linf", eps=EPS, step_size=EPS / 2, num_steps=2, random_start=False, keep_best=False, objective=objective
    )


def own(key, logits_fn, image, label):
    """A user's attack that no part of the library knows: the darkest of two shifts, by the first logit."""
    shifts = jnp.stack([jnp.clip(image + d, 0, 1) for d in (-EPS, EPS)])
    worst = jnp.argmin(jnp.stack([logits_fn(x)[:, 0] for x in shifts]), axis=0)
    return jnp.take_along_axis(shifts, worst[None, :, None, None, None], axis=0)[0]


def fast_aligned(apply):
    plain = cross_entropy(apply)
    fast = adversarial_loss(plain, apply, fast_attack(pgd, norm="linf", eps=EPS), clean_share=0.0)
    return align_gradients(fast, plain, eps=EPS, weight=0.5)


LOSSES = {
    "madry": lambda apply: adversarial_loss(cross_entropy(apply), apply, steps(), clean_share=0.5),
    "trades": lambda apply: trades_loss(apply, steps, beta=3.0, start_stddev=0.01),
    "fast, aligned": fast_aligned,
}


@functools.cache
def pruned():
    channels = find_channels(apply, PARAMS, jax.ShapeDtypeStruct((1, 6, 6, 1), jnp.float32))
    return channels, masks(channels, PARAMS, sparsity=0.5)


@pytest.mark.parametrize("name", ["trades", "fast, aligned"])  # madry's: tests/privacy
def test_records_do_not_meet(name):
    require_isolated(LOSSES[name](apply), KEY, PARAMS, IMAGE[:3], LABEL[:3])


def test_a_clipped_sum_is_that_of_each_records_own_gradient_also_twice_through_convolutions():
    loss, clip_norm = fast_aligned(convolutional), 0.5
    batch = Batch(IMAGE, LABEL, np.array([True, True, True, False]))
    total, info = COMPILED(clipped_grad(loss, clip_norm=clip_norm))(KEY, KERNELS, batch)

    @COMPILED
    def alone(key, x, y):
        return jax.grad(lambda p: loss(key, p, x[None], y[None])[0])(KERNELS)

    expected = jax.tree.map(np.zeros_like, KERNELS)
    for key, x, y in zip(jax.random.split(KEY, 4)[:3], IMAGE, LABEL, strict=False):
        gradient = alone(key, x, y)
        gradient = jax.tree.map(np.asarray, gradient)
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
        expected = jax.tree.map(lambda e, g, n=norm: e + g * min(1, clip_norm / n), expected, gradient)
    assert (info.norm[:3] > clip_norm).any() and info.num_dropped == 0
    for found, wanted in zip(jax.tree.leaves(total), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_pruned_and_quantized_models_are_attacked_as_what_they_are(name):
    """Masked is shrunk; fake-quantized is the model of the rounded weights, with a gradient that is alive."""
    channels, mask = pruned()
    masked = jax.tree.map(lambda p, m: p * m, PARAMS, mask)
    small, small_apply = shrink(apply, channels, PARAMS, mask)
    rounded = dequantize(quantize(masked))
    models = ((apply, masked), (small_apply, small), (fake_quantized, masked), (apply, rounded))

    def both(f, p):
        value, pull_back = jax.vjp(lambda p: LOSSES[name](f)(KEY, p, IMAGE, LABEL), p)
        return value, trees.norm(pull_back(jnp.ones(4))[0])

    values, norms = zip(*COMPILED(lambda: [both(f, p) for f, p in models])(), strict=True)
    np.testing.assert_allclose(values[1], values[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(values[2], values[3], rtol=1e-4, atol=1e-5)
    assert np.abs(values[2] - values[0]).max() > 1e-5
    assert abs(norms[2] - norms[3]) < 1e-3 * norms[3] and norms[2] > 0.1


@pytest.mark.parametrize("name", ["madry", "trades"])
def test_the_twin_that_is_trained_is_attacked_as_the_model_on_integers(name):
    """The same loss as with the served integers and their straight-through slope; its gradient in the weights lives."""
    served = integer_apply(apply, ranges(), straight_through=True)
    loss = COMPILED(lambda: LOSSES[name](fake_on_integers)(KEY, PARAMS, IMAGE, LABEL))()
    expected = COMPILED(lambda: LOSSES[name](served)(KEY, quantize(PARAMS), IMAGE, LABEL))()
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)
    gradient = COMPILED(jax.grad(lambda p: jnp.sum(LOSSES[name](fake_on_integers)(KEY, p, IMAGE, LABEL))))(PARAMS)
    assert trees.norm(gradient) > 0.1


PLAN = Plan(
    "record", "add_or_remove_one", "poisson", 0.5, 10, 0.1, 0.0, float("inf"), 1e-5, None, 0.0, 0.0, "pld",
)  # fmt: skip


def private(loss):
    return lambda m: private_grad(clipped_grad(loss, clip_norm=0.5), PLAN, num_records=4.0, num_replays=m)


CLIENTS = {
    "madry": lambda apply: local_update(private(LOSSES["madry"](apply))(1), optax.sgd(0.5), skip_empty=False),
    "trades": lambda apply: local_update(private(LOSSES["trades"](apply))(1), optax.sgd(0.5), skip_empty=False),
    "fast, aligned": lambda apply: local_update(private(fast_aligned(apply))(1), optax.sgd(0.5), skip_empty=False),
    "own attack": lambda apply: local_update(
        private(adversarial_loss(cross_entropy(apply), apply, own, clean_share=0.0))(1),
        optax.sgd(0.5),
        skip_empty=False,
    ),
    "free": lambda apply: free_update(
        cross_entropy(apply),
        optax.sgd(0.5),
        linf_ascent(eps=EPS, step_size=EPS, random_start=True),
        num_replays=2,
        skip_empty=False,
        private=private(cross_entropy(apply)),
    ),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_private_federated_rounds_of_a_masked_quantized_model(name):
    """Two rounds of one program; the absent client and the padding hold NaN; what is masked stays exactly zero."""
    shape = (3, 1, 2)
    image = np.stack([IMAGE[:2], IMAGE[2:], np.full((2, 6, 6, 1), np.nan)])[:, None].astype(np.float32)
    image[0, 0, 1] = np.nan
    batch = Batch(image, np.resize(LABEL, shape), np.array([1, 0, 1, 1, 0, 0], bool).reshape(shape))
    cohort = Cohort(np.arange(3, dtype=np.int32), np.array([1, 1, 0], np.float32), np.zeros(3, bool), batch)
    _, mask = pruned()
    algorithm = fedavg(
        lambda round: CLIENTS[name](fake_on_integers),
        mean(),
        optax.sgd(1.0),
        functools.partial(map_clients, backend="scan"),
    )
    masked = jax.tree.map(lambda p, m: p * m, PARAMS, mask)
    state = algorithm.init(masked)._replace(mask=mask)
    step = COMPILED(algorithm.round)
    for r in range(2):
        state, _ = step(jax.random.fold_in(KEY, r), jax.device_get(state), cohort)
    assert step._cache_size() == 1
    for p, m, before in zip(*map(jax.tree.leaves, (state.params, mask, masked)), strict=True):
        assert np.isfinite(p).all() and not p[m == 0].any() and (p != before)[m == 1].all()

"""Laws of the clipped gradient sum, against a loop in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrobust import losses, models
from fedrobust.privacy import RELATIONS, by_layer, clip, clipped_grad
from fedrobust.types import Batch
from tests.privacy.clipping_cases import (
    ADVERSARIAL,
    CLIP_NORM,
    KEY,
    LINEAR,
    MASK,
    PARAMS,
    PIECES,
    SAME,
    SIZE,
    WAYS,
    WEIGHT,
    bits,
    compiled,
    compiled_for_any_norm,
    every_way,
    make_batch,
    vector,
)


def softmax_gradients(params, batch):
    """Per-example gradients of the linear model by the textbook formula, in float64: [B, 3 + 12 + 9]."""
    x = np.asarray(batch.image, np.float64).reshape(len(batch.label), -1)
    logits = x @ params["w"].astype(np.float64) + params["b"]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    loss = -np.log(p[np.arange(len(x)), batch.label])
    error = p - np.eye(3)[batch.label]
    rows = [np.concatenate([e, np.zeros(9), np.outer(a, e).ravel()]) for a, e in zip(x, error, strict=True)]
    return np.stack(rows), loss  # leaves in the order b, v, w


def oracle(params, batch, weight, clip_norm=CLIP_NORM):
    gradients, loss = softmax_gradients(params, batch)
    total = np.zeros(gradients.shape[1])
    for i, g in enumerate(gradients):
        if batch.mask[i]:
            total += weight[i] * g * min(1, clip_norm / np.linalg.norm(g))
    norm = np.linalg.norm(gradients, axis=1) * batch.mask
    return total, norm, loss[batch.mask].mean()


def test_clip_by_hand():
    gradient = {"a": jnp.asarray([3.0]), "b": jnp.asarray([[4.0]])}
    clipped, norm = clip(gradient, 1.0)
    np.testing.assert_allclose(vector(clipped), [0.6, 0.8], rtol=1e-5)
    assert norm == 5
    unchanged, _ = clip(gradient, 6.0)
    assert bits(unchanged) == bits(gradient)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    exponent=st.floats(-18, 18),
    clip_norm=st.sampled_from([1e-3, 0.1, 1.0, 3.7, 1e4]),
)
def test_clip_never_leaves_the_ball_and_keeps_the_direction(seed, exponent, clip_norm):
    rng = np.random.default_rng(seed)
    scale = np.float32(10**exponent)
    gradient = {"a": rng.normal(size=37).astype(np.float32) * scale, "b": rng.normal(size=5).astype(np.float32) * scale}
    clipped, norm = clip(gradient, clip_norm)
    exact, result = np.linalg.norm(vector(gradient)), vector(clipped)
    np.testing.assert_allclose(norm, exact, rtol=1e-5)
    assert np.linalg.norm(result) <= clip_norm
    np.testing.assert_allclose(result, vector(gradient) * min(1, clip_norm / exact), rtol=2e-5)


def test_clip_never_leaves_the_ball_with_a_million_parameters():
    for gradient in (np.full(10**6, 1e-3, np.float32), np.random.default_rng(0).normal(size=10**6).astype(np.float32)):
        assert 0.9999 < np.linalg.norm(vector(clip({"a": gradient}, 1.0)[0])) <= 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_clip_of_what_is_not_finite_is_exactly_zero(bad):
    clipped, norm = clip({"a": jnp.ones(2), "b": jnp.asarray([bad, bad, 1.0])}, 1.0)
    assert bits(clipped) == [[0, 0], [0, 0, 0]]
    assert not np.isfinite(norm)


@pytest.mark.parametrize(("clip_norm", "way"), [(0.05, "whole"), (50.0, "whole"), *((CLIP_NORM, way) for way in SAME)])
def test_clipped_sum_equals_a_loop_in_float64(clip_norm, way):
    batch = make_batch()
    total, info = compiled(LINEAR, way, clip_norm)(KEY, PARAMS, batch, WEIGHT)
    expected, norm, loss = oracle(PARAMS, batch, WEIGHT, clip_norm)
    np.testing.assert_allclose(vector(total), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(info.norm, norm, rtol=1e-5)
    np.testing.assert_allclose(info.loss, loss, rtol=1e-5)
    assert info.num_dropped == 0


@every_way
def test_clipped_sum_never_exceeds_norm_times_weights(way):
    """Equal records make the bound tight: a clip per leaf, or of the sum alone, would miss it."""
    batch = make_batch()
    same = batch._replace(image=np.repeat(batch.image[:1], SIZE, 0), label=np.repeat(batch.label[:1], SIZE))
    length = np.linalg.norm(vector(compiled(LINEAR, way, 0.01)(KEY, PARAMS, same, WEIGHT)[0]))
    bound = 0.01 * WEIGHT[MASK].sum()
    # Of three groups, one has a gradient of zero: the model does not use it.
    tight = np.sqrt(2 / 3) if "groups" in WAYS[way] else 1
    assert 0.9999 * bound * tight <= length <= bound * tight * (1 + 1e-7)


@every_way
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_clipped_sum_stays_in_the_ball_for_any_records(way, seed):
    rng = np.random.default_rng(seed)
    batch = make_batch(seed)._replace(mask=rng.random(SIZE) < 0.7)
    batch = batch._replace(image=batch.image * np.float32(10 ** rng.uniform(-3, 6)))
    weight = rng.uniform(0, 1, SIZE).astype(np.float32)
    length = np.linalg.norm(vector(compiled(LINEAR, way)(KEY, PARAMS, batch, weight)[0]))
    assert length <= CLIP_NORM * weight[batch.mask].sum() * (1 + 1e-6)


@pytest.mark.parametrize(
    ("loss", "way"), [*((LINEAR, way) for way in (*SAME, *PIECES)), *((ADVERSARIAL, way) for way in SAME)]
)
def test_method_and_microbatch_size_change_nothing_but_speed(loss, way):
    batch = make_batch()
    image = batch.image.copy()
    image[1], image[4] = np.nan, np.inf
    for mask, x in (
        (MASK, batch.image),
        (MASK, image),
        (np.zeros(SIZE, bool), image),
        (np.arange(SIZE) == SIZE - 1, image),
        (np.arange(SIZE) == 1, image),
    ):
        part = batch._replace(mask=mask, image=x)
        total, info = compiled(loss)(KEY, PARAMS, part, WEIGHT)
        same, same_info = compiled(loss, way)(KEY, PARAMS, part, WEIGHT)
        np.testing.assert_allclose(vector(same), vector(total), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(same_info.norm, info.norm, rtol=1e-5)
        np.testing.assert_allclose(same_info.loss, info.loss, rtol=1e-5)
        assert same_info.num_dropped == info.num_dropped == np.isin([1, 4], np.flatnonzero(mask)).sum() * (x is image)


def test_no_weights_are_unit_weights():
    batch, clipped = make_batch(), jax.jit(clipped_grad(LINEAR, clip_norm=CLIP_NORM))
    expected = compiled()(KEY, PARAMS, batch, np.ones(SIZE, np.float32))[0]
    np.testing.assert_allclose(vector(clipped(KEY, PARAMS, batch)[0]), vector(expected), rtol=1e-5, atol=1e-7)


def test_weights_are_clamped_to_the_unit_interval_and_nan_to_zero():
    batch = make_batch(mask=np.ones(SIZE, bool))
    wild, tame = (
        np.array(weight, np.float32) for weight in ([-3, 0, 0.4, np.nan, 1.5, 100, np.inf], [0, 0, 0.4, 0, 1, 1, 1])
    )
    assert bits(compiled()(KEY, PARAMS, batch, wild)[0]) == bits(compiled()(KEY, PARAMS, batch, tame)[0])


def opposite_loss(key, params, image, label):
    """Gradient +100 e for label 0, -100 e for label 1: two records as far apart as can be."""
    return 100 * params["a"][0] * (1 - 2 * label)


@every_way
def test_sensitivity_is_reached_and_never_exceeded_by_neighbours(way):
    clipped = clipped_grad(opposite_loss, clip_norm=0.5, **WAYS[way])
    params, image, run = {"a": jnp.ones(1)}, np.zeros((3, 1, 1, 1), np.float32), jax.jit(clipped)
    here, gone = np.ones(3, bool), np.array([True, True, False])

    def total(label, mask):
        return run(KEY, params, Batch(image, np.array(label, np.int32), mask))[0]["a"][0]

    base = total([0, 1, 0], here)
    change = {
        "add_or_remove_one": abs(base - total([0, 1, 0], gone)),
        "zero_out": abs(base - total([0, 1, 0], gone)),
        "replace_one": abs(base - total([0, 1, 1], here)),
    }
    assert set(change) == set(RELATIONS)
    for relation, moved in change.items():
        assert 0.9999 * clipped.sensitivity(relation) <= moved <= clipped.sensitivity(relation)


def test_an_unknown_relation_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"^relation is 'swap': must be one of add_or_remove_one, replace_one, zero_out$"
    ):
        clipped_grad(LINEAR, clip_norm=1.0).sensitivity("swap")


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        *(("clip_norm", {"clip_norm": value}) for value in (0, -1.0, np.inf, np.nan)),
        *(("microbatch_size", {"clip_norm": 1.0, "microbatch_size": value}) for value in (0, -2, 1.5)),
        ("microbatch_size", {"clip_norm": 1.0, "method": "norms_first"}),
        ("method", {"clip_norm": 1.0, "method": "ghost"}),
        ("groups", {"clip_norm": 1.0, "method": "norms_first", "microbatch_size": 2, "groups": by_layer}),
    ],
)
def test_a_bad_setting_is_named(name, setting):
    with pytest.raises(ValueError, match=f"^{name} is "):
        clipped_grad(LINEAR, **setting)


def test_half_precision_is_refused_since_its_rounding_leaves_the_ball():
    """And sums are no sums: in bfloat16 256 + 1 is 256, and 256 + 1.01 is 258."""
    for dtype in (jnp.bfloat16, jnp.float16):
        params = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3, dtype)}
        with pytest.raises(ValueError, match=r"^dtype of gradient is 'b?float16': must be float32 or wider"):
            clip(params, 1.0)
        with pytest.raises(ValueError, match=r"^dtype of params is 'b?float16': must be float32 or wider"):
            clipped_grad(LINEAR, clip_norm=1.0)(KEY, params, make_batch())


def test_a_group_is_clipped_to_its_share_of_the_norm():
    """By hand in float64: b and w are groups, v takes no part in the loss but counts as one."""
    batch = make_batch()
    gradients, _ = softmax_gradients(PARAMS, batch)
    total, info = compiled(LINEAR, "groups")(KEY, PARAMS, batch, WEIGHT)
    expected = np.zeros(gradients.shape[1])
    for i in np.flatnonzero(MASK):
        for part in (slice(0, 3), slice(12, None)):
            g = gradients[i, part]
            expected[part] += WEIGHT[i] * g * min(1, CLIP_NORM / np.sqrt(3) / np.linalg.norm(g))
    np.testing.assert_allclose(vector(total), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(info.norm, np.linalg.norm(gradients, axis=1) * MASK, rtol=1e-5)


def test_layers_are_groups_of_all_that_lies_under_one_path():
    params = {"params": {"conv": {"kernel": 1.0, "bias": 2.0}, "dense": {"kernel": 3.0}}}
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    groups = [by_layer(path) for path in paths]
    assert groups[0] == groups[1] != groups[2]
    assert by_layer(jax.tree_util.tree_flatten_with_path({"w": 1.0, "b": 1.0})[0][0][0]) == ()


@pytest.mark.parametrize("way", ["microbatches", "norms first", "groups"])
def test_a_traced_clip_norm_gives_what_a_static_one_gives_and_a_traced_sensitivity(way):
    batch = make_batch()
    static = jax.jit(clipped_grad(LINEAR, clip_norm=CLIP_NORM, **WAYS[way]).apply)(KEY, PARAMS, batch, WEIGHT)[0]
    traced = compiled(LINEAR, way)(KEY, PARAMS, batch, WEIGHT)[0]
    np.testing.assert_allclose(vector(traced), vector(static), rtol=1e-6, atol=1e-7)
    assert compiled_for_any_norm(LINEAR, way)._cache_size() == 1

    @jax.jit
    def sensitivity(clip_norm):
        return [clipped_grad(LINEAR, clip_norm=clip_norm, **WAYS[way]).sensitivity(name) for name in RELATIONS]

    np.testing.assert_allclose(sensitivity(0.3), [0.3, 0.6, 0.3], rtol=1e-6)


def test_memory_in_microbatches_and_norms_first_is_that_of_a_step_without_privacy():
    """Compiled, not run. ResNet-9 at batch 512 in MB: see `clipped_grad`."""
    model = models.build("small_cnn", image_shape=(8, 8, 1), num_classes=2, width=8)
    loss, shape = losses.cross_entropy(model.apply), jax.ShapeDtypeStruct
    batch = Batch(shape((256, 8, 8, 1), jnp.float32), shape((256,), jnp.int32), shape((256,), bool))
    params = jax.eval_shape(model.init, KEY, batch.image)

    def plain(key, params, batch):
        return jax.grad(lambda p: jnp.mean(loss(key, p, batch.image, batch.label)))(params)

    def memory(function):
        return jax.jit(function).lower(KEY, params, batch).compile().memory_analysis().temp_size_in_bytes

    limit = 1.3 * memory(plain)
    assert memory(clipped_grad(loss, clip_norm=1.0, microbatch_size=256)) > limit
    assert memory(clipped_grad(loss, clip_norm=1.0, microbatch_size=4)) < 0.3 * limit
    assert memory(clipped_grad(loss, clip_norm=1.0, method="norms_first", microbatch_size=4)) < limit

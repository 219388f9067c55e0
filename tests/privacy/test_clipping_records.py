"""What a record adds to the clipped sum: nothing if it is padding or not finite, the same whatever the others are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.privacy import blank_padding, clipped_grad
from fedrobust.types import Batch
from tests.privacy.clipping_cases import (
    ADVERSARIAL,
    CLIP_NORM,
    KEY,
    LINEAR,
    MASK,
    PARAMS,
    SIZE,
    WAYS,
    WEIGHT,
    bits,
    compiled,
    every_way,
    make_batch,
    vector,
)


@every_way
def test_padding_is_nothing_whatever_it_holds(way):
    batch = make_batch()
    results = []
    for junk, label in ((0, 0), (np.nan, -5), (np.inf, 10**9), (-1e38, 2)):
        image = np.where(MASK[:, None, None, None], batch.image, np.float32(junk))
        padded = Batch(image, np.where(MASK, batch.label, np.int32(label)), MASK)
        weight = np.where(MASK, WEIGHT, np.float32(junk))
        results.append(bits(compiled(ADVERSARIAL, way)(KEY, PARAMS, padded, weight)))
    assert all(result == results[0] for result in results[1:])


def test_blank_padding_by_hand():
    image = np.full((2, 1, 1, 1), np.nan, np.float32)
    image[1] = 0.5
    batch, weight = blank_padding(
        Batch(image, jnp.asarray([7, 1]), jnp.asarray([False, True])), jnp.asarray([1.0, 0.5])
    )
    assert batch.image.ravel().tolist() == [0, 0.5]
    assert batch.label.tolist() == [0, 1]
    assert weight.tolist() == [0, 0.5]


@every_way
def test_an_empty_batch_gives_exactly_zero(way):
    batch = make_batch()._replace(mask=np.zeros(SIZE, bool))
    total, info = compiled(ADVERSARIAL, way)(KEY, PARAMS, batch, WEIGHT)
    assert not vector(total).any()
    assert (info.loss, info.num_dropped) == (0, 0)
    assert not info.norm.any()


@every_way
def test_a_record_that_is_not_finite_contributes_zero_and_is_counted(way):
    batch, ones = make_batch(mask=np.ones(SIZE, bool)), np.ones(SIZE, np.float32)
    image = batch.image.copy()
    image[1], image[3], image[5] = np.nan, np.inf, 1e25  # the last: finite, but its norm overflows
    run = compiled(LINEAR, way)
    total, info = run(KEY, PARAMS, batch._replace(image=image), ones)
    without = np.isin(np.arange(SIZE), [1, 3, 5], invert=True)
    expected, _ = run(KEY, PARAMS, batch._replace(mask=without), ones)
    np.testing.assert_allclose(vector(total), vector(expected), rtol=1e-5, atol=1e-7)
    assert info.num_dropped == 3
    assert (~np.isfinite(info.norm)).tolist() == (~without).tolist()
    image[0] = np.nan  # the first one, too
    total, info = run(KEY, PARAMS, batch._replace(image=image), ones)
    expected, _ = run(KEY, PARAMS, batch._replace(mask=without & (np.arange(SIZE) > 0)), ones)
    np.testing.assert_allclose(vector(total), vector(expected), rtol=1e-5, atol=1e-7)
    total, info = run(KEY, PARAMS, batch._replace(image=np.full_like(image, np.nan)), ones)
    assert not vector(total).any() and info.num_dropped == SIZE


@every_way
def test_a_loss_whose_gradient_is_infinite_at_zero_is_no_trouble_for_padding(way):
    """Blank padding is all zeros, where this gradient is inf: a factor 0 would make it NaN."""

    def loss(key, params, image, label):
        return jnp.sum(jnp.sqrt(image.reshape(len(label), -1) * params["b"][0] ** 2), axis=1)

    batch = make_batch()
    total, info = jax.jit(clipped_grad(loss, clip_norm=CLIP_NORM, **WAYS[way]).apply)(KEY, PARAMS, batch, WEIGHT)
    assert np.isfinite(vector(total)).all() and vector(total).any()
    assert info.num_dropped == 0


@pytest.mark.parametrize(("loss", "way"), [(LINEAR, "microbatches"), *((ADVERSARIAL, way) for way in WAYS)])
def test_replacing_a_record_changes_no_other_contribution_by_one_bit(loss, way):
    run = compiled(loss, way)
    batch, replaced = make_batch(mask=np.ones(SIZE, bool)), 2
    image, label = batch.image.copy(), batch.label.copy()
    image[replaced], label[replaced] = 1 - image[replaced], (label[replaced] + 1) % 3
    neighbour = Batch(image, label, batch.mask)
    gone = batch._replace(mask=np.arange(SIZE) != replaced)
    for i in range(SIZE):
        alone = (np.arange(SIZE) == i).astype(np.float32)  # the other records are there, but weigh nothing
        before, after, without = (run(KEY, PARAMS, b, alone) for b in (batch, neighbour, gone))
        if i == replaced:
            assert bits(before[0]) != bits(after[0])
            assert not vector(without[0]).any()
        else:
            assert bits(before[0]) == bits(after[0]) == bits(without[0])
            assert before[1].norm[i] == after[1].norm[i] == without[1].norm[i]


def test_equal_records_meet_their_own_random_attack():
    batch = make_batch(mask=np.ones(SIZE, bool))
    same = batch._replace(image=np.repeat(batch.image[:1], SIZE, 0), label=np.repeat(batch.label[:1], SIZE))
    assert len(set(compiled(ADVERSARIAL)(KEY, PARAMS, same, WEIGHT)[1].norm.tolist())) > 1


def tokens_loss(key, params, image, label):
    """Embedded tokens beside a picture, two labels: nothing here has the shape of an image batch."""
    tokens, picture = image["tokens"], image["picture"]
    x = params["table"][tokens].mean(axis=1) + picture @ params["w"]
    return jnp.sum((x - label[0][:, None]) ** 2, axis=1) * label[1]


@pytest.mark.parametrize("way", ["whole", "norms first"])
def test_any_pytree_of_records_equals_a_loop(way):
    rng = np.random.default_rng(4)
    params = {"table": rng.normal(size=(9, 3)).astype(np.float32), "w": rng.normal(size=(2, 3)).astype(np.float32)}
    image = {
        "tokens": rng.integers(0, 9, (SIZE, 5)).astype(np.int32),
        "picture": rng.normal(size=(SIZE, 2)).astype(np.float32),
    }
    label = (rng.normal(size=SIZE).astype(np.float32), rng.integers(1, 3, SIZE).astype(np.uint8))
    expected = np.zeros(33)
    for i in np.flatnonzero(MASK):
        x = params["table"][image["tokens"][i]].astype(np.float64).mean(axis=0)
        x = x + image["picture"][i].astype(np.float64) @ params["w"]
        error = 2 * (x - label[0][i]) * float(label[1][i])
        table = np.zeros((9, 3))
        for token in image["tokens"][i]:
            table[token] += error / 5
        g = np.concatenate([table.ravel(), np.outer(image["picture"][i], error).ravel()])
        expected += WEIGHT[i] * g * min(1, CLIP_NORM / np.linalg.norm(g))
    for junk in (0, 10**6):
        dirty = jax.tree.map(
            lambda x, junk=junk: np.where(MASK.reshape(-1, *(1,) * (x.ndim - 1)), x, np.asarray(junk).astype(x.dtype)),
            (image, label),
        )
        run = jax.jit(clipped_grad(tokens_loss, clip_norm=CLIP_NORM, **WAYS[way]))
        total, _ = run(KEY, params, Batch(*dirty, MASK), WEIGHT)
        np.testing.assert_allclose(vector(total), expected, rtol=1e-4, atol=1e-6)


def test_blank_padding_keeps_the_dtype_of_every_leaf():
    image = (np.ones((2, 3), np.int8), np.ones((2, 1, 4), np.float16), np.ones(2, bool))
    batch, _ = blank_padding(Batch(image, np.ones(2, np.int32), np.array([True, False])), np.ones(2))
    assert [x.dtype for x in batch.image] == [x.dtype for x in image]
    assert [np.asarray(x[1]).any() for x in batch.image] == [False] * 3
    assert [np.asarray(x[0]).all() for x in batch.image] == [True] * 3


def test_a_record_without_the_batch_axis_is_refused():
    batch = make_batch()
    with pytest.raises(AssertionError):
        clipped_grad(LINEAR, clip_norm=1.0)(KEY, PARAMS, batch._replace(label=batch.label[:-1]))

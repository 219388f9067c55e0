import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedrobust import models, ops, trace


def labels(apply, params, image_shape):
    """Component of each index, by leaf and axis, renamed 0 (frozen), 1, 2, ... in order of appearance."""
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), params, is_leaf=lambda x: isinstance(x, tuple)
    )
    coupling = trace.couple(apply, shapes, jax.ShapeDtypeStruct(image_shape, jnp.float32))
    leaves = coupling.leaf_axes()
    flat = np.concatenate([axis for leaf in leaves for axis in leaf])
    rename = {0: 0} | {c: i + 1 for i, c in enumerate(dict.fromkeys(flat[flat > 0].tolist()))}
    named = [[[rename[int(i)] for i in axis] for axis in leaf] for leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(shapes), named), coupling.unknown


def mlp(p, x):
    return jax.nn.relu(x.reshape(x.shape[0], -1) @ p["a"] + p["b"]) @ p["c"]


def test_a_hidden_unit_is_a_column_a_bias_and_a_row():
    got, unknown = labels(mlp, {"a": (4, 3), "b": (3,), "c": (3, 2)}, (1, 2, 2, 1))
    assert got == {"a": [[0] * 4, [1, 2, 3]], "b": [[1, 2, 3]], "c": [[1, 2, 3], [0, 0]]}
    assert unknown == ()


def test_flattened_rows_follow_their_channel():
    def apply(p, x):
        return ops.conv(x, p["a"], padding="SAME").reshape(x.shape[0], -1) @ p["c"]

    got, _ = labels(apply, {"a": (1, 1, 1, 2), "c": (8, 1)}, (1, 2, 2, 1))
    assert got["c"] == [[1, 2] * 4, [0]]


def test_a_residual_sum_ties_all_its_writers():
    def apply(p, x):
        x = x.mean((1, 2))
        y = x @ p["a"]
        return (y + y @ p["b"]) @ p["c"]

    got, _ = labels(apply, {"a": (1, 2), "b": (2, 2), "c": (2, 3)}, (1, 2, 2, 1))
    assert got == {"a": [[0], [1, 2]], "b": [[1, 2], [1, 2]], "c": [[1, 2], [0] * 3]}


def test_a_norm_group_is_one_unit():
    def apply(p, x):
        y = ops.group_norm(ops.conv(x, p["a"], padding="SAME"), 2, p["scale"], p["shift"])
        return y.mean((1, 2)) @ p["c"]

    got, unknown = labels(apply, {"a": (3, 3, 1, 6), "scale": (6,), "shift": (6,), "c": (6, 2)}, (1, 4, 4, 1))
    pattern = [1, 1, 1, 2, 2, 2]
    assert got["a"][3] == got["scale"][0] == got["shift"][0] == got["c"][0] == pattern
    assert got["a"][:3] == [[0] * 3, [0] * 3, [0]]
    assert unknown == ()


def test_concatenated_channels_keep_their_own_units():
    def apply(p, x):
        x = x.mean((1, 2))
        return jnp.concatenate([x @ p["a"], x @ p["b"]], -1) @ p["c"]

    got, _ = labels(apply, {"a": (1, 2), "b": (1, 3), "c": (5, 2)}, (1, 2, 2, 1))
    assert got["c"][0] == [*got["a"][1], *got["b"][1]] == [1, 2, 3, 4, 5]


def test_depthwise_channels_take_all_that_is_made_of_them():
    def apply(p, x):
        y = ops.conv(ops.conv(x, p["a"], padding="SAME"), p["b"], padding="SAME", groups=3)
        return y.mean((1, 2)) @ p["c"]

    got, _ = labels(apply, {"a": (1, 1, 1, 3), "b": (3, 3, 1, 6), "c": (6, 2)}, (1, 4, 4, 1))
    assert got["a"][3] == [1, 2, 3]
    assert got["b"] == [[0] * 3, [0] * 3, [0], [1, 1, 2, 2, 3, 3]]
    assert got["c"][0] == [1, 1, 2, 2, 3, 3]


def test_groups_of_a_convolution_stand_or_fall_whole():
    def apply(p, x):
        y = ops.conv(ops.conv(x, p["a"], padding="SAME"), p["b"], padding="SAME", groups=2)
        return y.mean((1, 2)) @ p["c"]

    got, _ = labels(apply, {"a": (1, 1, 1, 4), "b": (3, 3, 2, 6), "c": (6, 2)}, (1, 4, 4, 1))
    assert got["a"][3] == [1, 1, 2, 2] and got["c"][0] == [1, 1, 1, 2, 2, 2]


def test_groups_whose_channels_are_shuffled_lose_the_same_of_each():
    def apply(p, x):
        y = ops.conv(ops.conv(x, p["a"]), p["b"], groups=2)
        y = y.reshape(*y.shape[:-1], 2, 4).swapaxes(-1, -2).reshape(y.shape)
        return ops.conv(y, p["c"], groups=2).mean((1, 2)) @ p["d"]

    shapes = {"a": (1, 1, 1, 4), "b": (1, 1, 2, 8), "c": (1, 1, 4, 4), "d": (4, 2)}
    got, unknown = labels(apply, shapes, (1, 2, 2, 1))
    assert unknown == ()
    assert got["a"][3] == [1, 2, 1, 2] and got["b"][2] == [1, 2]
    # Channels 0 to 3 of each group, shuffled: 0 0 1 1 | 2 2 3 3, and what stands at one place of both groups is tied.
    assert got["b"][3] == [3, 4, 3, 4, 3, 4, 3, 4] and got["c"][2] == [3, 3, 4, 4]
    assert got["c"][3] == got["d"][0] == [5, 6, 5, 6]


@pytest.mark.parametrize("order", ["3hd", "h3d", "hd3"])
def test_a_head_is_a_unit_of_the_product_that_makes_queries_keys_and_values(order):
    num_heads, depth = 2, 3
    sizes = {"3": 3, "h": num_heads, "d": depth}

    def apply(p, x):
        y = x.reshape(x.shape[0], -1, x.shape[-1]) @ p["qkv"] + p["bias"]
        y = y.reshape(*y.shape[:-1], *(sizes[letter] for letter in order))
        q, k, v = (jnp.take(y, jnp.array(i), axis=2 + order.index("3")) for i in range(3))
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k)), v)
        return (y.reshape(*y.shape[:2], -1) @ p["out"]).mean(1)

    shapes = {"qkv": (1, 18), "bias": (18,), "out": (6, 2)}
    got, unknown = labels(apply, shapes, (1, 2, 2, 1))
    assert unknown == ()
    head = np.arange(num_heads).reshape([-1 if letter == "h" else 1 for letter in order]) + 1
    expected = np.broadcast_to(head, [sizes[letter] for letter in order]).ravel().tolist()
    assert got["qkv"][1] == got["bias"][0] == expected
    assert got["out"][0] == [1, 1, 1, 2, 2, 2]


def head(middle):
    return lambda p, x: middle(x.mean((1, 2)) @ p["a"]) @ p["c"]


def total(y):
    return jnp.ones((1, 4)) * y.sum((1, 2))[:, None]


WIDTHS = {"a": (1, 4), "c": (4, 2)}


MIDDLES = [
    (jax.nn.sigmoid, True),  # not zero when masked, but the next weights are
    (lambda y: y + jnp.arange(4.0), True),
    (lambda y: y / jnp.sqrt(jnp.mean(y**2, -1, keepdims=True) + 1), True),  # masked entries add zero to the sum
    (lambda y: y / jnp.mean(jnp.exp(y), -1, keepdims=True), True),  # exp(0) = 1 is missing, and added
    (lambda y: y / jnp.mean(jnp.exp(y + jnp.arange(4.0)), -1, keepdims=True), False),  # each another value
    (lambda y: y - jnp.mean(jnp.exp(y) @ jnp.ones((4, 4)), -1, keepdims=True), False),
    (lambda y: (y - jnp.mean(y, -1, keepdims=True)) / jnp.var(y, -1, keepdims=True), True),
    (lambda y: y / jnp.max(y, -1, keepdims=True), False),
    (jax.nn.softmax, False),
    (lambda y: jnp.cumsum(y, -1), False),
    (lambda y: y[:, ::-1], True),
    (lambda y: jnp.take(y, jnp.array([2, 0, 3, 1]), axis=1), False),  # which entries are read is known at run time
    (lambda y: jnp.take(jnp.stack([y, y * y], 1), jnp.array([1, 0]), axis=1)[:, 0], True),
    (lambda y: total(jnp.take(jnp.stack([y, y], 1), jnp.array([0, 9]), axis=1, fill_value=0)), True),
    (lambda y: total(jnp.take(jnp.stack([y, y], 1), jnp.array([0, 9]), axis=1, fill_value=7)), False),
    (lambda y: total(lax.cumsum(jnp.stack([y, y], 1), axis=1)), True),
    (lambda y: total(lax.cumlogsumexp(jnp.stack([y, y], 1), axis=1)), False),
    (lambda y: lax.dynamic_slice(y, (jnp.int32(y[0, 0] > 0), 0), y.shape), True),
    (lambda y: jnp.stack([y, 2 * y], -1).sum(-1), True),
    (lambda y: jnp.tile(y, (1, 2))[:, 4:] + y, True),
    (lambda y: jnp.stack(jnp.unstack(y, axis=1), -1), False),
    (lambda y: jnp.where(y > 0, y, 0.1 * y), True),
    (lambda y: jax.nn.softplus(y), True),
    (lambda y: y * jax.nn.relu6(y + 3) / 6, True),
]


@pytest.mark.parametrize(("middle", "prunable"), MIDDLES)
def test_an_axis_is_frozen_exactly_where_a_masked_entry_would_count(middle, prunable):
    got, _ = labels(head(middle), WIDTHS, (1, 2, 2, 1))
    assert (set(got["a"][1]) != {0}) == prunable


def test_without_the_masked_entries_every_one_of_these_functions_is_the_same():
    def apply(p, x):
        return jnp.concatenate([head(middle)(q, x) for (middle, _), q in zip(MIDDLES, p, strict=True)], -1)

    rng = np.random.default_rng(0)
    params = [{name: rng.normal(size=s).astype(np.float32) for name, s in WIDTHS.items()} for _ in MIDDLES]
    image = rng.uniform(size=(3, 2, 2, 1)).astype(np.float32)
    axes = trace.couple(apply, params, image).leaf_axes()
    removed = [a[1][2] for a in axes[::2]]  # the third unit of each
    keep = [[~np.isin(axis, removed) | (axis == 0) for axis in leaf] for leaf in axes]
    leaves, structure = jax.tree.flatten(params)
    masked = [x * np.multiply.outer(*k) for x, k in zip(leaves, keep, strict=True)]
    small = [x[np.ix_(*k)] for x, k in zip(leaves, keep, strict=True)]
    assert sum(x.shape == (1, 3) for x in small) == sum(prunable for _, prunable in MIDDLES)
    expected = jax.jit(apply)(structure.unflatten(masked), image)
    found = jax.jit(trace.resize(apply, params, keep))(structure.unflatten(small), image)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_unknown_operations_freeze_what_they_touch_and_are_named():
    got, unknown = labels(head(lambda y: jnp.sort(y, -1)), WIDTHS, (1, 2, 2, 1))
    assert unknown == ("sort",)
    assert got["a"][1] == [0] * 4

    def beside(p, x):
        return head(jax.nn.relu)(p, x) + lax.sort(x.mean((1, 2)))

    got, unknown = labels(beside, WIDTHS, (1, 2, 2, 1))
    assert unknown == ()  # it sorts the image alone
    assert got["a"][1] == [1, 2, 3, 4]


def test_an_unused_parameter_and_a_parameter_that_is_the_output_are_never_cut():
    got, _ = labels(lambda p, x: x.mean((1, 2)) * p["a"], {"a": (1, 3), "b": (2, 2)}, (1, 2, 2, 1))
    assert got == {"a": [[0], [0] * 3], "b": [[0, 0], [0, 0]]}


def test_reading_resnet18_takes_seconds():
    model = models.build("resnet18", image_shape=(28, 28, 1), num_classes=2)
    image = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)
    start = time.perf_counter()
    trace.couple(model.apply, params, image)
    assert time.perf_counter() - start < 10  # 0.6 s on an idle core

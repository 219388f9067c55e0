"""Laws of what every room shares: trees, keys, checks, losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrobust import check, keys, losses, trees

A = {"x": jnp.asarray([1.0, -2.0]), "y": [jnp.asarray([[3.0]])]}
B = {"x": jnp.asarray([0.5, 4.0]), "y": [jnp.asarray([[-1.0]])]}


def values(tree):
    return [float(x) for leaf in jax.tree.leaves(tree) for x in np.ravel(leaf)]


def test_a_tree_goes_through_one_vector_and_back():
    tree = {"b": jnp.asarray([1, 2], jnp.int32), "s": jnp.asarray(3.0), "w": jnp.arange(4.0).reshape(2, 2)}
    flat = trees.to_flat(tree)
    assert (flat.tolist(), flat.dtype) == ([1, 2, 3, 0, 1, 2, 3], jnp.float32)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    back = trees.from_flat(like, flat)
    assert jax.tree.map(lambda x: (x.tolist(), x.dtype), back) == jax.tree.map(lambda x: (x.tolist(), x.dtype), tree)


def test_tree_arithmetic_by_hand():
    assert values(trees.add(A, B)) == [1.5, 2, 2]
    assert values(trees.subtract(A, B)) == [0.5, -6, 4]
    assert values(trees.scale(A, -2)) == [-2, 4, -6]
    assert values(trees.multiply(A, B)) == [0.5, -8, -3]
    assert values(trees.zeros_like(A)) == [0, 0, 0]
    assert values(trees.where(jnp.asarray(True), A, B)) == values(A)
    assert values(trees.where(jnp.asarray(False), A, B)) == values(B)
    assert trees.size(A) == 3
    assert trees.size({}) == 0
    np.testing.assert_allclose(trees.norm(A), np.sqrt(14), rtol=1e-6)
    assert trees.norm({}) == 0


def test_trees_keep_the_dtype_of_their_first_argument():
    half = {"x": jnp.ones(2, jnp.bfloat16)}
    for tree in (
        trees.scale(half, jnp.float32(0.5)),
        trees.multiply(half, {"x": jnp.ones(2, jnp.float32)}),
        trees.zeros_like(half),
        trees.weighted_sum(jnp.ones(2), {"x": jnp.ones((2, 3), jnp.bfloat16)}),
    ):
        assert tree["x"].dtype == jnp.bfloat16


def test_where_leaks_no_nan_of_the_branch_not_taken():
    bad = jax.tree.map(lambda x: x * jnp.nan, A)
    assert values(trees.where(jnp.asarray(True), A, bad)) == values(A)
    assert values(trees.where(jnp.asarray(False), bad, A)) == values(A)


def test_norms_and_weighted_sums_are_taken_in_float32_or_wider():
    """In bfloat16 a sum of ones stops at 256; in float16 the square of 300 is inf."""
    np.testing.assert_allclose(trees.norm({"x": jnp.ones(10_000, jnp.bfloat16)}), 100, rtol=1e-5)
    assert trees.weighted_sum(jnp.full(1000, 1e-3), jnp.ones((1000, 1), jnp.bfloat16)) == 1
    np.testing.assert_allclose(trees.norm({"x": jnp.full(2, 300, jnp.float16)}), 300 * np.sqrt(2), rtol=1e-5)
    assert trees.norm({"x": jnp.ones(3, jnp.bfloat16)}).dtype == jnp.float32


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), num_present=st.integers(0, 5))
def test_weighted_sum_equals_numpy_and_absent_rows_are_nothing(seed, num_present):
    rng = np.random.default_rng(seed)
    weight = rng.uniform(-1, 2, 5).astype(np.float32)
    weight[num_present:] = 0
    stacked = {"x": rng.normal(size=(5, 2, 3)).astype(np.float32), "y": rng.normal(size=5).astype(np.float32)}
    expected = {k: np.tensordot(weight.astype(np.float64), v, 1) for k, v in stacked.items()}
    for junk in (0, np.nan, np.inf):
        for leaf in stacked.values():
            leaf[num_present:] = junk
        total = jax.jit(trees.weighted_sum)(weight, stacked)
        for name, leaf in expected.items():
            np.testing.assert_allclose(total[name], leaf, rtol=1e-5, atol=1e-5)


def data(key):
    return tuple(jax.random.key_data(key).tolist())


def test_streams_are_named_reproducible_and_distinct():
    root = keys.root(3)
    assert data(root) == data(keys.root(3)) != data(keys.root(4))
    names = ("init", "train", "client", "attack", "aggregate", "evaluate", "")
    assert len({data(keys.stream(root, name)) for name in names} | {data(root)}) == len(names) + 1
    assert data(keys.stream(root, "init")) == data(keys.stream(keys.root(3), "init"))


def test_a_name_gives_the_same_stream_on_every_platform():
    """CRC-32 of "123456789" is 0xCBF43926 by definition; `hash` would change with every process."""
    root = keys.root(0)
    assert data(keys.stream(root, "123456789")) == data(jax.random.fold_in(root, 0xCBF43926))


def test_a_client_has_its_key_by_identity_not_by_place():
    root = keys.root(0)
    some = keys.per_client(root, jnp.asarray([7, 2, 9]))
    others = keys.per_client(root, jnp.asarray([2, 9]))
    assert some.shape == (3,)
    assert [data(k) for k in some[1:]] == [data(k) for k in others]
    assert data(some[0]) == data(jax.random.fold_in(root, 7))
    assert len({data(k) for k in some}) == 3


GOOD = [
    (check.positive, 1e-300),
    (check.positive, 3),
    (check.non_negative, 0),
    (check.non_negative, 5.5),
    (check.fraction, 0),
    (check.fraction, 1),
    (check.fraction, 0.5),
]
BAD = [
    *((check.positive, value) for value in (0, -1, float("inf"), float("nan"))),
    *((check.non_negative, value) for value in (-1e-9, float("inf"), float("nan"))),
    *((check.fraction, value) for value in (-0.1, 1.1, float("nan"), float("inf"))),
]


@pytest.mark.parametrize(("requirement", "value"), GOOD)
def test_a_value_in_range_passes(requirement, value):
    requirement("eps", value)


@pytest.mark.parametrize(("requirement", "value"), BAD)
def test_a_value_out_of_range_is_named_in_one_line(requirement, value):
    with pytest.raises(ValueError, match=r"^eps is .*: must be ") as error:
        requirement("eps", value)
    assert "\n" not in str(error.value)
    assert repr(value) in str(error.value)


def test_checks_by_hand():
    check.at_least("n", 3, 3)
    check.at_least("n", np.int64(3), 3)
    check.one_of("norm", "l2", ("l2", "linf"))
    check.require(True, "n", 1, "anything")
    for call, message in (
        (lambda: check.at_least("n", 2, 3), "n is 2: must be a whole number >= 3"),
        (lambda: check.at_least("n", 3.0, 3), "n is 3.0: must be a whole number >= 3"),
        (lambda: check.one_of("norm", "l1", ("linf", "l2")), "norm is 'l1': must be one of l2, linf"),
        (lambda: check.fraction("q", 0, zero=False), "q is 0: must be in (0, 1]"),
        (lambda: check.fraction("q", 1, one=False), "q is 1: must be in [0, 1)"),
        (lambda: check.require(False, "n", "x", "y"), "n is 'x': must be y"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == message


def test_cross_entropy_by_hand_and_against_float64():
    loss = losses.cross_entropy(lambda params, image: image * params)
    key = keys.root(0)
    np.testing.assert_allclose(loss(key, 0.0, jnp.ones((2, 4)), jnp.asarray([0, 3])), np.log([4, 4]), rtol=1e-6)
    logits = np.random.default_rng(0).normal(size=(5, 3)) * 30
    label = np.array([0, 1, 2, 2, 1])
    expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(5), label]
    np.testing.assert_allclose(loss(key, 1.0, logits.astype(np.float32), label), expected, rtol=1e-4, atol=1e-5)


def test_cross_entropy_of_an_example_depends_on_that_example_alone():
    loss = losses.cross_entropy(lambda params, image: image @ params)
    params, image = jnp.ones((3, 2)).at[0, 0].set(2), jnp.arange(12.0).reshape(4, 3)
    jacobian = jax.jacobian(lambda x: loss(keys.root(0), params, x, jnp.zeros(4, jnp.int32)))(image)
    for i in range(4):
        for j in range(4):
            assert bool(jnp.any(jacobian[i, j])) == (i == j)

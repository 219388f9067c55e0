import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedrobust import trace


def mlp(p, x):
    return jax.nn.relu(x.mean((1, 2)) @ p["a"] + p["b"]) @ p["c"]


PARAMS = {
    "a": jnp.array([[1.0, 0.0, 3.0], [2.0, 0.0, 1.0]]),
    "b": jnp.array([0.5, 0.0, -1.0]),
    "c": jnp.array([[1.0, 2.0], [0.0, 0.0], [3.0, -1.0]]),
}
HIDDEN = np.array([True, False, True])
BOTH = np.array([True, True])
KEEP = [[BOTH, HIDDEN], [HIDDEN], [HIDDEN, BOTH]]
SMALL = {"a": PARAMS["a"][:, [0, 2]], "b": PARAMS["b"][jnp.array([0, 2])], "c": PARAMS["c"][jnp.array([0, 2])]}


def test_a_resized_model_equals_the_one_written_for_those_sizes():
    image = jax.random.normal(jax.random.key(0), (4, 2, 2, 2))
    small = trace.resize(mlp, PARAMS, KEEP)
    for batch in (1, 4):
        np.testing.assert_allclose(small(SMALL, image[:batch]), mlp(PARAMS, image[:batch]), rtol=1e-6)


def test_keeping_all_changes_nothing():
    image = jax.random.normal(jax.random.key(0), (2, 2, 2, 2))
    keep = [[np.ones(n, bool) for n in x.shape] for x in jax.tree.leaves(PARAMS)]
    np.testing.assert_array_equal(trace.resize(mlp, PARAMS, keep)(PARAMS, image), mlp(PARAMS, image))


@pytest.mark.parametrize(
    "middle",
    [
        lambda y: jnp.take(jnp.stack([y, y * y], 1), jnp.array([1, 1, 0]), axis=1)[:, 1],
        lambda y: lax.dynamic_index_in_dim(jnp.stack([y, y * y], 1), jnp.int32(y[0, 0] > 0), 1, keepdims=False),
        lambda y: jnp.tile(y[:, None, :], (1, 3, 1)).sum(1) + jnp.tile(y.sum(1, keepdims=True), (1, y.shape[1])),
        lambda y: y / jnp.mean(jnp.exp(y), -1, keepdims=True),
        lambda y: (y - y.mean(-1, keepdims=True)) / jnp.std(y, -1, keepdims=True),
        lambda y: y + jnp.sum((y.reshape(-1, 1, 3) * 2 - y.mean() + 1.5) ** 3, (1, 2))[:, None],
    ],
    ids=["gather", "dynamic_slice", "tile", "exp", "variance", "two_axes"],
)
def test_operations_that_name_sizes_are_resized(middle):
    def apply(p, x):
        return middle(jnp.tanh(x.mean((1, 2)) @ p["a"] + p["b"])) @ p["c"]

    image = jax.random.normal(jax.random.key(0), (2, 2, 2, 2))
    np.testing.assert_allclose(trace.resize(apply, PARAMS, KEEP)(SMALL, image), apply(PARAMS, image), rtol=1e-5)


def test_a_sum_over_entries_of_which_some_are_zero_loses_only_those():
    def apply(p, x):
        x = x.mean((1, 2))
        return jnp.concatenate([x @ p["a"], jnp.exp(x @ p["b"])], -1).sum(-1, keepdims=True)

    params = {"a": PARAMS["a"], "b": jnp.ones((2, 2))}
    keep = [[BOTH, HIDDEN], [BOTH, BOTH]]
    image = jax.random.normal(jax.random.key(0), (2, 2, 2, 2))
    got = trace.resize(apply, params, keep)({**params, "a": SMALL["a"]}, image)
    np.testing.assert_allclose(got, apply(params, image), rtol=1e-6)
    with pytest.raises(ValueError, match="not whole units"):
        trace.resize(apply, params, [keep[0], [BOTH, ~BOTH]])({"a": SMALL["a"], "b": jnp.ones((2, 0))}, image)


def test_part_of_a_unit_cannot_go():
    keep = [[BOTH, HIDDEN], [HIDDEN], [np.ones(3, bool), BOTH]]
    small = {**SMALL, "c": PARAMS["c"]}
    with pytest.raises(ValueError, match="not whole units"):
        trace.resize(mlp, PARAMS, keep)(small, jnp.ones((1, 2, 2, 2)))


def test_logits_cannot_go():
    first = np.array([True, False])
    small = {**PARAMS, "c": PARAMS["c"][:, :1]}
    keep = [[BOTH, np.ones(3, bool)], [np.ones(3, bool)], [np.ones(3, bool), first]]
    with pytest.raises(ValueError, match="not whole units"):
        trace.resize(mlp, PARAMS, keep)(small, jnp.ones((1, 2, 2, 2)))


def test_parameters_of_other_shapes_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^params have shapes .*$"):
        trace.resize(mlp, PARAMS, KEEP)(PARAMS, jnp.ones((1, 2, 2, 2)))


def test_derivatives_at_the_kink_of_relu_stay_zero():
    zero = jax.tree.map(jnp.zeros_like, SMALL)
    small = trace.resize(mlp, PARAMS, KEEP)
    params = {**zero, "c": SMALL["c"]}
    gradient = jax.grad(lambda p: small(p, jnp.ones((1, 2, 2, 2))).sum())(params)
    np.testing.assert_array_equal(gradient["b"], 0)  # 0.5 * c where relu became a plain maximum


def test_derivatives_given_by_an_author_are_resized_with_the_function():
    @jax.custom_jvp
    def odd(x, bend):
        return jnp.tanh(x * bend)

    @odd.defjvp
    def _(primals, tangents):
        return odd(*primals), 5 * tangents[0] * primals[1]  # wrong on purpose: only the rule can produce it

    bend = np.array([1.0, 2.0, 3.0], np.float32)

    def apply(p, x):
        return odd(x.mean((1, 2)) @ p["a"] + p["b"], bend) @ p["c"]

    image = jax.random.normal(jax.random.key(0), (2, 2, 2, 2))
    small = trace.resize(apply, PARAMS, KEEP)
    np.testing.assert_allclose(small(SMALL, image), apply(PARAMS, image), rtol=1e-5)
    got = jax.grad(lambda p: small(p, image).sum())(SMALL)
    want = jax.grad(lambda p: apply(p, image).sum())(PARAMS)
    np.testing.assert_allclose(got["b"], want["b"][jnp.array([0, 2])], rtol=1e-5)


def test_a_resized_model_works_inside_jit_after_being_called_outside():
    small = trace.resize(mlp, PARAMS, KEEP)
    image = jnp.ones((1, 2, 2, 2))
    outside = small(SMALL, image)
    np.testing.assert_allclose(jax.jit(small)(SMALL, image), outside, rtol=1e-6)

    @jax.jit
    def through(shift):  # the model captures a traced value: it must not be remembered
        cut = trace.resize(lambda p, x: mlp(p, x) + shift, PARAMS, KEEP)
        return cut(SMALL, image)

    np.testing.assert_allclose(through(1.0) - through(0.0), 1.0, rtol=1e-6)

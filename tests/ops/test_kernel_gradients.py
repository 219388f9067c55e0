"""Stacks of kernel gradients that are not written out, against gradients written out in NumPy float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedrobust.ops import KernelGradients
from fedrobust.ops._geometry import Geometry


def written(gradients):
    """[B,*window,Cin//groups,Cout] by a loop over outputs and window entries."""
    g, image, output = gradients[0], *(np.asarray(x, np.float64) for x in gradients[1:])
    size, views, channels, features = *image.shape[:2], image.shape[-1], output.shape[-1]
    found = np.zeros((size, *g.window, channels // g.groups, features))
    for at in itertools.product(*map(range, output.shape[2:-1])):
        for k in itertools.product(*map(range, g.window)):
            place = [
                a * s + i * d - low
                for a, s, i, d, (low, _) in zip(at, g.strides, k, g.dilation, g.padding, strict=True)
            ]
            if not all(0 <= p < n for p, n in zip(place, g.image, strict=True)):
                continue
            x = image[(slice(None), slice(None), *place)].reshape(size, views, g.groups, -1)
            y = output[(slice(None), slice(None), *at)].reshape(size, views, g.groups, -1)
            found[(slice(None), *k)] += np.einsum("bvgc,bvgd->bcgd", x, y).reshape(size, -1, features)
    return found


def square(x):
    return np.sum(np.square(x), axis=tuple(range(1, x.ndim)))


@st.composite
def stacks(draw):
    """Any geometry with windows that fit; padding may crop."""
    num_axes = draw(st.integers(1, 3))
    axes = range(num_axes)
    window, strides, dilation = ([draw(st.integers(1, most)) for _ in axes] for most in (3, 3, 2))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, window, strict=True)]
    padding = [(draw(st.integers(-1, 2)), draw(st.integers(-1, 2))) for _ in axes]
    image = [max(1, r - sum(p)) + draw(st.integers(0, 2)) for r, p in zip(reach, padding, strict=True)]
    count = [(n + sum(p) - r) // s + 1 for n, p, r, s in zip(image, padding, reach, strides, strict=True)]
    groups = draw(st.integers(1, 2))
    channels, features = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    views, rng = draw(st.integers(1, 2)), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    geometry = Geometry(*(tuple(x) for x in (image, window, strides, padding, dilation)), groups)
    shapes = (3, views, *image, channels), (3, views, *count, features)
    return KernelGradients(geometry, *(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gradients=stacks())
def test_norms_and_weighted_sum_equal_those_of_the_written_gradients(gradients):
    exact = written(gradients)
    weight = np.array([0.5, 0, 2], np.float32)
    geometry, *factors = gradients

    @jax.jit
    def found_by(*factors):
        stack = KernelGradients(geometry, *factors)
        return *stack.square_norms(), stack.weighted_sum(weight)

    found, bound, total = found_by(*factors)
    np.testing.assert_allclose(found, square(exact), rtol=1e-5, atol=1e-6)
    assert (bound >= square(exact)).all()
    np.testing.assert_allclose(bound, square(exact), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(total, np.tensordot(weight, exact, 1), rtol=1e-5, atol=1e-5)
    assert gradients.num_entries == total.size


def stack(image, output):
    """One window of 2 over a row of 3 entries, one channel: two outputs, two kernel entries."""
    geometry = Geometry((3,), (2,), (1,), ((0, 0),), (1,), 1)
    image, output = (jnp.asarray(x, jnp.float32)[:, None, :, None] for x in (image, output))
    return KernelGradients(geometry, image, output)


def test_by_hand():
    """Entries of the gradient: 1 * 1 + 2 * (-1) = -1 and 2 * 1 + 4 * (-1) = -2."""
    gradients = stack([[1, 2, 4]], [[1, -1]])
    found, bound = gradients.square_norms()
    assert found[0] == pytest.approx(5, rel=1e-6)
    # Without cancelling: lengths sqrt(1 + 4) and sqrt(4 + 16), squared sum 45.
    assert bound[0] - found[0] == pytest.approx(45e-6, rel=0.05)
    assert gradients.weighted_sum(jnp.ones(1)).ravel().tolist() == [-1, -2]
    assert gradients.num_products == 3**2 + 2**2
    assert gradients.num_entries == 2


def test_the_bound_holds_where_the_sum_cancels():
    """Equal patches, output gradients that nearly sum to 0: all that is left of the norm is rounding."""
    rng = np.random.default_rng(0)
    geometry = Geometry((9, 9), (3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), 1)
    output = rng.normal(size=(200, 1, 7, 7, 4))
    output -= output.mean(axis=(2, 3), keepdims=True) * (1 - 1e-6)
    image = np.broadcast_to(rng.uniform(size=(200, 1, 1, 1, 5)), (200, 1, 9, 9, 5))
    gradients = KernelGradients(geometry, *(jnp.asarray(x, jnp.float32) for x in (image, output)))
    found, bound = gradients.square_norms()
    exact = square(written(gradients))
    assert (found < exact).any()  # what is measured may be too small
    assert (bound >= exact).all()


@pytest.mark.parametrize(("x", "y"), [(1e30, 1e-30), (1e-30, 1e30), (1e-18, 1.0), (1e18, 1e-3)])
def test_factors_far_from_one_neither_overflow_nor_vanish(x, y):
    found, bound = stack([[x, 2 * x, 4 * x]], [[y, -y]]).square_norms()
    np.testing.assert_allclose([found[0], bound[0]], 5 * (x * y) ** 2, rtol=1e-4)


def test_what_is_not_finite_is_seen_in_the_norm_and_absent_with_weight_zero():
    image = [[1, 2, 4], [np.nan, 0, 0], [np.inf, 1, 1], [1e30, 0, 0], [0, 0, 0]]
    output = [[1, -1], [0, 1], [1, 0], [1e30, 0], [0, 0]]
    gradients = stack(image, output)
    found, bound = gradients.square_norms()
    assert np.isfinite(found).tolist() == np.isfinite(bound).tolist() == [True, False, False, False, True]
    assert (found[4], bound[4]) == (0, 0)
    assert gradients.weighted_sum(jnp.array([2.0, 0, 0, 0, 1])).ravel().tolist() == [-2, -4]

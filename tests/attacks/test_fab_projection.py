"""FAB's projection against solvers for linear and quadratic programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from fedrobust.attacks.balls import length
from fedrobust.attacks.fab import nearest
from tests.attacks.fab_oracle import NORMS, oracle_nearest

project = jax.jit(nearest, static_argnums=0)


def random_problem(seed, num):
    """A point with pixels on the edge of the box, a normal with zeros and of any scale, a gap perhaps out of reach."""
    rng = np.random.default_rng(seed)
    point = np.clip(rng.uniform(-0.3, 1.3, num), 0, 1).astype(np.float32)
    scale = 10.0 ** rng.integers(-6, 7)
    normal = (rng.normal(size=num) * (rng.uniform(size=num) < 0.8) * scale).astype(np.float32)
    reach = (
        np.abs(normal * np.where(normal > 0, 1 - point, point)).sum(),
        np.abs(normal * np.where(normal > 0, point, 1 - point)).sum(),
    )
    up = rng.uniform() < 0.5
    return point, normal, np.float32((reach[0] if up else -reach[1]) * rng.uniform(0, 1.2)), reach[0 if up else 1]


def solved(norm, point, normal, gap):
    """The least length of a change of the point, by a solver of linear or quadratic programs."""
    num = len(point)
    scale = np.abs(normal).max()
    normal, gap = normal / scale, gap / scale
    if norm == "l2":
        found = optimize.minimize(
            lambda d: d @ d,
            np.zeros(num),
            jac=lambda d: 2 * d,
            bounds=list(zip(-point, 1 - point, strict=True)),
            constraints={"type": "eq", "fun": lambda d: normal @ d - gap, "jac": lambda d: normal},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        return np.sqrt(found.fun) if found.success else None
    if norm == "linf":  # (d, t): least t with -t <= d <= t
        one = np.ones((num, 1))
        found = optimize.linprog(
            [0] * num + [1],
            A_ub=np.block([[np.eye(num), -one], [-np.eye(num), -one]]),
            b_ub=np.zeros(2 * num),
            A_eq=[[*normal, 0]],
            b_eq=[gap],
            bounds=[*zip(-point, 1 - point, strict=True), (0, None)],
        )
    else:  # (p, q): d = p - q, least sum
        found = optimize.linprog(
            np.ones(2 * num),
            A_eq=[[*normal, *-normal]],
            b_eq=[gap],
            bounds=[(0, hi) for hi in (*(1 - point), *point)],
        )
    return found.fun if found.success else None


@pytest.mark.parametrize("norm", NORMS)
def test_nearest_equals_the_solution_of_the_program(norm):
    """100 problems a norm. Without the box the lengths differ by more than 1 % in most of them."""
    num_solved = num_out_of_reach = 0
    for seed in range(100):
        point, normal, gap, reach = random_problem(seed, 9)
        change = np.asarray(project(norm, point, normal, gap), np.float64)
        assert ((point + change >= -1e-6) & (point + change <= 1 + 1e-6)).all()
        if abs(gap) >= reach * (1 - 1e-5):
            num_out_of_reach += 1
            corner = np.where(normal * gap > 0, 1 - point, -point) * (normal != 0)
            np.testing.assert_allclose(change, corner, atol=2e-5)
            continue
        expected = solved(norm, point.astype(np.float64), normal.astype(np.float64), float(gap))
        if expected is None:
            continue
        num_solved += 1
        np.testing.assert_allclose(change @ normal, gap, rtol=1e-5, atol=1e-5 * np.abs(normal).max())
        np.testing.assert_allclose(length(norm, change), expected, rtol=2e-5, atol=2e-6)
    assert num_solved >= 75 and num_out_of_reach >= 10


def test_nearest_by_hand():
    point, normal = jnp.asarray([0.5, 0.9, 0.0]), jnp.asarray([1.0, 2.0, -1.0])
    # room 0.5, 0.1 and 0 upwards
    np.testing.assert_allclose(project("linf", point, normal, 0.5), [0.3, 0.1, 0], atol=1e-6)
    np.testing.assert_allclose(project("l2", point, normal, 0.25), [0.05, 0.1, 0], atol=1e-6)
    np.testing.assert_allclose(project("l1", point, normal, 0.1), [0, 0.05, 0], atol=1e-6)
    np.testing.assert_allclose(project("l1", point, normal, 0.3), [0.1, 0.1, 0], atol=1e-6)
    np.testing.assert_allclose(project("linf", point, normal, -0.4), [-0.1, -0.1, 0.1], atol=1e-6)
    for norm in NORMS:
        np.testing.assert_allclose(project(norm, point, normal, 9.0), [0.5, 0.1, 0], atol=1e-6)
        np.testing.assert_array_equal(project(norm, point, 0 * normal, 1.0), 0)
        np.testing.assert_array_equal(project(norm, point, normal, 0.0), 0)
        np.testing.assert_array_equal(project(norm, point, normal * jnp.nan, 1.0), 0)
        np.testing.assert_array_equal(project(norm, point, normal, jnp.nan), 0)


@pytest.mark.parametrize("norm", NORMS)
def test_nearest_is_exact_for_many_pixels_of_very_different_weight(norm):
    """3000 pixels whose weights span eight orders of magnitude: many kinks, one after the other."""
    rng = np.random.default_rng(0)
    point = rng.uniform(size=(8, 3000)).astype(np.float32)
    normal = (10 ** rng.uniform(-8, 0, (8, 3000)) * rng.choice([-1, 1], (8, 3000))).astype(np.float32)
    reach = np.abs(normal * np.where(normal > 0, 1 - point, point)).sum(1)
    gap = (reach * rng.uniform(0.05, 0.99, 8)).astype(np.float32)
    change = jax.jit(jax.vmap(functools.partial(nearest, norm)))(point, normal, gap)
    expected = [oracle_nearest(norm, *map(np.float64, row)) for row in zip(point, normal, gap, strict=True)]
    np.testing.assert_allclose(change, expected, atol=3e-4 if norm == "l1" else 2e-5)
    np.testing.assert_allclose(np.sum(np.float64(change) * normal, axis=1), gap, rtol=1e-4)

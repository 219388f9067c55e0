"""Laws of the clip norm that follows a quantile."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.privacy import Plan, adaptive_clip_norm, clipped_grad, make_plan, private_mean
from fedrobust.privacy.adaptive import centred_count
from fedrobust.types import Batch

KEY = jax.random.key(0)
SETTINGS = {"initial": 1.0, "quantile": 0.5, "learning_rate": 0.2, "count_noise_stddev": 5.0, "expected_size": 100.0}


def test_the_count_by_hand():
    norm = np.array([0.5, 1.0, 1.5, np.nan, np.inf, 0.1, np.nan], np.float32)
    mask = np.array([True, True, True, True, True, False, False])
    assert centred_count(1.0, norm, mask) == 0.5 * 2 - 0.5 * 3
    assert centred_count(1.0, norm, np.zeros(7, bool)) == 0


def test_one_record_moves_the_count_by_one_half():
    rng = np.random.default_rng(0)
    norm = rng.lognormal(size=50).astype(np.float32)
    norm[[3, 7]] = np.nan, np.inf
    mask = rng.random(50) < 0.8
    base = centred_count(1.0, norm, mask)
    for i in range(50):
        other = mask.copy()
        other[i] = not mask[i]
        assert abs(centred_count(1.0, norm, other) - base) == 0.5
        replaced = norm.copy()
        replaced[i] = 0.0 if not norm[i] <= 1 else np.nan
        assert abs(centred_count(1.0, replaced, mask) - base) == float(mask[i])


def test_the_step_by_hand():
    """3 within, 1 above, 100 expected: the share is 1/2 + 1/100 + noise / 100."""
    norm, mask = np.array([0.1, 0.2, 0.3, 2.0], np.float32), np.ones(4, bool)
    update = adaptive_clip_norm(**SETTINGS | {"quantile": 0.3, "count_noise_stddev": 1e-9}).update
    np.testing.assert_allclose(update(KEY, jnp.float32(1.0), norm, mask), math.exp(-0.2 * (0.51 - 0.3)), rtol=1e-6)


def test_the_noise_has_the_stated_deviation():
    update = adaptive_clip_norm(**SETTINGS).update
    keys = jax.random.split(KEY, 4000)
    empty = jnp.zeros(1), jnp.zeros(1, bool)
    moved = jax.vmap(lambda key: update(key, jnp.float32(1.0), *empty))(keys)
    share = -np.log(np.asarray(moved)) / 0.2 * 100
    # Standard error of a standard deviation: 5 / sqrt(8000) = 0.056; a false failure is beyond 5 of them.
    assert abs(share.std() - 5) < 0.28
    assert abs(share.mean()) < 0.4


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("initial", [0.01, 50.0])
def test_it_converges_to_the_quantile(quantile, initial):
    """Log-normal norms: the quantile is exp(Phi^-1(q)). 200 records, Poisson-like masks, noise 5 on the count."""
    settings = SETTINGS | {"initial": initial, "quantile": quantile, "expected_size": 160.0}
    init, update, _ = adaptive_clip_norm(**settings)

    def step(clip_norm, key):
        of_norm, of_mask, of_update = jax.random.split(key, 3)
        norm = jnp.exp(jax.random.normal(of_norm, (200,)))
        mask = jax.random.bernoulli(of_mask, 0.8, (200,))
        clip_norm = update(of_update, clip_norm, jnp.where(mask, norm, jnp.nan), mask)
        return clip_norm, clip_norm

    _, path = jax.jit(lambda: jax.lax.scan(step, init(), jax.random.split(KEY, 400)))()
    expected = math.exp({0.2: -0.8416, 0.5: 0.0, 0.9: 1.2816}[quantile])
    assert abs(np.log(np.asarray(path[200:])).mean() - math.log(expected)) < 0.1


def test_it_stays_positive_and_finite():
    update = adaptive_clip_norm(**SETTINGS | {"learning_rate": 1e6}).update
    for clip_norm, norm in ((1e-9, 0.0), (1e9, jnp.nan)):
        moved = update(KEY, jnp.float32(clip_norm), jnp.full(200, norm), jnp.ones(200, bool))
        assert 1e-11 < moved < 1e11


def test_it_drives_the_clip_inside_one_compiled_step():
    def loss(key, params, image, label):
        return image @ params

    @jax.jit
    def step(clip_norm, key):
        batch = Batch(jnp.eye(4) * jnp.arange(1.0, 5), jnp.zeros(4, jnp.int32), jnp.ones(4, bool))
        _, info = clipped_grad(loss, clip_norm=clip_norm)(key, jnp.zeros(4), batch)
        return adaptive.update(key, clip_norm, info.norm, batch.mask)

    adaptive = adaptive_clip_norm(**SETTINGS | {"quantile": 0.6, "expected_size": 4, "count_noise_stddev": 0.01})
    clip_norm = functools.reduce(step, jax.random.split(KEY, 100), adaptive.init())
    assert 1.9 < clip_norm < 3.1  # norms are 1, 2, 3, 4: half of them within at 2, three quarters at 3
    assert step._cache_size() == 1


def test_a_private_mean_learns_its_clip_norm_and_asks_for_a_plan_that_pays_for_it():
    """Updates of norm 1, 2, 3, 4; half of them stay within what is learned, and nothing leaves the ball of then."""
    settings = {"relation": "add_or_remove_one", "sampling": "poisson", "sampling_rate": 0.5, "num_steps": 10}
    made = make_plan(unit="client", delta=1e-3, noise_multiplier=1.0, **settings)
    without = replace(made, noise_multiplier=1e-3)  # hardly any noise, to see what it hides
    plan = replace(without, count_noise_stddev=0.01)
    rule = adaptive_clip_norm(
        **SETTINGS | {"initial": 8.0, "quantile": 0.6, "expected_size": 4, "count_noise_stddev": 0.01}
    )
    mean = private_mean(plan, clip_norm=rule, num_clients=8)
    updates = {"a": jnp.eye(4) * jnp.arange(1.0, 5)}
    state, apply = mean.init(updates), jax.jit(mean.apply)
    assert state == 8
    for key in jax.random.split(KEY, 150):
        bound = state
        update, state, norm = apply(key, state, updates, jnp.ones(4))
    assert 1.9 < state < 3.1
    assert norm.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(4 * update["a"], np.minimum([1, 2, 3, 4], bound), atol=0.05)
    for other, clip_norm in ((without, rule), (plan, 1.0)):
        with pytest.raises(ValueError, match=r"^plan\.count_noise_stddev is "):
            private_mean(other, clip_norm=clip_norm, num_clients=8)


def test_sum_and_count_have_noise_of_their_own_and_the_sum_that_of_the_clip_norm_in_force():
    """Of nobody's updates. 4000 keys: six errors of a correlation are 0.095, of a standard deviation 0.067."""
    plan = Plan("client", "add_or_remove_one", "poisson", 0.5, 1, 3.0, 0.0, math.inf, 1e-3, count_noise_stddev=5.0)
    rule = adaptive_clip_norm(**SETTINGS | {"quantile": 1.0, "learning_rate": 4.0})
    mean = private_mean(plan, clip_norm=rule, num_clients=8)

    def noises(key):
        update, clip_norm, _ = mean.apply(key, jnp.float32(1.0), {"a": jnp.zeros((2, 1))}, jnp.zeros(2))
        return update["a"][0], jnp.log(clip_norm)

    of_sum, of_count = jax.jit(jax.vmap(noises))(jax.random.split(KEY, 4000))
    assert abs(np.corrcoef(of_sum, of_count)[0, 1]) < 0.095
    assert np.std(of_sum) == pytest.approx(3.0 / 4, rel=0.067)  # clip norm 1; the next one is about exp(2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0.0) for name in SETTINGS if name != "quantile"),
        *(("initial", value) for value in (1e-11, 1e11, math.nan)),
        ("quantile", 1.5),
        ("count_noise_stddev", math.inf),
    ],
)
def test_a_bad_setting_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} is "):
        adaptive_clip_norm(**SETTINGS | {name: value})

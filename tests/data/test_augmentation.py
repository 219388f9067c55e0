"""Views of one image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.data import compose, random_flip, random_shift

IMAGE = jnp.arange(1.0, 13).reshape(3, 4, 1)
KEYS = jax.random.split(jax.random.key(0), 400)


def views(augment):
    """The different views over 400 keys, and how often each came."""
    drawn = np.asarray(jax.jit(jax.vmap(augment, (0, None)))(KEYS, IMAGE))
    return np.unique(drawn.reshape(400, -1), axis=0, return_counts=True)


def test_shifts_are_all_moves_by_whole_pixels_equally_often():
    padded = np.pad(np.asarray(IMAGE)[..., 0], 1)
    moves = np.unique([padded[i : i + 3, j : j + 4].reshape(-1) for i in range(3) for j in range(3)], axis=0)
    seen, count = views(random_shift(1))
    np.testing.assert_array_equal(seen, moves)
    assert np.abs(count - 400 / 9).max() < 5.5 * np.sqrt(400 * 8 / 81)  # 5.5 standard deviations; fixed key


def test_flips_mirror_left_and_right_half_of_the_time():
    seen, count = views(random_flip())
    both = np.unique([np.asarray(IMAGE).reshape(-1), np.asarray(IMAGE)[:, ::-1].reshape(-1)], axis=0)
    np.testing.assert_array_equal(seen, both)
    assert abs(count[0] - 200) < 55


def test_nothing_to_do_changes_nothing():
    for augment in (random_shift(0), compose()):
        np.testing.assert_array_equal(augment(KEYS[0], IMAGE), IMAGE)


def test_composed_views_use_independent_keys():
    seen, _ = views(compose(random_flip(), random_flip()))
    assert len(seen) == 2  # with one shared key the flips would always cancel
    assert len(views(compose(random_shift(1), random_flip()))[0]) == 18


def test_pixels_below_zero_are_named():
    with pytest.raises(ValueError, match=r"^max_pixels is "):
        random_shift(-1)

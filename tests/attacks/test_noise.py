"""Random points lie as far out as the ball and the box allow, and no two are alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.attacks import balls, random_noise, run

KEY = jax.random.key(0)
GREY, BLACK = jnp.full((6, 5, 2), 0.5), jnp.zeros((6, 5, 2))


def points(norm, image, num=20, eps=0.1):
    """The first `num` points, [num,H,W,C]."""
    search = random_noise(norm=norm, eps=eps, num_queries=num)
    state, found = search.start(KEY, image, jnp.zeros(2), jnp.int32(0), jnp.int32(0)), []
    for _ in range(num):
        found.append(search.point(state))
        state = search.learn(state, None)
    return jnp.stack(found)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_points_are_on_the_surface_and_in_the_box(norm):
    found = points(norm, GREY)
    lengths = [balls.length(norm, point - GREY) for point in found]
    np.testing.assert_allclose(lengths, 0.1, rtol=1e-5)
    assert len({point.tobytes() for point in np.asarray(found)}) == 20
    assert abs(np.mean(found - 0.5)) < 4 * np.std(found) / np.sqrt(found.size)
    dark = points(norm, BLACK)
    assert (dark >= 0).all() and (dark > 0).any()
    assert max(float(balls.length(norm, point)) for point in dark) <= 0.1 + 1e-6


def test_it_breaks_what_gives_way_to_most_corners():
    """The label is right on the image alone."""
    model = lambda x: jnp.stack([0.01 - jnp.sum(jnp.abs(x - 0.5), (1, 2, 3)), jnp.zeros(len(x))], 1)  # noqa: E731
    found = run(random_noise(norm="linf", eps=0.1, num_queries=3), num_slots=2)(
        KEY, model, jnp.stack([GREY, GREY]), jnp.zeros(2, int), jnp.array([True, False])
    )
    assert found.wrong.tolist() == [True, False]
    assert found.num_queries.tolist() == [2, 0]

"""Free adversarial training against a loop in NumPy float64, with and without privacy."""

import functools

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedrobust.defenses import free_update, linf_ascent
from fedrobust.federated import local_update, mean_grad
from fedrobust.losses import cross_entropy
from fedrobust.privacy import Plan, clipped_grad, make_plan, private_grad
from fedrobust.types import Batch

KEY = jax.random.key(0)
COMPILED = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles faster
NUM_STEPS, SIZE, REPLAYS, EPS, STEP = 3, 4, 3, 0.1, 0.06
MASK = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 1]], bool)
rng = np.random.default_rng(0)
IMAGE = rng.uniform(size=(NUM_STEPS, SIZE, 2, 2, 1)).astype(np.float32)
LABEL = rng.integers(0, 3, (NUM_STEPS, SIZE)).astype(np.int32)
PARAMS = {"w": 2 * rng.normal(size=(4, 3)).astype(np.float32)}
BATCH = Batch(IMAGE, LABEL, MASK)


def linear(params, image):
    return image.reshape(len(image), -1) @ params["w"]


LOSS = cross_entropy(linear)


def ascent(random_start=False):
    return linf_ascent(eps=EPS, step_size=STEP, random_start=random_start)


def errors(w, point, label):
    logits = point.reshape(-1, 4) @ w
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True) - np.eye(3)[label]


def by_hand(*, skip_empty=True, forget=False, with_new_params=False, plain=False):
    """Algorithm 1 in float64 with heavy-ball SGD, and mistakes that can be made in it."""
    w, velocity = PARAMS["w"].astype(np.float64), np.zeros((4, 3))
    for image, label, mask in zip(IMAGE.astype(np.float64), LABEL, MASK, strict=True):
        image, label = image[mask], label[mask]
        point = image
        for _ in range(REPLAYS):
            error = errors(w, point, label)
            g, h = point.reshape(-1, 4).T @ error / max(1, len(point)), error @ w.T
            if mask.any() or not skip_empty:
                velocity = 0.9 * velocity + g
                w = w - 0.5 * velocity
            h = errors(w, point, label) @ w.T if with_new_params else h
            moved = (image if forget else point) + STEP * np.sign(h).reshape(point.shape)
            point = image if plain else np.clip(np.clip(moved, image - EPS, image + EPS), 0, 1)
    return w - PARAMS["w"]


@functools.cache
def free(**changes):
    settings = {"num_replays": REPLAYS, "skip_empty": True} | changes
    return COMPILED(free_update(LOSS, optax.sgd(0.5, momentum=0.9), ascent(), **settings))


@pytest.mark.parametrize("skip_empty", [True, False])
def test_free_training_equals_a_loop_by_hand(skip_empty):
    change, info = free(skip_empty=skip_empty)(KEY, PARAMS, BATCH)
    np.testing.assert_allclose(change["w"], by_hand(skip_empty=skip_empty), rtol=1e-4, atol=1e-5)
    assert info.loss.shape == (NUM_STEPS, REPLAYS)
    value = LOSS(KEY, PARAMS, IMAGE[0], LABEL[0]).mean()  # at the clean images, before anything has moved
    np.testing.assert_allclose(info.loss[0, 0], value, rtol=1e-5)
    assert not info.loss[1].any()


@pytest.mark.parametrize("mistake", ["forget", "with_new_params", "plain"])
def test_a_mistaken_loop_ends_elsewhere(mistake):
    """So that the test above can tell: points forgotten between replays, ascents at the new parameters, no ascent."""
    assert np.abs(by_hand(**{mistake: True}) - by_hand()).max() > 1e-3


def test_one_replay_is_plain_local_training_and_from_a_random_start_still_within_the_ball():
    plain = local_update(mean_grad(LOSS), optax.sgd(0.5, momentum=0.9), skip_empty=True)
    plain = COMPILED(plain)(KEY, PARAMS, BATCH)[0]
    np.testing.assert_allclose(free(num_replays=1)(KEY, PARAMS, BATCH)[0]["w"], plain["w"], rtol=1e-5, atol=1e-6)
    moves = ascent(random_start=True)
    start = COMPILED(moves.start)(KEY, IMAGE[0])
    assert np.abs(start - IMAGE[0]).max() <= EPS + 1e-6 and start.min() >= 0 and start.max() <= 1
    assert COMPILED(moves.start)(KEY, IMAGE[0][:2]).tolist() == start[:2].tolist()
    assert len(np.unique(np.sign(start - IMAGE[0]))) == 2


def test_a_step_stops_at_the_ball_and_the_box_and_where_there_is_no_gradient():
    image = np.array([0.5, 0.5, 0.99, 0.5], np.float32).reshape(1, 2, 2, 1)
    gradient = np.array([3.0, -1e-30, 2.0, np.nan], np.float32).reshape(1, 2, 2, 1)
    once = ascent().step(image, image, gradient)
    np.testing.assert_allclose(once.ravel(), [0.56, 0.44, 1.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(ascent().step(image, once, gradient).ravel(), [0.6, 0.4, 1.0, 0.5], rtol=1e-6)


def test_padding_is_nothing_whatever_it_holds():
    found = []
    for junk, label in ((0, 0), (np.nan, -7), (np.inf, 99)):
        image, labels = IMAGE.copy(), LABEL.copy()
        image[~MASK], labels[~MASK] = junk, label
        found.append(np.asarray(free()(KEY, PARAMS, Batch(image, labels, MASK))[0]["w"]).tobytes())
    assert found[0] == found[1] == found[2]


def test_weights_decay_from_where_the_replays_stand():
    """With no gradient each of the steps and replays leaves 0.9 of the parameters."""
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1.0))
    loss = lambda key, params, image, label: 0 * image[:, 0, 0, 0]  # noqa: E731
    update = free_update(loss, optimizer, ascent(), num_replays=REPLAYS, skip_empty=False)
    change, _ = COMPILED(update)(KEY, PARAMS, BATCH)
    np.testing.assert_allclose(change["w"], (0.9 ** (NUM_STEPS * REPLAYS) - 1) * PARAMS["w"], rtol=1e-5)


def test_a_start_draws_from_a_stream_that_no_replay_has():
    def grad(key, params, batch):
        return jax.tree.map(jnp.zeros_like, params), (jax.random.bits(key), batch.image[0])

    moves = ascent()._replace(start=lambda key, image: jnp.zeros_like(image) + jax.random.uniform(key))
    moves = moves._replace(step=lambda image, point, gradient: point)
    update = free_update(
        LOSS, optax.sgd(0.0), moves, num_replays=REPLAYS, skip_empty=False, private=lambda num_replays: grad
    )
    _, (bits, points) = COMPILED(update)(KEY, PARAMS, BATCH)
    for s in range(NUM_STEPS):
        of_batch = jax.random.fold_in(KEY, s)
        assert (points[s] == jax.random.uniform(jax.random.fold_in(of_batch, REPLAYS))).all()
        replays = [jax.random.split(jax.random.fold_in(of_batch, r))[0] for r in range(REPLAYS)]
        assert bits[s].tolist() == [int(jax.random.bits(key)) for key in replays]


CLIP_NORM = 0.4


def recorded(num_replays):
    """A private gradient without its noise, whose info is each clipped gradient by itself, and the images it saw."""
    clipped = clipped_grad(LOSS, clip_norm=CLIP_NORM)

    def grad(key, params, batch):
        rows = [
            clipped(key, params, Batch(batch.image[i : i + 1], batch.label[i : i + 1], batch.mask[i : i + 1]))[0]["w"]
            for i in range(SIZE)
        ]
        total, _ = clipped(key, params, batch)
        return total, (jnp.stack(rows), batch.image)

    assert num_replays == REPLAYS
    return grad


def private_info(batch, rate=0.0):
    update = free_update(LOSS, optax.sgd(rate), ascent(), num_replays=REPLAYS, skip_empty=False, private=recorded)
    change, info = COMPILED(update)(KEY, PARAMS, batch)
    return change, jax.tree.map(np.asarray, info)


def test_given_the_parameters_a_record_moves_every_sum_by_its_own_clipped_gradient_alone():
    """The parameters stand still, as if their path had been released; record 2 is replaced, record 3 taken out."""
    _, (rows, points) = private_info(BATCH)
    assert np.abs(points - IMAGE[:, None]).max() > STEP - 1e-6
    image, label, mask = IMAGE.copy(), LABEL.copy(), MASK.copy()
    image[:, 2], label[:, 2] = 1 - image[:, 2], (label[:, 2] + 1) % 3
    mask[:, 3] = False
    _, (other_rows, other_points) = private_info(Batch(image, label, mask))
    for before, after in ((rows, other_rows), (points[:2], other_points[:2])):
        np.testing.assert_array_equal(before[:, :, :2], after[:, :, :2])
    norms = np.linalg.norm(rows, axis=(3, 4))
    assert norms.max() <= CLIP_NORM and np.sum(norms > 0.99 * CLIP_NORM) > 5
    assert not rows[~MASK[:, None].repeat(REPLAYS, 1)].any() and not other_rows[:, :, 3].any()
    assert (rows[0, :, 2] != other_rows[0, :, 2]).any()


def test_private_replays_take_the_same_samples_as_free_ones():
    """With a clip norm that no gradient reaches; points and gradients come from two passes, and are those of one."""

    def whole(num_replays):
        clipped = clipped_grad(LOSS, clip_norm=1e3)

        def grad(key, params, batch):
            total, info = clipped(key, params, batch)
            return jax.tree.map(lambda g: g / jnp.maximum(jnp.sum(batch.mask), 1), total), info

        return grad

    found = free(private=whole, skip_empty=False)(KEY, PARAMS, BATCH)[0]
    np.testing.assert_allclose(found["w"], by_hand(skip_empty=False), rtol=1e-4, atol=1e-5)


PLAN = Plan(
    "record", "add_or_remove_one", "poisson", 0.1, 20, 1.5, 0.0, float("inf"), 1e-5, None, 0.0, 0.0, "pld",
)  # fmt: skip


def noise_of(num_replays, plan=PLAN):
    """What m calls on one empty batch add, [m, number of parameters], times the expected batch size."""
    grad = private_grad(clipped_grad(LOSS, clip_norm=CLIP_NORM), plan, num_records=100.0, num_replays=num_replays)
    params = {"w": np.zeros((4, 5000), np.float32)}
    empty = Batch(IMAGE[:1], LABEL[:1], np.zeros((1, SIZE), bool))
    update = free_update(
        LOSS, optax.sgd(1.0), ascent(), num_replays=num_replays, skip_empty=False, private=lambda m: grad
    )
    return -10 * np.asarray(COMPILED(update)(KEY, params, empty)[0]["w"]).ravel()


def test_every_replay_is_noised_afresh_and_their_mean_has_the_noise_of_the_plans_one_step():
    """A sum of m draws of variance m v: m^2 v, so that the mean's is v. 20 000 numbers; 5 sigma are 2.5 %."""
    for m in (1, 4):
        assert np.std(noise_of(m)) / m == pytest.approx(1.5 * CLIP_NORM, rel=0.025)


def test_replays_cost_one_sampled_step_and_counting_them_as_samples_of_their_own_would_report_too_little():
    def epsilon(event, num_steps):
        accountant = dp_accounting.rdp.RdpAccountant()  # the one that can sample several Gaussians at once
        accountant.compose(dp_accounting.PoissonSampledDpEvent(0.1, event), num_steps)
        return accountant.get_epsilon(1e-5)

    m, z = 4, 1.5
    one = dp_accounting.GaussianDpEvent(z)
    replay = dp_accounting.GaussianDpEvent(z * m**0.5)
    planned = make_plan(
        unit="record", relation="add_or_remove_one", sampling="poisson", delta=1e-5, num_steps=20,
        noise_multiplier=z, sampling_rate=0.1,
    )  # fmt: skip
    together = epsilon(dp_accounting.SelfComposedDpEvent(replay, m), 20)
    assert together == pytest.approx(epsilon(one, 20), rel=1e-6)
    assert planned.epsilon < together  # the same step by a tighter accountant
    assert epsilon(replay, 20 * m) < 0.8 * together
    assert epsilon(one, 20 * m) > together


def test_a_bad_setting_is_named():
    grad = clipped_grad(LOSS, clip_norm=CLIP_NORM)
    for arguments, name in (({"num_replays": 0}, "num_replays"), ({"private": recorded}, "skip_empty")):
        with pytest.raises(ValueError, match=rf"^{name} is "):
            free(**arguments)
    with pytest.raises(ValueError, match=r"^num_replays is 3: must be 1 where noise comes in shares$"):
        private_grad(grad, PLAN, num_records=10.0, num_replays=3, num_shares=2)
    with pytest.raises(ValueError, match=r"^num_replays is 0"):
        private_grad(grad, PLAN, num_records=10.0, num_replays=0)
    for radius in ({"eps": -1.0}, {"step_size": float("nan")}):
        with pytest.raises(ValueError, match=rf"^{next(iter(radius))} is "):
            linf_ascent(**{"eps": 0.1, "step_size": 0.1, "random_start": False} | radius)

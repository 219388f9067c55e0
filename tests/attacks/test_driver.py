"""The driver against a plain loop over examples, tries and questions; what must not change its result; its cost."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.attacks import as_attack, auto_pgd, balls, objectives, run, spread
from fedrobust.types import Answer, Search

SHAPE = (4, 3, 1)
NUM, NUM_TRIES, NUM_QUERIES, EPS = 24, 3, 5, 0.03
KEY = jax.random.key(1)
HIDDEN, OUT = (np.random.default_rng(1).normal(size=size).astype(np.float32) for size in ((12, 16), (16, 3)))
WIDTHS = [
    {"num_slots": 1},
    {"num_slots": 5},
    {"num_slots": 200},
    {"num_slots": 1, "compact": False},
    {"num_slots": 2, "num_devices": 2},
    {"num_slots": 2, "num_devices": 5},  # 24 examples do not divide by 5
    {"num_slots": 2, "num_devices": None},
    {"num_slots": 1, "num_devices": 3, "compact": False},
]


def curved(x):
    return jnp.sin(3 * x.reshape(x.shape[0], -1) @ HIDDEN) @ OUT


class State(NamedTuple):
    image: jax.Array
    x: jax.Array
    num: jax.Array
    patience: jax.Array


def toy(eps=EPS, num_tries=NUM_TRIES, num_queries=NUM_QUERIES, objective=True, overshoot=1.0):
    """Sign steps from a random start; try r gives up after 3 + r questions."""

    def start(key, image, logits, label, index):
        return State(image, balls.start(key, "linf", eps, image), jnp.int32(0), 3 + index)

    def learn(state, answer):
        x = state.x + overshoot * eps / 4 * jnp.sign(answer.gradient)
        return state._replace(x=balls.project("linf", eps * overshoot, state.image, x), num=state.num + 1)

    return Search(
        start=start,
        point=lambda state: state.x,
        learn=learn,
        ended=lambda state: state.num >= state.patience,
        objective=(lambda logits, label, state: objectives.cross_entropy(logits, label)) if objective else None,
        inside=lambda image, point: balls.inside("linf", eps, image, point),
        num_tries=num_tries,
        num_queries=num_queries,
    )


IMAGE = np.random.default_rng(0).uniform(size=(NUM, *SHAPE)).astype(np.float32)
LABEL = np.array(curved(IMAGE).argmax(1))
LABEL[3] = (LABEL[3] + 1) % 3
TODO = np.arange(NUM) != 5


@functools.cache
def program(num_slots, num_samples=None, **settings):
    logits_fn = curved if num_samples is None else noisy
    search = run(toy(), num_slots=num_slots, num_samples=num_samples, **settings)
    return jax.jit(lambda image, label, todo: search(KEY, logits_fn, image, label, todo))


def noisy(key, x):
    return curved(x) + 0.1 * jax.random.normal(key, (len(x), 3))


def expected():
    """What a loop finds that takes one example, one try and one question after the other."""
    search = toy()
    start, learn = jax.jit(search.start), jax.jit(search.learn)
    ask = jax.jit(
        jax.value_and_grad(
            lambda x, y: (lambda z: (objectives.cross_entropy(z, y), z))(curved(x[None])[0]), has_aux=True
        )
    )
    for i in range(NUM):
        image, wrong, value, queries = IMAGE[i], False, -np.inf, int(TODO[i])
        logits = curved(IMAGE[i : i + 1])[0]
        wrong = bool(TODO[i] and logits.argmax() != LABEL[i])
        for r in range(NUM_TRIES if TODO[i] else 0):
            state = start(jax.random.fold_in(jax.random.fold_in(KEY, i), r), IMAGE[i], logits, LABEL[i], r)
            for _ in range(min(NUM_QUERIES, 3 + r)):
                if wrong:
                    break
                point = search.point(state)
                (v, z), gradient = ask(point, LABEL[i])
                queries, wrong = queries + 1, bool(z.argmax() != LABEL[i])
                if wrong or v > value:
                    image, value = point, v
                state = learn(state, Answer(z, v, gradient))
        yield image, wrong, queries


def test_the_driver_equals_a_loop_over_examples_tries_and_questions():
    image, wrong, queries = map(np.asarray, zip(*expected(), strict=True))
    found = program(5)(IMAGE, LABEL, TODO)
    np.testing.assert_array_equal(found.wrong, wrong)
    np.testing.assert_array_equal(found.num_queries, queries)
    np.testing.assert_allclose(found.image, image, atol=1e-6)
    assert 0.2 < wrong.mean() < 0.8 and len(set(queries.tolist())) > 5  # all that may happen did


@pytest.mark.parametrize("settings", WIDTHS, ids=str)
def test_slots_and_compaction_change_nothing(settings):
    one, other = program(5)(IMAGE, LABEL, TODO), program(**settings)(IMAGE, LABEL, TODO)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_no_example_feels_another():
    image, label, todo = IMAGE.copy(), LABEL.copy(), TODO.copy()
    image[[2, 9]], label[7], todo[11] = np.nan, (label[7] + 1) % 3, False
    one, other = program(5)(IMAGE, LABEL, TODO), program(5)(image, label, todo)
    rest = ~np.isin(np.arange(NUM), [2, 7, 9, 11])
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(np.asarray(a)[rest], np.asarray(b)[rest])
    assert np.asarray(other.wrong)[[2, 9, 11]].tolist() == [True, True, False]  # NaN is never right


ROWS = []


def watched(x):
    jax.debug.callback(lambda x: ROWS.append(len(x)), x[:, 0, 0, 0])
    return curved(x)


@functools.cache
def watched_program(compact):
    search = run(toy(), num_slots=1, compact=compact)
    return jax.jit(lambda todo: search(KEY, watched, IMAGE, LABEL, todo))


def counted(todo, compact=True):
    """How many images the model was asked about, and what was found."""
    ROWS.clear()
    found = watched_program(compact)(todo)
    jax.effects_barrier()
    return sum(ROWS), found


def test_what_is_not_to_be_attacked_costs_nothing_and_comes_back_untouched():
    asked, found = counted(np.zeros(NUM, bool))
    assert asked == 0
    assert not found.wrong.any() and not found.num_queries.any()
    np.testing.assert_array_equal(found.image, IMAGE)


def test_num_queries_counts_the_images_that_the_model_saw():
    asked, found = counted(TODO)
    assert asked == int(found.num_queries.sum())
    in_step, _ = counted(TODO, compact=False)
    assert asked < 0.7 * in_step == 0.7 * NUM * (1 + NUM_TRIES * NUM_QUERIES)


def test_every_device_gets_its_share_of_what_is_to_be_attacked():
    todo = np.arange(NUM) < 7  # the first of a row: cut in pieces, one device would have them all
    watch = jax.jit(lambda todo: run(toy(), num_slots=1, num_devices=4)(KEY, watched, IMAGE, LABEL, todo))
    ROWS.clear()
    found = watch(todo)
    jax.effects_barrier()
    assert sum(ROWS) == int(found.num_queries.sum())
    shares = np.asarray(spread._dealt(jnp.asarray(todo), 4)).reshape(4, -1)
    assert sorted(todo[shares].sum(1)) == [1, 2, 2, 2]
    np.testing.assert_array_equal(np.sort(shares, axis=None), np.arange(NUM))


def test_nan_logits_are_never_right():
    program = jax.jit(lambda bad: run(toy(), num_slots=8)(KEY, lambda x: curved(x) + bad, IMAGE, LABEL, TODO))
    for bad in (jnp.full(3, jnp.nan), jnp.asarray([0.0, jnp.nan, 9.0])):
        found = program(bad)
        np.testing.assert_array_equal(found.wrong, TODO)
        np.testing.assert_array_equal(found.image, IMAGE)


def test_a_model_that_answers_nan_at_a_changed_image_is_broken_there():
    def logits_fn(x):
        return jnp.where(jnp.all(x == jnp.round(x * 255) / 255, axis=(1, 2, 3))[:, None], curved(x), jnp.nan)

    image = np.round(IMAGE * 255).astype(np.float32) / np.float32(255)
    right = TODO & (np.asarray(curved(image)).argmax(1) == LABEL)
    found = jax.jit(lambda: run(toy(), num_slots=8)(KEY, logits_fn, image, LABEL, TODO))()
    assert right.any() and found.wrong[right].all()
    assert np.isnan(logits_fn(found.image[right])).any(axis=1).all()


def test_radius_zero_gives_the_clean_errors_exactly():
    found = jax.jit(lambda eps: run(toy(eps), num_slots=8)(KEY, curved, IMAGE, LABEL, TODO))(0.0)
    np.testing.assert_array_equal(found.wrong, TODO & (curved(IMAGE).argmax(1) != LABEL))
    np.testing.assert_array_equal(found.image, IMAGE)


def test_a_point_outside_the_ball_is_no_success_and_never_returned():
    found = jax.jit(lambda: run(toy(0.001, overshoot=300.0), num_slots=8)(KEY, curved, IMAGE, LABEL, TODO))()
    assert np.abs(found.image - IMAGE).max() <= 0.001 + 1e-6
    assert found.wrong.sum() <= 3


def test_a_black_box_search_takes_no_gradient():
    def logits_fn(x):
        shape = jax.ShapeDtypeStruct((len(x), 3), jnp.float32)
        return jax.pure_callback(lambda x: np.sin(3 * x.reshape(len(x), -1) @ HIDDEN) @ OUT, shape, x)

    found = jax.jit(lambda: run(toy(objective=False), num_slots=8)(KEY, logits_fn, IMAGE, LABEL, TODO))()
    value = jax.vmap(objectives.margin)(curved(found.image), LABEL)
    np.testing.assert_array_equal(np.asarray(value > 0) & TODO, found.wrong)


def test_a_randomised_model_is_judged_by_its_mean_and_slots_change_nothing():
    one, *others = (program(n, 2, num_devices=d)(IMAGE, LABEL, TODO) for n, d in ((5, 1), (64, 1), (2, 3)))
    for other in others:
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    assert (one.num_queries % 2 == 0).all()


def test_samples_of_a_model_that_ignores_its_key_change_nothing():
    search = run(toy(), num_slots=5, num_samples=4)
    found = jax.jit(lambda: search(KEY, lambda key, x: curved(x), IMAGE, LABEL, TODO))()
    plain = program(5)(IMAGE, LABEL, TODO)
    np.testing.assert_array_equal(found.wrong, plain.wrong)
    margin = jax.vmap(objectives.margin)
    assert (margin(curved(found.image), LABEL) >= margin(curved(plain.image), LABEL) - 1e-6).all()
    attacked = TODO & (np.argmax(curved(IMAGE), 1) == LABEL)
    asked = 3 + 4 + 5 + 1  # three tries to their ends, then once more
    np.testing.assert_array_equal(found.num_queries, 4 * (TODO + asked * attacked))


def test_the_mean_of_samples_is_taken_and_luck_is_no_success():
    """Each draw adds +10 or -10 to class 0; only the mean of many draws shows the class that is ahead by 4.

    Of 30 questions of one draw each, one is all but sure to be wrong; asked once more, about half of them are.
    """

    def logits_fn(key, x):
        coin = 10.0 * jax.random.rademacher(key, (len(x), 1)).astype(jnp.float32)
        return jnp.concatenate([coin, jnp.full((len(x), 1), 4.0), jnp.zeros((len(x), 1))], 1)

    label = np.ones(NUM, int)
    share = []
    for num_samples in (1, 64):
        search = run(toy(num_tries=1, num_queries=30), num_slots=24, num_samples=num_samples)
        found = jax.jit(lambda search=search: search(KEY, logits_fn, IMAGE, label, TODO))()
        share.append(float(found.wrong.mean()))
    assert 0.15 < share[0] < 0.85 and share[1] < 0.1  # 24 coins, one of them out of the range in 1 of 1500 keys


@pytest.mark.parametrize(("num_samples", "num_slots"), [(1, 200), (4, 33)])
def test_a_lucky_draw_does_not_end_the_search(num_samples, num_slots):
    """The corner of the ball is wrong in every draw; on the way there many a draw is, by luck."""
    image, label = np.full((200, *SHAPE), 0.5, np.float32), np.zeros(200, int)

    def logits_fn(key, x):
        margin = 1 - 80 * jnp.mean(x - 0.5, (1, 2, 3)) + 1.5 * jax.random.normal(key, (len(x),))
        return jnp.stack([margin, 0 * margin], 1)

    search = auto_pgd(norm="linf", eps=0.1, num_steps=10, random_start=True, objective="margin")
    attack = run(search, num_slots=num_slots, num_samples=num_samples)
    assert jax.jit(lambda: attack(KEY, logits_fn, image, label, label == 0))().wrong.all()


def test_at_radius_zero_a_coin_is_tossed_once():
    image, label = np.full((400, *SHAPE), 0.5, np.float32), np.zeros(400, int)
    search = run(toy(0.0), num_slots=100, num_samples=1)
    coin = lambda key, x: jax.random.normal(key, (len(x), 2))  # noqa: E731
    found = jax.jit(lambda: search(KEY, coin, image, label, label == 0))()
    assert 0.375 < found.wrong.mean() < 0.625  # five standard errors
    np.testing.assert_array_equal(found.image, image)


def test_of_equal_points_the_first_try_has_the_say():
    """Later tries are shorter by one question each: in enough slots all tries of an example end in the same turn."""
    flat = lambda x: jnp.zeros((len(x), 3)) + 0 * jnp.sum(x)  # noqa: E731
    search = toy()._replace(ended=lambda state: state.num >= 8 - state.patience)
    first, *others = (
        jax.jit(lambda s=s, n=n: run(s, num_slots=n)(KEY, flat, IMAGE, np.zeros(NUM, int), TODO))().image
        for s, n in ((search._replace(num_tries=1), 5), (search, 1), (search, 200))
    )
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_what_fills_up_a_device_is_not_attacked():
    ROWS.clear()
    found = jax.jit(lambda: run(toy(), num_slots=1, num_devices=5)(KEY, watched, IMAGE, LABEL, TODO))()
    jax.effects_barrier()
    assert sum(ROWS) == int(found.num_queries.sum())


def test_as_an_attack_it_gives_the_images():
    attack = as_attack(toy())
    image = jax.jit(lambda: attack(KEY, curved, IMAGE, LABEL))()
    np.testing.assert_allclose(image[TODO], program(5)(IMAGE, LABEL, TODO).image[TODO], atol=1e-6)


def test_memory_does_not_grow_with_questions_or_tries():
    def temporary_bytes(num_queries, num_tries):
        search = run(toy(num_queries=num_queries, num_tries=num_tries), num_slots=16)
        lowered = jax.jit(lambda x: search(KEY, curved, x, LABEL, TODO)).lower(IMAGE)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(100, 8) <= 1.05 * temporary_bytes(2, 4)


def test_the_radius_is_traced_and_plain_convolutions_are_replaced():
    kernel = jnp.ones((3, 3, 1, 3))

    def logits_fn(x):
        return jnp.mean(
            jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")), (1, 2)
        )

    traced = jax.make_jaxpr(lambda eps: run(toy(eps), num_slots=8)(KEY, logits_fn, IMAGE, LABEL, TODO))(0.1)
    assert "custom_vjp" in str(traced) or "custom_jvp" in str(traced)


@pytest.mark.parametrize(
    ("setting", "bad"),
    [("num_slots", 0), ("num_samples", 0), ("num_slots", 1.5), ("num_devices", 0), ("num_devices", 9)],
)
def test_a_bad_setting_is_named(setting, bad):
    with pytest.raises(ValueError, match=f"^{setting} is "):
        run(toy(), **{"num_slots": 4, setting: bad})

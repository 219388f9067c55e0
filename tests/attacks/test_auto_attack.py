"""What the published sets hold, what stands in for two and three classes, and attacks by way of a twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.attacks import auto_attack, auto_pgd, balls, momentum_pgd, objectives, run, transfer, with_gradient_of
from fedrobust.attacks.square import square

SHAPE = (4, 3, 1)
KEY = jax.random.key(2)
RNG = np.random.default_rng(5)
HIDDEN, OUT = RNG.normal(size=(12, 8)).astype(np.float32), RNG.normal(size=(8, 10)).astype(np.float32)
IMAGE = RNG.uniform(0.1, 0.9, size=(32, *SHAPE)).astype(np.float32)


FABS = ("fab_t", "fab and fab_t", "fab_t")
DRAWS = ("all", "a success at any question", "the point of the largest margin, judged by new draws")


def logits_fn(x):
    return jnp.tanh((x.reshape(len(x), -1) - 0.5) @ HIDDEN) @ OUT


LABEL = np.asarray(logits_fn(IMAGE).argmax(1))


def set_of(version="standard", **settings):
    return auto_attack(**{"version": version, "norm": "linf", "eps": 0.1, "num_classes": 10, **settings})


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("standard", {"apgd_ce": (1, 101), "apgd_t": (9, 101), "fab_t": (9, None), "square": (1, 5000)}),
        (
            "plus",
            {"apgd_ce": (5, 101), "apgd_dlr": (5, 101), "fab_t": (45, None), "square": (1, 5000), "apgd_t": (9, 101)},
        ),
        ("rand", {"apgd_ce": (1, 101), "apgd_dlr": (1, 101)}),
    ],
)
def test_sets_are_the_published_ones(version, expected):
    found = set_of(version)
    assert [member.name for member in found.members] == list(expected)
    for name, num_steps, search in found.members:
        num_tries, num_queries = expected[name]
        assert num_steps == (5000 if name == "square" else 100)
        assert search.num_tries == num_tries
        assert num_queries in (None, search.num_queries)
    assert [x[:3] for x in found.replaced] == {"standard": [], "plus": [FABS], "rand": [DRAWS]}[version]
    assert found.num_samples == (20 if version == "rand" else None)


@pytest.mark.parametrize(
    ("version", "num_classes", "expected"),
    [
        ("standard", 2, [("apgd_t", "targeted_dlr", "targeted_margin")]),
        ("standard", 3, [("apgd_t", "targeted_dlr", "targeted_margin")]),
        ("standard", 4, []),
        ("plus", 2, [("apgd_dlr", "dlr", "margin"), ("apgd_t", "targeted_dlr", "targeted_margin"), FABS]),
        ("plus", 3, [("apgd_t", "targeted_dlr", "targeted_margin"), FABS]),
        ("rand", 2, [("apgd_dlr", "dlr", "margin"), DRAWS]),
    ],
)
def test_what_is_not_defined_is_replaced_and_said(version, num_classes, expected):
    found = set_of(version, num_classes=num_classes)
    assert [tuple(x[:3]) for x in found.replaced] == expected
    for x in found.replaced[: None if version == "standard" else -1]:
        assert x.reason == f"{x.published} is not defined for {num_classes} classes"
    logits = jax.ShapeDtypeStruct((num_classes,), jnp.float32)
    for _, _, search in found.members:
        state = jax.eval_shape(search.start, KEY, IMAGE[0], logits, jnp.int32(0), jnp.int32(0))
        if search.objective is not None:
            assert jax.eval_shape(search.objective, logits, jnp.int32(0), state).shape == ()


def test_the_l1_set_has_more_starts_and_fewer_targets():
    found = set_of(norm="l1", eps=1.0)
    tries = [("apgd_ce", 5), ("apgd_t", 5), ("fab_t", 9), ("square", 1)]
    assert [(name, search.num_tries) for name, _, search in found.members] == tries
    assert not found.replaced
    few = set_of(norm="l1", eps=1.0, num_classes=3)
    assert [search.num_tries for _, _, search in few.members] == [5, 2, 2, 1]


@pytest.mark.parametrize("version", ["plus", "rand"])
def test_other_sets_have_no_l1(version):
    with pytest.raises(ValueError, match=r"^norm is 'l1': "):
        set_of(version, norm="l1")


@pytest.mark.parametrize(
    ("setting", "bad"),
    [("version", "fast"), ("norm", "l0"), ("num_classes", 1), ("eps", -1.0), ("num_steps", 0), ("num_samples", 0)],
)
def test_a_bad_setting_is_named(setting, bad):
    with pytest.raises(ValueError, match=f"^{setting} is "):
        set_of(**{setting: bad})


def rounded(x):
    """A model without a useful gradient: its input is rounded to tenths."""
    return logits_fn(jnp.round(10 * x) / 10)


SEARCH = auto_pgd(norm="linf", eps=0.1, num_steps=10, random_start=False, objective="margin")


def found_by(attack, target):
    label = np.asarray(target(IMAGE).argmax(1))
    return jax.jit(lambda: attack(KEY, target, IMAGE, label, label >= 0))()


def test_a_twin_breaks_what_has_no_gradient_and_the_target_is_the_judge():
    direct = found_by(run(SEARCH, num_slots=16), rounded)
    by_twin = found_by(transfer(SEARCH, logits_fn, num_slots=16), rounded)
    straight = found_by(run(SEARCH, num_slots=16), with_gradient_of(logits_fn, rounded))
    assert direct.wrong.sum() <= 2
    label = rounded(IMAGE).argmax(1)
    for found in (by_twin, straight):
        assert found.wrong.sum() >= 10
        np.testing.assert_array_equal(rounded(found.image).argmax(1) != label, found.wrong)
        assert np.abs(found.image - IMAGE).max() <= 0.1 + 1e-6


def test_a_model_is_its_own_twin():
    search = momentum_pgd(norm="linf", eps=0.05, step_size=0.02, num_steps=5, momentum=0.0, random_start=True)
    own, twin = run(search, num_slots=16), transfer(search, logits_fn, num_slots=16)
    for a, b in zip(found_by(own, logits_fn), found_by(twin, logits_fn), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_borrowed_gradient_changes_no_value():
    both = with_gradient_of(logits_fn, rounded)
    np.testing.assert_array_equal(both(IMAGE), rounded(IMAGE))
    slope = [jax.grad(lambda x, f=f: f(x).sum())(IMAGE) for f in (both, logits_fn)]
    np.testing.assert_allclose(*slope, atol=1e-6)


@pytest.mark.parametrize("norm", balls.NORMS)
def test_members_count_in_the_ball_of_their_radius_and_norm(norm):
    image, delta = jnp.full(SHAPE, 0.5), jnp.zeros(SHAPE).at[:2, 0].set(0.1)
    eps = {"linf": 0.1, "l2": 0.1 * 2**0.5, "l1": 0.2}[norm]
    for name, _, search in set_of(norm=norm, eps=eps).members:
        assert [bool(search.inside(image, image + s * delta)) for s in (0.99, 1.01)] == [True, False], name


def test_the_square_of_the_set_halves_as_published():
    ours = set_of(num_queries=100).members[-1].search
    theirs = square(norm="linf", eps=0.1, num_queries=100, p_init=0.8, rescale_schedule=False)

    def right(x):
        return jnp.stack([jnp.mean(jnp.sin(9 * x), (1, 2, 3)) + 9, jnp.zeros(len(x))], 1)

    one, other = (
        jax.jit(lambda s=s: run(s, num_slots=4)(KEY, right, IMAGE[:4], np.zeros(4, int), np.ones(4, bool)))()
        for s in (ours, theirs)
    )
    np.testing.assert_array_equal(one.image, other.image)


def test_members_climb_their_objectives():
    logits, label = jnp.asarray([2.0, 1.0, 0.5, -1.0]), jnp.int32(0)
    names = {"apgd_ce": "cross_entropy", "apgd_dlr": "dlr", "apgd_t": "targeted_dlr"}
    found = {member.name: member.search for member in set_of("plus", num_classes=4).members if member.name in names}
    assert found.keys() == names.keys()
    for name, search in found.items():
        state = search.start(KEY, jnp.full(SHAPE, 0.5), logits, label, jnp.int32(0))
        expected = objectives.OBJECTIVES[names[name]].value(logits, label, jnp.int32(1))
        np.testing.assert_allclose(search.objective(logits, label, state), expected, rtol=1e-6)

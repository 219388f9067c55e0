"""The gate's comparisons, one by one, on a linear model whose margins are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.evaluation import gate
from fedrobust.types import Dataset, Found
from tests.evaluation.gate_checks import EPS, KEY, PROBE, SIZE, failed


def linear(params, x):
    weight, bias = params
    score = (x.reshape(len(x), -1) - 0.5) @ weight + bias
    return jnp.stack([-score, score], 1)


SIGNS = np.where(np.arange(64) % 3 == 0, 1.0, -1.0).astype(np.float32)
LINE = SIGNS, 0.0
FRAGILE = np.where(np.arange(64) % 10 < 5, SIGNS, 0), 0.0  # `pushed` moves all its pixels the right way
NEAR = Dataset(0.5 + np.linspace(-0.1, 0.1, SIZE)[:, None, None, None] * SIGNS.reshape(1, 8, 8, 1), None, 2)
NEAR = NEAR._replace(image=NEAR.image.astype(np.float32), label=np.asarray(linear(LINE, NEAR.image)).argmax(1))


@functools.cache
def pushed(share=0.6, *, length=1.0, idle=(0.0, 0.0), says=True):
    """An attack on `LINE` that wins where the margin is below `share` of what a perfect one takes away.

    Args:
        share: of the pixels that move the right way; every second one of the others moves the other way.
        length: of its steps over the radius.
        idle: radii between which all it does is move.
        says: whether it reports what it finds.
    """
    right = (np.arange(64) + 1) % 10 <= 10 * share - 0.5
    rest = np.where(np.cumsum(~right) % 2, 1.0, -1.0)

    def attack(eps):
        def run(key, model, image, label, todo):
            useful = right & ~((eps > idle[0]) & (eps < idle[1]))
            toward = SIGNS * jnp.where(useful, 1, rest).reshape(64)
            delta = length * eps * jnp.where(label == 1, -1.0, 1.0)[:, None] * toward
            moved = jnp.clip(image + delta.reshape(image.shape), 0, 1)
            moved = jnp.where(todo[:, None, None, None], moved, image)
            return Found(moved, (model(moved).argmax(1) != label) & says, todo.astype(jnp.int32))

        return run

    return attack


PERFECT = pushed(1.0)
WEAK = {
    "nothing": ({}, {}, None),
    "pgd_at_least_as_strong_as_fgsm": ({"fgsm": PERFECT}, {}, None),
    "more_steps_find_no_more": ({"more_steps": PERFECT}, {}, None),
    "more_restarts_find_no_more": ({"more_restarts": PERFECT}, {}, None),
    "auto_pgd_finds_no_more": ({"auto_pgd": PERFECT}, {}, None),
    "square_finds_no_more": ({"square": PERFECT}, {}, None),
    "noise_finds_no_more": ({"noise": PERFECT}, {}, None),
    "transfer_finds_no_more": ({}, {"twin": PERFECT}, None),
    "undefended_twin_falls": ({}, {}, (SIGNS, 100.0)),
    "success_rises_with_eps": ({"pgd": pushed(idle=(1.5 * EPS, 3 * EPS))}, {}, None),
    "samples_inside_ball": ({"noise": pushed(length=1.01)}, {}, None),
    "success_is_reproduced": ({"pgd": pushed(says=False)}, {}, None),
}


@pytest.mark.parametrize("name", WEAK)
def test_a_weak_attack_is_flagged_by_its_comparison_alone(name):
    changes, extra, undefended = WEAK[name]
    probes = {**dict.fromkeys(PROBE, pushed()), **changes}
    checks = gate(
        linear, LINE, NEAR, probes, KEY, 64, norm="linf", eps=EPS,
        extra={"itself": pushed(), **extra}, undefended=undefended or FRAGILE,
    )  # fmt: skip
    assert failed({check["check"]: check for check in checks}) == {name} - {"nothing"}


@pytest.mark.parametrize(
    ("share", "idle", "flagged"),
    [
        (0.4, (1.1 * EPS, 1.1), {"nothing_is_right_unbounded"}),  # some stand at twice the radius
        (0.4, (0.3, 1.1), set()),
        (0.4, (1.1 * EPS, 0.9), set()),
        (0.6, (1.1 * EPS, 1.1), set()),  # none does
    ],
    ids=["in_no_ball", "not_beyond_a_quarter", "in_the_largest", "in_twice_the_radius"],
)
def test_what_one_ball_around_an_image_holds_the_largest_does(share, idle, flagged):
    probes = dict.fromkeys(PROBE, pushed(share))
    idle = dict.fromkeys(("more_steps", "auto_pgd"), pushed(share, idle=idle))
    assert failed(linear_gate({**probes, **idle})) == flagged


@pytest.mark.parametrize("name", ["more_steps", "auto_pgd"])
def test_what_one_of_two_attacks_finds_without_a_bound_is_not_right_there(name):
    probes = dict.fromkeys(PROBE, pushed(0.4))
    idle = dict.fromkeys(("more_steps", "auto_pgd"), pushed(0.4, idle=(1.1 * EPS, 1.1)))
    assert failed(linear_gate({**probes, **idle, name: pushed(0.4)})) == set()


def test_a_radius_that_is_never_reached_is_flagged():
    checks = gate(linear, LINE, NEAR, dict.fromkeys(PROBE, pushed(length=0.3)), KEY, 64, norm="linf", eps=EPS)
    assert failed({check["check"]: check for check in checks}) == {"the_radius_is_used_up"}


def linear_gate(probes, apply=linear, image=NEAR.image, batch_size=SIZE, **settings):
    checks = gate(
        apply, LINE, NEAR._replace(image=image), probes, KEY, batch_size, **{"norm": "linf", "eps": EPS, **settings}
    )
    return {check["check"]: check for check in checks}


@pytest.mark.parametrize("name", ["auto_pgd", "square", "noise", "transfer"])
def test_an_attack_that_breaks_what_others_leave_is_flagged_though_it_breaks_less(name):
    def one_sided(eps):
        perfect = PERFECT(eps)
        return lambda key, model, image, label, todo: perfect(key, model, image, label, todo & (label == 1))

    probes, extra = dict.fromkeys(PROBE, pushed()), {}
    (extra if name == "transfer" else probes)[name] = one_sided
    assert failed(linear_gate(probes, extra=extra)) == {f"{name}_finds_no_more"}


def left_by(attack):
    found = attack(EPS)(KEY, lambda x: linear(LINE, x), NEAR.image, NEAR.label, np.ones(SIZE, bool))
    return ~np.asarray(found.wrong)


def test_an_evaluation_that_found_all_that_the_probes_find_passes_though_pgd_does_not():
    stronger = {name: PERFECT for name in ("more_steps", "more_restarts", "auto_pgd", "square", "noise")}
    checks = linear_gate({**dict.fromkeys(PROBE, pushed()), **stronger}, standing=left_by(PERFECT))
    assert failed(checks) == set()


@pytest.mark.parametrize("name", ["pgd", "more_steps", "more_restarts", "auto_pgd", "square", "noise", "transfer"])
def test_an_evaluation_that_left_what_a_probe_breaks_is_flagged(name):
    weak, extra = pushed(), {}
    probes = dict.fromkeys(PROBE, weak)
    (extra if name == "transfer" else probes)[name] = PERFECT
    checks = linear_gate(probes, extra=extra, standing=left_by(weak))
    flagged = {"more_steps", "more_restarts"} if name == "pgd" else {name}
    assert failed(checks) == {f"{one}_find{'' if 'more' in one else 's'}_no_more" for one in flagged}


def test_an_evaluation_that_attacked_nothing_is_flagged():
    checks = linear_gate(dict.fromkeys(PROBE, pushed()), standing=np.ones(SIZE, bool))
    assert failed(checks) == {"more_steps_find_no_more", "more_restarts_find_no_more"}
    with pytest.raises(ValueError, match=r"standing is \(3,\): must be 64 booleans"):
        linear_gate(dict.fromkeys(PROBE, pushed()), standing=np.ones(3, bool))


def test_half_the_radius_that_finds_more_is_flagged():
    probes = dict.fromkeys(PROBE, pushed(idle=(0.9 * EPS, 1.1 * EPS)))
    assert failed(linear_gate(probes)) == {"success_rises_with_eps"}


def test_the_radius_that_counts_is_that_of_pgd():
    probes = {**dict.fromkeys(PROBE, pushed(length=0.3)), "fgsm": pushed(0.1)}
    assert failed(linear_gate(probes)) == {"the_radius_is_used_up"}


def test_in_l2_every_image_is_within_the_root_of_its_size():
    probes = dict.fromkeys(PROBE, pushed(length=1 / 8))
    assert failed(linear_gate(probes, norm="l2", eps=8 * EPS)) == set()


def test_answers_that_change_are_flagged():
    calls = []

    def count():
        calls.append(0)
        return np.float32(len(calls))

    def drifting(params, x):
        shift = jax.pure_callback(count, jax.ShapeDtypeStruct((), jnp.float32))
        return linear(params, x) + 1e-2 * shift * jnp.asarray([0.0, 1.0])

    assert "deterministic" in failed(linear_gate(None, drifting))


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_one_logit_that_is_not_finite_is_flagged_by_its_own_check(value):
    def holed(params, x):
        logits = linear(params, x)
        return logits.at[:, 0].set(jnp.where(x[:, 0, 0, 0] > 0.59, value, logits[:, 0]))

    checks = linear_gate(None, holed)
    share = float(np.mean(NEAR.image[:, 0, 0, 0] > 0.59))
    assert (checks["outputs_are_finite"]["figure"], checks["deterministic"]["figure"]) == (share, 0.0)
    assert 0 < share < 1
    assert {"outputs_are_finite"} <= failed(checks) and "deterministic" not in failed(checks)
    nothing = linear_gate(None, lambda params, x: linear(params, x) * value)
    assert nothing["outputs_are_finite"]["outcome"] == "failed"


def test_gradients_are_asked_for_in_every_batch():
    def dead_in_the_dark(params, x):
        return linear(params, x) * (jnp.mean(x, (1, 2, 3)) > 0.3)[:, None]

    image = np.concatenate([NEAR.image[:32], np.full((32, 8, 8, 1), 0.1, np.float32)])
    checks = linear_gate(None, dead_in_the_dark, image=image, batch_size=32)
    assert checks["no_gradient_is_zero"]["figure"] == 0.5


def test_differences_are_taken_on_a_step_of_the_norm():
    """Ripples that are fine in "linf", where the step is longer by the root of the number of pixels."""

    def rippled(params, x):
        score = jnp.sin((x.reshape(len(x), -1) - 0.5) @ SIGNS / 8 / 0.02)
        return jnp.stack([-score, score], 1)

    found = {norm: linear_gate(None, rippled, norm=norm)["gradient_predicts_differences"] for norm in ("linf", "l2")}
    assert {norm: check["outcome"] for norm, check in found.items()} == {"linf": "failed", "l2": "passed"}


def test_a_twin_that_is_never_right_says_nothing():
    checks = linear_gate(dict.fromkeys(PROBE, pushed()), undefended=(-SIGNS, 0.0))
    assert checks["undefended_twin_falls"]["outcome"] == "not applicable"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": NEAR.image * 255}, "the range of images is"),
        ({"image": NEAR.image * np.nan}, "the range of images is"),
        ({"label": NEAR.label + 1}, "label is"),
        ({"label": NEAR.label - 1}, "label is"),
    ],
)
def test_what_a_gate_says_nothing_about_is_one_clear_error(change, message):
    """Where no label is one of the model's, no image is right, and nothing could be found wrong with that."""
    with pytest.raises(ValueError, match=f"^{message}[^\\n]*$"):
        gate(linear, LINE, NEAR._replace(**change), None, KEY, 16, norm="linf", eps=EPS)

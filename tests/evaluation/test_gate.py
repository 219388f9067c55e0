"""The gate refuses ten broken defenses and lets five honest adversarially trained models pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from fedrobust import attacks, data, defenses, losses, ops
from fedrobust.evaluation import gate, is_overestimated
from fedrobust.types import Dataset, Found

KEY = jax.random.key(0)
EPS, SIZE = 0.1, 64
SPLITS = data.load("digits")
TEST = Dataset(SPLITS.test.image[:SIZE], SPLITS.test.label[:SIZE], 10)
PROBE = attacks.probes(norm="linf", num_steps=20, num_queries=200, num_slots=32)


def dense(*widths, activation):
    def init(key):
        pairs = list(zip((64, *widths), (*widths, 10), strict=True))
        return [(jax.random.normal(k, pair) / np.sqrt(pair[0]), jnp.zeros(pair[1]))
                for k, pair in zip(jax.random.split(key, len(pairs)), pairs, strict=True)]  # fmt: skip

    def apply(params, image):
        x = image.reshape(len(image), -1)
        for w, b in params[:-1]:
            x = activation(x @ w + b)
        return x @ params[-1][0] + params[-1][1]

    return init, apply


def convolutional(pool):
    def init(key):
        a, b = jax.random.split(key)
        return jax.random.normal(a, (3, 3, 1, 8)) / 3, jax.random.normal(b, (128, 10)) / 11, jnp.zeros(10)

    def apply(params, image):
        x = pool(jax.nn.relu(ops.group_norm(ops.conv(image, params[0]), 2)), (2, 2))
        return x.reshape(len(x), -1) @ params[1] + params[2]

    return init, apply


def winners(x):
    return jnp.where(x >= lax.top_k(x, 16)[0][:, -1:], x, 0)


MODELS = {
    "linear": dense(activation=None),
    "relu": dense(48, activation=jax.nn.relu),
    "tanh": dense(48, activation=jnp.tanh),
    "max pool": convolutional(ops.max_pool),
    "mean pool": convolutional(ops.avg_pool),
    "many": dense(256, 256, 256, activation=winners),
}
HONEST = ("linear", "relu", "tanh", "max pool", "mean pool")


@functools.cache
def trained(name, adversarial=True):
    init, apply = MODELS[name]
    attack = attacks.pgd(norm="linf", eps=EPS, step_size=EPS / 2, num_steps=3, random_start=True, keep_best=False)
    loss = losses.cross_entropy(apply)
    if adversarial:
        loss = defenses.adversarial_loss(loss, apply, attack, clean_share=0.0)
    optimizer = optax.adam(5e-3)
    image, label = jnp.asarray(SPLITS.train.image), jnp.asarray(SPLITS.train.label)

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (64,), 0, len(label))
        gradient = jax.grad(lambda p: jnp.mean(loss(key, p, image[rows], label[rows])))(params)
        update, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, update), state), None

    params = init(KEY)
    start = params, optimizer.init(params)
    return jax.jit(lambda start: lax.scan(step, start, jax.random.split(KEY, 250))[0][0])(start)


def verdict(apply, params, probes=PROBE, **settings):
    checks = gate(apply, params, TEST, probes, KEY, 64, norm="linf", eps=EPS, **settings)
    assert all(check["outcome"] in ("passed", "failed", "not applicable") for check in checks)
    return {check["check"]: check for check in checks}


def failed(checks):
    return {name for name, check in checks.items() if check["outcome"] == "failed"}


@pytest.mark.parametrize(
    "name", ["relu", *(pytest.param(name, marks=pytest.mark.slow) for name in HONEST if name != "relu")]
)
def test_an_honest_adversarially_trained_model_passes(name):
    apply, params = MODELS[name][1], trained(name)
    standing = np.ones(SIZE, bool)
    for member in attacks.auto_attack(
        version="standard", norm="linf", eps=EPS, num_classes=10, num_queries=200
    ).members:
        attack = attacks.run(member.search, num_slots=32)
        found = jax.jit(lambda todo, attack=attack: attack(KEY, lambda x: apply(params, x), *TEST[:2], todo))(standing)
        standing &= ~np.asarray(found.wrong)
    checks = verdict(apply, params, standing=standing)
    assert failed(checks) == set(), [checks[name] for name in failed(checks)]
    assert not is_overestimated(list(checks.values()))


def scaled(params, x):
    return 1e4 * RELU(params, x)


def rounded_inside(params, x):
    hidden = jax.nn.relu(x.reshape(len(x), -1) @ params[0][0] + params[0][1])
    return jnp.round(hidden * 8) / 8 @ params[1][0] + params[1][1]


def rounded_input(params, x):
    return RELU(params, jnp.round(x * 7) / 7)


def noisy(params, x):
    """Noise that follows from the image: the same each time, another one nearby."""
    seed = jnp.sum(lax.bitcast_convert_type(x, jnp.uint32), axis=(1, 2, 3))
    noise = jax.vmap(lambda s: jax.random.normal(jax.random.fold_in(KEY, s), x.shape[1:]))(seed)
    return RELU(params, x + 0.2 * noise)


def winners_take_all(params, x):
    return MODELS["many"][1](params, x)


def stopped(params, x):
    return RELU(params, lax.stop_gradient(x)) + 1e-3 * x.reshape(len(x), -1)[:, :10]


def saturated(params, x):
    return 20 * jnp.tanh(100 * RELU(params, x))


def batch_dependent(params, x):
    logits = RELU(params, x)
    return logits - 2 * jnp.mean(logits, axis=0)


def probabilities(params, x):
    return jax.nn.softmax(RELU(params, x))


RELU = MODELS["relu"][1]
BROKEN = {
    "temperature": (scaled, {"no_gradient_is_zero"}),
    "quantization": (rounded_inside, {"gradient_path_is_whole"}),
    "input rounding": (rounded_input, {"gradient_path_is_whole", "no_gradient_is_zero"}),
    "noise": (noisy, {"gradient_path_is_whole"}),
    "stop_gradient": (stopped, {"gradient_predicts_differences"}),
    "saturated logits": (saturated, {"no_gradient_is_zero"}),
    "batch-dependent outputs": (batch_dependent, {"rows_are_independent"}),
    "no logits": (probabilities, {"outputs_are_logits"}),
    "k winners take all": (winners_take_all, {"gradient_predicts_differences"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_defense_is_flagged(name):
    apply, expected = BROKEN[name]
    kind = "many" if name == "k winners take all" else "relu"
    checks = verdict(apply, trained(kind, adversarial=False), probes=None)
    assert failed(checks) >= expected, failed(checks)
    assert is_overestimated(list(checks.values()))


def test_a_saturated_winner_beside_a_decoy_is_flagged():
    """In float32 the winner's share of the softmax is 1 and its slope 0: cross-entropy sees the decoy alone."""
    strong, weak = jax.random.normal(KEY, (2, 256))
    image = jax.random.uniform(jax.random.key(1), (400, 16, 16, 1))

    def decoyed(params, x):
        signal, decoy = jnp.moveaxis((x.reshape(len(x), -1) - 0.5) @ jnp.stack([strong, 0.01 * weak], 1), 1, 0)
        return jnp.stack([jnp.where(signal > 0, 5 * signal, decoy), jnp.where(signal > 0, decoy, -5 * signal)], 1)

    logits = decoyed(None, image)
    margin = jnp.abs(logits[:, 0] - logits[:, 1])
    chosen = (margin > 20) & (margin < 30)  # a step of eps along the signs of `strong` moves it by 30
    dataset = Dataset(image[chosen], logits[chosen].argmax(1), 2)
    probes = dict.fromkeys(PROBE, PROBE["pgd"]) | {"auto_pgd": PROBE["auto_pgd"]}
    checks = gate(decoyed, None, dataset, probes, KEY, 64, norm="linf", eps=0.03)
    assert "auto_pgd_finds_no_more" in failed({check["check"]: check for check in checks})


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
    "nothing_is_right_unbounded": ({"pgd": pushed(idle=(0.9, 1.1))}, {}, None),
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

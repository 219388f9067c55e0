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
from fedrobust.types import Dataset
from tests.evaluation.gate_checks import EPS, KEY, PROBE, SIZE, failed

SPLITS = data.load("digits")
TEST = Dataset(SPLITS.test.image[:SIZE], SPLITS.test.label[:SIZE], 10)


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

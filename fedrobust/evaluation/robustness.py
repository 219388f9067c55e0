"""Robust accuracy over a named set of attacks, with the first checks of whether to believe it."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedrobust import check
from fedrobust.evaluation.accuracy import accuracies, is_degenerate, pad, predict, predicted_class
from fedrobust.types import Attack, Dataset, Key, Params

Apply = Callable[[Params, jax.Array], jax.Array]

TOLERANCE = 0.005
"""Accuracy by which a check that compares two attacks may be missed: their random starts differ."""


class Threat(NamedTuple):
    """One attack at one or more radii, with what must be said beside its numbers.

    Attributes:
        family: "fgsm", "pgd", ...
        norm: "linf" or "l2".
        eps: the radii > 0, in units of the image range [0, 1].
        steps: gradients per restart.
        restarts: independent starts.
        attack: builds it for a radius, which is traced: one program serves all radii. That its samples lie in the ball
            is among the checks. Keep the function, not a copy of it, from one model to the next: it is what a compiled
            program is remembered by.
    """

    family: str
    norm: str
    eps: tuple[float, ...]
    steps: int
    restarts: int
    attack: Callable[[jax.Array], Attack]

    def name(self, eps: float) -> str:
        """As in `pgd20_linf_0.031`: family, steps unless there is one, norm, radius with two significant digits."""
        return f"{self.family}{self.steps if self.steps > 1 else ''}_{self.norm}_{eps:.2g}"


Case = tuple[Threat, float, str]
"""A threat, one of its radii, and the name of the two."""


class Robustness(NamedTuple):
    """Robust accuracies and their verdict, both ready for JSON.

    Attributes:
        robust: by name of threat and radius, and `worst_NORM_EPS` for all threats of one norm and radius together:
            `accuracy`, `balanced_accuracy`, `degenerate`, `norm`, `eps`, `steps`, `restarts` (the last two None for the
            worst case). An example counts as right when it is right on the clean image and under the attack.
        checks: `{"check", "passed", "figure"}` each; one that fails says that the accuracies are not what they seem.
    """

    robust: dict[str, dict[str, Any]]
    checks: list[dict[str, Any]]


class _Outcome(NamedTuple):
    prediction: np.ndarray  # [N], the wrong class wherever one was found
    excess: float  # how far the worst sample lies outside the ball or the box


def evaluate(
    apply: Apply, params: Params, dataset: Dataset, threats: Sequence[Threat], key: Key, batch_size: int
) -> Robustness:
    """Attacks a model with every threat at every radius.

    Args:
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`, differentiable in the image. For a quantized model its
            dequantized form: through a rounding every gradient is 0, and the checks say so.
        params: its parameters.
        dataset: what to attack, N >= 1.
        threats: at least one; names must differ.
        key: shape (). Example i draws from a stream of its own, whatever the batch size.
        batch_size: images per call >= 1. One program is compiled per threat, and not again for another model with the
            same `apply` and shapes.

    Returns:
        `Robustness`.

    Raises:
        ValueError: no threat, two of one name, a radius not > 0, no example, batch_size < 1.
    """
    cases = [(threat, eps, threat.name(eps)) for threat in threats for eps in threat.eps]
    names = [name for _, _, name in cases]
    check.require(0 < len(names) == len(set(names)), "threats", names, "at least one, with different names")
    for _, eps, name in cases:
        check.positive(f"eps of {name}", eps)
    label = np.asarray(dataset.label)
    logits = predict(apply, params, dataset.image, batch_size)
    clean = predicted_class(logits)
    outcomes = {name: _outcome(apply, params, dataset, clean, t, eps, key, batch_size) for t, eps, name in cases}
    robust = {name: _entry(t, eps, outcomes[name].prediction, label) for t, eps, name in cases}
    checks = [
        *_check_strength(cases, robust),
        _check("samples_inside_ball", max(x.excess for x in outcomes.values()), 1e-5),
        _check("input_gradients_not_zero", _zero_gradient_share(apply, params, dataset, batch_size), 0.0),
        _check("logits_are_not_probabilities", _probability_share(logits), 0.99),
    ]
    for norm, eps in dict.fromkeys((threat.norm, eps) for threat, eps, _ in cases):
        worst = label
        for prediction in [outcomes[name].prediction for t, e, name in cases if (t.norm, e) == (norm, eps)]:
            worst = np.where(worst == label, prediction, worst)
        union = Threat("worst", norm, (eps,), 1, 1, threats[0].attack)
        robust[union.name(eps)] = {**_entry(union, eps, worst, label), "steps": None, "restarts": None}
    return Robustness(robust, checks)


def _outcome(
    apply: Apply,
    params: Params,
    dataset: Dataset,
    clean: np.ndarray,
    threat: Threat,
    eps: float,
    key: Key,
    batch_size: int,
) -> _Outcome:
    def program(index: jax.Array, image: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _attack(apply, threat.attack, threat.norm, params, np.float32(eps), key, index, image, label)

    logits, excess = _in_batches(program, dataset, batch_size)
    prediction = np.where(clean == np.asarray(dataset.label), predicted_class(logits), clean)
    return _Outcome(prediction, float(excess.max()))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _attack(
    apply: Apply,
    attack: Callable[[jax.Array], Attack],
    norm: str,
    params: Params,
    eps: jax.Array,
    key: Key,
    index: jax.Array,
    image: jax.Array,
    label: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Logits [B,L] under attack and how far [B] the samples lie outside the ball or the box.

    Each example is a batch of its own under `vmap`, so that its key follows from its number in the data set alone.
    """

    def one(index: jax.Array, image: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
        def logits_fn(x: jax.Array) -> jax.Array:
            return apply(params, x)

        sample = attack(eps)(jax.random.fold_in(key, index), logits_fn, image[None], label[None])
        delta = jnp.abs(sample[0] - image)
        distance = jnp.max(delta) if norm == "linf" else jnp.sqrt(jnp.sum(jnp.square(delta)))
        outside = jnp.maximum(-jnp.min(sample), jnp.max(sample) - 1)
        return logits_fn(sample)[0], jnp.maximum(distance - eps, outside)

    return jax.vmap(one)(index, image, label)


@functools.partial(jax.jit, static_argnums=0)
def _has_no_gradient(apply: Apply, params: Params, image: jax.Array, label: jax.Array) -> jax.Array:
    """[B] bool: the input gradient of the loss at the clean image is all zero or NaN."""

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(apply(params, x), label))

    return ~jnp.any(jnp.abs(jax.grad(loss)(image)) > 0, axis=(1, 2, 3))


def _in_batches(program: Callable[..., Any], dataset: Dataset, batch_size: int) -> list[np.ndarray]:
    """`program(index[B], image[B,...], label[B])` over a data set; its outputs [N,...] on the host, without padding."""
    image, label = np.asarray(dataset.image), np.asarray(dataset.label)
    parts = []
    for start in range(0, len(label), batch_size):
        rows = slice(start, start + batch_size)
        index = np.arange(start, start + batch_size, dtype=np.int32)
        parts.append(program(index, pad(image[rows], batch_size), pad(label[rows], batch_size)))
    return [np.concatenate([np.asarray(x) for x in part])[: len(label)] for part in zip(*parts, strict=True)]


def _entry(threat: Threat, eps: float, prediction: np.ndarray, label: np.ndarray) -> dict[str, Any]:
    accuracy, balanced_accuracy = accuracies(prediction, label)
    return {
        "accuracy": accuracy,
        "balanced_accuracy": balanced_accuracy,
        "degenerate": is_degenerate(prediction),
        "norm": threat.norm,
        "eps": eps,
        "steps": threat.steps,
        "restarts": threat.restarts,
    }


def _check(name: str, figure: float, limit: float) -> dict[str, Any]:
    return {"check": name, "passed": bool(figure <= limit), "figure": float(figure)}


def _check_strength(cases: Sequence[Case], robust: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What must hold between attacks, where there are two to compare: many steps beat one, a large radius a small."""
    accuracy = {name: robust[name]["accuracy"] for _, _, name in cases}
    pairs = [(a, b) for a in cases for b in cases if a[0].norm == b[0].norm]
    steps = [
        accuracy[pgd] - accuracy[fgsm]
        for (a, large, pgd), (b, small, fgsm) in pairs
        if (a.family, b.family) == ("pgd", "fgsm") and large == small
    ]
    radii = [
        accuracy[strong] - accuracy[weak]
        for (a, large, strong), (b, small, weak) in pairs
        if (a.family, a.steps, a.restarts) == (b.family, b.steps, b.restarts) and large > small
    ]
    checks = {"pgd_at_least_as_strong_as_fgsm": steps, "success_rises_with_eps": radii}
    return [_check(name, max(figures), TOLERANCE) for name, figures in checks.items() if figures]


def _zero_gradient_share(apply: Apply, params: Params, dataset: Dataset, batch_size: int) -> float:
    (zero,) = _in_batches(lambda _, x, y: (_has_no_gradient(apply, params, x, y),), dataset, batch_size)
    return float(np.mean(zero))


def _probability_share(logits: np.ndarray) -> float:
    """The share of rows in [0, 1] that sum to 1: a softmax before the loss flattens its gradients."""
    inside = ((logits >= 0) & (logits <= 1)).all(axis=1)
    return float(np.mean(inside & (np.abs(logits.sum(axis=1) - 1) < 1e-3)))

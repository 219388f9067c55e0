"""The verdict: questions that an evaluation with too weak attacks, or a model that hides its gradients, fails."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedrobust import check, trace
from fedrobust.evaluation.accuracy import predict, predicted_class
from fedrobust.evaluation.attacked import Apply, Attack, attack_all, probability_share, require_in_range
from fedrobust.evaluation.robustness import check_samples, checked
from fedrobust.types import Dataset, Key, Params

PROBES = ("fgsm", "pgd", "more_steps", "more_restarts", "auto_pgd", "square", "noise")
"""The attacks that the gate asks with, see `attacks.probes`."""

STEP = 0.1
"""Length over the radius of the step that gradients are compared with differences on."""


class _Subject(NamedTuple):
    apply: Apply
    params: Params
    dataset: Dataset
    norm: str
    key: Key
    batch_size: int


def gate(
    apply: Apply,
    params: Params,
    dataset: Dataset,
    probes: Mapping[str, Attack] | None,
    key: Key,
    batch_size: int,
    *,
    norm: str,
    eps: float,
    standing: np.ndarray | None = None,
    extra: Mapping[str, Attack] | None = None,
    undefended: Params | None = None,
) -> list[dict[str, Any]]:
    """Asks whether robust accuracies of a model can be believed.

    Args:
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`, the model as it is served.
        params: its parameters.
        dataset: N >= 2 examples; a part of the test split is enough.
        probes: attacks by the names of `PROBES`; None asks about outputs and gradients only.
        key: shape ().
        batch_size: images per prediction >= 1.
        norm: "linf" or "l2".
        eps: the radius > 0 that the accuracies are of; half and twice of it are tried as well, and on what they leave
            an eighth, a quarter, half and all of the range of images.
        standing: [N] bool, the examples that the evaluation counts as right at `eps`: no probe of several steps or
            questions may break more of them than a check's limit; "fgsm" is compared with "pgd" alone. None: those that
            the probe "pgd" leaves.
        extra: further attacks that must not find what the white-box ones do not, such as transfer from twins.
        undefended: parameters of the same model trained without a defense, which must fall.

    Returns:
        `Check`s as dictionaries. One that fails says that the accuracies are overestimated, or mean nothing.

    Raises:
        ValueError: a probe is missing, fewer than two examples, `standing` of another length, a number out of range;
            images outside [0, 1] or NaN, labels that the model has no logit for.

    Source: Carlini et al. 2019 (arXiv 1902.06705); Pintor et al. 2022, "Indicators of Attack Failure" (arXiv
        2106.09947); the flags of AutoAttack and the rules of RobustBench (arXiv 2010.09670). How each is measured, and
        its limit, is ours.
    """
    missing = [name for name in PROBES if probes is not None and name not in probes]
    check.require(not missing, "probes", sorted(probes or ()), f"with {', '.join(missing)}")
    check.positive("eps", eps)
    check.at_least("the number of examples", len(dataset.label), 2)
    check.one_of("norm", norm, ("linf", "l2"))
    if standing is not None:
        one_each = np.shape(standing) == np.shape(dataset.label)
        check.require(one_each, "standing", np.shape(standing), f"{len(dataset.label)} booleans, one per example")
    dataset = dataset._replace(image=np.asarray(dataset.image, np.float32), label=np.asarray(dataset.label))
    subject = _Subject(apply, params, dataset, norm, key, batch_size)
    logits = predict(apply, params, dataset.image, batch_size)
    require_in_range(dataset, logits.shape[1])
    checks = [*_outputs(subject, logits), *_gradients(subject, eps)]
    if probes is not None:
        right = predicted_class(logits) == dataset.label
        checks += _attacks(subject, right, standing, probes, eps, extra or {})
        checks.append(_undefended(subject, undefended, probes["pgd"], eps))
    return checks


def _outputs(subject: _Subject, logits: np.ndarray) -> list[dict[str, Any]]:
    """What the model says: logits, the same each time, each from its own image."""
    image = subject.dataset.image
    again = predict(subject.apply, subject.params, image, subject.batch_size)
    among_others = image.copy()
    among_others[1::2] = 1 - image[1::2]
    moved = predict(subject.apply, subject.params, among_others, subject.batch_size)[::2]
    finite = np.isfinite(logits)
    scale = float(np.max(np.abs(logits), where=finite, initial=1e-30))

    def change(now: np.ndarray, before: np.ndarray) -> float | None:
        """The largest, over the largest logit; where one of the two is not finite there must be the same again."""
        both = np.isfinite(now) & np.isfinite(before)
        if not np.array_equal(now[~both], before[~both], equal_nan=True):
            return float("inf")
        return float(np.max(np.abs(np.where(both, now, 0) - np.where(both, before, 0)))) / scale if both.any() else None

    return [
        checked("outputs_are_logits", probability_share(logits), 0.99),
        checked("outputs_are_finite", float(np.mean(~finite.all(axis=1))), 0.0),
        checked("deterministic", change(again, logits), 0.0),
        checked("rows_are_independent", change(moved, logits[::2]), 1e-3),
    ]


def _gradients(subject: _Subject, eps: float) -> list[dict[str, Any]]:
    """Whether the gradient in the image is there, whole, and says where the logits go."""
    apply, params, dataset, norm, key, batch_size = subject
    image, label = dataset.image, dataset.label
    names = trace.interruptions(lambda x: apply(params, x), jnp.asarray(image[:batch_size]))
    # What these take away may be nothing (a shift that a norm undoes; a slope, chosen by a sign): the differences tell.
    cut = [name for name in names if name not in ("stop_gradient", "choice")]
    length = STEP * eps * (float(np.sqrt(np.prod(image.shape[1:]))) if norm == "linf" else 1.0)
    parts = [slice(start, start + batch_size) for start in range(0, len(label), batch_size)]
    slopes = [jax.device_get(_slopes(apply, params, image[part], label[part], key, length)) for part in parts]
    zero, predicted, measured, noise = map(np.concatenate, zip(*slopes, strict=True))
    largest = np.maximum(np.maximum(np.abs(predicted), np.abs(measured)), noise)
    share = float(np.mean(~(np.abs(predicted - measured) < 0.5 * largest)))
    return [
        checked("no_gradient_is_zero", float(np.mean(zero)), 0.0),
        checked("gradient_path_is_whole", float(len(cut)), 0.0, ", ".join(cut)),
        checked("gradient_predicts_differences", share, 0.1, ", ".join(names)),
    ]


@functools.partial(jax.jit, static_argnums=0)
def _slopes(
    apply: Apply, params: Params, image: jax.Array, label: jax.Array, key: Key, length: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """[B] each: zero cross-entropy gradient; rise of the margin by its gradient, by differences; their rounding.

    The direction is the sum of the gradient's and a random one of the same length.
    """

    def entropy(x: jax.Array) -> jax.Array:
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(apply(params, x), label))

    def margin(x: jax.Array) -> jax.Array:
        logits = apply(params, x)
        own = jnp.arange(logits.shape[1]) == label[:, None]
        rest = jnp.max(jnp.where(own, -jnp.inf, logits), axis=1)
        return rest - jnp.sum(jnp.where(own, logits, 0), axis=1)

    axes = tuple(range(1, image.ndim))
    zero = ~jnp.any(jnp.abs(jax.grad(entropy)(image)) > 0, axis=axes)
    gradient = jax.grad(lambda x: jnp.sum(margin(x)))(image)

    def unit(x: jax.Array) -> jax.Array:
        length = jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))
        return x / jnp.where(length > 0, length, 1)

    direction = unit(unit(gradient) + unit(jax.random.normal(key, image.shape)))
    step = length * direction
    measured = (margin(image + step) - margin(image - step)) / 2
    predicted = jnp.sum(gradient * step, axis=axes)
    return zero, predicted, measured, 1e-5 * jnp.abs(margin(image)) + 1e-30


def _attacks(
    subject: _Subject,
    right: np.ndarray,
    standing: np.ndarray | None,
    probes: Mapping[str, Attack],
    eps: float,
    extra: Mapping[str, Attack],
) -> list[dict[str, Any]]:
    """What must hold between attacks: more is stronger, and none that is blind wins."""
    label = subject.dataset.label
    outcomes = []

    def attack(probe: Attack, radius: float, todo: np.ndarray) -> np.ndarray:
        """[N] bool: what is still right of `todo`."""
        outcome = attack_all(
            subject.apply, subject.params, subject.dataset, probe,
            norm=subject.norm, eps=radius, todo=todo, key=subject.key, batch_size=subject.batch_size,
        )  # fmt: skip
        outcomes.append((outcome, todo, radius))
        return todo & (outcome.prediction == label)

    left = {name: attack(probes[name], eps, right) for name in ("fgsm", "pgd", "more_steps", "more_restarts")}
    judged = left["pgd"] if standing is None else right & np.asarray(standing, bool)
    more = {name: judged & left["pgd"] & left[name] for name in ("more_steps", "more_restarts")}
    on_entropy = functools.reduce(np.logical_and, left.values(), judged)
    white = attack(probes["auto_pgd"], eps, on_entropy)
    blind = {name: attack(probes[name], eps, white) for name in ("square", "noise")}
    others = {name: attack(other, eps, white) for name, other in extra.items()}
    weaker, stronger = (attack(probes["pgd"], factor * eps, right) for factor in (0.5, 2.0))
    everything = 1.0 if subject.norm == "linf" else float(np.sqrt(np.prod(subject.dataset.image.shape[1:])))
    unbounded = white & stronger  # what a ball holds, a larger one does, though from afar no slope may lead there
    for share in (1 / 8, 1 / 4, 1 / 2, 1):
        for name in ("more_steps", "auto_pgd"):
            unbounded = attack(probes[name], share * everything, unbounded)

    def gain(after: np.ndarray, before: np.ndarray) -> float:
        return (int(np.sum(before)) - int(np.sum(after))) / len(label)  # exactly a limit of one example

    lost = max((gain(x, white) for x in others.values()), default=None)
    furthest = outcomes[1][0].distance[left["pgd"]] / eps
    one = 1 / len(label)  # on few examples a limit is at least one of them
    return [
        checked("pgd_at_least_as_strong_as_fgsm", gain(left["fgsm"], left["pgd"]), max(0.005, one)),
        checked("more_steps_find_no_more", gain(more["more_steps"], judged), max(0.005, 2 * one)),
        checked("more_restarts_find_no_more", gain(more["more_restarts"], judged), max(0.005, 2 * one)),
        checked("auto_pgd_finds_no_more", gain(white, on_entropy), max(0.02, 2 * one)),
        checked("success_rises_with_eps", max(gain(weaker, left["pgd"]), gain(left["pgd"], stronger)), max(0.005, one)),
        checked("nothing_is_right_unbounded", float(np.mean(unbounded)), max(0.01, one)),
        checked("the_radius_is_used_up", float(1 - np.median(furthest)) if len(furthest) else None, 0.1),
        checked("square_finds_no_more", gain(blind["square"], white), max(0.002, one)),
        checked("noise_finds_no_more", gain(blind["noise"], white), max(0.002, one)),
        checked("transfer_finds_no_more", lost, max(0.002, one), ", ".join(others)),
        *check_samples(outcomes, label),
    ]


def _undefended(subject: _Subject, params: Params | None, probe: Attack, eps: float) -> dict[str, Any]:
    """A twin without a defense must fall."""
    name, limit = "undefended_twin_falls", 0.1
    if params is None:
        return checked(name, None, limit, "no undefended twin was given")
    label, size = subject.dataset.label, subject.batch_size
    todo = predicted_class(predict(subject.apply, params, subject.dataset.image, size)) == label
    if not todo.any():
        return checked(name, None, limit, "the twin is right nowhere")
    outcome = attack_all(
        subject.apply, params, subject.dataset, probe,
        norm=subject.norm, eps=eps, todo=todo, key=subject.key, batch_size=size,
    )  # fmt: skip
    return checked(name, float(np.mean(todo & (outcome.prediction == label))), limit)

"""Robust accuracy: the worst case of each example over a named set of attacks, with its interval."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedrobust import check, intervals
from fedrobust.evaluation.accuracy import accuracies, is_degenerate, predict, predicted_class
from fedrobust.evaluation.attacked import NORMS, Apply, Attack, Outcome, attack_all, require_attackable
from fedrobust.types import Dataset, Key, Params

CONFIDENCE = 0.95

TOLERANCE = 0.005
"""Accuracy by which a check that compares two attacks may be missed: their random starts differ."""


class Threat(NamedTuple):
    """One attack at one or more radii, with what must be said beside its numbers.

    Attributes:
        family: "fgsm", "pgd", "apgd_ce", ...
        norm: "linf", "l2" or "l1".
        eps: the radii >= 0, in units of the image range [0, 1].
        steps: questions per try.
        restarts: tries.
        attack: builds it for a radius.
    """

    family: str
    norm: str
    eps: tuple[float, ...]
    steps: int
    restarts: int
    attack: Attack

    def name(self, eps: float) -> str:
        """As in `pgd20_linf_0.031`: family, steps unless there is one, norm, radius with two significant digits."""
        return f"{self.family}{self.steps if self.steps > 1 else ''}_{self.norm}_{eps:.2g}"


Case = tuple[Threat, float, str]
"""A threat, one of its radii, and the name of the two."""


class Robustness(NamedTuple):
    """Robust accuracies, ready for JSON.

    Attributes:
        robust: by name of threat and radius, and `worst_NORM_EPS` for all threats of one norm and radius together:
            `accuracy`, `balanced_accuracy`, `degenerate`, `norm`, `eps`, `steps`, `restarts` (the last two None for the
            worst case) and `interval`, the 95 % Clopper-Pearson interval of the accuracy over draws of the data set. An
            example counts as right when it is right on the clean image and under the attack.
        checks: those of the samples themselves, see `evaluation.Check`. `gate` asks some by the same names of its own
            attacks' samples, so that a name can occur twice in a list of both.
        broken: `(norm, eps)` -> [N] bool, which examples are wrong in the worst case.
    """

    robust: dict[str, dict[str, Any]]
    checks: list[dict[str, Any]]
    broken: dict[tuple[str, float], np.ndarray]


class Check(NamedTuple):
    """One question to an evaluation, ready for JSON as `check._asdict()`.

    Attributes:
        check: its name.
        outcome: "passed", "failed" or "not applicable".
        figure: what was measured; None where it does not apply.
        limit: the largest figure that passes.
        detail: names or a reason, where there is more to say.
    """

    check: str
    outcome: str
    figure: float | None
    limit: float
    detail: str = ""


def checked(name: str, figure: float | None, limit: float, detail: str = "") -> dict[str, Any]:
    """A `Check` of a figure that must not exceed its limit; None does not apply, NaN fails."""
    outcome = "not applicable" if figure is None else "passed" if figure <= limit else "failed"
    return Check(name, outcome, figure, limit, detail)._asdict()


def is_overestimated(checks: Sequence[dict[str, Any]]) -> bool:
    """Whether a check failed: robust accuracies beside it are too high, or mean nothing."""
    return any(check["outcome"] == "failed" for check in checks)


def evaluate(
    apply: Apply,
    params: Params,
    dataset: Dataset,
    threats: Sequence[Threat],
    key: Key,
    batch_size: int,
    *,
    cascade: bool,
) -> Robustness:
    """Attacks a model with every threat at every radius.

    Args:
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`, the model as it is served: success is counted on it.
        params: its parameters.
        dataset: what to attack, N >= 1.
        threats: at least one; names must differ.
        key: shape (). Example i draws from a stream of its own.
        batch_size: images per prediction >= 1.
        cascade: attack only what no threat before has broken, largest radius first, and at a smaller one only what a
            larger has broken: an example that withstands all threats at one radius counts as right at the smaller. An
            entry is then what is left after its threat, not the threat's own accuracy.

    Returns:
        `Robustness`. A radius of 0 gives the clean accuracy exactly.

    Raises:
        ValueError: no threat, two threats or two radii of one name, an unknown norm, different radii in a cascade, a
            negative radius, no example, a batch_size < 1; images, labels or outputs that `require_attackable` refuses.

    Source: the worst case per example: Croce, Hein 2020 (arXiv 2003.01690), section 6; the interval: Clopper, Pearson
        1934.
    """
    cases = [(threat, eps, threat.name(eps)) for threat in threats for eps in threat.eps]
    unions = {(t.norm, eps): Threat("worst", t.norm, (eps,), 1, 1, t.attack) for t, eps, _ in cases}
    _check_names(cases, [union.name(*union.eps) for union in unions.values()])
    for norm in dict.fromkeys(threat.norm for threat in threats):
        radii = sorted({tuple(sorted(set(threat.eps))) for threat in threats if threat.norm == norm})
        check.require(not cascade or len(radii) == 1, f"eps of the {norm} threats", radii, "the same for a cascade")
    logits = predict(apply, params, dataset.image, batch_size)
    require_attackable(dataset, logits)
    label, clean = np.asarray(dataset.label), predicted_class(logits)
    dataset = dataset._replace(image=np.asarray(dataset.image, np.float32), label=label)
    robust, outcomes, broken = {}, [], {}
    for norm in dict.fromkeys(threat.norm for threat in threats):
        fragile = clean == label  # at every larger radius; only these are tried at a smaller one
        for eps in sorted({eps for threat, eps, _ in cases if threat.norm == norm}, reverse=True):
            worst = clean.copy()
            for threat in [threat for threat, e, _ in cases if (threat.norm, e) == (norm, eps)]:
                todo = fragile & (worst == label) if cascade else clean == label
                outcome = attack_all(
                    apply, params, dataset, threat.attack,
                    norm=norm, eps=eps, todo=todo, key=key, batch_size=batch_size,
                )  # fmt: skip
                outcomes.append((outcome, todo, eps))
                worst = np.where((worst == label) & todo, outcome.prediction, worst)
                own = worst if cascade else np.where(todo, outcome.prediction, clean)
                robust[threat.name(eps)] = _entry(own, label, threat, eps)
            union = unions[norm, eps]
            robust[union.name(eps)] = {**_entry(worst, label, union, eps), "steps": None, "restarts": None}
            broken[norm, eps] = worst != label
            fragile &= worst != label
    strength = [] if cascade else _check_strength(cases, robust)
    return Robustness(robust, [*check_samples(outcomes, label), *strength], broken)


def check_samples(outcomes: Sequence[tuple[Outcome, np.ndarray, float]], label: np.ndarray) -> list[dict[str, Any]]:
    """What must hold of every attack's samples: in the ball, and as wrong for the served model as reported.

    Args:
        outcomes: with what was to be attacked, [N] bool, and the radius of each.
        label: [N].
    """
    attacked = [case for case in outcomes if case[1].any()]
    beyond = [o.outside / max(1.0, eps) for o, _, eps in attacked]  # rounding grows with the radius
    differ = [np.mean((o.found != (o.prediction != label)) & todo) for o, todo, _ in attacked]
    return [
        checked("samples_inside_ball", float(np.max(beyond)) if beyond else None, 1e-5),
        checked("success_is_reproduced", float(np.max(differ)) if differ else None, max(TOLERANCE, 1 / len(label))),
    ]


def _check_names(cases: Sequence[Case], of_unions: Sequence[str]) -> None:
    names = [name for _, _, name in cases]
    own = len(names) == len({*names} - {*of_unions}) > 0
    check.require(own, "threats", names, "at least one, with different names, none that of a worst case")
    radii = sorted({eps for _, eps, _ in cases})
    check.require(len({*of_unions}) == len(of_unions), "eps", radii, "radii that differ in their first two digits")
    for threat, eps, name in cases:
        check.one_of(f"norm of {name}", threat.norm, NORMS)
        check.non_negative(f"eps of {name}", eps)


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
    return [checked(name, max(figures, default=None), TOLERANCE) for name, figures in checks.items()]


def _entry(prediction: np.ndarray, label: np.ndarray, threat: Threat, eps: float) -> dict[str, Any]:
    accuracy, balanced_accuracy = accuracies(prediction, label)
    right, total, side = int(np.sum(prediction == label)), len(label), (1 + CONFIDENCE) / 2
    return {
        "accuracy": accuracy,
        "balanced_accuracy": balanced_accuracy,
        "degenerate": is_degenerate(prediction),
        "norm": threat.norm,
        "eps": eps,
        "steps": threat.steps,
        "restarts": threat.restarts,
        "interval": [float(bound(right, total, side)) for bound in (intervals.lower, intervals.upper)],
    }

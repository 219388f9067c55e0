"""AutoAttack: the published sets of attacks, and what stands in where one is not defined."""

from typing import NamedTuple

from fedrobust import check
from fedrobust.attacks.auto_pgd import NORMS, auto_pgd
from fedrobust.attacks.balls import Radius
from fedrobust.attacks.fab import fab
from fedrobust.attacks.objectives import OBJECTIVES
from fedrobust.attacks.square import square
from fedrobust.types import Search

VERSIONS = ("standard", "plus", "rand")

_MAX_TARGETS = 9
_STAND_IN = {"dlr": "margin", "targeted_dlr": "targeted_margin"}


class Member(NamedTuple):
    """One attack of the set.

    Attributes:
        name: as published: "apgd_ce", "apgd_dlr", "apgd_t", "fab_t", "square".
        search: to be given to `run`, on the examples that no member before it broke.
    """

    name: str
    search: Search


class Replacement(NamedTuple):
    """What differs from the published set.

    Attributes:
        member: the name of the member.
        published: what it is there.
        used: what stands in for it.
        reason: why.
    """

    member: str
    published: str
    used: str
    reason: str


class AutoAttack(NamedTuple):
    """A set of attacks, in the order in which they run.

    Attributes:
        members: at least two.
        replaced: what differs from the published set; empty where all of it is defined.
        num_samples: draws per question that `run` must be told; None for a deterministic model.
    """

    members: tuple[Member, ...]
    replaced: tuple[Replacement, ...]
    num_samples: int | None


def auto_attack(
    *,
    version: str,
    norm: str,
    eps: Radius,
    num_classes: int,
    num_steps: int = 100,
    num_queries: int = 5000,
    num_samples: int = 20,
) -> AutoAttack:
    """The sets of Croce and Hein, their settings as the defaults.

    - "standard": Auto-PGD with cross-entropy, with targeted DLR, targeted FAB, Square;
    - "plus": Auto-PGD with cross-entropy and with DLR, targeted FAB, each with 5 starts; Square; Auto-PGD with targeted
      DLR;
    - "rand", for randomised models: Auto-PGD with cross-entropy and with DLR, by expectation over transformation.

    Targets are the 9 classes of the largest logits, or all others where there are fewer.

    Args:
        version: one of the above.
        norm: "linf" or "l2".
        eps: radius of the ball >= 0, in units of the image range [0, 1].
        num_classes: L >= 2 of the model.
        num_steps: of Auto-PGD and FAB, >= 1.
        num_queries: of Square, >= 1.
        num_samples: of "rand": draws of the model per question, >= 1.

    Returns:
        An `AutoAttack`; `replaced` says what differs: two classes have no DLR and fewer than four no targeted one (the
        margin, or targeted margin, stands in), and one targeted FAB stands for the two of "plus".

    Raises:
        ValueError: unknown version or norm, a number out of range.

    Source:
        Croce, Hein 2020, https://arxiv.org/abs/2003.01690, section 6, and the versions of their code's documentation.
    """
    check.one_of("version", version, VERSIONS)
    check.one_of("norm", norm, NORMS)
    check.at_least("num_classes", num_classes, 2)
    check.at_least("num_samples", num_samples, 1)
    num_targets = min(_MAX_TARGETS, num_classes - 1)

    def pgd(name: str, objective: str, num_restarts: int, num_targets: int = 1) -> Member:
        return Member(
            name,
            auto_pgd(
                norm=norm,
                eps=eps,
                num_steps=num_steps,
                random_start=True,
                objective=_defined(objective, num_classes),
                num_restarts=num_restarts,
                num_targets=num_targets,
            ),
        )

    def boundary(num_restarts: int) -> Member:
        search = fab(norm=norm, eps=eps, num_steps=num_steps, num_targets=num_targets, num_restarts=num_restarts)
        return Member("fab_t", search)

    black_box = Member("square", square(norm=norm, eps=eps, num_queries=num_queries, p_init=0.8))
    entropy, targeted = ("apgd_ce", "cross_entropy"), ("apgd_t", "targeted_dlr", 1, num_targets)
    members = {
        "standard": (pgd(*entropy, 1), pgd(*targeted), boundary(1), black_box),
        "plus": (pgd(*entropy, 5), pgd("apgd_dlr", "dlr", 5), boundary(5), black_box, pgd(*targeted)),
        "rand": (pgd(*entropy, 1), pgd("apgd_dlr", "dlr", 1)),
    }[version]
    replaced = [_replacement(member.name, num_classes) for member in members]
    if version == "plus":
        replaced.append(Replacement("fab_t", "fab and fab_t", "fab_t", "the untargeted one has no targets of its own"))
    return AutoAttack(members, tuple(x for x in replaced if x), num_samples if version == "rand" else None)


def _defined(objective: str, num_classes: int) -> str:
    """The objective, or what stands in for it where it is not defined."""
    return objective if num_classes >= OBJECTIVES[objective].min_classes else _STAND_IN[objective]


def _replacement(name: str, num_classes: int) -> Replacement | None:
    objective = {"apgd_dlr": "dlr", "apgd_t": "targeted_dlr"}.get(name, "cross_entropy")
    used = _defined(objective, num_classes)
    if used == objective:
        return None
    return Replacement(name, objective, used, f"{objective} is not defined for {num_classes} classes")

"""AutoAttack: the published sets of attacks, and what stands in where one is not defined."""

from typing import NamedTuple

from fedrobust import check
from fedrobust.attacks.auto_pgd import auto_pgd
from fedrobust.attacks.balls import NORMS, Radius
from fedrobust.attacks.fab import fab
from fedrobust.attacks.objectives import OBJECTIVES
from fedrobust.attacks.square import square
from fedrobust.types import Search

VERSIONS = ("standard", "plus", "rand")

_MAX_TARGETS = 9
_OBJECTIVES = {"apgd_ce": "cross_entropy", "apgd_dlr": "dlr", "apgd_t": "targeted_dlr"}
_STAND_IN = {"dlr": "margin", "targeted_dlr": "targeted_margin"}


class Member(NamedTuple):
    """One attack of the set.

    Attributes:
        name: as published: "apgd_ce", "apgd_dlr", "apgd_t", "fab_t", "square".
        num_steps: of each of its tries; of "square", queries.
        search: to be given to `run`, on the examples that no member before it broke.
    """

    name: str
    num_steps: int
    search: Search


class Replacement(NamedTuple):
    """What differs from the published set.

    Attributes:
        member: the name of the member.
        published: what it is there.
        used: what stands in for it; "" where nothing does.
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

    - "standard": Auto-PGD with cross-entropy, with targeted DLR, targeted FAB, Square; in "l1" the first takes 5 starts
      and the second 5 targets;
    - "plus": Auto-PGD with cross-entropy and with DLR, targeted FAB, each with 5 starts; Square; Auto-PGD with targeted
      DLR;
    - "rand", for randomised models: Auto-PGD with cross-entropy and with DLR, by expectation over transformation.

    Other targets are the 9 classes of the largest logits; all others where there are fewer.

    Args:
        version: one of the above.
        norm: "linf", "l2" or, for "standard", "l1".
        eps: radius of the ball >= 0, in units of the image range [0, 1].
        num_classes: L >= 2 of the model.
        num_steps: of Auto-PGD and FAB, >= 1.
        num_queries: of Square, >= 1.
        num_samples: of "rand": draws of the model per question, >= 1.

    Returns:
        An `AutoAttack`; `replaced` says what differs: two classes have no DLR and fewer than four no targeted one (the
        margin, or targeted margin, stands in), one targeted FAB stands for the two of "plus", and "rand" counts no
        success that new draws do not confirm.

    Raises:
        ValueError: unknown version or norm, a number out of range.

    Source:
        Croce, Hein 2020, https://arxiv.org/abs/2003.01690, section 6, and the versions of their code's documentation.
        "l1": Croce, Hein 2021, https://arxiv.org/abs/2103.01208, restarts and targets as in the same code.
    """
    check.one_of("version", version, VERSIONS)
    check.one_of("norm", norm, NORMS if version == "standard" else ("linf", "l2"))
    check.at_least("num_classes", num_classes, 2)
    check.at_least("num_samples", num_samples, 1)
    num_starts, most_targets = (5, 5) if norm == "l1" else (1, _MAX_TARGETS)

    def pgd(name: str, num_restarts: int, num_targets: int = 1) -> Member:
        return Member(
            name,
            num_steps,
            auto_pgd(
                norm=norm,
                eps=eps,
                num_steps=num_steps,
                random_start=True,
                objective=_defined(_OBJECTIVES[name], num_classes),
                num_restarts=num_restarts,
                num_targets=min(num_targets, num_classes - 1),
            ),
        )

    def boundary(num_restarts: int) -> Member:
        num_targets = min(_MAX_TARGETS, num_classes - 1)
        search = fab(norm=norm, eps=eps, num_steps=num_steps, num_targets=num_targets, num_restarts=num_restarts)
        return Member("fab_t", num_steps, search)

    search = square(norm=norm, eps=eps, num_queries=num_queries, p_init=0.8, rescale_schedule=False)
    black_box = Member("square", num_queries, search)
    targeted = pgd("apgd_t", 1, most_targets)
    members = {
        "standard": (pgd("apgd_ce", num_starts), targeted, boundary(1), black_box),
        "plus": (pgd("apgd_ce", 5), pgd("apgd_dlr", 5), boundary(5), black_box, targeted),
        "rand": (pgd("apgd_ce", 1), pgd("apgd_dlr", 1)),
    }[version]
    replaced = [x for member in members if (x := _replacement(member.name, num_classes))]
    if version == "plus":
        replaced.append(_one_boundary_attack(num_classes))
    if version == "rand":
        replaced.append(_JUDGED_AGAIN)
    return AutoAttack(members, tuple(replaced), num_samples if version == "rand" else None)


_JUDGED_AGAIN = Replacement(
    "all",
    "a success at any question",
    "the point of the largest margin, judged by new draws",
    "among many questions one succeeds by the luck of its draws",
)


def _one_boundary_attack(num_classes: int) -> Replacement:
    costs = "with two classes both are the same"
    if num_classes > 2:
        costs = f"an untargeted step takes {num_classes - 1} gradients: 5 starts per target stand in for it"
    return Replacement("fab_t", "fab and fab_t", "fab_t", costs)


def _replacement(name: str, num_classes: int) -> Replacement | None:
    objective = _OBJECTIVES.get(name)
    if objective is None or (used := _defined(objective, num_classes)) == objective:
        return None
    return Replacement(name, objective, used, f"{objective} is not defined for {num_classes} classes")


def _defined(objective: str, num_classes: int) -> str:
    """The objective, or what stands in for it where it is not defined."""
    return objective if num_classes >= OBJECTIVES[objective].min_classes else _STAND_IN[objective]

"""From settings to a federation: data on clients, a privacy plan, and one compiled round per kind of training."""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.combinations.settings import AT, Study
from experiments.ways import Way
from fedrobust import attacks, compression, data, defenses, federated, losses, models, privacy, threads
from fedrobust.types import Attack, ClientUpdate, Cohort, Federated, GradFn, LogitsFn, Loss, Model, Params

Apply = Callable[[Params, jax.Array], jax.Array]
Objective = Callable[[jax.Array, jax.Array], jax.Array]

# Purposes of host generators, beyond those of `fedrobust.data`: NumPy takes [s, 1] and [s, 1, 0] for one seed.
_PARTITION, _LABEL_COUNTS = 101, 102

_plan = threads.cached(maxsize=8)(privacy.make_plan)  # a search of seconds, the same for all rows of a study

RULES = ("mean", "rule")
"""What the aggregator can be switched between without compiling again: plain averaging, the study's robust rule."""


class Hospitals(NamedTuple):
    """The data of one seed: Attributes: splits; parts: each client's rows of the training split."""

    splits: data.Splits
    parts: list[np.ndarray]

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name the training records and whose they are."""
        train = self.splits.train
        found = hashlib.sha256()
        for array in (train.image, train.label, *self.parts):
            found.update(np.ascontiguousarray(array).tobytes())
            found.update(repr(np.shape(array)).encode())
        return found.hexdigest()[:12]


@dataclass(frozen=True)
class Recipe:
    """How one combination is trained: hashable, so that equal recipes share one compiled round.

    Attributes:
        study: the settings.
        dp: whether gradients are private.
        at: whether samples are adversarial.
        plan: the privacy plan of every silo; None without privacy.
        class_weight: weights after the clip, one per class; () without privacy or without label counts.
        num_records: nominal size of a silo, public.
        way: how updates are said; None: as they are.
    """

    study: Study
    dp: bool
    at: bool
    plan: privacy.Plan | None
    class_weight: tuple[float, ...]
    num_records: float
    way: Way | None = None

    @property
    def num_rounds(self) -> int:
        """Rounds of the whole training."""
        return (self.study.dp if self.dp else self.study.train).num_rounds


def hospitals(study: Study, seed: int) -> Hospitals:
    """Loads the data and shares it out."""
    splits = data.load(study.dataset, data_dir=study.data_dir)
    options = {"alpha": study.alpha} if study.partition in ("dirichlet", "quantity_skew") else {}
    rng = np.random.default_rng([seed, _PARTITION])
    parts = data.PARTITIONS[study.partition](rng, splits.train.label, study.clients, min_size=1, **options)
    return Hospitals(splits, parts)


@threads.cached(maxsize=4)  # one object for all rows: what is compiled for it is shared
def build_model(study: Study, image_shape: tuple[int, int, int], num_classes: int) -> Model:
    """The study's architecture for the data at hand."""
    return models.build(
        study.model,
        builder=study.builder,
        image_shape=image_shape,
        num_classes=num_classes,
        width=study.width,
        groups=study.norm_groups,
    )


def make_plan(study: Study, site: Hospitals) -> privacy.Plan:
    """The privacy of every silo; looks at nothing but their sizes, which are public.

    Raises:
        ValueError: a plan that cannot be made.
    """
    return _plan(
        unit="record",
        relation="add_or_remove_one",
        sampling="poisson",
        epsilon=study.dp.epsilon,
        delta=study.dp.delta,
        sampling_rate=study.dp.sampling_rate,
        num_steps=study.dp.num_rounds,
        num_units=max(len(part) for part in site.parts),
        histogram_epsilon=study.dp.histogram_epsilon,
    )


def make_recipe(study: Study, seed: int, site: Hospitals, *, plan: privacy.Plan | None, at: bool) -> Recipe:
    """How a combination is trained; releases what it needs to know of the labels, which must have been charged."""
    if plan is None:
        return Recipe(study, False, at, None, (), 0.0)
    class_weight: tuple[float, ...] = ()
    if plan.histogram_epsilon > 0:
        label, num_classes = site.splits.train.label, site.splits.train.num_classes
        counts = np.stack([np.bincount(label[part], minlength=num_classes) for part in site.parts])
        weight = privacy.private_class_weight(
            np.random.default_rng([seed, _LABEL_COUNTS]), counts, histogram_epsilon=plan.histogram_epsilon
        )
        class_weight = tuple(weight.tolist())
    return Recipe(study, True, at, plan, class_weight, len(site.splits.train.label) / len(site.parts))


def cohorts(recipe: Recipe, site: Hospitals, seed: int, malicious: tuple[int, ...]) -> Callable[[int], Cohort]:
    """All clients in every round; batches and equal weights as planned under privacy, shuffled epochs without."""
    train, settings = site.splits.train, recipe.study.train
    if recipe.plan is not None:
        private = data.CohortSettings(num_steps=1, client_sampling="all", batch_sampling="sampler", weighting="equal")
        return data.make_cohorts(
            train, site.parts, private, seed=seed, batch_sampler=recipe.plan.sampler, malicious=malicious
        )
    shuffled = data.CohortSettings(
        num_steps=settings.num_steps,
        client_sampling="all",
        batch_sampling="shuffle",
        batch_size=settings.batch_size,
        weighting="examples",
    )
    return data.make_cohorts(train, site.parts, shuffled, seed=seed, malicious=malicious)


def federation(recipe: Recipe, apply: Apply, params: Params, teacher: LogitsFn | None = None) -> Federated:
    """The federated algorithm of a recipe for a model, and for the one it learns from if there is one.

    Args:
        recipe: how.
        apply: the model's function.
        params: of the model; their shapes count, not their values.
        teacher: the model it learns from.
    """
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda params: params, params))
    return _federation(recipe, apply, tuple(leaves), structure, teacher)


@threads.cached(maxsize=16)  # one compiled round per recipe and model, shared by all rows that differ in neither
def _federation(
    recipe: Recipe,
    apply: Apply,
    leaves: tuple[jax.ShapeDtypeStruct, ...],
    structure: jax.tree_util.PyTreeDef,
    teacher: LogitsFn | None,
) -> Federated:
    study, way = recipe.study, recipe.way
    codec = None if way is None else way.build(jax.tree.unflatten(structure, leaves))
    rule = defenses.AGGREGATORS[study.poison.rule]
    options = {"trim_fraction": study.poison.malicious_share} if study.poison.rule == "trimmed_mean" else {}
    backend = None if study.client_map == "auto" else study.client_map
    return federated.fedavg(
        lambda round: client_update(recipe, apply, round, teacher),
        defenses.choice(defenses.mean(), rule(**options)),
        server_optimizer(recipe),
        lambda fn: federated.map_clients(fn, backend=backend),
        update_attack=attacks.sign_flip(study.poison.scale),
        average_decay=(study.dp if recipe.dp else study.train).average_decay,
        codec=codec,
        num_clients=None if way is None else study.clients,
        downlink=codec if way is not None and way.both else None,
    )


def server_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Momentum over noised steps under privacy, plain averaging of local models without."""
    if not recipe.dp:
        return optax.sgd(1.0)
    settings = recipe.study.dp
    schedule = optax.cosine_decay_schedule(settings.learning_rate, settings.num_rounds)
    return optax.sgd(schedule, momentum=settings.momentum)


def client_update(recipe: Recipe, apply: Apply, round: jax.Array, teacher: LogitsFn | None = None) -> ClientUpdate:
    """What a client does in a round: one noised gradient under privacy, local Adam without."""
    loss = example_loss(recipe, apply, round, teacher)
    if not recipe.dp:
        schedule = optax.cosine_decay_schedule(recipe.study.train.learning_rate, recipe.num_rounds)
        return federated.local_update(federated.mean_grad(loss), optax.adam(schedule(round)), skip_empty=True)
    return federated.local_update(private_gradient(recipe, loss), optax.sgd(1.0), skip_empty=False)


def private_gradient(recipe: Recipe, loss: Loss) -> GradFn:
    """DP-SGD's gradient under the recipe's plan."""
    settings, plan = recipe.study.dp, recipe.plan
    assert plan is not None
    clipped = privacy.clipped_grad(loss, clip_norm=settings.clip_norm, microbatch_size=settings.microbatch_size)
    class_weight = jnp.asarray(recipe.class_weight) if recipe.class_weight else None
    return privacy.private_grad(
        clipped,
        plan,
        num_records=recipe.num_records,
        class_weight=class_weight,
        num_shares=recipe.study.clients if settings.noise == "secure_sum" else 1,
    )


def example_loss(recipe: Recipe, apply: Apply, round: jax.Array, teacher: LogitsFn | None = None) -> Loss:
    """Distance from the labels, and from a teacher's answers where there is one.

    Where AT takes part it is that of adversarial samples, or TRADES; their radius grows over the first rounds.
    """
    settings: AT = recipe.study.at
    eps = settings.eps * defenses.linear_warmup(num_rounds=recipe.num_rounds, share=settings.warmup)(round)
    attack = functools.partial(training_attack, settings, eps)
    if teacher is not None:
        return compression.distillation_loss(
            apply,
            teacher,
            temperature=1.0,
            label_share=recipe.study.mc.label_share,
            attack=attack if recipe.at else None,
            clean_share=settings.clean_share,
        )
    loss = losses.cross_entropy(apply)
    if not recipe.at:
        return loss
    if settings.trades_beta > 0:
        return defenses.trades_loss(apply, attack, beta=settings.trades_beta, start_stddev=0.0)
    return defenses.adversarial_loss(loss, apply, attack(), clean_share=settings.clean_share)


def training_attack(
    settings: AT, eps: float | jax.Array, objective: Objective = optax.softmax_cross_entropy_with_integer_labels
) -> Attack:
    """The PGD inside adversarial training, at the radius `eps`."""
    return attacks.pgd(
        objective=objective,
        norm="linf",
        eps=eps,
        step_size=settings.relative_step * eps,
        num_steps=settings.num_steps,
        random_start=True,
        keep_best=False,
    )

"""One step of the study's training, with and without its worst record."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.audit.settings import Audit
from experiments.combinations.federation import Apply, Hospitals, Recipe, example_loss, private_gradient
from fedrobust import keys, privacy
from fedrobust.types import Batch, Loss, Params

NUM_CANDIDATES = 64
BATCH_SIZE = 16
CHUNK_NUMBERS = 4_000_000  # normals drawn at a time: 16 MB


class OneStep(NamedTuple):
    """What was measured: Attributes: gaussian, clopper_pearson: lower bounds; canary_norm: over the clip norm."""

    gaussian: float
    clopper_pearson: float
    canary_norm: float


def measure(settings: Audit, recipe: Recipe, apply: Apply, params: Params, seed: int, site: Hospitals) -> OneStep:
    """Audits the private gradient of a trained model on a batch of the first hospital.

    The canary is the mislabelled image, of up to 64, that moves the noised sum most. Draws of adversarial samples are
    fixed and known to the attacker; the noise is all that hides the canary.
    """
    key = keys.stream(keys.root(seed), "audit")
    drawn = example_loss(recipe, apply, jnp.asarray(recipe.num_rounds - 1))

    def loss(_: jax.Array, params: Params, image: jax.Array, label: jax.Array) -> jax.Array:
        return drawn(key, params, image, label)

    inside, outside, norm = _batches(recipe, loss, params, site)
    scores = privacy.one_step_scores(
        private_gradient(recipe, loss),
        key,
        params,
        outside,
        inside,
        num_trials=settings.trials,
        chunk_size=max(1, min(settings.trials, CHUNK_NUMBERS // sum(x.size for x in jax.tree.leaves(params)))),
    )
    if not np.isfinite(np.concatenate(scores)).all():
        return OneStep(0.0, 0.0, norm)  # a diverged model tells nothing
    options = {"delta": settings.dp.delta, "confidence": settings.confidence}
    return OneStep(
        privacy.epsilon_gaussian(scores, **options), privacy.epsilon_clopper_pearson(scores, **options), norm
    )


def _batches(recipe: Recipe, loss: Loss, params: Params, site: Hospitals) -> tuple[Batch, Batch, float]:
    """A batch with the canary in its first place, the same without it, and the canary's norm over the clip norm."""
    train, part = site.splits.train, site.parts[0]
    clip_norm = recipe.study.dp.clip_norm
    candidate = part[:NUM_CANDIDATES]
    wrong = (train.label[candidate] + 1) % train.num_classes
    everyone = jnp.ones(len(candidate), bool)
    clipped = jax.jit(privacy.clipped_grad(loss, clip_norm=clip_norm))
    norm = clipped(jax.random.key(0), params, Batch(train.image[candidate], wrong, everyone))[1].norm
    norm = np.nan_to_num(np.asarray(norm) / clip_norm, posinf=0)
    weight = np.asarray(recipe.class_weight)[wrong] if recipe.class_weight else 1.0
    best = int(np.argmax(weight * np.minimum(norm, 1)))
    others = part[part != candidate[best]][: BATCH_SIZE - 1]
    rows = np.concatenate([[candidate[best]], others])
    label = train.label[rows].copy()
    label[0] = wrong[best]
    inside = Batch(train.image[rows], label, jnp.ones(len(rows), bool))
    return inside, inside._replace(mask=jnp.arange(len(rows)) > 0), float(norm[best])

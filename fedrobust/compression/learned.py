"""Scores that are learned on a loss, such as the adversarial one, instead of read from weights.

The weights stay what they are; a score per unit decides which of them the model runs with, and the scores follow the
gradient. What is learned goes to `masks(score=...)`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fedrobust import check, trees
from fedrobust.compression.pruning import Apply, Channels, require_like_params
from fedrobust.compression.scores import l2_scores
from fedrobust.compression.selection import num_removed
from fedrobust.types import Key, Loss, Params

_NUM_IMAGES = 8
_TOLERANCE = 1e-5
"""Largest difference of logits, over the largest logit or 1, that is taken for rounding."""


def initial_scores(channels: Channels, params: Params) -> jax.Array:
    """Where learning starts: at the order of the units' L2 norms.

    Args:
        channels: the model's units.
        params: trained parameters, concrete float arrays.

    Returns:
        [U] float32 in [0, 1], each unit's norm over the largest of its group; 0 in a group of zeros.

    Source: Sehwag et al., HYDRA, 2020, https://arxiv.org/abs/2002.10509, section 3. Deviations: a score per unit, not
        per weight, and no factor of the fan-in, which only scales the learning rate of a layer.
    """
    scores = np.sqrt(l2_scores(channels, params))
    for group in np.unique(channels.group):
        members = channels.group == group
        scores[members] /= max(scores[members].max(), np.finfo(np.float32).tiny)
    return jnp.asarray(scores, jnp.float32)


def loss_of_scores(loss: Loss, apply: Apply, channels: Channels, params: Params, *, sparsity: float) -> Loss:
    """The loss of the masked model as a function of the scores that choose the masks.

    Forwards the best units of every group stay and the others are zero, as `masks` would have it; backwards a score
    gets the gradient of its unit's factor, as if the factors were the scores. A factor stands where the unit is read
    and not also where it is made: with both zero neither has a gradient, and what is removed could never come back.

    Args:
        loss: `(key, params, image[B,...], label[B]) -> loss[B]`, an adversarial one included.
        apply: the model that `channels` was read from.
        channels: its units.
        params: the weights, which stay as they are.
        sparsity: in [0, 1), the share of units that goes, of each group.

    Returns:
        A `Loss` of the scores [U] in place of the parameters: for `jax.grad` and any optax optimizer.

    Raises:
        ValueError: sparsity outside [0, 1), or parameters of other shapes.

    Guarantees:
        Entry i depends on example i alone where the same holds of `loss`. A gradient of scores is a gradient on private
        data: under privacy the loss goes through `privacy.clipped_grad` and `privacy.private_grad` like any other,
        each step charged to the ledger, with noise in U dimensions only.

    Source: Sehwag et al., HYDRA, 2020, https://arxiv.org/abs/2002.10509, section 3, with the gradient of Ramanujan et
        al., 2020, https://arxiv.org/abs/1911.13299, section 3. Deviation: whole units, the same share of every group.
    """
    check.fraction("sparsity", sparsity, one=False)
    require_like_params("params", params, channels)
    places = gated_places(apply, channels)

    def of_scores(key: Key, scores: jax.Array, image: jax.Array, label: jax.Array) -> jax.Array:
        gates = scores + jax.lax.stop_gradient(_best(channels, scores, sparsity) - scores)
        return loss(key, trees.multiply(params, _gated(channels, gates, places)), image, label)

    return of_scores


def _best(channels: Channels, scores: jax.Array, sparsity: float) -> jax.Array:
    """[U] float32 ones for the units that stay; of equal scores the earlier goes, as in `masks`."""
    keep = jnp.ones(scores.shape, jnp.float32)
    for group in np.unique(channels.group):
        members = np.flatnonzero(channels.group == group)
        order = jnp.argsort(scores[members], stable=True)
        keep = keep.at[jnp.asarray(members)[order[: num_removed(sparsity, len(members))]]].set(0)
    return keep


def gated_places(apply: Apply, channels: Channels) -> list[list[bool]]:
    """A smallest set of places where a factor of zero does what removing a unit does.

    Found by trying, with random parameters: place after place is left out as long as the logits stay. Vectors go first,
    then last axes, so that what remains mostly is where the next layer reads a unit.

    Args:
        apply: the model that `channels` was read from.
        channels: its units.

    Returns:
        For each leaf and each of its axes, whether factors stand there.
    """
    rng = np.random.default_rng(0)
    params = channels.structure.unflatten([_drawn(rng, shape) for shape in channels.shapes])
    images = jnp.asarray(rng.uniform(size=(_NUM_IMAGES, *channels.image.shape[1:])), channels.image.dtype)
    half = rng.random(len(channels.group)) < 0.5
    gates = jnp.asarray(np.stack([half, ~half]), jnp.float32)
    places = [[bool((axis >= 0).any()) for axis in axes] for axes in channels.unit]
    logits = jax.jit(lambda masks: apply(trees.multiply(params, masks), images))

    def found() -> np.ndarray:
        return np.stack([np.asarray(logits(_gated(channels, g, places))) for g in gates])

    wanted = found()
    tried = [(i, j) for i, axes in enumerate(places) for j, gated in enumerate(axes) if gated]
    for i, j in sorted(tried, key=lambda place: (len(places[place[0]]) > 1, place[1] < len(places[place[0]]) - 1)):
        places[i][j] = False
        if not np.abs(found() - wanted).max() <= _TOLERANCE * max(1.0, np.abs(wanted).max()):
            places[i][j] = True
    return places


def _drawn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Parameters none of which is zero or one, of a size that lets signals through."""
    z = rng.normal(size=shape)
    return (0.5 + 0.2 * z if len(shape) < 2 else z / math.sqrt(math.prod(shape[:-1]))).astype(np.float32)


def _gated(channels: Channels, gates: jax.Array, places: list[list[bool]]) -> Params:
    """Masks like those of `masks_from_units`, at some places only, differentiable in the gates [U]."""
    gates = jnp.append(gates, jnp.ones((), gates.dtype))  # index -1 always stays
    leaves = []
    for axes, shape, gated in zip(channels.unit, channels.shapes, places, strict=True):
        mask = jnp.ones(shape, gates.dtype)
        for i, axis in enumerate(axes):
            if gated[i]:
                mask *= gates[axis].reshape([-1 if j == i else 1 for j in range(len(shape))])
        leaves.append(mask)
    return channels.structure.unflatten(leaves)

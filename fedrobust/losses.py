"""Per-example losses."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedrobust import check
from fedrobust.types import Key, Loss, Params

MakeViews = Callable[[Key, Any], Any]
"""`(key, image[B,...]) -> image[B,K,...]`, K views of each record, each made from its own record alone."""


def cross_entropy(apply: Callable[[Params, jax.Array], jax.Array]) -> Loss:
    """Softmax cross-entropy in nats.

    Args:
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`.

    Returns:
        A `Loss`: `(key, params, image[B,H,W,C], label[B]) -> loss[B]`. The key is not used.
    """

    def loss(key: Key, params: Params, image: jax.Array, label: jax.Array) -> jax.Array:
        del key
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, image), label)

    return loss


def mean_over_views(loss: Loss, make_views: MakeViews) -> Loss:
    """The mean loss of K views of each record: augmentations, crops, several scans of one patient.

    Under differential privacy views must not be rows of a batch: each would be clipped by itself, and one record
    would move the sum by K times the clip norm. Here one record stays one loss, one gradient and one clip.

    Args:
        loss: of a batch of B * K views; an adversarial loss attacks every view by itself.
        make_views: see `MakeViews`. For data that hold their views already, `lambda key, image: image`.

    Returns:
        A `Loss` of records. Its key is split: one for the views, one for the loss.

    Raises:
        ValueError: make_views returns no axis of views.

    Source: De, Berrada, Hayes, Smith, Balle 2022 (arXiv 2204.13650), section 3.2, "augmentation multiplicity".
    """

    def mean_loss(key: Key, params: Params, image: jax.Array, label: jax.Array) -> jax.Array:
        of_views, of_loss = jax.random.split(key)
        views = make_views(of_views, image)
        shapes = {x.shape[:2] for x in jax.tree.leaves(views)}
        size, num_views = shapes.pop() if len(shapes) == 1 else (0, 0)
        fits = size == jax.tree.leaves(label)[0].shape[0] and num_views >= 1
        check.require(fits, "views", sorted(shapes) or (size, num_views), "of shape [B, K, ...], K >= 1")
        views = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), views)
        label = jax.tree.map(lambda x: jnp.repeat(x, num_views, axis=0), label)
        return jnp.mean(loss(of_loss, params, views, label).reshape(size, num_views), axis=1)

    return mean_loss


def random_views(augment: Callable[[Key, jax.Array], jax.Array], *, num_views: int) -> MakeViews:
    """K independent random views of each record.

    Args:
        augment: `(key, image[...]) -> image[...]` of one record, such as `data.random_shift(2)`.
        num_views: K >= 1.

    Returns:
        A `MakeViews`. View k of record i draws from `fold_in(fold_in(key, i), k)`.

    Raises:
        ValueError: num_views < 1.
    """
    check.at_least("num_views", num_views, 1)

    def make_views(key: Key, image: Any) -> Any:
        def of_record(i: jax.Array, x: Any) -> Any:
            keys = jax.vmap(lambda k: jax.random.fold_in(jax.random.fold_in(key, i), k))(jnp.arange(num_views))
            return jax.vmap(augment, (0, None))(keys, x)

        size = jax.tree.leaves(image)[0].shape[0]
        return jax.vmap(of_record)(jnp.arange(size), image)

    return make_views

"""Randomised smoothing: a radius within which no perturbation, of any attack, changes the prediction."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from fedrobust import check, intervals, threads
from fedrobust.evaluation.attacked import require_images
from fedrobust.types import Key, Params

Apply = Callable[[Params, jax.Array], jax.Array]

ABSTAIN = -1
"""The prediction of a smoothed classifier that the draws do not settle; never right."""


class Certificates(NamedTuple):
    """What a smoothed classifier predicts, and how far that holds.

    Attributes:
        prediction: [N] int, the class, or `ABSTAIN`.
        radius: [N] float64 >= 0, L2, in units of the image range [0, 1]; 0 where it abstains. Open: at distances
            strictly below it the smoothed classifier predicts the same.
        failure_probability: of each certificate by itself, in (0, 1), over the noise that was drawn.
    """

    prediction: np.ndarray
    radius: np.ndarray
    failure_probability: float


class CertifiedAccuracy(NamedTuple):
    """The share of examples predicted right wherever they are moved to within a radius.

    Attributes:
        accuracy: the share with a certificate, in [0, 1].
        lower: at least this share of these very examples deserves one: accuracy less what may be wrong.
        population_lower: at least this share of the distribution from which these were drawn independently.
    """

    accuracy: float
    lower: float
    population_lower: float


def certify(
    apply: Apply,
    params: Params,
    image: npt.ArrayLike,
    key: Key,
    *,
    stddev: float,
    num_selection: int,
    num_estimation: int,
    failure_probability: float,
    batch_size: int,
) -> Certificates:
    """Certifies the smoothed classifier `argmax_c P(apply(params, image + N(0, stddev^2)) = c)`.

    The base model should have been trained on noisy images: `losses.mean_over_views` with views that add noise. It is
    asked about images outside [0, 1].

    Args:
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`, any model at all: it is never differentiated.
        params: its parameters.
        image: [N,H,W,C] float32 in [0, 1], N >= 1.
        key: shape ().
        stddev: of the noise > 0, in units of the image range.
        num_selection: n0 >= 1, draws that choose the class (100 in the paper).
        num_estimation: n >= 1, fresh draws that bound its probability (100 000 in the paper). The radius cannot exceed
            `stddev * Phi^-1(failure_probability ** (1 / n))`.
        failure_probability: alpha in [1e-9, 1) of each certificate (0.001 in the paper).
        batch_size: noisy images per call of the model >= 1.

    Returns:
        `Certificates`, see there.

    Raises:
        ValueError: a number out of range, no image, or one outside [0, 1] or with a NaN.

    Guarantees:
        A prediction that is not the smoothed classifier's, or a radius above its true one, has a probability of at
        most alpha. Not guaranteed: anything against errors of float rounding in noise and model, which the proof
        takes for real numbers (Jin et al. 2022, arXiv 2205.10159).

    Source: Cohen, Rosenfeld, Kolter 2019 (arXiv 1902.02918), Algorithm CERTIFY, Theorem 1 and Proposition 2.
    """
    _check_failure(failure_probability)
    counts = noisy_counts(
        apply,
        params,
        image,
        key,
        stddev=stddev,
        num_selection=num_selection,
        num_estimation=num_estimation,
        batch_size=batch_size,
    )
    return certificates(counts, num_estimation, stddev=stddev, failure_probability=failure_probability)


def noisy_counts(
    apply: Apply,
    params: Params,
    image: npt.ArrayLike,
    key: Key,
    *,
    stddev: float,
    num_selection: int,
    num_estimation: int,
    batch_size: int,
) -> np.ndarray:
    """How often a model predicts each class under Gaussian noise.

    Args:
        apply: as for `certify`; compiled once, for `batch_size` images.
        params: as for `certify`.
        image: as for `certify`.
        key: draw s of example i is `normal(fold_in(fold_in(key, i), s))`, whatever the batch size.
        stddev: as for `certify`.
        num_selection: the first draws, counted by themselves.
        num_estimation: the draws after them.
        batch_size: as for `certify`. Where it does not divide the number of draws, the rest is computed and dropped.

    Returns:
        [N,2,L] int32: counts of selection and of estimation. A draw whose logits hold a NaN counts for no class.

    Raises:
        ValueError: a number out of range, no image, or one outside [0, 1] or with a NaN.
    """
    image = np.asarray(image, np.float32)
    check.at_least("the number of images", len(image), 1)
    require_images(image)
    check.positive("stddev", stddev)
    numbers = {"num_selection": num_selection, "num_estimation": num_estimation, "batch_size": batch_size}
    for name, number in numbers.items():
        check.at_least(name, number, 1)
    total = num_selection + num_estimation
    check.require(total + batch_size < 2**31, "num_selection + num_estimation", total, "less than 2**31 - batch_size")
    limits = np.array([num_selection, total], np.int32)

    def count(i: int) -> jax.Array:
        return _count(apply, batch_size, params, image[i], jax.random.fold_in(key, i), np.float32(stddev), limits)

    with threads.COMPILING:
        first = count(0)
    return np.stack([np.asarray(x) for x in (first, *(count(i) for i in range(1, len(image))))])


def certificates(counts: np.ndarray, num_estimation: int, *, stddev: float, failure_probability: float) -> Certificates:
    """From counts to certificates.

        c = argmax selection,  p = Clopper-Pearson lower bound of P(c) from estimation,  radius = stddev Phi^-1(p)

    Args:
        counts: [N,2,L] int, of independent draws for selection and for estimation.
        num_estimation: n, draws behind the second row, also those that counted for no class.
        stddev: of the noise > 0.
        failure_probability: alpha in [1e-9, 1); p is a bound at confidence 1 - alpha.

    Returns:
        `Certificates`; it abstains where p <= 1/2.

    Raises:
        ValueError: a number out of range; counts of another shape, or above n.
    """
    from scipy.stats import norm  # takes half a second to import

    counts = np.asarray(counts)
    check.require(counts.ndim == 3 and counts.shape[1] == 2, "the shape of counts", counts.shape, "[N, 2, L]")
    check.positive("stddev", stddev)
    _check_failure(failure_probability)
    selection, estimation = counts[:, 0], counts[:, 1]
    chosen = np.argmax(selection, axis=1)
    bound = intervals.lower(estimation[np.arange(len(counts)), chosen], num_estimation, 1 - failure_probability)
    settled = bound > 0.5
    radius = np.where(settled, stddev * norm.ppf(np.where(settled, bound, 0.5)), 0.0)
    return Certificates(np.where(settled, chosen, ABSTAIN), radius, failure_probability)


def certified_accuracy(
    found: Certificates, label: npt.ArrayLike, radius: float, *, confidence: float
) -> CertifiedAccuracy:
    """The share of examples that are right, and certified to stay so at a distance of `radius`.

    With at most k wrong certificates among N, up to a probability of 1 - confidence: k is the quantile of the binomial
    of N trials at alpha. For the distribution: a random example is certified with a probability of at most alpha more
    than it deserves to be, so Clopper and Pearson's lower bound less alpha holds.

    Args:
        found: certificates, from noise that is independent from example to example.
        label: [N] int >= 0.
        radius: >= 0, L2; at 0 the accuracy of the smoothed classifier.
        confidence: in (0, 1), of each of the two lower bounds by itself.

    Returns:
        `CertifiedAccuracy`.

    Raises:
        ValueError: a number or a label out of range, or lengths that differ.

    Source: Cohen, Rosenfeld, Kolter 2019 (arXiv 1902.02918), section 4 and its appendix on approximate certified
        accuracy. Deviation: the binomial's own quantile, not Bernstein's bound on it.
    """
    from scipy.stats import binom  # takes half a second to import

    label = np.asarray(label)
    check.require(label.shape == found.prediction.shape, "the shape of label", label.shape, f"{found.prediction.shape}")
    check.at_least("the smallest label", label.min(initial=0), 0)
    check.non_negative("radius", radius)
    check.fraction("confidence", confidence, zero=False, one=False)
    num, alpha = len(label), found.failure_probability
    certified = int(np.sum((found.prediction == label) & (found.radius > radius)))
    wrong = int(binom.isf(1 - confidence, num, alpha))
    population = float(intervals.lower(certified, num, confidence)) - alpha
    return CertifiedAccuracy(certified / num, max(0, certified - wrong) / num, max(0.0, population))


def _check_failure(probability: float) -> None:
    """1 less anything smaller would be rounded."""
    check.require(1e-9 <= probability < 1, "failure_probability", probability, "in [1e-9, 1)")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _count(
    apply: Apply, batch_size: int, params: Params, image: jax.Array, key: Key, stddev: jax.Array, limits: jax.Array
) -> jax.Array:
    """[2,L] int32: predictions of draws 0 to limits[0], and from there to limits[1]. The number of draws is traced."""

    def logits(first: int | jax.Array) -> jax.Array:
        draws = first + jnp.arange(batch_size)
        noise = jax.vmap(lambda s: jax.random.normal(jax.random.fold_in(key, s), image.shape))(draws)
        return apply(params, image + stddev * noise)

    def batch(i: jax.Array, counts: jax.Array) -> jax.Array:
        found = logits(i * batch_size)
        draws = i * batch_size + jnp.arange(batch_size)
        hit = jax.nn.one_hot(jnp.argmax(found, axis=1), num_classes, dtype=jnp.int32)
        hit = jnp.where(jnp.isnan(found).any(axis=1, keepdims=True), 0, hit)
        parts = jnp.stack([draws < limits[0], (draws >= limits[0]) & (draws < limits[1])]).astype(jnp.int32)
        return counts + parts @ hit

    num_classes = jax.eval_shape(logits, 0).shape[1]
    num_batches = -(-limits[1] // batch_size)
    return jax.lax.fori_loop(0, num_batches, batch, jnp.zeros((2, num_classes), jnp.int32))

"""What dishonest clients do to the data they train on."""

from collections.abc import Callable

from fedrobust import check
from fedrobust.types import Attack, Batch, Cohort, Key, LogitsFn


def flip_labels(num_classes: int) -> Callable[[Cohort], Cohort]:
    """Malicious clients train on label `L - 1 - y` in place of y.

    Args:
        num_classes: L >= 2.

    Returns:
        `cohort -> cohort`, on NumPy or JAX arrays alike; honest clients and all other fields are untouched. Twice is
        the identity; with an odd L the middle class stays.

    Raises:
        ValueError: num_classes not a whole number >= 2.

    Source:
        Fang, Cao, Jia, Gong 2020, https://arxiv.org/abs/1911.11815, section 4.1 ("Label flipping attack").
    """
    check.at_least("num_classes", num_classes, 2)

    def poison(cohort: Cohort) -> Cohort:
        label = cohort.batch.label
        flip = cohort.malicious.astype(label.dtype).reshape(cohort.malicious.shape + (1,) * (label.ndim - 1))
        label = label + flip * (num_classes - 1 - 2 * label)
        return cohort._replace(batch=cohort.batch._replace(label=label))

    return poison


def adversarial_samples(attack: Attack) -> Callable[[Key, LogitsFn, Batch], Batch]:
    """A malicious client trains on adversarial samples of the model it was sent, with their true labels.

    It passes for honest adversarial training while it spends the model's accuracy on samples nobody will see. For
    samples with wrong labels compose it with `flip_labels` after it.

    Args:
        attack: finds the samples.

    Returns:
        `(key, logits_fn, batch[B]) -> batch[B]`: images replaced, labels and mask kept. Padding stays padding.

    Source:
        Usynin, Klause, Paetzold, Rueckert, Kaissis 2022, https://arxiv.org/abs/2205.02652: adversarial samples at
        training time.
    """

    def poison(key: Key, logits_fn: LogitsFn, batch: Batch) -> Batch:
        return batch._replace(image=attack(key, logits_fn, batch.image, batch.label))

    return poison

"""Knowledge distillation: a small model learns what a large one answers, clean, under attack, and in private."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedrobust import check
from fedrobust.types import Attack, Key, LogitsFn, Loss, Params

Objective = Callable[[jax.Array, jax.Array], jax.Array]
"""`(logits[B,L], label[B]) -> value[B]`, every row from its own logits alone."""


def distillation_loss(
    apply: Callable[[Params, jax.Array], jax.Array],
    teacher: LogitsFn,
    *,
    temperature: float,
    label_share: float,
    attack: Callable[[Objective], Attack] | None = None,
    clean_share: float = 0.0,
) -> Loss:
    """How far a student's answers are from the teacher's answers to the clean image, and from the label.

        term(x')  = label_share CE(s(x'), y) + (1 - label_share) T^2 KL(softmax(t(x) / T) || softmax(s(x') / T))
        loss      = term(x) without an attack, else clean_share term(x) + (1 - clean_share) term(x')

    The sample x' makes the divergence large within the attack's ball; the teacher is asked about the clean image alone,
    so a robust student needs no teacher that is robust at x'.

    Under privacy one record is still one loss and one gradient to clip (`privacy.clipped_grad`), and the student's plan
    pays for the student. It does not pay for the teacher: one trained on the same records must itself be private, and
    both trainings are charged; one trained elsewhere costs nothing. A student that learns from a private teacher on
    public images, with `label_share` 0, sees no private record at all: the teacher's guarantee is the student's.

    Args:
        apply: the student, `(params, image[B,H,W,C]) -> logits[B,L]`.
        teacher: `image[B,H,W,C] -> logits[B,L]`, every row from its own image alone, over the same classes; a constant.
        temperature: T > 0; larger ones tell more of the classes that the teacher ranks low.
        label_share: weight of the label in [0, 1]; at 0 labels are never read, at 1 the teacher is never asked: the
            attack makes the label's loss large.
        attack: what makes an objective large, such as `lambda objective: pgd(..., objective=objective)`. An attack that
            has an objective of its own is `lambda _: attack`. None distils on clean images.
        clean_share: weight of the clean image in [0, 1]; at 0 no clean pass of the student is computed, at 1 no attack.

    Returns:
        A `Loss`, in nats. Its gradient runs through the student's answers only: not through the teacher, not through
        the attack.

    Raises:
        ValueError: a setting out of range.

    Source:
        Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531, section 2; adversarial: ARD, Goldblum et
        al. 2020, https://arxiv.org/abs/1905.09747 (its label term is that of the clean image), and RSLAD, Zi et al.
        2021, https://arxiv.org/abs/2108.07969, which is T = 1, label_share 0, clean_share 1/6.
    """
    check.positive("temperature", temperature)
    check.fraction("label_share", label_share)
    check.fraction("clean_share", clean_share)

    def loss(key: Key, params: Params, image: jax.Array, label: jax.Array) -> jax.Array:
        fixed, clean = jax.lax.stop_gradient((params, image))
        of_label = optax.softmax_cross_entropy_with_integer_labels
        divergence = of_label if label_share == 1 else _divergence(teacher(clean), temperature)

        def term(logits: jax.Array) -> jax.Array:
            if label_share == 1:
                return of_label(logits, label)
            if label_share == 0:
                return divergence(logits, label)  # public images may have labels of other classes, or none
            return label_share * of_label(logits, label) + (1 - label_share) * divergence(logits, label)

        if attack is None or clean_share == 1:
            return term(apply(params, image))
        sample = jax.lax.stop_gradient(attack(divergence)(key, lambda x: apply(fixed, x), clean, label))
        if clean_share == 0:
            return term(apply(params, sample))
        logits = apply(params, jnp.concatenate([image, sample]))
        return clean_share * term(logits[: len(label)]) + (1 - clean_share) * term(logits[len(label) :])

    return loss


def _divergence(answer: jax.Array, temperature: float) -> Objective:
    """T^2 KL(softmax(answer / T) || softmax(logits / T)), the teacher's answer a constant."""
    target = jax.lax.stop_gradient(jax.nn.log_softmax(answer / temperature))

    def divergence(logits: jax.Array, label: jax.Array) -> jax.Array:
        del label
        of_student = jax.nn.log_softmax(logits / temperature)
        return temperature**2 * jnp.sum(jnp.exp(target) * (target - of_student), axis=-1)

    return divergence

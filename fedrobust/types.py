"""The tuples and function types that every room of the library shares.

Letters used for shapes: K clients, S local steps, B batch, H W C image, L classes, D parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

Params = Any
"""A pytree of float arrays."""

Key = jax.Array
"""A typed JAX PRNG key of shape ()."""


class Model(NamedTuple):
    """A model as two pure functions; Flax, Haiku or plain `jnp` all fit.

    Attributes:
        init: `(key, image[B,H,W,C]) -> params`.
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`, every row computed from its own image alone.
    """

    init: Callable[[Key, jax.Array], Params]
    apply: Callable[[Params, jax.Array], jax.Array]


class Batch(NamedTuple):
    """One padded batch of one client.

    Attributes:
        image: [B,H,W,C] float32 in [0, 1]; for losses that take something else, any pytree of arrays [B,...].
        label: [B] int32 in [0, L); likewise.
        mask: [B] bool; False marks padding, whose image and label may hold anything, NaN included.
    """

    image: jax.Array
    label: jax.Array
    mask: jax.Array


class Cohort(NamedTuple):
    """The clients of one round, padded to a fixed K, and the batches each will train on.

    Attributes:
        id: [K] int32, unique among the clients that are present; it names the client's random stream.
        weight: [K] float32 >= 0, the client's share in the average; 0 marks an absent (padding) client.
        malicious: [K] bool, which clients an attack controls. Known to the simulation, never to an aggregator.
        batch: a `Batch` with leading axes [K,S,B].
    """

    id: jax.Array
    weight: jax.Array
    malicious: jax.Array
    batch: Batch


class Dataset(NamedTuple):
    """Labelled images in memory, on the host.

    Attributes:
        image: [N,H,W,C] float32 in [0, 1].
        label: [N] int32 in [0, num_classes).
        num_classes: L >= 2.
    """

    image: Any
    label: Any
    num_classes: int


class Sampler(NamedTuple):
    """Draws who enters one step, on the host, with as many places as are ever needed.

    Attributes:
        draw: `(rng, num) -> places`, sorted, distinct, in [0, num), at most `capacity` of them.
        capacity: the fixed, padded size of what is drawn.
        tail: the probability that a draw had to be cut to fit; the plan that made the sampler has paid for it.
        sizes: the populations `num` it may draw from.
    """

    draw: Callable[[np.random.Generator, int], np.ndarray]
    capacity: int
    tail: float
    sizes: range


LogitsFn = Callable[[jax.Array], jax.Array]
"""`image[B,H,W,C] -> logits[B,L]`."""

Attack = Callable[[Key, LogitsFn, jax.Array, jax.Array], jax.Array]
"""`(key, logits_fn, image[B,H,W,C], label[B]) -> image[B,H,W,C]`, still in [0, 1]."""


class Answer(NamedTuple):
    """What the model says about one image that a search asked about.

    Attributes:
        logits: [L].
        value: [] the search's objective there, larger is worse for the model; 0 for a search without one.
        gradient: [H,W,C] of `value` in the image; zeros for a search without an objective.
    """

    logits: jax.Array
    value: jax.Array
    gradient: jax.Array


class Search(NamedTuple):
    """An attack on one image as a state machine that asks about points and is told answers; it never calls the model.

    `fedrobust.attacks.run` drives it over many images at once. A try is one run of the machine; its state is a pytree
    of fixed shapes.

    Attributes:
        start: `(key, image[H,W,C], logits[L] at the image, label[], index[] int32 of the try) -> state`. What sets the
            tries apart, such as a target class, follows from `key` and `index` and is kept in the state.
        point: `state -> image[H,W,C]` in [0, 1], what to ask about next.
        learn: `(state, answer) -> state`.
        ended: `state -> [] bool`, nothing more to ask; a try also ends at its first success and after `num_queries`.
        objective: `(logits[L], label[], state) -> value[]`, differentiated in the image; None for a black box.
        inside: `(image, point) -> [] bool`, whether a success at the point counts: in the ball up to float rounding.
        num_tries: restarts times targets, of each example, >= 1.
        num_queries: questions of one try, at most, >= 1.
    """

    start: Callable[[Key, jax.Array, jax.Array, jax.Array, jax.Array], Any]
    point: Callable[[Any], jax.Array]
    learn: Callable[[Any, Answer], Any]
    ended: Callable[[Any], jax.Array]
    objective: Callable[[jax.Array, jax.Array, Any], jax.Array] | None
    inside: Callable[[jax.Array, jax.Array], jax.Array]
    num_tries: int
    num_queries: int


class Found(NamedTuple):
    """What a search found.

    Attributes:
        image: [N,H,W,C]: the first success in the order of the tries (the clean image, if that is one); else the
            point of the largest objective (margin, if the search has none or the model is randomised) in the ball.
        wrong: [N] bool, whether the model misclassifies it.
        num_queries: [N] int32, images of that example the model was asked about, the clean one included, up to the
            success; for a randomised model up to the end and once more, times `num_samples`. 0 for an example that was
            not to be attacked.
    """

    image: jax.Array
    wrong: jax.Array
    num_queries: jax.Array


Run = Callable[[Key, Callable[..., Any], jax.Array, jax.Array, jax.Array], Found]
"""`(key, logits_fn, image[N,H,W,C], label[N], todo[N] bool) -> Found`: an attack on many images at once."""

UpdateAttack = Callable[[Key, Params, jax.Array], Params]
"""`(key, updates[K,...], malicious[K]) -> updates[K,...]`."""

Loss = Callable[[Key, Params, jax.Array, jax.Array], jax.Array]
"""`(key, params, image[B,H,W,C], label[B]) -> loss[B]`, entry i computed from example i alone.

A batch in, one loss per example out: training without privacy takes the mean and one gradient (no per-example
gradient is ever formed), training with privacy calls it with B = 1 under `vmap(grad)`.
"""

GradFn = Callable[[Key, Params, Batch], tuple[Params, Any]]
"""`(key, params, batch) -> (gradient, info)`, the gradient scaled as the optimizer expects it."""

ClientUpdate = Callable[[Key, Params, Batch], tuple[Params, Any]]
"""`(key, params, batch[S,B]) -> (update, info)`; `params + update` is the client's new model."""


class Aggregator(NamedTuple):
    """How a server combines client updates.

    Attributes:
        init: `params -> state`.
        apply: `(key, state, updates[K,...], weight[K]) -> (update, state, info)`.
    """

    init: Callable[[Params], Any]
    apply: Callable[[Key, Any, Params, jax.Array], tuple[Params, Any, Any]]


class Codec(NamedTuple):
    """How one sender says an update in few bytes. Built for the shapes of one model, which both sides know.

    All but the last two are pure and may be traced, mapped and scanned; those two run on the host.

    Attributes:
        init: `params -> state`, what one sender remembers, such as what it has not said yet; () where nothing.
        encode: `(key, state, update) -> (code, state)`.
        decode: `code -> update`.
        num_bits: `code -> [] int32`, equal to `8 * len(serialize(code))`, of models below 2^26 numbers.
        shape: the code as a pytree of `jax.ShapeDtypeStruct`: its size never depends on values, its bytes do.
        serialize: `code -> bytes`, all that is sent.
        deserialize: `bytes -> code`, the same to the bit; ValueError for bytes that are not a code.
    """

    init: Callable[[Params], Any]
    encode: Callable[[Key, Any, Params], tuple[Any, Any]]
    decode: Callable[[Any], Params]
    num_bits: Callable[[Any], jax.Array]
    shape: Any
    serialize: Callable[[Any], bytes]
    deserialize: Callable[[bytes], Any]


class Federated(NamedTuple):
    """A federated algorithm.

    Attributes:
        init: `params -> state`.
        round: `(key, state, cohort) -> (state, info)`.
    """

    init: Callable[[Params], Any]
    round: Callable[[Key, Any, Cohort], tuple[Any, Any]]

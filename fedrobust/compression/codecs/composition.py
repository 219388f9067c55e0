"""Codecs from codecs: error feedback, numbers in few bits, updates inside pruning masks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedrobust import check, trees
from fedrobust.compression.codecs.wire import assemble
from fedrobust.types import Codec, Key, Params


class Feedback(NamedTuple):
    """What a sender with error feedback remembers.

    Attributes:
        residual: a pytree like the parameters, what was not sent yet.
        codec: state of the codec inside.
    """

    residual: Params
    codec: Any


class Few(NamedTuple):
    """n numbers on a grid of sizes.

    Attributes:
        ends: [2] float32, smallest and largest size; of one size alone, their mean twice.
        negative: [n] bool.
        level: [n] uint8, 0 for the smallest size; [0] where all have one size.
    """

    ends: jax.Array
    negative: jax.Array
    level: jax.Array


def error_feedback(codec: Codec) -> Codec:
    """Adds to each update what the ones before left unsaid.

        code = encode(update + residual),    residual = update + residual - decode(code)

    Args:
        codec: a contraction, |C(x) - x| <= c |x| with c < 1: `top_k`, `random_k(unbiased=False)`, `sign`, `power_sgd`.
            With an unbiased one of large variance the residual grows without bound.

    Returns:
        A `Codec` of the same code, whose state is a `Feedback`.

    Guarantees:
        The sum of all that was decoded plus the residual is the sum of all updates, to rounding. An update that is not
        finite is sent as it is and leaves no trace in the state.

    Source: Karimireddy, Rebjock, Stich, Jaggi 2019, https://arxiv.org/abs/1901.09847, algorithm 2. Deviation: updates
        hold their learning rate already.
    """

    def init(params: Params) -> Feedback:
        return Feedback(trees.zeros_like(params), codec.init(params))

    def encode(key: Key, state: Feedback, update: Params) -> tuple[Any, Feedback]:
        whole = trees.add(update, state.residual)
        code, inner = codec.encode(key, state.codec, whole)
        after = Feedback(trees.subtract(whole, codec.decode(code)), inner)
        return code, trees.where(trees.is_finite(after.residual), after, state)

    return codec._replace(init=init, encode=encode)


def quantized(codec: Codec, *, num_bits: int) -> Codec:
    """Sends every float32 array of another codec's code in few bits a number.

    The sizes of an array's numbers go to the nearest of 2^(num_bits - 1) equal steps from its smallest to its largest;
    with one bit, to their mean. Many numbers are much smaller than the largest, and small steps cost less.

    Args:
        codec: `top_k`, `power_sgd`, `random_k` ... without `error_feedback`, which goes around this.
        num_bits: in [1, 9], sign included.

    Returns:
        A `Codec` with the state of `codec`.

    Raises:
        ValueError: num_bits out of range.

    Guarantees:
        Of each number |C(x) - x| <= |x|, from two bits on. Biased.
    """
    check.at_least("num_bits", num_bits, 1)
    check.require(num_bits <= 9, "num_bits", num_bits, "in [1, 9]")
    last = 2 ** (num_bits - 1) - 1

    def few(x: jax.Array) -> Any:
        if x.dtype != jnp.float32 or x.size < 3:  # ends would cost as much as the numbers
            return x
        size = jnp.abs(x.ravel())
        ends = jnp.stack([jnp.min(size), jnp.max(size)]) if last else jnp.full(2, jnp.mean(size))
        step = (ends[1] - ends[0]) / max(last, 1)
        level = jnp.clip(jnp.round((size - ends[0]) / jnp.where(step > 0, step, 1)), 0, last)
        return Few(ends, x.ravel() < 0, level.astype(jnp.uint8)[: x.size if last else 0])

    def many(shape: jax.ShapeDtypeStruct, code: Any) -> jax.Array:
        if not isinstance(code, Few):
            return code
        size = code.ends[0] + (code.ends[1] - code.ends[0]) / last * code.level if last else code.ends[0]
        return jnp.where(code.negative, -size, size).reshape(shape.shape)

    def encode(key: Key, state: Any, update: Params) -> tuple[Any, Any]:
        code, state = codec.encode(key, state, update)
        return jax.tree.map(few, code), state

    def whole(code: Any) -> Any:
        return jax.tree.map(many, codec.shape, code)

    def deserialize(data: bytes) -> Any:
        code = packed.deserialize(data)
        codec.deserialize(codec.serialize(whole(code)))  # refuses what is no code of the codec within
        return code

    shape = jax.eval_shape(lambda code: jax.tree.map(few, code), codec.shape)
    packed = assemble(codec.init, encode, lambda code: codec.decode(whole(code)), shape, largest={"uint8": last})
    return packed._replace(deserialize=deserialize)


def masked(make: Callable[[Params], Codec], masks: Params) -> Codec:
    """Sends what pruning left: numbers outside the masks are never sent and cost nothing.

    Args:
        make: `like -> Codec`, for a vector of the numbers inside. Error feedback belongs in here.
        masks: concrete zeros and ones, a pytree of the updates' shapes, known to both sides; at least one 1.

    Returns:
        A `Codec` whose decoded updates are exactly zero outside the masks.

    Raises:
        ValueError: masks that keep nothing.
    """
    place = np.flatnonzero(np.concatenate([np.ravel(x) for x in jax.tree.leaves(masks)]))
    check.require(len(place) > 0, "masks", "all zero", "one somewhere")
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), masks)
    inner = make(jax.ShapeDtypeStruct((len(place),), jnp.float32))

    def inside(tree: Params) -> jax.Array:
        return trees.to_flat(tree)[place]

    def encode(key: Key, state: Any, update: Params) -> tuple[Any, Any]:
        return inner.encode(key, state, inside(update))

    def decode(code: Any) -> Params:
        return trees.from_flat(like, jnp.zeros(trees.size(like)).at[place].set(inner.decode(code)))

    return inner._replace(init=lambda params: inner.init(inside(params)), encode=encode, decode=decode)

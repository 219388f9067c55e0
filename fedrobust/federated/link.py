"""What stands between clients and server: updates said in codes, both ways."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from fedrobust import check, keys, trees
from fedrobust.federated.client_map import ClientFn
from fedrobust.types import Codec, Key, Params


class LinkState(NamedTuple):
    """What senders remember between rounds.

    Attributes:
        uplink: states of the clients' codec, leading axis [N] by client id; () without one.
        downlink: state of the server's codec; () without one.
    """

    uplink: Any
    downlink: Any


class Sent(NamedTuple):
    """What was said in one round.

    Attributes:
        uplink: [K] int32, bits from each client, 0 from absent ones; () without a codec.
        downlink: [] int32, bits to each client; () without a codec.
    """

    uplink: Any
    downlink: Any


class Link(NamedTuple):
    """Both ways. Without a codec a way hands on what it is given and leaves any state as it is.

    Attributes:
        init: `params -> state`.
        up: `(key, state, updates[K], id[K], weight[K]) -> (updates[K], state, num_bits[K])`; rows of absent clients
            are 0.
        down: `(key, state, change) -> (change, state, num_bits)`.
    """

    init: Callable[[Params], LinkState]
    up: Callable[[Key, Any, Params, jax.Array, jax.Array], tuple[Params, Any, Any]]
    down: Callable[[Key, Any, Params], tuple[Params, Any, Any]]


def link(
    codec: Codec | None,
    downlink: Codec | None,
    num_clients: int | None,
    client_map: Callable[[ClientFn], ClientFn],
) -> Link:
    """The link of a federation.

    Args:
        codec: of every client; None: updates arrive as they are.
        downlink: of the server; None: so do its changes.
        num_clients: N, all there are; present ids are in [0, N). Needed for `codec` alone.
        client_map: as in `fedavg`.

    Returns:
        A `Link`. A client encodes with the stream "uplink" of its id and its own state; what absent clients remember
        stays, to the bit. A present id outside [0, N) would find NaN to remember, and lets it arrive.

    Raises:
        ValueError: one of codec and num_clients without the other, or num_clients below 1.
    """
    given = "num_clients" if codec is None else "codec"
    check.require((codec is None) == (num_clients is None), "codec and num_clients", f"{given} alone", "given together")
    if num_clients is not None:
        check.at_least("num_clients", num_clients, 1)

    def init(params: Params) -> LinkState:
        own = () if codec is None else codec.init(params)
        everyone = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_clients, *jnp.shape(x))), own)
        return LinkState(everyone, () if downlink is None else downlink.init(params))

    def up(key: Key, state: Any, updates: Params, client_id: jax.Array, weight: jax.Array) -> tuple[Params, Any, Any]:
        if codec is None:
            return updates, state, ()
        nowhere = jnp.iinfo(jnp.int32).max
        known = jnp.where(client_id < 0, nowhere, client_id)  # -1 is no other name of the last client
        own = jax.tree.map(lambda x: x.at[known].get(mode="fill"), state.uplink)
        client_key = keys.per_client(keys.stream(key, "uplink"), client_id)
        clients = (client_key, weight, own, updates)
        arrived, own, num_bits = client_map(lambda _, client: _said(codec, *client))((), clients)
        place = jnp.where(weight > 0, known, nowhere)
        everyone = jax.tree.map(lambda x, new: x.at[place].set(new, mode="drop"), state.uplink, own)
        return arrived, state._replace(uplink=everyone), num_bits

    def down(key: Key, state: Any, change: Params) -> tuple[Params, Any, Any]:
        if downlink is None:
            return change, state, ()
        said, own, num_bits = _say(downlink, keys.stream(key, "downlink"), state.downlink, change)
        return said, state._replace(downlink=own), num_bits

    return Link(init, up, down)


def _say(codec: Codec, key: Key, state: Any, update: Params) -> tuple[Params, Any, jax.Array]:
    """What arrives of an update, what its sender remembers, and bits."""
    code, state = codec.encode(key, state, update)
    arrived = codec.decode(code)
    chex.assert_trees_all_equal_shapes_and_dtypes(arrived, update)  # else the codec is for another model
    return arrived, state, codec.num_bits(code)


def _said(codec: Codec, key: Key, weight: jax.Array, state: Any, update: Params) -> tuple[Params, Any, jax.Array]:
    """The same of one client of a cohort; nothing of one that is absent."""

    def say_nothing(state: Any, update: Params) -> tuple[Params, Any, jax.Array]:
        return trees.zeros_like(update), state, jnp.int32(0)

    return jax.lax.cond(weight > 0, lambda *said: _say(codec, key, *said), say_nothing, state, update)

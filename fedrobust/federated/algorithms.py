"""Federated algorithms: how a round turns client updates into new server parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from fedrobust import check, keys, trees
from fedrobust.federated.client_map import ClientFn
from fedrobust.federated.link import LinkState, Sent, link
from fedrobust.types import Aggregator, ClientUpdate, Codec, Cohort, Federated, Key, Params, UpdateAttack


class FederatedState(NamedTuple):
    """Everything the server carries from round to round.

    Attributes:
        params: the model that is trained.
        average: its running average over rounds, the model to keep (equal to params without averaging), in float32 or
            wider.
        mask: a pytree like params; what it zeroes stays zero (all ones where nothing is pruned).
        optimizer: state of the server optimizer.
        aggregator: state of the aggregator.
        round: [] int32, rounds done.
    """

    params: Params
    average: Params
    mask: Params
    optimizer: Any
    aggregator: Any
    round: jax.Array


class CodedState(NamedTuple):
    """A `FederatedState` and what senders of codes remember. Attributes: as there; link."""

    params: Params
    average: Params
    mask: Params
    optimizer: Any
    aggregator: Any
    round: jax.Array
    link: LinkState


class RoundInfo(NamedTuple):
    """Diagnostics of one round. NOT private.

    Attributes:
        num_present: [] int32, clients that took part.
        client: what `ClientUpdate` reports, leading axis [K]; rows of absent clients are 0.
        aggregation: what the aggregator reports.
        update_norm: [] L2 norm of the aggregated update.
        sent: `Sent`, how much was said.
    """

    num_present: jax.Array
    client: Any
    aggregation: Any
    update_norm: jax.Array
    sent: Sent


def fedavg(
    client_update: Callable[[jax.Array], ClientUpdate],
    aggregator: Aggregator,
    server_optimizer: optax.GradientTransformation,
    client_map: Callable[[ClientFn], ClientFn],
    *,
    update_attack: UpdateAttack | None = None,
    average_decay: float = 0.0,
    codec: Codec | None = None,
    num_clients: int | None = None,
    downlink: Codec | None = None,
) -> Federated:
    """Federated averaging, generalised: any client update, aggregator and server optimizer.

        update_k = client_update(round)(key_k, params, batches_k)        for every client k that is present
        code_k   = codec(update_k),                                      what it sends
        update   = aggregator(update_1 ... update_K, weights)            of what arrives
        params   = mask * server_optimizer(params, -update)
        average  = mask * (decay * average + (1 - decay) * params),  decay = min(average_decay, (1 + r) / (10 + r))

    With `optax.sgd(1.0)` on the server and the mean as aggregator this is FedAvg; with one local step, DP-SGD or SGD
    averaged at every step; with another server optimizer FedOpt.

    Args:
        client_update: `round[] int32 -> ClientUpdate`. A schedule over rounds (learning rate, attack radius) is a
            closure over the traced round; `lambda _: update` where nothing changes.
        aggregator: see `Aggregator`. It never sees who is malicious.
        server_optimizer: optax, fed the negative update as its gradient.
        client_map: `fn -> mapped fn`, such as `partial(map_clients, backend="vmap")`.
        update_attack: what malicious clients do to their updates before they reach the server.
        average_decay: in [0, 1), per round; 0 keeps no average. Under privacy it is free: post-processing.
        codec: how clients say their updates, such as `error_feedback(top_k(params, share=0.01))`; the malicious ones
            theirs after the attack. Noise is part of `client_update`, so a code is post-processing of what is private
            already, and so is what error feedback remembers. Not for noise in shares of a secure sum: a server that
            reads a single code reads an update that is hardly noised.
        num_clients: all clients there are, present ids in [0, num_clients); needed for `codec`, which remembers each.
        downlink: how the server says the change of the parameters, as all clients must hear it; it moves its own
            parameters by what they decode.

    Returns:
        A `Federated`, its state a `FederatedState`, with codecs a `CodedState`. Absent clients are not computed (under
        vmap: computed and dropped) and may hold NaN. The round draws client k's numbers from `fold_in(key, id_k)`.

    Raises:
        ValueError: average_decay outside [0, 1); codec without num_clients.

    Source: McMahan et al. 2017 (arXiv 1602.05629), Algorithm 1; Reddi et al. 2021 (arXiv 2003.00295), Algorithm 1;
        averaging with a warm-up: De et al. 2022 (arXiv 2204.13650), section 3.
    """
    check.fraction("average_decay", average_decay, one=False)
    way = link(codec, downlink, num_clients, client_map)

    def init(params: Params) -> FederatedState | CodedState:
        start = FederatedState(
            params=params,
            average=jax.tree.map(lambda x: jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32)), params),
            mask=jax.tree.map(jnp.ones_like, params),
            optimizer=server_optimizer.init(params),
            aggregator=aggregator.init(params),
            round=jnp.zeros((), jnp.int32),
        )
        return start if codec is None and downlink is None else CodedState(*start, way.init(params))

    def round(key: Key, state: Any, cohort: Cohort) -> tuple[Any, RoundInfo]:
        chex.assert_rank([cohort.id, cohort.weight, cohort.malicious], 1)
        chex.assert_equal_shape_prefix([*list(cohort.batch), cohort.id], 1)
        client_key = keys.per_client(keys.stream(key, "client"), cohort.id)
        clients = (client_key, cohort.weight, cohort.batch)
        updates, info = client_map(_training(client_update))((state.params, state.round), clients)
        if update_attack is not None:
            updates = update_attack(keys.stream(key, "attack"), updates, cohort.malicious)
        updates, link_state, up = way.up(key, getattr(state, "link", ()), updates, cohort.id, cohort.weight)
        update, aggregator_state, aggregation = aggregator.apply(
            keys.stream(key, "aggregate"), state.aggregator, updates, cohort.weight
        )
        gradient = trees.scale(update, -1)
        change, optimizer = server_optimizer.update(gradient, state.optimizer, state.params)
        change, link_state, down = way.down(key, link_state, change)
        params = trees.multiply(optax.apply_updates(state.params, change), state.mask)
        decay = jnp.minimum(average_decay, (1 + state.round) / (10 + state.round))
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, params)
        average = trees.multiply(average, state.mask)
        present = jnp.sum(cohort.weight > 0).astype(jnp.int32)
        next = FederatedState(params, average, state.mask, optimizer, aggregator_state, state.round + 1)
        new = CodedState(*next, link_state) if isinstance(state, CodedState) else next
        return new, RoundInfo(present, info, aggregation, trees.norm(update), Sent(up, down))

    return Federated(init, round)


def _training(client_update: Callable[[jax.Array], ClientUpdate]) -> ClientFn:
    """What every client does in a round; zeros from one that is absent."""

    def train(shared: tuple[Params, jax.Array], client: tuple) -> Any:
        params, round = shared
        key, weight, batch = client
        run = client_update(round)
        result = jax.eval_shape(run, key, params, batch)
        absent = lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result)  # noqa: E731
        return jax.lax.cond(weight > 0, run, absent, key, params, batch)

    return train

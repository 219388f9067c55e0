"""How the training examples are shared out among the clients.

Every partition has the form `(rng, label[N], num_clients, *, min_size, ...) -> num_clients sorted index arrays`, is a
pure function of its arguments and the generator's state, and gives every example to exactly one client.
"""

from collections.abc import Callable

import numpy as np

from fedrobust import check

Parts = list[np.ndarray]


def iid(rng: np.random.Generator, label: np.ndarray, num_clients: int, *, min_size: int = 1) -> Parts:
    """Shuffled and cut into parts whose sizes differ by one at most.

    Args:
        rng: the source of randomness; advanced.
        label: [N] integers.
        num_clients: K >= 1.
        min_size: the least number of examples of any client, >= 1.

    Returns:
        K sorted int64 index arrays: disjoint, together 0..N-1, each of at least min_size.

    Raises:
        ValueError: K * min_size > N.
    """
    _check(label, num_clients, min_size)
    return _finish(rng, np.array_split(rng.permutation(len(label)), num_clients), min_size)


def dirichlet(
    rng: np.random.Generator, label: np.ndarray, num_clients: int, *, alpha: float, min_size: int = 1
) -> Parts:
    """Label skew: each class is divided among the clients by its own draw from Dirichlet(alpha, ..., alpha).

    Args:
        rng: the source of randomness; advanced.
        label: [N] integers.
        num_clients: K >= 1.
        alpha: > 0; small means few classes per client, large tends to `iid` in distribution of labels.
        min_size: the least number of examples of any client, >= 1. Clients below it are filled up with random
            examples of the largest ones, so the call always ends; the usual redrawing does not for small alpha.

    Returns:
        K sorted int64 index arrays: disjoint, together 0..N-1, each of at least min_size.

    Raises:
        ValueError: K * min_size > N, or alpha not > 0.

    Source:
        Hsu, Qi, Brown, arXiv 1909.06335 (2019), with the draw per class (Yurochkin et al., ICML 2019) instead of per
        client.
    """
    _check(label, num_clients, min_size)
    check.positive("alpha", alpha)
    pieces = [_cut(rng, np.flatnonzero(label == value), num_clients, alpha) for value in np.unique(label)]
    return _finish(rng, [np.concatenate(piece) for piece in zip(*pieces, strict=True)], min_size)


def shards(
    rng: np.random.Generator,
    label: np.ndarray,
    num_clients: int,
    *,
    num_shards_per_client: int = 2,
    min_size: int = 1,
) -> Parts:
    """Label skew of equal sizes: sorted by label, cut into equal shards, each client is dealt some.

    Args:
        rng: the source of randomness; advanced.
        label: [N] integers.
        num_clients: K >= 1.
        num_shards_per_client: >= 1; a client sees few more classes than this.
        min_size: the least number of examples of any client, >= 1.

    Returns:
        K sorted int64 index arrays: disjoint, together 0..N-1, each of at least min_size.

    Raises:
        ValueError: K * min_size > N, or more shards than examples.

    Source:
        McMahan et al., arXiv 1602.05629 (2017), section 3.
    """
    _check(label, num_clients, min_size)
    check.at_least("num_shards_per_client", num_shards_per_client, 1)
    num_shards = num_clients * num_shards_per_client
    check.require(
        num_shards <= len(label),
        "num_shards_per_client",
        num_shards_per_client,
        f"<= {len(label)} examples over {num_clients} clients",
    )
    shuffled = rng.permutation(len(label))
    pieces = np.array_split(shuffled[np.argsort(label[shuffled], kind="stable")], num_shards)
    dealt = rng.permutation(num_shards).reshape(num_clients, num_shards_per_client)
    return _finish(rng, [np.concatenate([pieces[i] for i in hand]) for hand in dealt], min_size)


def quantity_skew(
    rng: np.random.Generator, label: np.ndarray, num_clients: int, *, alpha: float, min_size: int = 1
) -> Parts:
    """Size skew: shuffled examples, sizes drawn from Dirichlet(alpha, ..., alpha).

    Args:
        rng: the source of randomness; advanced.
        label: [N] integers.
        num_clients: K >= 1.
        alpha: > 0; small means a few large clients and many small ones.
        min_size: the least number of examples of any client, >= 1, kept as in `dirichlet`.

    Returns:
        K sorted int64 index arrays: disjoint, together 0..N-1, each of at least min_size.

    Raises:
        ValueError: K * min_size > N, or alpha not > 0.

    Source:
        Li, Diao, Chen, He, arXiv 2102.02079 (2021), section IV.
    """
    _check(label, num_clients, min_size)
    check.positive("alpha", alpha)
    return _finish(rng, _cut(rng, np.arange(len(label)), num_clients, alpha), min_size)


PARTITIONS: dict[str, Callable[..., Parts]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "shards": shards,
    "quantity_skew": quantity_skew,
}


def _check(label: np.ndarray, num_clients: int, min_size: int) -> None:
    check.at_least("num_clients", num_clients, 1)
    check.at_least("min_size", min_size, 1)
    num = len(label)
    check.require(num_clients <= num, "num_clients", num_clients, f"<= the number of examples, {num}")
    check.require(num_clients * min_size <= num, "min_size", min_size, f"<= {num} examples over {num_clients} clients")


def _cut(rng: np.random.Generator, index: np.ndarray, num_clients: int, alpha: float) -> Parts:
    """Shuffles and cuts at the cumulative shares of one Dirichlet draw."""
    share = rng.dirichlet(np.full(num_clients, alpha))
    cuts = np.rint(np.cumsum(share)[:-1] * len(index)).astype(int)
    return np.split(rng.permutation(index), cuts)


def _finish(rng: np.random.Generator, parts: Parts, min_size: int) -> Parts:
    """Fills up the clients below min_size from the largest one, example by example, and sorts."""
    parts = [rng.permutation(part) for part in parts]
    size = np.array([len(part) for part in parts])
    while size.min() < min_size:
        poor, rich = size.argmin(), size.argmax()
        parts[poor], parts[rich] = np.append(parts[poor], parts[rich][-1]), parts[rich][:-1]
        size[poor] += 1
        size[rich] -= 1
    return [np.sort(part) for part in parts]

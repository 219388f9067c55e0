"""Every random stream of a run, from one root key.

A run has one root. Each purpose has a named stream folded from it, each stream is folded by round, then by
client id, then by local step, so the numbers a client draws do not depend on who else takes part, in what
order, or on which device.
"""

import zlib

import jax

from fedrobust import check
from fedrobust.types import Key


def root(seed: int) -> Key:
    """The root key of a run.

    Args:
        seed: in [0, 2**32): with JAX's default 32-bit integers a larger one would equal a smaller.

    Raises:
        ValueError: seed out of range.
    """
    check.require(0 <= seed < 2**32, "seed", seed, "in [0, 2**32)")
    return jax.random.key(seed)


def stream(key: Key, purpose: str) -> Key:
    """A stream for one named purpose.

    Args:
        key: the key to derive from, shape ().
        purpose: a name such as "init" or "evaluation"; equal names give equal streams on every platform.

    Returns:
        A key of shape ().

    >>> import jax
    >>> a, b = stream(root(0), "init"), stream(root(0), "train")
    >>> bool((jax.random.key_data(a) == jax.random.key_data(b)).all())
    False
    """
    return jax.random.fold_in(key, zlib.crc32(purpose.encode()))


def per_client(key: Key, client_id: jax.Array) -> Key:
    """One key per client, by identity and not by position.

    Args:
        key: shape ().
        client_id: [K] int32.

    Returns:
        Keys of shape [K].
    """
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(client_id)

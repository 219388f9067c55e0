"""An attack's examples, dealt out to several devices."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedrobust import devices
from fedrobust.types import Found


class Examples(NamedTuple):
    """What one device attacks. Rows [N].

    Attributes:
        number: int32, by which an example draws, wherever it stands.
        image: [N,H,W,C].
        label: int32.
        todo: bool, what is to be attacked.
    """

    number: jax.Array
    image: jax.Array
    label: jax.Array
    todo: jax.Array


def over_devices(attack: Callable[[Examples], Found], on: Sequence[jax.Device]) -> Callable[[Examples], Found]:
    """Gives each device its share of the examples that are to be attacked, and of the others.

    Args:
        attack: what each device runs on its share.
        on: the devices.

    Returns:
        The same on all examples. No device waits for another before its own share is done.
    """
    if len(on) == 1:
        return attack
    each = devices.sharded(lambda _, examples: attack(examples), on)

    def spread(examples: Examples) -> Found:
        num = len(examples.todo)
        dealt = _dealt(examples.todo, len(on))
        rows = jax.tree.map(lambda x: x[jnp.minimum(dealt, num - 1)], examples)
        found = each((), rows._replace(todo=rows.todo & (dealt < num)))
        return jax.tree.map(lambda x: x[jnp.argsort(dealt)[:num]], found)

    return spread


def _dealt(todo: jax.Array, num_devices: int) -> jax.Array:
    """The rows of each device, one device after the other, [D * ceil(N / D)]: one each in turn, `todo` first.

    N stands where there is no row left.
    """
    order = jnp.pad(jnp.argsort(~todo), (0, -len(todo) % num_devices), constant_values=len(todo))
    return order.reshape(-1, num_devices).T.reshape(-1)

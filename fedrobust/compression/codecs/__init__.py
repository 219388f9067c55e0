"""Updates in few bytes: what a client sends to the server, and what the server sends back."""

from collections.abc import Callable

from fedrobust.compression.codecs.composition import error_feedback, masked, quantized
from fedrobust.compression.codecs.levels import qsgd, sign, terngrad
from fedrobust.compression.codecs.low_rank import power_sgd
from fedrobust.compression.codecs.sparse import identity, random_k, top_k
from fedrobust.compression.codecs.wire import assemble
from fedrobust.types import Codec

CODECS: dict[str, Callable[..., Codec]] = {
    "identity": identity,
    "power_sgd": power_sgd,
    "qsgd": qsgd,
    "random_k": random_k,
    "sign": sign,
    "terngrad": terngrad,
    "top_k": top_k,
}
"""By name: builders `(like, **settings) -> Codec`, `like` a pytree of the updates' shapes."""

__all__ = [
    "CODECS",
    "assemble",
    "error_feedback",
    "identity",
    "masked",
    "power_sgd",
    "qsgd",
    "quantized",
    "random_k",
    "sign",
    "terngrad",
    "top_k",
]

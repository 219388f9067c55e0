"""How a federation says its updates: a codec and what is done with it, by name."""

from dataclasses import dataclass
from typing import Any

from fedrobust.compression.codecs import CODECS, error_feedback, quantized
from fedrobust.types import Codec, Params


@dataclass(frozen=True)
class Way:
    """How a federation says its updates.

    Attributes:
        codec: name of a builder in `CODECS`.
        settings: its settings, as pairs.
        num_bits: of every number that the codec sends; None for 32.
        feedback: whether what was not said is said later.
        both: whether the server says its changes so, too; else it sends float32 parameters.
        private: whether gradients are clipped and noised, one step a round, before the codec.
    """

    codec: str
    settings: tuple[tuple[str, Any], ...] = ()
    num_bits: int | None = None
    feedback: bool = False
    both: bool = False
    private: bool = False

    def build(self, like: Params) -> Codec:
        """The codec for a model.

        Args:
            like: a pytree of `jax.ShapeDtypeStruct`, its parameters.
        """
        codec = CODECS[self.codec](like, **dict(self.settings))
        if self.num_bits is not None:
            codec = quantized(codec, num_bits=self.num_bits)
        return error_feedback(codec) if self.feedback else codec


def _top_k(share: float, num_bits: int | None = None, **more: bool) -> Way:
    return Way("top_k", (("share", share),), num_bits, feedback=True, **more)


def _random_k(share: float, *, unbiased: bool) -> Way:
    return Way("random_k", (("share", share), ("unbiased", unbiased)), feedback=not unbiased)


WAYS = {
    "float32": Way("identity"),
    "top-k": _top_k(0.007),
    "top-k, 3 bits": _top_k(0.027, 3),
    "top-k, 1 bit": _top_k(0.035, 1),
    "top-k, 3 bits, both ways": _top_k(0.027, 3, both=True),
    "random-k, unbiased": _random_k(0.0098, unbiased=True),
    "random-k, feedback": _random_k(0.0098, unbiased=False),
    "QSGD, 1 level": Way("qsgd", (("num_levels", 1),)),
    "TernGrad": Way("terngrad"),
    "sign, feedback": Way("sign", feedback=True),
    "PowerSGD, rank 1": Way("power_sgd", (("rank", 1),), feedback=True),
    "PowerSGD, rank 1, 8 bits": Way("power_sgd", (("rank", 1),), 8, feedback=True),
    "DP, float32": Way("identity", private=True),
    "DP, top-k, 3 bits": _top_k(0.027, 3, private=True),
}
"""By the name in tables and on the command line. Shares were chosen by bytes alone, for 100 to 120 times fewer where a
codec can be set so; accuracy was not looked at."""

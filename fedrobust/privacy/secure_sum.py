"""Differential privacy for sums that nobody sees the terms of: integer codes, each with its share of the noise.

The adding up itself (masks, a trusted machine) is not done here: whoever does it learns the sum modulo 2^bits.

Source: Kairouz, Liu, Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
Aggregation" (arXiv 2102.06387), Algorithms 1 and 2, Theorem 1. Deviation: vectors are not flattened by a random
rotation first, so more bits are needed where one coordinate holds most of a vector.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import dp_accounting
import numpy as np
from dp_accounting import rdp

from fedrobust import check
from fedrobust.privacy.discrete import Words, discrete_gaussian

_ROUNDING_TRIALS = 1000
_BETA = math.exp(-0.5)  # the paper's choice: a rounding is kept with probability at least 1 - beta = 0.39


@dataclass(frozen=True)
class SecureSum:
    """A sum of clipped vectors on an integer grid, with one discrete Gaussian share of noise from each client.

    Attributes:
        clip_norm: L2 bound C of one client's vector, > 0.
        dimension: D >= 1.
        step: gamma > 0, the width of the grid in the vectors' unit.
        share_stddev: sigma of one client's noise in the vectors' unit, at least step / 2; K shares together have
            sqrt(K) times that.
        num_clients: K >= 1 clients in every sum. The privacy rests on all of their shares: where up to h of them may
            drop out or leave out their noise, ask for that of the same settings with K - h.
        num_bits: in [1, 62]; the sum is known modulo 2^num_bits.

    Raises:
        ValueError: a setting out of range, or so fine a grid that squared norms leave 64 bits.
    """

    clip_norm: float
    dimension: int
    step: float
    share_stddev: float
    num_clients: int
    num_bits: int

    def __post_init__(self) -> None:
        """Checks every setting."""
        check.positive("clip_norm", self.clip_norm)
        check.at_least("dimension", self.dimension, 1)
        check.positive("step", self.step)
        least = self.step / 2
        check.require(least <= self.share_stddev < math.inf, "share_stddev", self.share_stddev, f">= step / 2 {least}")
        check.at_least("num_clients", self.num_clients, 1)
        check.at_least("num_bits", self.num_bits, 1)
        check.require(self.num_bits <= 62, "num_bits", self.num_bits, "<= 62")  # 2^63 is no integer of 64 bits
        fine = self.squared_sensitivity < 2**59 and self.share_variance <= 2**60
        check.require(fine, "step", self.step, "wide enough for integers of 64 bits")

    @property
    def squared_sensitivity(self) -> int:
        """The largest squared L2 norm of one client's code before noise, in steps: what `encode` enforces.

        min((c + sqrt(D))^2, c^2 + D/4 + sqrt(2 log(1/beta)) (c + sqrt(D)/2)), c = C / gamma: the sensitivity after
        rounding for the relation "zero_out", one client whose vector becomes 0 and whose noise stays.
        """
        c, root = self.clip_norm / self.step, math.sqrt(self.dimension)
        likely = c**2 + self.dimension / 4 + math.sqrt(2 * math.log(1 / _BETA)) * (c + root / 2)
        return math.floor(min((c + root) ** 2, likely))

    @property
    def share_variance(self) -> Fraction:
        """sigma^2 of one client's share, in squared steps."""
        return Fraction(self.share_stddev / self.step) ** 2

    @property
    def wrap_probability(self) -> float:
        """A bound on the chance that any coordinate of the sum leaves its 2^bits values and `decode` is wrong there.

        2 D exp(-room^2 / (2 K sigma^2)), room = 2^(bits - 1) - K (C / gamma + 1): a coordinate of a code is at most
        C / gamma + 1, and discrete Gaussians are as subgaussian as continuous ones.
        """
        room = 2 ** (self.num_bits - 1) - self.num_clients * (self.clip_norm / self.step + 1)
        if room <= 0:
            return 1.0
        exponent = room**2 / (2 * self.num_clients * float(self.share_variance))
        return min(1.0, 2 * self.dimension * math.exp(-exponent))


def encode(settings: SecureSum, words: Words, vector: np.ndarray) -> np.ndarray:
    """One client's code: clipped, rounded to the grid, noised, modulo 2^bits.

    Args:
        settings: the same for all clients.
        words: this client's own randomness, `system_words` in deployment.
        vector: [D] float.

    Returns:
        [D] int64 in [0, 2^bits).

    Raises:
        ValueError: a vector of another shape.

    Guarantees:
        Before the noise the squared norm of the code is at most `squared_sensitivity`, counted in integers; a vector
        that is not finite counts as 0. The noise is exact. Rounding is unbiased up to the condition on its norm,
        which moves the mean by at most step * sqrt(D) * beta / (1 - beta), in practice far less.
    """
    check.require(np.shape(vector) == (settings.dimension,), "shape of vector", np.shape(vector), "(dimension,)")
    code = round_to_grid(settings, words, np.asarray(vector, np.float64))
    noise = discrete_gaussian(words, settings.dimension, variance=settings.share_variance)
    return (code + noise) % 2**settings.num_bits


def round_to_grid(settings: SecureSum, words: Words, vector: np.ndarray) -> np.ndarray:
    """Randomised rounding of a clipped vector, repeated until its norm is allowed.

    Args:
        settings: as in `encode`.
        words: as in `encode`.
        vector: [D] float64.

    Returns:
        [D] int64 whose squared norm is at most `settings.squared_sensitivity`.
    """
    largest = np.max(np.abs(vector))
    if not 0 < largest < np.inf:
        return np.zeros(vector.shape, np.int64)
    norm = largest * np.linalg.norm(vector / largest)  # no overflow, whatever the vector
    scaled = vector / largest * (min(norm, settings.clip_norm) / settings.step * (largest / norm))
    below = np.floor(scaled)
    for _ in range(_ROUNDING_TRIALS):
        uniform = (words(len(scaled)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        code = (below + (uniform < scaled - below)).astype(np.int64)
        # At most (c + sqrt(D))^2, at most 8 times the bound, below 2^62: the integers do not wrap.
        if int(code @ code) <= settings.squared_sensitivity:
            return code
    return np.trunc(scaled * (1 - 1e-9)).astype(np.int64)  # towards 0, never longer than the vector; chance < 1e-200


def decode(settings: SecureSum, total: np.ndarray) -> np.ndarray:
    """The sum of the clients' vectors, noise included, from the sum of their codes.

    Args:
        settings: as in `encode`.
        total: [D] integers, the sum of the codes modulo 2^bits.

    Returns:
        [D] float64; right unless a coordinate wrapped, see `wrap_probability`.
    """
    modulus = 2**settings.num_bits
    total = np.asarray(total, np.int64) % modulus
    return settings.step * np.where(total >= modulus // 2, total - modulus, total).astype(np.float64)


def secure_sum_zcdp(settings: SecureSum) -> float:
    """Concentrated differential privacy of one noised sum.

    rho = eps^2 / 2 with eps = min(sqrt(S^2 / (K s^2) + tau D / 2), S / (sqrt(K) s) + tau sqrt(D)) and
    tau = 10 sum_{k < K} exp(-2 pi^2 s^2 k / (k + 1)): K discrete Gaussians of variance s^2 are all but one of K s^2.

    Args:
        settings: S^2 is its squared sensitivity, s^2 its share's variance.

    Returns:
        rho > 0, for one client and the relation "zero_out". All clients are in every sum: no amplification by
        sampling.

    Source: Kairouz, Liu, Steinke 2021 (arXiv 2102.06387), Theorem 1.
    """
    variance, dimension = float(settings.share_variance), settings.dimension
    k = np.arange(1, settings.num_clients)
    tau = 10 * float(np.sum(np.exp(-2 * math.pi**2 * variance * k / (k + 1))))
    ratio = settings.squared_sensitivity / (settings.num_clients * variance)
    joint = math.sqrt(ratio + tau * dimension / 2)
    apart = math.sqrt(ratio) + tau * math.sqrt(dimension)
    return min(joint, apart) ** 2 / 2


def secure_sum_epsilon(settings: SecureSum, *, num_steps: int, delta: float) -> float:
    """Epsilon of T noised sums.

    Args:
        settings: of every sum.
        num_steps: T >= 1.
        delta: in (0, 1).

    Returns:
        Epsilon at `delta`, for one client and the relation "zero_out".

    Raises:
        ValueError: a setting out of range.
    """
    check.at_least("num_steps", num_steps, 1)
    check.fraction("delta", delta, zero=False, one=False)
    accountant = rdp.RdpAccountant()
    accountant.compose(dp_accounting.ZCDpEvent(secure_sum_zcdp(settings)), num_steps)
    return accountant.get_epsilon(delta)

"""How sparsity grows during training."""

from collections.abc import Callable

from fedrobust import check


def cubic_sparsity(
    *, final: float, begin: int, end: int, initial: float = 0.0, every: int = 1
) -> Callable[[int], float]:
    """Sparsity that rises quickly at first, while there is much to remove, and slowly towards its end.

        s(t) = final + (initial - final) * (1 - (t - begin) / (end - begin))^3      for begin <= t <= end

    Args:
        final: sparsity from step `end` on, in [0, 1).
        begin: the first step at which it may change, >= 0.
        end: the step at which it is final, > begin.
        initial: sparsity up to `begin`, in [0, final].
        every: steps between changes, >= 1; in between the last value holds.

    Returns:
        `step -> sparsity`, a pure function of the step.

    Raises:
        ValueError: a setting out of range.

    Source: Zhu & Gupta, To prune, or not to prune, 2017, https://arxiv.org/abs/1710.01878, equation (1), with
        t0 = begin, n Δt = end - begin, Δt = every. Deviation: `end` need not be a multiple of `every` away.
    """
    check.fraction("final", final, one=False)
    check.require(0 <= initial <= final, "initial", initial, f"in [0, final = {final}]")
    check.at_least("begin", begin, 0)
    check.at_least("end", end, begin + 1)
    check.at_least("every", every, 1)

    def sparsity(step: int) -> float:
        if step >= end:
            return final
        changed = max(step - begin, 0) // every * every
        return final + (initial - final) * (1 - changed / (end - begin)) ** 3

    return sparsity


def one_shot_sparsity(*, final: float, begin: int) -> Callable[[int], float]:
    """Sparsity that is reached at once: nothing goes before step `begin`, everything at it.

    Args:
        final: sparsity from step `begin` on, in [0, 1).
        begin: the step at which it changes, >= 0.

    Returns:
        `step -> sparsity`, a pure function of the step.

    Raises:
        ValueError: a setting out of range.
    """
    check.fraction("final", final, one=False)
    check.at_least("begin", begin, 0)
    return lambda step: final if step >= begin else 0.0

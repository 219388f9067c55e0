"""What FAB's projection `nearest` returns, in NumPy float64."""

import numpy as np

NORMS = ["linf", "l2", "l1"]


def oracle_nearest(norm, point, normal, gap):
    """The same by sorting, in float64: the sum of the moves is linear between the sorted kinks."""
    size, up = np.abs(normal), normal * gap > 0
    room, way = np.where(up, 1 - point, point) * (normal != 0), np.sign(normal) * np.sign(gap)
    need = min(abs(gap), (size * room).sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        if norm == "l1":
            order = np.argsort(-size, kind="stable")
            before = np.concatenate([[0], np.cumsum((size * room)[order])[:-1]])
            change = np.zeros_like(point)
            change[order] = np.nan_to_num(np.clip((need - before) / size[order], 0, room[order]))
            return way * change
        rate = np.ones_like(size) if norm == "linf" else size
        kink = np.where(size > 0, room / rate, 0)
    order = np.argsort(kink)
    kinks = kink[order]
    slope, fill = (size * rate)[order], (size * room)[order]
    filled = np.cumsum(fill) + kinks * (slope.sum() - np.cumsum(slope))  # the sum at every kink
    level = np.interp(need, [0, *filled], [0, *kinks])
    return way * np.minimum(level * rate, room)

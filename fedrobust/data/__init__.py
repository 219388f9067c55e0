"""Labelled images on the host: loading, partitions over clients, the cohort of each round, augmentation."""

from fedrobust.data.augmentation import Augment, compose, random_flip, random_shift
from fedrobust.data.cohort import CohortSettings, make_cohorts
from fedrobust.data.errors import DataError
from fedrobust.data.loading import Splits, load
from fedrobust.data.partition import PARTITIONS, dirichlet, iid, quantity_skew, shards

__all__ = [
    "PARTITIONS",
    "Augment",
    "CohortSettings",
    "DataError",
    "Splits",
    "compose",
    "dirichlet",
    "iid",
    "load",
    "make_cohorts",
    "quantity_skew",
    "random_flip",
    "random_shift",
    "shards",
]

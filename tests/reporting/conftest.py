"""A small study: all eight combinations, as many seeds as wanted, figures that follow a formula."""

import itertools

import pytest

from fedrobust.reporting import config_hash


def make_row(dp=False, at=False, mc=False, seed=0):
    clean = 0.95 - 0.04 * dp - 0.05 * at - 0.01 * mc + 0.01 * seed
    robust = {}
    for eps, loss in ((2 / 255, 0.1), (4 / 255, 0.2), (8 / 255, 0.4)):
        for family, bonus in (("fgsm", 0.05), ("pgd20", 0.01), ("worst", 0.0)):
            accuracy = clean - loss * (0.25 if at else 1) * (1.5 if dp else 1) + bonus
            robust[f"{family}_linf_{eps:.2g}"] = {
                "accuracy": accuracy,
                "balanced_accuracy": accuracy - 0.02,
                "degenerate": False,
                "norm": "linf",
                "eps": eps,
                "steps": None if family == "worst" else 20,
                "restarts": None if family == "worst" else 1,
            }
    ratios = {"parameters": 0.24, "bytes": 0.07, "flops": 0.3, "latency_ms": 0.5}
    size = {f"{name}_ratio": ratio if mc else 1.0 for name, ratio in ratios.items()}
    return {
        "experiment": "combinations",
        "combination": {"dp": dp, "at": at, "mc": mc},
        "seed": seed,
        "config": {"rounds": 3},
        "config_hash": config_hash({"rounds": 3}),
        "clean": {
            "accuracy": clean,
            "balanced_accuracy": clean - 0.02,
            "auc": clean + 0.02,
            "degenerate": dp and at and not mc,
        },
        "robust": robust,
        "checks": [{"check": "deterministic", "outcome": "passed", "figure": 0.0, "limit": 0.0, "detail": ""}],
        "poisoned": {
            "attack": "sign_flip",
            "malicious_share": 0.2,
            "rounds_share": 1.0,
            "mean": {"accuracy": 0.5, "balanced_accuracy": 0.5},
            "trimmed_mean": {"accuracy": clean - 0.02, "balanced_accuracy": clean - 0.04},
        },
        "size": {
            **size,
            "parameters": 36_000 if mc else 150_000,
            "bytes": 42_000 if mc else 600_000,
            "flops": 1e6,
            "latency_ms": 2.0,
        },
        "privacy": {"epsilon": 7.98, "delta": 1e-4, "unit": "record", "relation": "add-remove", "sampling": "Poisson"}
        if dp
        else None,
        "history": {"round": [1, 2, 3], "val_loss": [1.0, 0.6, 0.5 + 0.1 * at], "val_accuracy": [0.5, None, clean]},
        "train_seconds": 12.5,
        "versions": {"jax": "0.10.2"},
        "device": "cpu",
    }


@pytest.fixture
def study():
    def build(num_seeds=1):
        return [make_row(*on, seed) for on in itertools.product((False, True), repeat=3) for seed in range(num_seeds)]

    return build


@pytest.fixture
def row_of():
    return make_row

"""The study's presets: quickstart, and combinations at three scales.

Source: `experiments/combinations/__init__.py`.

    python -m experiments.run quickstart                                  # digits: 4 min on 2 CPU cores
    python -m experiments.run combinations --dataset pneumonia_mnist      # the paper's task: 43 min there
"""

from dataclasses import replace
from typing import Any

from experiments.combinations.settings import AT, DP, MC, Attack, Poison, Scale, Study, Training

# Settings were chosen on the val split, seed 0.
_DIGITS = Study(
    dataset="digits",
    model="small_cnn",
    width=24,
    norm_groups=16,
    train=Training(num_rounds=40, num_steps=8, batch_size=32, learning_rate=6e-3, average_decay=0.5),
    dp=DP(
        delta=1e-3,
        num_rounds=80,
        sampling_rate=0.5,
        learning_rate=2.0,
        histogram_epsilon=0.0,  # ten balanced classes: counts would cost privacy and say nothing
        microbatch_size=32,
    ),
    # One step from a random start (Wong et al. 2020, arXiv 2001.03994): a third of PGD-3's cost, as strong here.
    at=AT(eps=0.13, num_steps=1, relative_step=1.25, clean_share=0.25, warmup=0.3),
    mc=MC(sparsity=0.5625, begin=0.03, end=0.15, num_events=3),
    attack=Attack(eps=(0.04, 0.08, 0.13)),
)

_PNEUMONIA = Study(
    model="resnet9",
    width=16,
    train=Training(num_rounds=24),
    dp=DP(num_rounds=150),
    at=AT(clean_share=0.2, warmup=0.4),
    poison=Poison(rounds_share=0.5),
)


def shared(dataset: str, scale: Scale) -> dict[str, Any]:
    """What other studies take over from the preset: on what a model is trained, which, and how without privacy."""
    study = preset("combinations", dataset, scale)
    return {name: getattr(study, name) for name in ("dataset", "scale", "model", "width", "norm_groups", "train", "dp")}


def preset(name: str, dataset: str, scale: Scale) -> Study:
    """The settings a command starts from, before the overrides on its line.

    Args:
        name: "quickstart" or "combinations".
        dataset: what `--dataset` says.
        scale: what `--scale` says.

    Returns:
        A complete study.
    """
    study = _DIGITS if dataset == "digits" else _PNEUMONIA
    study = replace(study, experiment=name, dataset=dataset, scale=scale)
    if scale == "smoke":
        return replace(
            study,
            width=8,
            train=replace(study.train, num_rounds=4, num_steps=2, batch_size=16),
            dp=replace(study.dp, num_rounds=4, sampling_rate=0.1),
            at=replace(study.at, num_steps=1),
            attack=replace(study.attack, num_steps=2),
        )
    if scale == "paper":
        return replace(
            study,
            model="resnet9",
            width=32,
            seeds=(0, 1, 2),
            train=replace(study.train, num_rounds=60),
            dp=replace(study.dp, num_rounds=600, sampling_rate=0.2),
            at=replace(study.at, num_steps=7, relative_step=0.25),
            attack=replace(study.attack, num_steps=50, num_restarts=5),
        )
    return study

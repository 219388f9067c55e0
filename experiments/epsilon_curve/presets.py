"""The curve's presets.

python -m experiments.run epsilon_curve                                # digits
python -m experiments.run epsilon_curve --dataset pneumonia_mnist      # five silos of chest radiographs
"""

from dataclasses import replace

from experiments.combinations import presets
from experiments.combinations.settings import Scale
from experiments.epsilon_curve.settings import Curve

RADIOGRAPHS_RATE = 0.4
"""Of epsilon 8, so 0.09 at epsilon 1, where AUC on val was 0.850, 0.926, 0.955, 0.954 at 0.5, 0.2, 0.1, 0.05 (noise in
each silo, seed 0, 2026-11-23). One seed says little: at epsilon 3, AUC on val was 0.936 at 0.22 and 0.910 at 0.08."""


def preset(dataset: str, scale: Scale) -> Curve:
    """The settings a command starts from, before the overrides on its line.

    Args:
        dataset: what `--dataset` says.
        scale: what `--scale` says.

    Returns:
        A complete curve: model and training of the study of combinations, with a learning rate for much noise.
    """
    study = presets.preset("combinations", dataset, scale)
    return Curve(
        dataset=dataset,
        scale=scale,
        model=study.model,
        width=study.width,
        norm_groups=study.norm_groups,
        train=study.train,
        dp=study.dp if dataset == "digits" else replace(study.dp, learning_rate=RADIOGRAPHS_RATE),
    )

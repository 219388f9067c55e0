"""The curve's presets.

python -m experiments.run epsilon_curve                                # digits
python -m experiments.run epsilon_curve --dataset pneumonia_mnist      # five silos of chest radiographs
"""

from dataclasses import replace

from experiments.combinations import presets
from experiments.combinations.settings import Scale
from experiments.epsilon_curve.settings import Curve

RADIOGRAPHS_RATE = 0.4
"""Of epsilon 8, so 0.04 at epsilon 1, where AUC on val, noise in each silo, was (2026-11-24, other shares for counts):

rate          0.1   0.05  0.03  0.012 0.005
seed 0        0.955 0.954 0.940 0.927 0.906
seed 1                    0.956 0.961 0.954
seed 2                    0.930 0.937 0.924

With the clip norm 0.1 and ten times the rate, 0.2: 0.932, 0.972, 0.929. ScaleNorm, half the width and a last layer that
starts at 0 did not help."""


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

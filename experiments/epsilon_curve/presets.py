"""The curve's presets.

python -m experiments.run epsilon_curve                                # digits
python -m experiments.run epsilon_curve --dataset pneumonia_mnist      # five silos of chest radiographs
"""

from experiments.combinations import presets
from experiments.combinations.settings import Scale
from experiments.epsilon_curve.settings import Curve


def preset(dataset: str, scale: Scale) -> Curve:
    """The settings a command starts from, before the overrides on its line.

    Args:
        dataset: what `--dataset` says.
        scale: what `--scale` says.

    Returns:
        A complete curve: the model and the training of the study of combinations.
    """
    study = presets.preset("combinations", dataset, scale)
    return Curve(
        dataset=dataset,
        scale=scale,
        model=study.model,
        width=study.width,
        norm_groups=study.norm_groups,
        train=study.train,
        dp=study.dp,
    )

"""The study's presets.

python -m experiments.run codecs                                         # digits
python -m experiments.run codecs --dataset pneumonia_mnist --seeds 0 1 2
"""

from experiments.codecs.settings import Codecs
from experiments.combinations import presets
from experiments.combinations.settings import Scale


def preset(dataset: str, scale: Scale) -> Codecs:
    """The settings a command starts from, before the overrides on its line: those of the study of combinations.

    Args:
        dataset: what `--dataset` says.
        scale: what `--scale` says.
    """
    return Codecs(**presets.shared(dataset, scale))

"""Models by name."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax

from fedrobust import check
from fedrobust.models.flax_builder import build_flax
from fedrobust.models.haiku_builder import build_haiku
from fedrobust.models.spec import Spec, resnet9, resnet18, small_cnn
from fedrobust.types import Key, Model, Params

SPECS: dict[str, Callable[..., Spec]] = {"small_cnn": small_cnn, "resnet9": resnet9, "resnet18": resnet18}
BUILDERS: dict[str, Callable[[Spec], Model]] = {"flax": build_flax, "haiku": build_haiku}


def build(
    name: str,
    *,
    builder: str = "flax",
    image_shape: Sequence[int],
    num_classes: int,
    width: int | None = None,
    **options: Any,
) -> Model:
    """Builds a model by name.

    Args:
        name: a row of `SPECS`.
        builder: a row of `BUILDERS`; they compute the same function of the same parameter tree.
        image_shape: (H, W, C), each >= 1. `init` insists on it.
        num_classes: L >= 2.
        width: channels of the first convolution, >= 1; None for the model's own.
        **options: of the specification: `groups`, `scale_norm`.

    Returns:
        The model. Its parameters are float32: layer name -> weight name -> array.

    Raises:
        ValueError: one line naming the setting.
    """
    check.one_of("model", name, SPECS)
    check.one_of("builder", builder, BUILDERS)
    check.require(
        len(image_shape) == 3 and min(image_shape) >= 1, "image_shape", tuple(image_shape), "(H, W, C), each >= 1"
    )
    allowed = set(inspect.signature(SPECS[name]).parameters) - {"num_classes", "width"}
    for option in options:
        check.one_of(f"option of {name}", option, allowed)
    if width is not None:
        options["width"] = width
    model = BUILDERS[builder](SPECS[name](num_classes=num_classes, **options))

    def init(key: Key, image: jax.Array) -> Params:
        check.require(
            image.shape[1:] == tuple(image_shape), "image", image.shape, f"of shape [B, *{tuple(image_shape)}]"
        )
        return model.init(key, image)

    return Model(init, model.apply)

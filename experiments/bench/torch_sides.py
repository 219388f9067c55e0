"""The sides of `dp_step` that run PyTorch and Opacus: the same ResNet-9, and the clipped sum by each of its modes.

Opacus is timed up to its clipped sum of gradients: no noise, no update, as on our side.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def side(name: str, num_examples: int, clip_norm: float) -> Callable[[], Any]:
    """The function without arguments that is measured under this name."""
    import torch

    warnings.filterwarnings("ignore", "Full backward hook is firing")  # Opacus, on images that need no gradient
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    model = resnet9()
    image, label = torch.rand(num_examples, 1, 28, 28), torch.arange(num_examples) % 2
    criterion = torch.nn.CrossEntropyLoss()
    if name in ("torch", "torch_channels_last"):
        if name == "torch_channels_last":
            model = model.to(memory_format=torch.channels_last)
            image = image.to(memory_format=torch.channels_last)
        weights = list(model.parameters())
        return lambda: torch.autograd.grad(criterion(model(image), label), weights)
    return _opacus(name, model, criterion, image, label, clip_norm)


def _opacus(name: str, model: Any, criterion: Any, image: Any, label: Any, clip_norm: float) -> Callable[[], Any]:
    import torch
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    is_ghost = name == "opacus_ghost"
    wrapped = (
        GradSampleModuleFastGradientClipping(model, max_grad_norm=clip_norm, use_ghost_clipping=True)
        if is_ghost
        else GradSampleModule(model, force_functorch=name == "opacus_functorch")
    )
    optimizer = (DPOptimizerFastGradientClipping if is_ghost else DPOptimizer)(
        torch.optim.SGD(wrapped.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=clip_norm,
        expected_batch_size=len(label),
    )
    loss = DPLossFastGradientClipping(wrapped, optimizer, criterion, loss_reduction="mean") if is_ghost else criterion

    def step() -> None:
        optimizer.zero_grad()
        loss(wrapped(image), label).backward()
        if is_ghost:
            optimizer.accumulate()
        else:
            optimizer.clip_and_accumulate()

    return step


def resnet9(width: int = 32) -> Any:
    """The ResNet-9 of `fedrobust.models`, 28 x 28 x 1, two classes, new weights."""
    from torch import nn

    class Residual(nn.Module):
        def __init__(self, *body: nn.Module):
            super().__init__()
            self.body = nn.Sequential(*body)

        def forward(self, x: Any) -> Any:
            return x + self.body(x)

    return nn.Sequential(
        _conv_block(1, width),
        _conv_block(width, 2 * width),
        nn.MaxPool2d(2),
        Residual(_conv_block(2 * width, 2 * width), _conv_block(2 * width, 2 * width)),
        _conv_block(2 * width, 4 * width),
        nn.MaxPool2d(2),
        _conv_block(4 * width, 4 * width),
        Residual(_conv_block(4 * width, 4 * width), _conv_block(4 * width, 4 * width)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 2),
    )


def small_cnn(width: int = 24) -> Any:
    """The small CNN of `fedrobust.models`, any image with one channel, two classes, new weights."""
    from torch import nn

    return nn.Sequential(
        _conv_block(1, width),
        nn.MaxPool2d(2),
        _conv_block(width, 2 * width),
        nn.MaxPool2d(2),
        _conv_block(2 * width, 2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 2),
    )


NETWORKS = {"resnet9": resnet9, "small_cnn": small_cnn}
"""By the names they have in `fedrobust.models`."""


def _conv_block(channels: int, features: int) -> Any:
    from torch import nn

    convolution = nn.Conv2d(channels, features, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(8, features, eps=1e-6), nn.ReLU())


def set_weights(model: Any, weights: Mapping[str, np.ndarray]) -> None:
    """Gives one of the networks the weights of ours, `"layer/entry" -> array`.

    Both list their layers in the order in which they run; kernels have their axes turned.
    """
    import torch

    def position(name: str) -> list[int]:
        return [int(word) for word in name.split("/")[0].split("_") if word.isdigit()]

    layers = [layer for layer in model.modules() if list(layer.parameters(recurse=False))]
    names = sorted({name.split("/")[0] for name in weights}, key=position)
    for name, layer in zip(names, layers, strict=True):
        found = {entry.split("/")[1]: x for entry, x in weights.items() if entry.split("/")[0] == name}
        kernel = found.get("kernel", found.get("scale"))
        assert kernel is not None
        order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[kernel.ndim]
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(kernel.transpose(order))))
            if "bias" in found:
                layer.bias.copy_(torch.from_numpy(found["bias"]))

"""The sides of `dp_step` that run PyTorch and Opacus: the same ResNet-9, and the clipped sum by each of its modes.

Opacus is timed up to its clipped sum of gradients: no noise, no update, as on our side.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any


def side(name: str, num_examples: int, clip_norm: float) -> Callable[[], Any]:
    """The function without arguments that is measured under this name."""
    import torch

    warnings.filterwarnings("ignore", "Full backward hook is firing")  # Opacus, on images that need no gradient
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    model = _resnet9()
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


def _resnet9() -> Any:
    from torch import nn

    class Residual(nn.Module):
        def __init__(self, *body: nn.Module):
            super().__init__()
            self.body = nn.Sequential(*body)

        def forward(self, x: Any) -> Any:
            return x + self.body(x)

    def block(channels: int, features: int) -> nn.Module:
        convolution = nn.Conv2d(channels, features, 3, padding=1, bias=False)
        return nn.Sequential(convolution, nn.GroupNorm(8, features, eps=1e-6), nn.ReLU())

    return nn.Sequential(
        block(1, 32),
        block(32, 64),
        nn.MaxPool2d(2),
        Residual(block(64, 64), block(64, 64)),
        block(64, 128),
        nn.MaxPool2d(2),
        block(128, 128),
        Residual(block(128, 128), block(128, 128)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 2),
    )

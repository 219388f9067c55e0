"""Reading a model's own equations: coupled channels, the same model with fewer of them, its cost."""

from fedrobust.trace.cost import flops
from fedrobust.trace.coupling import Coupling, couple
from fedrobust.trace.examples import ties_examples
from fedrobust.trace.fast import fast_convolutions, fast_inference
from fedrobust.trace.gradients import interruptions, straight_through
from fedrobust.trace.opened import with_open_kernels
from fedrobust.trace.program import Equation, Program, evaluate, read
from fedrobust.trace.resize import resize

__all__ = [
    "Coupling",
    "Equation",
    "Program",
    "couple",
    "evaluate",
    "fast_convolutions",
    "fast_inference",
    "flops",
    "interruptions",
    "read",
    "resize",
    "straight_through",
    "ties_examples",
    "with_open_kernels",
]

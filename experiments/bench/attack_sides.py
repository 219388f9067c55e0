"""One attack of `attacks` in a process of its own: `python -m experiments.bench.attack_sides NAME FILE`.

NAME is `NETWORK-ATTACK_LIBRARY_SIZE`, such as resnet9-pgd40_torchattacks_64; FILE holds the weights, the images
and our predictions. The process stops with an error unless its model predicts the same class for every image. It prints
"ready" after one attack that is not counted, then answers each line it reads with the milliseconds of one attack.
"""

import copy
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

NETWORKS = {"resnet9": (28, 32), "small_cnn": (8, 24)}
"""Height and width of its images, and its base width."""
NUM_STEPS = {"pgd40": 40, "apgd100": 100, "weak40": 40}
JAX_LIBRARIES = ("ours", "plain", "foolboxjax", "foolboxjaxjit")
FEW = 64  # images that take all these steps on every side
BRIEF = ("apgd100", "foolboxjax", "foolboxjaxjit")  # attacks and sides that take a fifth with more, on "resnet9"
SMALL = 1e-4  # a radius at which nothing breaks, so that all sides take all steps
LARGE = 0.3  # where this model has no defense
STEP_SHARE = 0.25  # a step over the radius
NUM_SLOTS = 16
NUM_TRAINING_STEPS = 320
ACCURACY = 0.95  # at least, on the images of the benchmark: a network that has learnt nothing has no labels to speak of

Step = Callable[[], Any]


def side(name: str, file: str) -> Step:
    """The function without arguments that is measured; it returns when its result is there."""
    network, attack, library, size = parts(name)
    with np.load(file) as stored:
        arrays = dict(stored)
    image, label = arrays.pop("image")[:size], arrays.pop("label")[:size]
    make = _jax_side if library in JAX_LIBRARIES else _torch_side
    return make(network, attack, library, num_steps(network, attack, library, size), arrays, image, label)


def parts(name: str) -> tuple[str, str, str, int]:
    """Network, attack, library and size of a side's name."""
    network, rest = name.split("-")
    attack, library, size = rest.split("_")
    return network, attack, library, int(size)


def num_steps(network: str, attack: str, library: str, size: int) -> int:
    """Steps of a side's attack on this many images."""
    is_brief = network == "resnet9" and size > FEW and (attack in BRIEF or library in BRIEF)
    return NUM_STEPS[attack] // (5 if is_brief else 1)


def save(file: str, network: str, num: int) -> None:
    """Writes a network that tells digits below 5 from the others, `num` of its images and its predictions.

    Raises:
        RuntimeError: it does not tell them apart.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from fedrobust import data, keys, losses

    train = data.load("digits").train
    size, _ = NETWORKS[network]
    image = jax.image.resize(train.image, (len(train.label), size, size, 1), "linear")
    label = jnp.asarray(train.label < 5, jnp.int32)
    root, model = keys.root(0), build(network)
    params = model.init(keys.stream(root, "init"), image[:1])
    loss, optimizer = losses.cross_entropy(model.apply), optax.adam(_rate())

    @jax.jit
    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        gradient = jax.grad(lambda p: jnp.mean(loss(root, p, x, y)))(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for rows in np.random.default_rng(0).integers(len(label), size=(NUM_TRAINING_STEPS, 64)):
        params, state = step(params, state, image[rows], label[rows])
    prediction = jax.jit(model.apply)(params, image[:num]).argmax(1)
    accuracy = float(jnp.mean(prediction == label[:num]))
    if accuracy < ACCURACY:
        raise RuntimeError(f"{network} is right on {accuracy:.1%} of its training images: {ACCURACY:.0%} are wanted")
    weights = {f"{layer}/{name}": x for layer, entry in params.items() for name, x in entry.items()}
    np.savez(file, image=image[:num], label=prediction, **weights)


def _rate() -> Any:
    """A tenth for the last quarter: at the full one accuracy on these images still jumps by points."""
    import optax

    return optax.piecewise_constant_schedule(1e-3, {NUM_TRAINING_STEPS * 3 // 4: 0.1})


def build(network: str) -> Any:
    """The network of all sides."""
    from fedrobust import models

    size, width = NETWORKS[network]
    return models.build(network, builder="flax", image_shape=(size, size, 1), num_classes=2, width=width)


def parameters(weights: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """The tree of parameters from a file's arrays by path."""
    params: dict[str, dict[str, Any]] = {}
    for name, x in weights.items():
        layer, entry = name.split("/")
        params.setdefault(layer, {})[entry] = x
    return params


def _jax_side(
    network: str,
    attack: str,
    library: str,
    steps: int,
    weights: dict[str, np.ndarray],
    image: np.ndarray,
    label: np.ndarray,
) -> Step:
    import jax

    from experiments.bench import sides
    from fedrobust import keys, ops

    if library.startswith("foolbox"):
        # The network as its users write it; this process runs nothing else.
        ops.conv = sides._lax_conv  # type: ignore[assignment]
    model = build(network)
    params = jax.tree.map(jax.numpy.asarray, parameters(weights))
    _agree(jax.jit(model.apply)(params, image).argmax(1), label)
    if library.startswith("foolbox"):

        def logits_fn(x: jax.Array) -> jax.Array:
            return model.apply(params, x)

        return _foolbox_jax(jax.jit(logits_fn) if library.endswith("jit") else logits_fn, image, label, steps)
    run = _search(attack, library, steps)

    def program(key: Any, params: Any, image: Any, label: Any) -> Any:
        return run(key, lambda x: model.apply(params, x), image, label, label >= 0)

    arguments = (keys.root(1), params, *map(jax.numpy.asarray, (image, label)))
    compiled = jax.jit(program).lower(*arguments).compile()
    if attack != "weak40" and compiled(*arguments).wrong.any():
        raise RuntimeError(f"{attack} breaks an image of {network} at {SMALL}: not all sides take the same steps")
    return lambda: jax.block_until_ready(compiled(*arguments))


def _search(attack: str, library: str, steps: int) -> Any:
    from fedrobust import attacks

    eps = LARGE if attack == "weak40" else SMALL
    if attack == "apgd100":
        search = attacks.auto_pgd(norm="linf", eps=eps, num_steps=steps, random_start=False, objective="cross_entropy")
    else:
        search = attacks.momentum_pgd(
            norm="linf",
            eps=eps,
            step_size=STEP_SHARE * eps,
            num_steps=steps,
            momentum=0.0,
            random_start=False,
            detect_cycles=False,
        )
    return attacks.run(search, num_slots=NUM_SLOTS, compact=library == "ours", num_devices=None)


def _foolbox_jax(logits_fn: Any, image: np.ndarray, label: np.ndarray, steps: int) -> Step:
    import foolbox
    import jax

    model = foolbox.models.JAXModel(logits_fn, bounds=(0, 1), data_format="channels_last")
    attack = _foolbox_attack(foolbox, steps)
    arrays = tuple(map(jax.numpy.asarray, (image, label)))
    return lambda: jax.block_until_ready(
        attack.run(model, arrays[0], foolbox.criteria.Misclassification(arrays[1]), epsilon=SMALL)
    )


def _foolbox_attack(foolbox: Any, steps: int) -> Any:
    return foolbox.attacks.LinfProjectedGradientDescentAttack(
        abs_stepsize=STEP_SHARE * SMALL, steps=steps, random_start=False
    )


def _torch_side(
    network: str,
    attack: str,
    library: str,
    steps: int,
    weights: dict[str, np.ndarray],
    image: np.ndarray,
    label: np.ndarray,
) -> Step:
    import torch

    from experiments.bench import torch_sides

    warnings.simplefilter("ignore")
    torch.set_num_threads(os.cpu_count() or 1)
    model = torch_sides.NETWORKS[network](NETWORKS[network][1]).eval()
    torch_sides.set_weights(model, weights)
    x = torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))
    y = torch.from_numpy(label.astype(np.int64))
    with torch.no_grad():
        _agree(model(x).argmax(1).numpy(), label)
    if _channels_last_is_faster(torch, model, x):
        model, x = (value.to(memory_format=torch.channels_last) for value in (model, x))
    if library == "torchattacks":
        import torchattacks

        if attack == "apgd100":
            found = torchattacks.APGD(
                model, norm="Linf", eps=SMALL, steps=steps, n_restarts=1, loss="ce", verbose=False
            )
        else:
            found = torchattacks.PGD(model, eps=SMALL, alpha=STEP_SHARE * SMALL, steps=steps, random_start=False)
        return lambda: found(x, y)
    if library == "foolboxtorch":
        import foolbox

        wrapped, pgd = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), _foolbox_attack(foolbox, steps)
        return lambda: pgd.run(wrapped, x, foolbox.criteria.Misclassification(y), epsilon=SMALL)
    return _art(torch, model, x.numpy(), label, steps)


def _channels_last_is_faster(torch: Any, model: Any, image: Any) -> bool:
    """By the times of five input gradients in each memory format, the first two not counted."""
    times = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        network, x = (copy.deepcopy(value).to(memory_format=memory_format) for value in (model, image))
        x.requires_grad_()
        for repeat in range(5):
            if repeat == 2:
                start = time.perf_counter()
            torch.autograd.grad(network(x).sum(), x)
        times.append(time.perf_counter() - start)
    return times[1] < times[0]


def _art(torch: Any, model: Any, image: np.ndarray, label: np.ndarray, steps: int) -> Step:
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(model, torch.nn.CrossEntropyLoss(), image.shape[1:], 2, clip_values=(0, 1))
    attack = ProjectedGradientDescent(
        classifier,
        norm=np.inf,
        eps=SMALL,
        eps_step=STEP_SHARE * SMALL,
        max_iter=steps,
        num_random_init=0,
        batch_size=len(label),
        verbose=False,
    )
    return lambda: attack.generate(image, label)


def _agree(prediction: Any, label: np.ndarray) -> None:
    share = float(np.mean(np.asarray(prediction) == label))
    if share != 1:
        raise RuntimeError(f"the models agree on {share:.2%} of the images: the timings would mean nothing")


def main(name: str, file: str) -> None:
    """Answers until its input ends."""
    if parts(name)[2] in JAX_LIBRARIES:
        import jax

        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    step = side(name, file)
    step()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(1e3 * (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

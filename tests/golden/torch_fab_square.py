"""What torch implementations of FAB and Square break on two small nets, to compare ours with.

`python tests/golden/torch_fab_square.py`, torchattacks, pyautoattack and scikit-learn installed; 2 minutes of one core.
"""

import json
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np

HIDDEN = 24
NUM_TRAIN = 797  # of scikit-learn's 1797 digits, 8x8; the other 1000 are attacked
NETS = {"ten": 10, "two": 2}  # the digit; whether it is below 5
RUNS = [
    # net, norm, eps, FAB steps, Square queries
    ("ten", "linf", 0.15, 20, 500),
    ("ten", "l2", 0.5, 20, 500),
    ("ten", "l1", 1.5, 20, 500),
    ("two", "linf", 0.1, 20, 500),
    ("two", "l2", 0.5, 20, 500),
]
SEEDS = (0, 1, 2)


def digits():
    """Images [1797,8,8] float32 in [0, 1] and digits [1797]."""
    from sklearn.datasets import load_digits

    bundled = load_digits()
    return (bundled.images / 16).astype(np.float32), bundled.target


def labels(net, digit):
    """What the net is to tell apart."""
    return digit if net == "ten" else (digit < 5).astype(digit.dtype)


def trained(net, image, label):
    """A perceptron of one hidden layer after adversarial training; its weights as rounded lists, input side first."""
    import torch
    from torch.nn.functional import cross_entropy

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, NETS[net])
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    image, label = torch.from_numpy(image), torch.from_numpy(label)
    for _ in range(400):
        sample = image
        for _ in range(3):
            sample = sample.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(cross_entropy(model(sample), label), sample)
            sample = torch.clamp(image + torch.clamp(sample + 0.05 * gradient.sign() - image, -0.1, 0.1), 0, 1)
        optimizer.zero_grad()
        cross_entropy(model(sample.detach()), label).backward()
        optimizer.step()
    arrays = [model[1].weight.T, model[1].bias, model[3].weight.T, model[3].bias]
    return [np.round(x.detach().numpy().astype(float), 3).tolist() for x in arrays]


def attacks(model, net, norm, eps, num_steps, num_queries):
    """`(peer, family, seed, function of images and labels)` of a run."""
    import pyautoattack.fab_pt
    import pyautoattack.square
    import torchattacks

    name, others = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm], NETS[net] - 1
    if norm != "l1":
        fab = torchattacks.FAB(model, name, eps, num_steps, multi_targeted=True, n_classes=others + 1)
        yield "torchattacks", "fab", 0, fab
        yield "torchattacks", "square", 0, torchattacks.Square(model, name, eps, num_queries, seed=0)
    fab = pyautoattack.fab_pt.FABAttack_PT(
        model, norm=name, n_iter=num_steps, eps=eps, targeted=True, device="cpu", n_target_classes=others
    )
    yield "pyautoattack", "fab", 0, fab.perturb
    for seed in SEEDS:
        square = pyautoattack.square.SquareAttack(
            model, norm=name, n_queries=num_queries, eps=eps, seed=seed, device="cpu"
        )
        yield "pyautoattack", "square", seed, square.perturb


def broken(model, norm, eps, image, label, sample):
    """[N] bool: misclassified and inside the ball."""
    import torch

    delta = (sample - image).double().flatten(1)
    size = {"linf": delta.abs().amax(1), "l2": delta.norm(dim=1), "l1": delta.abs().sum(1)}[norm]
    inside = (size <= eps * (1 + 1e-5) + 1e-6) & (sample.flatten(1).amin(1) >= 0) & (sample.flatten(1).amax(1) <= 1)
    with torch.no_grad():
        return ((model(sample).argmax(1) != label) & inside).numpy()


def main() -> None:
    """Writes the nets and what breaks beside this file."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # tiny layers: more threads wait for each other
    image, digit = digits()
    found, weights = [], {net: trained(net, image[:NUM_TRAIN], labels(net, digit)[:NUM_TRAIN]) for net in NETS}
    tested = torch.from_numpy(image[NUM_TRAIN:, None])
    for net, norm, eps, num_steps, num_queries in RUNS:
        w1, b1, w2, b2 = (torch.tensor(x, dtype=torch.float32) for x in weights[net])

        class Net(torch.nn.Module):
            def forward(self, x, w1=w1, b1=b1, w2=w2, b2=b2):
                return torch.relu(x.flatten(1) @ w1 + b1) @ w2 + b2

        model, label = Net().eval(), torch.from_numpy(labels(net, digit)[NUM_TRAIN:])
        with torch.no_grad():
            clean = (model(tested).argmax(1) != label).numpy()
        for peer, family, seed, attack in attacks(model, net, norm, eps, num_steps, num_queries):
            errors = clean | broken(model, norm, eps, tested, label, attack(tested.clone(), label))
            row = [net, norm, eps, num_steps, num_queries, peer, family, seed, np.packbits(errors).tobytes().hex()]
            print(*row[:-1], "accuracy", 100 * np.mean(~errors), "clean", 100 * np.mean(~clean), flush=True)
            found.append(row)
    Path(__file__).with_suffix(".json").write_text(
        json.dumps(
            {
                "command": "python tests/golden/torch_fab_square.py",
                "versions": {n: version(n) for n in ("torchattacks", "pyautoattack", "torch", "numpy", "scikit-learn")},
                "fields": ["net", "norm", "eps", "fab_steps", "square_queries", "peer", "family", "seed", "errors"],
                "num_train": NUM_TRAIN,
                "weights": weights,
                "runs": found,
            }
        ).replace('], ["', '],\n["')
        + "\n"
    )


if __name__ == "__main__":
    main()

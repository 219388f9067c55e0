"""What torch implementations of Auto-PGD break on two small nets, to compare ours with.

`python tests/golden/torch_auto_pgd.py`, torchattacks, pyautoattack and scikit-learn installed; 3 minutes of one core.
"""

import json
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
from torch_fab_square import NETS, NUM_TRAIN, broken, digits, labels, trained

NUM_STEPS = 50
NUM_SEEDS = {"cross_entropy": 12, "dlr": 48, "targeted_dlr": 1}  # one start moves DLR by 0.3 points
RUNS = [
    # net, norm, eps, objective
    ("ten", "linf", 0.12, "cross_entropy"),
    ("ten", "linf", 0.12, "dlr"),
    ("ten", "linf", 0.12, "targeted_dlr"),
    ("ten", "l2", 0.6, "cross_entropy"),
    ("ten", "l2", 0.6, "dlr"),
    ("ten", "l2", 0.6, "targeted_dlr"),
    ("two", "linf", 0.08, "cross_entropy"),
    ("two", "l2", 0.5, "cross_entropy"),
]


def attacks(model, net, norm, eps, objective, seed):
    """`(peer, function of images and labels)` of a run."""
    import torchattacks
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

    name, settings = {"linf": "Linf", "l2": "L2"}[norm], {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps}
    if objective == "targeted_dlr":
        yield "torchattacks", torchattacks.APGDT(model, name, eps, NUM_STEPS, n_classes=NETS[net], seed=seed)
        yield "pyautoattack", APGDAttack_targeted(model, n_iter=NUM_STEPS, seed=seed, device="cpu", **settings).perturb
        return
    loss = {"cross_entropy": "ce", "dlr": "dlr"}[objective]
    yield "torchattacks", torchattacks.APGD(model, name, eps, NUM_STEPS, loss=loss, seed=seed)
    yield "pyautoattack", APGDAttack(model, n_iter=NUM_STEPS, seed=seed, loss=loss, device="cpu", **settings).perturb


def main() -> None:
    """Writes the nets and what breaks beside this file."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # tiny layers: more threads wait for each other
    image, digit = digits()
    found, weights = [], {net: trained(net, image[:NUM_TRAIN], labels(net, digit)[:NUM_TRAIN]) for net in NETS}
    tested = torch.from_numpy(image[NUM_TRAIN:, None])
    for net, norm, eps, objective in RUNS:
        w1, b1, w2, b2 = (torch.tensor(x, dtype=torch.float32) for x in weights[net])

        class Net(torch.nn.Module):
            def forward(self, x, w1=w1, b1=b1, w2=w2, b2=b2):
                return torch.relu(x.flatten(1) @ w1 + b1) @ w2 + b2

        model, label = Net().eval(), torch.from_numpy(labels(net, digit)[NUM_TRAIN:])
        with torch.no_grad():
            clean = (model(tested).argmax(1) != label).numpy()
        seeds = range(NUM_SEEDS[objective])
        runs = [(seed, *run) for seed in seeds for run in attacks(model, net, norm, eps, objective, seed)]
        for seed, peer, attack in runs:
            errors = clean | broken(model, norm, eps, tested, label, attack(tested.clone(), label))
            wrong = np.packbits(errors).tobytes().hex() if seed == 0 else ""
            row = [net, norm, eps, objective, peer, seed, int(np.sum(~errors)), wrong]
            print(*row[:-1], "right of", len(errors), "clean", int(np.sum(~clean)), flush=True)
            found.append(row)
    record = {
        "command": "python tests/golden/torch_auto_pgd.py",
        "versions": {
            name: version(name) for name in ("torchattacks", "pyautoattack", "torch", "numpy", "scikit-learn")
        },
        "num_train": NUM_TRAIN,
        "num_steps": NUM_STEPS,
        "weights": weights,
        "fields": ["net", "norm", "eps", "objective", "peer", "seed", "right", "wrong"],
        "runs": found,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()

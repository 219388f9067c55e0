"""The study's presets: quickstart, and combinations at three scales.

python -m experiments.run quickstart                                  # digits
python -m experiments.run combinations --dataset pneumonia_mnist      # the paper's task
"""

from dataclasses import replace

from experiments.combinations.settings import AT, DP, Attack, Scale, Study, Training

_DIGITS = Study(
    experiment="quickstart",
    dataset="digits",
    model="small_cnn",
    width=24,
    train=Training(num_rounds=20, num_steps=8, batch_size=32, learning_rate=4e-3, average_decay=0.5),
    dp=DP(num_rounds=80, sampling_rate=0.25, delta=1e-3, learning_rate=1.0, momentum=0.9, microbatch_size=32),
    at=AT(eps=0.1, num_steps=3, warmup=0.3, clean_share=0.0),
    attack=Attack(eps=(0.05, 0.1, 0.15)),
)

_PNEUMONIA = Study(model="resnet9", width=16)


def preset(name: str, dataset: str, scale: Scale) -> Study:
    """The settings a command starts from, before the overrides on its line.

    Args:
        name: "quickstart" or "combinations".
        dataset: what `--dataset` says.
        scale: what `--scale` says.

    Returns:
        A complete study.
    """
    study = _DIGITS if dataset == "digits" else _PNEUMONIA
    study = replace(study, experiment=name, dataset=dataset, scale=scale)
    if scale == "smoke":
        return replace(
            study,
            width=8,
            train=replace(study.train, num_rounds=4, num_steps=2, batch_size=16),
            dp=replace(study.dp, num_rounds=4, sampling_rate=0.1),
            at=replace(study.at, num_steps=1),
            attack=replace(study.attack, num_steps=2),
        )
    if scale == "paper":
        return replace(
            study,
            model="resnet9",
            width=32,
            seeds=(0, 1, 2),
            train=replace(study.train, num_rounds=60),
            dp=replace(study.dp, num_rounds=600, sampling_rate=0.2),
            at=replace(study.at, num_steps=7, relative_step=0.25),
            attack=replace(study.attack, num_steps=50, num_restarts=5),
        )
    return study

"""Real images through every layer, once."""

import functools

import jax
import numpy as np
import optax

from fedrobust import attacks, data, defenses, evaluation, federated, losses, models


def test_a_round_on_chest_radiographs_moves_the_model_and_lowers_its_loss(pneumonia_dir):
    splits = data.load("pneumonia_mnist", data_dir=pneumonia_dir)
    assert [len(split.label) for split in splits] == [4708, 524, 624]
    assert np.bincount(splits.train.label).tolist() == [1214, 3494]
    parts = data.PARTITIONS["iid"](np.random.default_rng(0), splits.train.label, 3, min_size=1)
    settings = data.CohortSettings(num_steps=2, client_sampling="all", batch_sampling="shuffle", batch_size=4)
    cohorts = data.make_cohorts(splits.train, parts, settings, seed=0, malicious=(2,))
    model = models.build("resnet9", image_shape=(28, 28, 1), num_classes=2, width=8)
    loss = losses.cross_entropy(model.apply)
    algorithm = federated.fedavg(
        lambda round: federated.local_update(federated.mean_grad(loss), optax.sgd(0.05), skip_empty=True),
        defenses.coordinate_median(),
        optax.sgd(1.0),
        functools.partial(federated.map_clients, backend="scan"),
        update_attack=attacks.sign_flip(5.0),
    )
    key = jax.random.key(0)
    start = algorithm.init(model.init(key, splits.train.image[:1]))
    ((done, state, info),) = federated.rounds(algorithm, start, cohorts, key, 1)
    assert (done, state.round, info.num_present) == (1, 1, 3)
    assert info.client.loss.shape == (3, 2)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    seen = cohorts(0)
    image, label = (np.concatenate(x[:2].reshape(2, 8, *x.shape[3:])) for x in (seen.batch.image, seen.batch.label))
    before, after = (evaluation.predict(model.apply, s.params, image, 16) for s in (start, state))
    values = [optax.softmax_cross_entropy_with_integer_labels(logits, label).mean() for logits in (before, after)]
    assert values[1] < values[0]

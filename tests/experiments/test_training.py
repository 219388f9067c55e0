"""A model that gets smaller while it trains: what it learns from, what it sends."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.combinations import pruning, training
from experiments.combinations.federation import build_model, example_loss, federation, hospitals, make_recipe
from experiments.run import parse
from experiments.ways import WAYS
from fedrobust import compression, trees
from fedrobust.federated import latest
from fedrobust.models import SPECS
from fedrobust.models.spec import Conv, Dense, GlobalPool, Norm, Relu

COMMAND = "quickstart --scale smoke --poison.malicious-share 0 --train.num-rounds 5 --train.batch-size 8"


def tiny(*, num_classes, width, groups):
    return (Conv(width), Norm(4), Relu(), GlobalPool(), Dense(num_classes))


@pytest.fixture
def setting(monkeypatch):
    monkeypatch.setitem(SPECS, "small_cnn", tiny)
    study = parse(COMMAND.split())
    site = hospitals(study, 0)
    return study, site, build_model(study, site.splits.train.image.shape[1:], 10)


def log_softmax(logits):
    return logits - logits.max(1, keepdims=True) - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1))[:, None]


@pytest.mark.parametrize("at", [False, True])
def test_the_loss_by_hand(setting, at):
    """At radius 0 the adversarial sample is the image itself, whatever share clean images have."""
    study, site, model = setting
    study = replace(study, mc=replace(study.mc, label_share=0.25), at=replace(study.at, eps=0.0))
    recipe = make_recipe(study, 0, site, plan=None, at=at)
    image, label = jnp.asarray(site.splits.train.image[:6]), jnp.asarray(site.splits.train.label[:6])
    params, other = (model.init(jax.random.key(seed), image) for seed in (0, 1))
    loss = example_loss(recipe, model.apply, jnp.asarray(3), lambda x: model.apply(other, x))
    found = jax.jit(loss)(jax.random.key(2), params, image, label)

    answer, taught = (log_softmax(np.asarray(model.apply(p, image), np.float64)) for p in (params, other))
    of_label = -answer[np.arange(6), label]
    divergence = (np.exp(taught) * (taught - answer)).sum(1)
    np.testing.assert_allclose(found, 0.25 * of_label + 0.75 * divergence, rtol=1e-5)


def test_under_adversarial_training_the_sample_moves_the_answer_away_from_the_teachers(setting):
    """Without the attack, or with one on something else, the loss at the full radius would be that of the image."""
    study, site, model = setting
    study = replace(study, mc=replace(study.mc, label_share=0.0), at=replace(study.at, eps=0.1, clean_share=0.0))
    image, label = jnp.asarray(site.splits.train.image[:6]), jnp.asarray(site.splits.train.label[:6])
    params, other = (model.init(jax.random.key(seed), image) for seed in (0, 1))
    values = []
    for at in (False, True):
        recipe = make_recipe(study, 0, site, plan=None, at=at)
        loss = example_loss(recipe, model.apply, jnp.asarray(recipe.num_rounds - 1), lambda x: model.apply(other, x))
        values.append(np.asarray(jax.jit(loss)(jax.random.key(2), params, image, label)))
    assert (values[1] > values[0] + 1e-3).all()


def test_trades_adds_beta_times_a_divergence_to_the_clean_loss(setting):
    study, site, model = setting
    image, label = jnp.asarray(site.splits.train.image[:6]), jnp.asarray(site.splits.train.label[:6])
    params = model.init(jax.random.key(0), image)

    def at_the_full_radius(beta, eps):
        settings = replace(study.at, eps=eps, trades_beta=beta, clean_share=0.5)
        recipe = make_recipe(replace(study, at=settings), 0, site, plan=None, at=True)
        loss = example_loss(recipe, model.apply, jnp.asarray(recipe.num_rounds - 1))
        return np.asarray(jax.jit(loss)(jax.random.key(2), params, image, label))

    clean = -log_softmax(np.asarray(model.apply(params, image), np.float64))[np.arange(6), label]
    np.testing.assert_allclose(at_the_full_radius(2.0, 0.0), clean, rtol=1e-5)
    twice, four = (at_the_full_radius(beta, 0.1) - clean for beta in (2.0, 4.0))
    assert (twice > 1e-4).all()
    np.testing.assert_allclose(four, 2 * twice, rtol=1e-2)


def test_the_teacher_is_the_full_model_before_anything_is_pruned(setting, monkeypatch, tmp_path):
    study, site, model = setting
    study = replace(study, mc=replace(study.mc, label_share=0.0, begin=0.4, end=0.8, num_events=2))
    asked = []
    federation = training.federation
    monkeypatch.setattr(training, "federation", lambda *args: asked.append(args) or federation(*args))
    recipe = make_recipe(study, 0, site, plan=None, at=False)
    job = training.Job(recipe, site, 0, 5, True, (), "mean", tmp_path, None)
    training.train(job, model, lambda done, total, figures: None)
    (_, _, params), (_, _, small, teacher) = asked
    assert trees.size(small) < trees.size(params)
    state = federation(recipe, model.apply, params).init(params)
    rounds, saved = latest(tmp_path / "dense", training._Saved(state, *training._nothing(5)))
    assert rounds == 2 and all((x == 1).all() for x in jax.tree.leaves(saved.state.mask))
    image = site.splits.val.image[:8]
    np.testing.assert_array_equal(teacher(image), model.apply(saved.state.average, image))


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_units_compete_as_the_study_says(setting, scope):
    study, site, _ = setting
    model = build_model(replace(study, model="resnet9"), site.splits.val.image.shape[1:], 10)
    mc = replace(study.mc, sparsity=0.5, scope=scope, begin=0.2, end=0.4, num_events=1)
    params = model.init(jax.random.key(1), site.splits.val.image[:1])
    scaled = {
        name: jax.tree.map(lambda x, i=i: x * jnp.linspace(1, 1 + i, x.shape[-1]), params[name])
        for i, name in enumerate(params)
    }
    state = federation(make_recipe(study, 0, site, plan=None, at=False), model.apply, params).init(scaled)
    channels = pruning.channels(model, site.splits.val.image.shape[1:])
    prune, begin, end = pruning.schedule(mc, channels, 10)
    expected = {scope: compression.masks(channels, scaled, sparsity=0.5, scope=scope) for scope in compression.SCOPES}
    assert (
        compression.num_kept(channels, expected["global"]).tolist()
        != compression.num_kept(channels, expected["uniform"]).tolist()
    )
    jax.tree.map(np.testing.assert_array_equal, prune(state, end).mask, expected[scope])
    assert prune(state, begin) is state


def test_every_group_reaches_its_own_share_with_the_others(setting):
    study, site, _ = setting
    model = build_model(replace(study, model="resnet9"), site.splits.val.image.shape[1:], 10)
    shares = (0.5, 0.0, 0.75, 0.25, 0.5, 0.75)
    mc = replace(study.mc, group_sparsity=shares, begin=0.1, end=0.5, num_events=2)
    channels = pruning.channels(model, site.splits.val.image.shape[1:])
    pruning.require_groups(mc, channels)
    params = model.init(jax.random.key(1), site.splits.val.image[:1])
    state = federation(make_recipe(study, 0, site, plan=None, at=False), model.apply, params).init(params)
    prune, begin, end = pruning.schedule(mc, channels, 10)
    sizes = np.bincount(channels.group)
    halfway = prune(state, (begin + end) // 2)  # cubic: 7/8 of each share
    for found, part in ((halfway, 7 / 8), (prune(halfway, end), 1)):
        expected = sizes - np.floor(np.array(shares) * part * sizes)
        np.testing.assert_array_equal(compression.num_kept(channels, found.mask), expected)


def test_labels_alone_need_no_teacher(setting):
    study, site, model = setting
    assert training._teacher(make_recipe(study, 0, site, plan=None, at=False), model.apply, {}) is None


def num_bytes(way, params):
    codec = way.build(params)
    code, _ = codec.encode(jax.random.key(0), codec.init(params), params)
    return float(codec.num_bits(code)) / 8


def test_a_model_that_gets_smaller_sends_less_in_every_code(setting, tmp_path):
    """Two rounds of five go by before the last event, and the last three are of the small model."""
    study, site, model = setting
    study = replace(study, mc=replace(study.mc, sparsity=0.5, begin=0.2, end=0.4, num_events=1))
    way = replace(WAYS["sign, feedback"], both=True)
    recipe = replace(make_recipe(study, 0, site, plan=None, at=False), way=way)
    job = training.Job(recipe, site, 0, 5, True, (), "mean", tmp_path, None)
    trained = training.train(job, model, lambda done, total, figures: None)
    full = model.init(jax.random.key(0), site.splits.val.image[:1])
    assert trees.size(trained.params) < trees.size(full)
    expected = (2 * num_bytes(way, full) + 3 * num_bytes(way, trained.params)) / 5
    np.testing.assert_allclose(trained.sent, [expected, expected], rtol=1e-6)

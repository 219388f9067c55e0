"""Which units the masks remove: by hand, at their edges, and by scores that are learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust import losses, trees
from fedrobust.compression import find_channels, kept_units, loss_of_scores, masks
from tests.compression.nets import IMAGE, NETS, ONE, Net, concatenated, residual


def test_masks_remove_the_lowest_scores_of_a_hand_computed_net():
    net = Net(lambda p, x: (x.mean((1, 2)) @ p["a"] + p["b"]) @ p["c"], None)
    params = {
        "a": jnp.array([[3.0, 1.0, 0.0, 2.0], [0.0, 1.0, 0.0, 0.0]]),
        "b": jnp.array([0.0, 1.0, 2.5, 0.0]),
        "c": jnp.zeros((4, 3)).at[0, 0].set(1.0),
    }
    channels = find_channels(net.apply, params, ONE)
    assert masks(channels, params, sparsity=0.5, score="l1")["b"].tolist() == [1, 1, 0, 0]  # 4, 3, 2.5, 2
    assert masks(channels, params, sparsity=0.5, score="l2")["b"].tolist() == [1, 0, 1, 0]  # 10, 3, 6.25, 4
    got = masks(channels, params, sparsity=0.25, score="l1")
    np.testing.assert_array_equal(got["a"], [[1, 1, 1, 0]] * 2)
    np.testing.assert_array_equal(got["c"], [[1] * 3, [1] * 3, [1] * 3, [0] * 3])


@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, 6), (0.1, 6), (0.34, 4), (0.5, 3), (2 / 3, 2), (0.999, 1)])
def test_the_share_removed_is_rounded_down_and_one_unit_stays(sparsity, kept):
    net = residual()
    channels = find_channels(net.apply, net.params, ONE)
    assert kept_units(channels, masks(channels, net.params, sparsity=sparsity)).sum() == kept


def test_a_higher_sparsity_keeps_a_subset():
    net = concatenated()
    channels = find_channels(net.apply, net.params, ONE)
    kept = [kept_units(channels, masks(channels, net.params, sparsity=s)) for s in (0.2, 0.5, 0.8)]
    assert (kept[1] <= kept[0]).all() and (kept[2] <= kept[1]).all()


@pytest.mark.parametrize("name", ["squeeze_excite", "attention"])
def test_the_loss_of_scores_is_that_of_the_masked_model_and_removed_units_can_come_back(name):
    net, key, label = NETS[name](), jax.random.key(1), jnp.arange(3)
    channels = find_channels(net.apply, net.params, ONE)
    scores = jax.random.normal(key, channels.group.shape)
    chosen = masks(channels, net.params, sparsity=0.5, score=scores)
    loss = losses.cross_entropy(net.apply)
    of_scores = loss_of_scores(loss, net.apply, channels, net.params, sparsity=0.5)
    value, gradient = jax.jit(jax.value_and_grad(lambda s: of_scores(key, s, IMAGE, label).sum()))(scores)
    masked = jax.jit(loss)(key, trees.multiply(net.params, chosen), IMAGE, label)
    np.testing.assert_allclose(value, masked.sum(), rtol=1e-5)
    removed = ~kept_units(channels, chosen)
    assert (gradient[removed] != 0).sum() >= removed.sum() - 1  # a rectifier may hide one on all images


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_out_of_range_is_named(sparsity):
    net = residual()
    channels = find_channels(net.apply, net.params, ONE)
    with pytest.raises(ValueError, match=r"^sparsity is .*must be in \[0, 1\)$"):
        masks(channels, net.params, sparsity=sparsity)

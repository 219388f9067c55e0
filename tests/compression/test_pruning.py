import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedrobust import trace, trees
from fedrobust.compression import find_channels, kept_units, masks, masks_from_units, max_difference, shrink, slice_tree
from tests.compression.nets import IMAGE, NETS, ONE, depthwise, flax_cnn, from_room, plain, plain_cnn, residual, same

GROUPS = {
    "plain_cnn": [6],
    "flax_cnn": [4, 4, 6],
    "haiku_cnn": [4, 4, 6],
    "concatenated": [4, 6, 5],
    "depthwise": [4, 6],
    "grouped": [3],  # a group's two inputs and three outputs are one unit
    "residual": [6],
    "squeeze_excite": [6, 4],
    "padded_shortcut": [4, 4],
    "gated_halves": [4],
    "layer_norm": [6],
    "attention": [6, 2, 4, 4],
    "channels_first": [6, 4],
}


@pytest.mark.parametrize("name", NETS)
def test_masked_equals_shrunk(name):
    net = NETS[name]()
    channels = find_channels(net.apply, net.params, ONE)
    assert channels.unknown == ()
    uniform = masks(channels, net.params, sparsity=0.5)
    assert max_difference(net.apply, channels, net.params, uniform, IMAGE) <= 1e-5
    rng = np.random.default_rng(0)
    keep = rng.random(len(channels.group)) < 0.5
    for group in np.unique(channels.group):
        keep[rng.choice(np.flatnonzero(channels.group == group))] = True
    assert max_difference(net.apply, channels, net.params, masks_from_units(channels, keep), IMAGE) <= 1e-5
    small, _ = shrink(net.apply, channels, net.params, uniform)
    assert trees.size(small) < 0.8 * trees.size(net.params)


@pytest.mark.parametrize("name", GROUPS)
def test_units_and_groups_are_those_of_the_architecture(name):
    net = NETS[name]()
    channels = find_channels(net.apply, net.params, ONE)
    sizes = np.bincount(channels.group).tolist()
    assert sorted(sizes) == sorted(GROUPS[name])


def test_half_the_channels_leave_a_quarter_of_the_parameters_and_flops():
    net = from_room("resnet9", "flax", width=16)
    channels = find_channels(net.apply, net.params, ONE)
    small, small_apply = shrink(net.apply, channels, net.params, masks(channels, net.params, sparsity=0.5))
    assert 3.8 < trees.size(net.params) / trees.size(small) < 4
    assert 3.7 < trace.flops(net.apply, net.params, ONE) / trace.flops(small_apply, small, ONE) < 4


def test_scattered_channels_inside_a_norm_group_would_not_commute():
    net = flax_cnn()
    channels = find_channels(net.apply, net.params, ONE)
    kernel, axes = next(
        (x, u) for x, u in zip(jax.tree.leaves(net.params), channels.unit, strict=True) if x.shape == (3, 3, 2, 8)
    )
    assert axes[3].tolist() == sorted(np.repeat(np.unique(axes[3]), 2).tolist())
    odd = jax.tree.map(jnp.ones_like, net.params)
    mask = jnp.ones_like(kernel).at[..., 1].set(0)
    odd = jax.tree.map(lambda x: mask if x.shape == mask.shape else x, odd)
    assert kept_units(channels, odd).all()  # part of a unit is masked: nothing can be removed...
    assert max_difference(net.apply, channels, net.params, odd, IMAGE) <= 1e-5  # ...and the zeros are kept


def test_shrinking_a_masked_model_by_hand_gives_the_same_parameters():
    net = plain_cnn()
    channels = find_channels(net.apply, net.params, ONE)
    keep = np.array([True, False, True, True, False, False])
    small, small_apply = shrink(net.apply, channels, net.params, masks_from_units(channels, keep))
    p = net.params
    by_hand = {
        "a": p["a"][..., keep],
        "b": p["b"][keep],
        "c": p["c"].reshape(16, 6, 3)[:, keep].reshape(-1, 3),
        "d": p["d"],
    }
    jax.tree.map(np.testing.assert_array_equal, small, by_hand)
    # This model names no width, so its own code runs on the smaller parameters.
    np.testing.assert_allclose(small_apply(small, IMAGE), net.apply(by_hand, IMAGE), atol=1e-6)


def test_gradients_of_the_shrunk_model_are_those_of_the_masked_one():
    net = flax_cnn()
    channels = find_channels(net.apply, net.params, ONE)
    chosen = masks(channels, net.params, sparsity=0.5)
    small, small_apply = shrink(net.apply, channels, net.params, chosen)

    def loss(apply):
        return lambda p: jnp.sum(jnp.square(apply(p, IMAGE)))

    want = jax.jit(jax.grad(lambda p: loss(net.apply)(trees.multiply(p, chosen))))(net.params)
    got = jax.jit(jax.grad(loss(small_apply)))(small)
    want = slice_tree(channels, chosen, want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want)


def test_per_example_gradients_of_the_shrunk_model_equal_the_loop():
    net = depthwise()
    channels = find_channels(net.apply, net.params, ONE)
    small, small_apply = shrink(net.apply, channels, net.params, masks(channels, net.params, sparsity=0.5))
    gradient = jax.grad(lambda p, image: jnp.sum(small_apply(p, image[None]) ** 2))
    batched = jax.jit(jax.vmap(gradient, (None, 0)))(small, IMAGE)
    one = jax.jit(gradient)
    for i, image in enumerate(IMAGE):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5), batched, one(small, image)
        )


def test_a_shrunk_model_can_be_shrunk_again():
    net = flax_cnn()
    channels = find_channels(net.apply, net.params, ONE)
    small, small_apply = shrink(net.apply, channels, net.params, masks(channels, net.params, sparsity=0.25))
    again = find_channels(small_apply, small, ONE)
    assert sorted(np.bincount(again.group).tolist()) == [3, 3, 5]
    assert max_difference(small_apply, again, small, masks(again, small, sparsity=0.5), IMAGE) <= 1e-5


def test_optimizer_state_is_cut_like_the_parameters():
    net = plain_cnn()
    channels = find_channels(net.apply, net.params, ONE)
    chosen = masks(channels, net.params, sparsity=0.5)
    small, _ = shrink(net.apply, channels, net.params, chosen)
    trace_state = optax.sgd(0.1, momentum=0.9).init(net.params)[0]
    cut = trace_state._replace(trace=slice_tree(channels, chosen, trace_state.trace))
    assert jax.tree.map(jnp.shape, cut.trace) == jax.tree.map(jnp.shape, small)


def test_training_the_shrunk_model_compiles_once_per_shape():
    net = residual()
    channels = find_channels(net.apply, net.params, ONE)
    small, small_apply = shrink(net.apply, channels, net.params, masks(channels, net.params, sparsity=0.5))
    count = []

    @jax.jit
    def run(p, image):
        count.append(1)
        return small_apply(p, image)

    for _ in range(3):
        run(small, IMAGE)
    assert len(count) == 1


def test_unknown_operations_are_named_and_left_whole():
    def apply(p, x):
        y = jnp.sort(same(x, p["a"]), axis=-1)
        return (jax.nn.relu(same(y, p["b"]))).mean((1, 2)) @ p["d"]

    net = plain({"a": (3, 3, 2, 4), "b": (3, 3, 4, 6), "d": (6, 3)}, apply)
    channels = find_channels(net.apply, net.params, ONE)
    assert channels.unknown == ("sort",)
    assert np.bincount(channels.group).tolist() == [6]
    assert max_difference(apply, channels, net.params, masks(channels, net.params, sparsity=0.5), IMAGE) <= 1e-5


def test_trees_of_another_model_and_empty_layers_are_refused_in_one_line():
    net = residual()
    channels = find_channels(net.apply, net.params, ONE)
    ones = jax.tree.map(jnp.ones_like, net.params)
    with pytest.raises(ValueError, match=r"^score is 'l3': must be one of fpgm, l1, l2, random$"):
        masks(channels, net.params, sparsity=0.5, score="l3")
    with pytest.raises(ValueError, match=r"^masks is 'a tree of 4 leaves': must be of .*$"):
        shrink(net.apply, channels, net.params, list(ones.values()))
    with pytest.raises(ValueError, match=r"^masks is 'a tree of 4 leaves': must be of .*$"):
        shrink(net.apply, channels, net.params, {**ones, "d": jnp.ones((3, 6))})
    with pytest.raises(ValueError, match=r"^masks is .*one unit or more per group$"):
        shrink(net.apply, channels, net.params, trees.zeros_like(net.params))


def test_a_model_of_the_whole_batch_is_refused_in_one_line():
    def apply(p, x):
        y = x.mean((1, 2)) @ p["a"]
        return ((y - y.mean(0)) / jnp.sqrt(y.var(0) + 1e-5)) @ p["d"]

    net = plain({"a": (2, 4), "d": (4, 3)}, apply)
    with pytest.raises(ValueError, match=r"^apply is 'a function of the whole batch': must be .*BatchNorm$"):
        find_channels(net.apply, net.params, ONE)


def test_shrink_compares_by_itself_and_refuses_what_is_not_the_masked_model():
    def apply(p, x):
        y = x.mean((1, 2)) @ p["a"]
        return y / jnp.abs(y) @ p["d"]  # 0 / 0 once masked, while the rules rely on finite values

    net = plain({"a": (2, 4), "d": (4, 3)}, apply)
    channels = find_channels(net.apply, net.params, ONE)
    half = masks(channels, net.params, sparsity=0.5)
    with pytest.raises(RuntimeError, match=r"^the shrunk model differs by nan in its logits from the masked one$"):
        shrink(net.apply, channels, net.params, half)
    shrink(net.apply, channels, net.params, half, verify=False)


def test_the_difference_that_is_taken_for_rounding_grows_with_the_logits():
    """Logits of about 1e6, summed up over 200 of 400 units in another order where the others are gone."""
    net = plain({"a": (128, 400), "d": (400, 3)}, lambda p, x: jnp.tanh(x.reshape(len(x), -1) @ p["a"]) @ p["d"])
    params = {**net.params, "d": 1e6 * net.params["d"]}
    channels = find_channels(net.apply, params, ONE)
    half = masks(channels, params, sparsity=0.5)
    assert max_difference(net.apply, channels, params, half, IMAGE) > 1e-3
    shrink(net.apply, channels, params, half, image=IMAGE)


def test_a_tree_of_other_shapes_is_not_cut():
    net = residual()
    channels = find_channels(net.apply, net.params, ONE)
    ones = jax.tree.map(jnp.ones_like, net.params)
    with pytest.raises(ValueError, match=r"^tree is 'a tree of 4 leaves': must be of .*$"):
        slice_tree(channels, ones, {**net.params, "d": jnp.ones((7, 3))})


def test_shrink_compares_on_the_image_it_is_given():
    seen = []
    net = residual()

    def apply(p, x):
        seen.append(x.shape)
        return net.apply(p, x)

    channels = find_channels(apply, net.params, ONE)
    half = masks(channels, net.params, sparsity=0.5)
    shrink(apply, channels, net.params, half, image=jnp.zeros((5, 8, 8, 2)))
    assert (5, 8, 8, 2) in seen
    seen.clear()
    shrink(apply, channels, net.params, half, verify=False)
    assert not seen

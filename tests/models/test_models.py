"""One specification, two builders, the same function of the same parameters."""

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust import trees
from fedrobust.models import BUILDERS, SPECS, build, build_flax, from_flax, from_haiku
from fedrobust.models.spec import Conv, Dense, GlobalPool, MaxPool, Norm, Relu, Residual, num_groups
from fedrobust.types import Model

TINY = {"small_cnn": {}, "resnet9": {}, "resnet9_scale_norm": {"scale_norm": True}, "resnet18": {}}
KEY = jax.random.key(0)
IMAGE = jax.random.uniform(jax.random.key(1), (3, 8, 8, 1))


def tiny(name, builder="flax", image=IMAGE, **options):
    spec = name.removesuffix("_scale_norm")
    given = {"builder": builder, "image_shape": image.shape[1:], "num_classes": 3, "width": 4, **TINY[name], **options}
    return build(spec, **given)


def describe(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.fixture(scope="module")
def params():
    return {name: drawn(tiny(name)) for name in TINY}


def drawn(model):
    """Parameters all at random: at their start, scale 1 and bias 0 would hide what is left out."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, KEY, IMAGE)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), x.dtype), shapes)


def test_every_model_of_the_registry_is_tested():
    assert {name.removesuffix("_scale_norm") for name in TINY} == set(SPECS)


@pytest.mark.parametrize("name", TINY)
def test_builders_have_equal_parameters_and_on_equal_weights_equal_logits(name, params):
    flax, haiku = (tiny(name, builder) for builder in BUILDERS)
    of_flax, of_haiku = (jax.eval_shape(model.init, KEY, IMAGE) for model in (flax, haiku))
    assert describe(of_flax) == describe(of_haiku) == describe(params[name])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(of_flax))
    assert trees.size(of_flax) == trees.size(of_haiku)
    logits = [jax.jit(model.apply)(params[name], IMAGE) for model in (flax, haiku)]
    assert logits[0].shape == (3, 3)
    assert jnp.std(logits[0]) > 0.01
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("name", TINY)
def test_no_row_depends_on_another_row(name, params):
    apply = jax.jit(tiny(name).apply)
    changed = IMAGE.at[1].set(1 - IMAGE[1])
    before, after = apply(params[name], IMAGE), apply(params[name], changed)
    np.testing.assert_array_equal(before[jnp.array([0, 2])], after[jnp.array([0, 2])])
    assert (before[1] != after[1]).any()


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 2, 3), (9, 8, 1), (28, 28, 1), (33, 17, 3)])
def test_any_image_size_gives_logits(name, shape):
    model = tiny(name, image=jnp.zeros((2, *shape)))
    image = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    logits = jax.eval_shape(lambda image: model.apply(model.init(KEY, image), image), image)
    assert (logits.shape, logits.dtype) == ((2, 3), jnp.float32)


def test_one_pixel_is_enough_and_finite():
    image = jnp.full((2, 1, 1, 1), 0.5)
    model = tiny("small_cnn", image=image)
    assert jnp.isfinite(jax.jit(lambda: model.apply(model.init(KEY, image), image))()).all()


def convolutions(params):
    """The kernels of 3x3 convolutions, as (channels in, channels out), in the order of their places."""
    kernels = [w["kernel"].shape for w in params.values() if "kernel" in w and len(w["kernel"].shape) == 4]
    return [shape[2:] for shape in kernels if shape[0] == 3]


def shapes_of(name, image_shape, **options):
    model = build(name, image_shape=image_shape, num_classes=options.pop("num_classes", 2), **options)
    return jax.eval_shape(model.init, KEY, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))


def test_resnet9_is_the_reference_net():
    params = shapes_of("resnet9", (28, 28, 1))
    widths = sorted(c[1] for c in convolutions(params))
    assert widths == sorted([32, 64, 64, 64, 128, 128, 128, 128])
    norms = 2 * (32 + 3 * 64 + 4 * 128)
    kernels = 9 * (32 + 32 * 64 + 2 * 64 * 64 + 64 * 128 + 3 * 128 * 128)
    assert trees.size(params) == kernels + norms + 128 * 2 + 2 == 610_274
    scaled = shapes_of("resnet9", (28, 28, 1), scale_norm=True)
    assert trees.size(scaled) == 610_274 + 2 * (64 + 128)
    assert shapes_of("resnet9", (28, 28, 1), groups=4) == params


def test_resnet18_and_small_cnn_have_the_published_and_stated_sizes():
    # 11 173 962: ResNet-18 for CIFAR-10 with affine norms, as counted in common public implementations
    assert trees.size(shapes_of("resnet18", (32, 32, 3), num_classes=10)) == 11_173_962
    assert trees.size(shapes_of("small_cnn", (8, 8, 1), num_classes=10)) == 56_554


def test_width_scales_every_convolution():
    for name in SPECS:
        narrow, wide = (shapes_of(name, (8, 8, 3), width=w) for w in (6, 12))
        for (in_, out), (in2, out2) in zip(convolutions(narrow), convolutions(wide), strict=True):
            assert out2 == 2 * out
            assert in_ == in2 == 3 or in2 == 2 * in_


def test_norm_groups_divide_the_channels_and_leave_two_each():
    for channels in range(1, 70):
        for groups in (1, 3, 8):
            chosen = num_groups(channels, groups)
            assert channels % chosen == 0
            assert 1 <= chosen <= groups
            assert channels // chosen >= 2 or channels == 1
    assert [num_groups(c, 8) for c in (8, 12, 16, 20, 32, 128, 7)] == [4, 6, 8, 5, 8, 8, 1]


class Handwritten(nn.Module):
    """The specification below, in Flax's own layers."""

    @nn.compact
    def __call__(self, image):
        x = nn.Conv(4, (3, 3), use_bias=False)(image)
        x = nn.max_pool(nn.relu(nn.GroupNorm(2, epsilon=1e-6)(x)), (2, 2), (2, 2))
        skip = nn.GroupNorm(3, epsilon=1e-6)(nn.Conv(6, (1, 1), (2, 2), use_bias=False)(x))
        body = nn.Conv(6, (3, 3), (2, 2), use_bias=False)(x)
        body = nn.relu(nn.GroupNorm(3, epsilon=1e-6)(body))
        return nn.Dense(3)(jnp.mean(body + skip, axis=(1, 2)))


def test_every_layer_means_what_flax_means():
    spec = (
        *(Conv(4), Norm(2), Relu(), MaxPool()),
        Residual((Conv(6, stride=2), Norm(3), Relu()), (Conv(6, window=1, stride=2), Norm(3))),
        *(GlobalPool(), Dense(3)),
    )
    model, module = build_flax(spec), Handwritten()
    params = drawn(model)
    theirs = {
        "Conv_0": params["conv_0"],
        "GroupNorm_0": params["norm_1"],
        "Conv_1": params["residual_4_shortcut_conv_0"],
        "GroupNorm_1": params["residual_4_shortcut_norm_1"],
        "Conv_2": params["residual_4_body_conv_0"],
        "GroupNorm_2": params["residual_4_body_norm_1"],
        "Dense_0": params["dense_6"],
    }
    expected = jax.jit(module.apply)({"params": theirs}, IMAGE)
    np.testing.assert_allclose(model.apply(params, IMAGE), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("builder", BUILDERS)
def test_kernels_start_with_he_variance_and_the_rest_at_one_and_zero(builder):
    params = tiny("small_cnn", builder, width=16).init(KEY, IMAGE)
    kernel = params["conv_4"]["kernel"]  # 3 x 3 x 16 x 32: 4608 normal draws, relative error of the variance 2.1 %
    np.testing.assert_allclose(jnp.var(kernel) * 9 * 16, 2, rtol=0.12)
    assert abs(jnp.mean(kernel)) < 5 * jnp.std(kernel) / np.sqrt(kernel.size)
    np.testing.assert_array_equal(params["norm_1"]["scale"], 1)
    for layer in ("norm_1", "dense_12"):
        np.testing.assert_array_equal(params[layer]["bias"], 0)
    other = tiny("small_cnn", builder, width=16).init(jax.random.key(1), IMAGE)
    assert (other["conv_4"]["kernel"] != kernel).all()
    again = tiny("small_cnn", builder, width=16).init(KEY, IMAGE)
    np.testing.assert_array_equal(again["conv_4"]["kernel"], kernel)


def test_own_flax_haiku_and_plain_functions_are_models_in_one_line():
    def plain_apply(params, image):
        return image.reshape(len(image), -1) @ params["w"]

    flax = from_flax(nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(3, use_bias=False)]))
    haiku = from_haiku(hk.transform(lambda x: hk.Linear(3, with_bias=False)(hk.Flatten()(x))))
    plain = Model(lambda key, image: {"w": jax.random.normal(key, (image[0].size, 3))}, plain_apply)
    weight = plain.init(KEY, IMAGE)["w"]
    expected = plain.apply({"w": weight}, IMAGE)
    for model in (flax, haiku):
        own = model.init(KEY, IMAGE)
        assert [leaf.shape for leaf in jax.tree.leaves(own)] == [weight.shape]
        given = jax.tree.map(lambda _: weight, own)
        np.testing.assert_allclose(model.apply(given, IMAGE), expected, rtol=1e-6)


class WithTrain(nn.Module):
    """A module that must be told whether it trains."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(2)(x[:, 0, :, 0]))


def test_call_arguments_reach_the_module():
    model = from_flax(WithTrain(), train=False)
    params = model.init(KEY, IMAGE)
    np.testing.assert_array_equal(model.apply(params, IMAGE), model.apply(params, IMAGE))


def test_batch_norm_is_refused():
    flax = from_flax(nn.Sequential([nn.BatchNorm(use_running_average=False), lambda x: x.mean((1, 2))]))
    with pytest.raises(ValueError, match=r"^collections is \['batch_stats'\]"):
        flax.init(KEY, IMAGE)
    with pytest.raises(ValueError, match=r"^transformed is 'TransformedWithState'"):
        from_haiku(hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(x, True)))


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("resnet50", {}, "model"),
        ("resnet9", {"builder": "torch"}, "builder"),
        ("resnet9", {"width": 0}, "width"),
        ("resnet9", {"width": 2.5}, "width"),
        ("resnet9", {"num_classes": 1}, "num_classes"),
        ("resnet9", {"groups": 0}, "groups"),
        ("resnet9", {"depth": 3}, "option of resnet9"),
        ("small_cnn", {"scale_norm": True}, "option of small_cnn"),
        ("resnet9", {"image_shape": (28, 28)}, "image_shape"),
        ("resnet9", {"image_shape": (28, 0, 1)}, "image_shape"),
    ],
)
def test_settings_out_of_range_are_named_in_one_line(name, settings, named):
    with pytest.raises(ValueError, match=f"^{named} is ") as caught:
        build(name, **{"image_shape": (8, 8, 1), "num_classes": 3, **settings})
    assert "\n" not in str(caught.value)


def test_init_insists_on_the_image_shape_it_was_built_for():
    with pytest.raises(ValueError, match=r"^image is "):
        tiny("small_cnn").init(KEY, jnp.zeros((1, 9, 8, 1)))

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec

from fedrobust.ops import _contractions, _cpu, conv
from fedrobust.ops._geometry import Geometry, plain
from tests.ops.convolutions import assert_close, lax_conv, normal, primitives


def squares(tree):
    return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree))


def derivatives(function):
    """Value, gradient, and the gradient of the gradient's squared norm, compiled as one."""

    def energy(image, kernel):
        return jnp.sum(jnp.sin(function(image, kernel)))

    first = jax.grad(energy, (0, 1))
    second = jax.grad(lambda image, kernel: squares(first(image, kernel)), (0, 1))
    return jax.jit(lambda *operands: (function(*operands), first(*operands), second(*operands)))


@st.composite
def cases(draw):
    axes = draw(st.sampled_from((1, 2, 2, 2, 3)))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(axes))  # noqa: E731
    window, dilation, strides, groups = each(1, 3), each(1, 2), each(1, 3), draw(st.sampled_from((1, 1, 2, 3)))
    reach = tuple(d * (k - 1) + 1 for d, k in zip(dilation, window, strict=True))
    pairs = tuple((draw(st.integers(-1, 3)), draw(st.integers(0, 3))) for _ in range(axes))
    padding = draw(st.sampled_from(("SAME", "VALID", pairs)))
    if draw(st.booleans()):  # an image smaller than the window, which padding makes room for
        image, padding = each(1, 3), tuple((r, r - 1) for r in reach)
    else:
        image = tuple(r + extra for r, extra in zip(reach, each(1, 4), strict=True))
    channels = (groups * draw(st.sampled_from((1, 2, 3, 5))), groups * draw(st.integers(1, 3)))
    shapes = (draw(st.integers(1, 3)), *image, channels[0]), (*window, channels[0] // groups, channels[1])
    return shapes, {"strides": strides, "padding": padding, "kernel_dilation": dilation, "groups": groups}


@settings(max_examples=10)
@given(case=cases(), wide=st.booleans())
def test_value_and_derivatives_equal_those_of_lax(case, wide):
    shapes, how = case
    with jax.enable_x64(wide):
        dtype = jnp.float64 if wide else jnp.float32
        operands = [normal(i, shape, dtype) for i, shape in enumerate(shapes)]
        got = derivatives(partial(conv, **how))(*operands)
        assert got[0].dtype == dtype
        assert_close(got, derivatives(partial(lax_conv, **how))(*operands), 1e-10 if wide else 2e-4)


def test_hand_computed():
    image = jnp.arange(9.0).reshape(1, 3, 3, 1)
    kernel = jnp.array([[1.0, 0.0], [0.0, 10.0]]).reshape(2, 2, 1, 1)
    assert conv(image, kernel, padding="VALID").ravel().tolist() == [40.0, 51.0, 73.0, 84.0]
    assert conv(image, kernel, padding="VALID", strides=2).ravel().tolist() == [40.0]
    gradient = jax.grad(lambda kernel: jnp.sum(conv(image, kernel, padding="VALID")))(kernel)
    assert gradient.ravel().tolist() == [8.0, 12.0, 20.0, 24.0]


HOW = [{}, {"strides": 2, "groups": 2}]


def stacks(how):
    groups = how.get("groups", 1)
    image, kernel = normal(0, (3, 2, 7, 6, 4)), normal(1, (3, 3, 2, 4 // groups, 6))
    return image, kernel


@pytest.mark.parametrize(
    ("how", "axes"), [(HOW[0], (0, None)), (HOW[0], (None, 0)), (HOW[0], (0, 0)), (HOW[1], (0, 0))], ids=str
)
def test_vmap_equals_loop(how, axes):
    operands = [x if axis == 0 else x[0] for x, axis in zip(stacks(how), axes, strict=True)]
    function = jax.jit(jax.grad(lambda image, kernel: jnp.sum(jnp.sin(conv(image, kernel, **how))), (0, 1)))
    got = jax.vmap(function, axes)(*operands)
    loop = [function(*(x[i] if a == 0 else x for x, a in zip(operands, axes, strict=True))) for i in range(3)]
    assert_close(got, jax.tree.map(lambda *x: np.stack(x), *loop))


@pytest.mark.parametrize("how", HOW, ids=str)
def test_clients_of_examples_equal_loops_in_either_nesting(how):
    image, kernel = normal(0, (2, 3, 7, 6, 4)), stacks(how)[1][:2]
    gradient = jax.jit(jax.grad(lambda kernel, image: jnp.sum(jnp.sin(conv(image[None], kernel, **how)))))
    outer_clients = jax.jit(jax.vmap(jax.vmap(gradient, (None, 0))))(kernel, image)
    outer_examples = jax.jit(jax.vmap(jax.vmap(gradient), (None, 1), 1))(kernel, image)
    loop = jnp.stack([jnp.stack([gradient(kernel[k], image[k, i]) for i in range(3)]) for k in range(2)])
    assert_close([outer_clients, outer_examples], [loop, loop])


def test_vmap_of_second_order_and_three_levels_equals_lax():
    image, kernel = normal(0, (2, 2, 2, 5, 5, 4)), normal(1, (2, 3, 3, 4, 2))
    for_one = lambda f: lambda k, x: derivatives(lambda x, k: f(x[None], k))(x, k)  # noqa: E731
    every = lambda f: jax.vmap(jax.vmap(jax.vmap(for_one(f), (None, 0)), (None, 0)))(kernel, image)  # noqa: E731
    assert_close(every(conv), every(lax_conv))


@pytest.mark.parametrize("loop", ["scan", "fori", "while"])
def test_training_in_a_loop_equals_unrolled(loop):
    images, kernel = normal(0, (3, 4, 6, 6, 4)), normal(1, (3, 3, 4, 2))

    def step(kernel, image):
        loss = lambda kernel, image: jnp.mean(jnp.square(conv(image[None], kernel)))  # noqa: E731
        return kernel - 0.1 * jnp.sum(jax.vmap(jax.grad(loss), (None, 0))(kernel, image), 0)

    def looped(kernel):
        if loop == "scan":
            return lax.scan(lambda kernel, image: (step(kernel, image), None), kernel, images)[0]
        if loop == "fori":
            return lax.fori_loop(0, 3, lambda i, kernel: step(kernel, images[i]), kernel)
        more = lambda state: state[0] < 3  # noqa: E731
        return lax.while_loop(more, lambda s: (s[0] + 1, step(s[1], images[s[0]])), (0, kernel))[1]

    unrolled = kernel
    for image in images:
        unrolled = step(unrolled, image)
    assert_close(jax.jit(looped)(kernel), unrolled)


@pytest.mark.parametrize("wrap", ["batch", "vmap", "scan"])
def test_a_loss_that_takes_an_image_gradient_through_the_same_parameters_differentiates(wrap):
    images, kernel = normal(0, (3, 1, 5, 5, 4)), normal(1, (3, 3, 4, 2))

    def gradient(function):
        def loss(kernel, image):
            energy = lambda image: jnp.sum(jnp.sin(function(image, kernel)))  # noqa: E731
            attacked = image + 0.1 * jnp.tanh(jax.grad(energy)(image))
            return jnp.sum(jnp.square(function(attacked, kernel)))

        if wrap == "batch":
            return jax.grad(loss)(kernel, images[:, 0])
        if wrap == "vmap":
            return jax.vmap(jax.grad(loss), (None, 0))(kernel, images)
        return lax.map(lambda image: jax.grad(loss)(kernel, image), images)

    assert_close(jax.jit(gradient, static_argnums=0)(conv), jax.jit(gradient, static_argnums=0)(lax_conv))


def test_forward_mode_equals_lax():
    image, kernel = normal(0, (2, 5, 5, 4)), normal(1, (3, 3, 4, 2))
    hessian = lambda f: jax.jit(jax.hessian(lambda k: jnp.sum(jnp.sin(f(image, k)))))(kernel)  # noqa: E731
    assert_close(hessian(conv), hessian(lax_conv))


def test_jaxpr_without_vmap_holds_exactly_one_lax_convolution():
    names = [name for name, _ in primitives(conv, normal(0, (2, 5, 5, 4)), normal(1, (3, 3, 4, 2)))]
    assert names.count("conv_general_dilated") == 1
    assert not {"cond", "while", "scan"} & set(names)


def test_gradient_of_a_batched_loss_forms_one_kernel_gradient_for_all_examples():
    one = lambda kernel, image: jnp.sum(jnp.sin(conv(image[None], kernel)))  # noqa: E731
    batched = lambda kernel, image: jnp.sum(jax.vmap(one, (None, 0))(kernel, image))  # noqa: E731
    operands = normal(1, (3, 3, 4, 2)), normal(0, (4, 5, 5, 4))
    found = primitives(jax.grad(batched), *operands)
    assert [how["stacked"] for name, how in found if name == "convolution_kernel"] == [False]
    found = primitives(jax.vmap(jax.grad(one), (None, 0)), *operands)
    assert [how["stacked"] for name, how in found if name == "convolution_kernel"] == [True]


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_clients_equals_loop(check_vma):
    mesh = jax.make_mesh((4,), ("client",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    images, kernel = normal(0, (4, 3, 5, 5, 4)), normal(1, (3, 3, 4, 2))
    gradient = jax.grad(lambda kernel, image: jnp.sum(jnp.sin(conv(image, kernel))))
    client, whole = PartitionSpec("client"), PartitionSpec()

    def local(kernel, image):
        kernel = lax.pcast(kernel, "client", to="varying") if check_vma else kernel
        return gradient(kernel, image[0])[None]

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(whole, client), out_specs=client, check_vma=check_vma)
    loop = jnp.stack([gradient(kernel, image) for image in images])
    assert_close(jax.jit(mapped)(kernel, images), loop)
    if check_vma:  # as with lax, the gradient of a replicated kernel is the sum over the shards
        summed = jax.shard_map(lambda k, x: gradient(k, x[0]), mesh=mesh, in_specs=(whole, client), out_specs=whole)
        assert_close(jax.jit(summed)(kernel, images), loop.sum(0))


@st.composite
def rows_of_images(draw):
    pair = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(2))  # noqa: E731
    window, dilation, strides = pair(1, 4), pair(1, 2), pair(1, 3)
    padding = tuple((draw(st.integers(-1, 4)), draw(st.integers(-1, 4))) for _ in range(2))
    image = tuple(
        max(d * (k - 1) + 1 - low - high, 2) + extra
        for d, k, (low, high), extra in zip(dilation, window, padding, pair(0, 3), strict=True)
    )
    return Geometry(image, window, strides, padding, dilation, groups=1)


@settings(max_examples=15)
@given(geometry=rows_of_images())
def test_images_side_by_side_do_not_see_each_other(geometry):
    image, kernel = normal(1, (3, *geometry.image, 2)), normal(2, (*geometry.window, 2, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cpu, "_ROW", geometry.image[1] * kernel.size + 1)
        side_by_side = partial(_cpu._side_by_side, geometry)
        assert any(eqn.primitive.name == "reshape" for eqn in jax.make_jaxpr(side_by_side)(image, kernel).eqns)
        got = jax.jit(side_by_side)(image, kernel)
    assert_close(got, jax.jit(partial(plain, geometry))(image, kernel), 1e-5)


@pytest.mark.parametrize("role", ["image", "kernel", "output"])
@pytest.mark.parametrize("stacked", [False, True])
def test_what_other_platforms_run_equals_what_the_cpu_runs(role, stacked):
    geometry = Geometry((7, 6), (3, 2), (2, 1), ((1, 2), (0, 1)), (1, 2), 2)
    lead = (3,) if stacked else ()
    shapes = {"image": (2, 7, 6, 4), "kernel": (3, 2, 2, 6), "output": (2, 4, 5, 6)}
    operands = [normal(i, lead + shapes[name]) for i, name in enumerate(shapes) if name != role]
    how = {"geometry": geometry, "stacked": stacked}
    on_cpu, by_lax = (jax.jit(partial(f, role, **how))(*operands) for f in (_cpu.contract, _contractions._by_lax))
    assert on_cpu.shape == lead + shapes[role]
    assert_close(on_cpu, by_lax)


@pytest.mark.parametrize("how", [{}, {"strides": (2, 3), "padding": ((3, -1), (-1, 2)), "kernel_dilation": (1, 2)}])
@pytest.mark.parametrize(
    ("channels", "dtype", "num"), [(1, "float32", 0), (3, "float32", 0), (4, "float32", 1), (1, "float16", 1)]
)
def test_a_thin_image_is_multiplied_entry_by_entry(how, channels, dtype, num):
    image, kernel = normal(0, (2, 9, 8, channels), dtype), normal(1, (3, 3, channels, 5), dtype)
    output, back = jax.vjp(lambda image: lax_conv(image, kernel, **({"padding": "SAME"} | how)), image)
    pads = how.get("padding", ((1, 1), (1, 1)))
    geometry = Geometry((9, 8), (3, 3), how.get("strides", (1, 1)), pads, how.get("kernel_dilation", (1, 1)), 1)
    for role, operands, wanted in (("output", (image, kernel), output), ("image", (kernel, output), back(output)[0])):
        run = partial(_cpu.contract, role, geometry=geometry, stacked=False)
        assert [name for name, _ in primitives(run, *operands)].count("conv_general_dilated") == num
        assert_close(run(*operands), wanted, 1e-5 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_platforms_that_are_not_here(platform):
    gradient = jax.vmap(jax.grad(lambda k, x: jnp.sum(conv(x[None], k))), (None, 0))
    exported = jax.export.export(jax.jit(gradient), platforms=[platform])(
        normal(1, (3, 3, 4, 2)), normal(0, (4, 5, 5, 4))
    )
    assert "convolution" in exported.mlir_module()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"strides": 0}, "strides is 0"),
        ({"strides": (1, 1, 1)}, "strides is (1, 1, 1)"),
        ({"kernel_dilation": (1, 0)}, "kernel_dilation is (1, 0)"),
        ({"padding": "same"}, "padding is 'same'"),
        ({"padding": ((1, 1),)}, "padding is ((1, 1),)"),
        ({"groups": 3}, "kernel.shape is"),
        ({"groups": 0}, "groups is 0"),
        ({"padding": "VALID", "kernel_dilation": 3}, "kernel.shape is"),
    ],
    ids=str,
)
def test_bad_settings_are_named_in_one_line(how, message):
    with pytest.raises(ValueError) as error:
        conv(jnp.ones((1, 5, 5, 4)), jnp.ones((3, 3, 4, 2)), **how)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_kernel_of_other_rank_is_refused():
    with pytest.raises(ValueError, match=r"kernel\.ndim is 3"):
        conv(jnp.ones((1, 5, 5, 4)), jnp.ones((3, 4, 2)))

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fedrobust import ops, trace
from fedrobust.trace.program import nested


def names(program):
    return [equation.name for equation in program.equations]


def test_calls_are_inlined_and_the_result_is_unchanged():
    @jax.jit
    def inner(x):
        return jnp.sin(x) * 2

    def function(x, y):
        return inner(x) + jax.checkpoint(jnp.tanh)(y), inner(y)

    x, y = jnp.arange(3.0), jnp.ones(3)
    program = trace.read(function, x, y)
    assert names(program) == ["sin", "mul", "tanh", "add", "sin", "mul"]
    for got, want in zip(trace.evaluate(program, [x, y]), function(x, y), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_function_shared_by_two_calls_keeps_its_values_apart():
    inner = jax.jit(lambda x: x + 1)
    program = trace.read(lambda x: inner(inner(x)), 0.0)
    assert trace.evaluate(program, [5.0]) == [7.0]


def test_emit_sees_every_equation_and_replaces_its_result():
    program = trace.read(lambda x: jnp.sin(x) + 1.0, 0.0)
    seen = []

    def emit(equation, *arrays):
        seen.append(equation.name)
        return [jnp.cos(arrays[0])] if equation.name == "sin" else equation.bind(*arrays)

    assert float(trace.evaluate(program, [0.0], emit)[0]) == 2.0
    assert seen == ["sin", "add"]


def test_captured_arrays_are_constants():
    table = np.arange(4.0, dtype=np.float32)
    program = trace.read(lambda x: x + table, jnp.ones(4))
    np.testing.assert_array_equal(trace.evaluate(program, [jnp.ones(4)])[0], table + 1)


def test_derivatives_given_by_an_author_survive():
    @jax.custom_vjp
    def step(x):
        return jnp.round(x)

    step.defvjp(lambda x: (step(x), None), lambda _, g: (7 * g,))
    program = trace.read(lambda x: step(x) + jax.nn.relu(x), 0.0)
    assert names(program) == ["custom_vjp_call", "custom_jvp_call", "add"]
    gradient = jax.grad(lambda x: trace.evaluate(program, [x])[0])
    assert gradient(0.0) == 7.0  # relu'(0) is 0; max'(0) would add 0.5


def test_the_librarys_convolution_is_read_as_one_convolution():
    program = trace.read(ops.conv, jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2, 4)))
    assert names(program) == ["conv_general_dilated"]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=(2, 1), kernel_dilation=(1, 2))(x))
        x = nn.Conv(8, (3, 3), feature_group_count=4, padding=((1, 0), (0, 2)))(x)
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


def test_fast_convolutions_compute_the_same_through_the_librarys_convolution(monkeypatch):
    image = jax.random.normal(jax.random.key(0), (2, 6, 7, 2))
    model = Net()
    params = model.init(jax.random.key(1), image)
    calls = []
    conv = ops.conv
    monkeypatch.setattr(ops, "conv", lambda *args, **kwargs: calls.append(kwargs) or conv(*args, **kwargs))
    fast = trace.fast_convolutions(model.apply)
    np.testing.assert_allclose(jax.jit(fast)(params, image), model.apply(params, image), atol=1e-5)
    assert [call["groups"] for call in calls] == [1, 4]
    got, want = (jax.jit(jax.grad(lambda p, f=f: jnp.sum(f(p, image) ** 2)))(params) for f in (fast, model.apply))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_fast_inference_computes_the_same_by_contractions_alone():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 2, 4)), jnp.float32)
    image = jnp.asarray(np.random.default_rng(1).normal(size=(5, 6, 6, 2)), jnp.float32)

    def model(x):
        plain = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return ops.conv(x, kernel), {"pair": plain.sum((1, 2))}

    fast = trace.fast_inference(model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), fast(image), model(image))
    names = str(jax.make_jaxpr(fast)(image))
    assert names.count("convolution_output") == 2 and "conv_general_dilated" not in names


def test_a_convolution_in_another_layout_is_left_alone():
    def apply(image, kernel):
        return jax.lax.conv(image, kernel, (1, 1), "SAME")

    image, kernel = jax.random.normal(jax.random.key(0), (1, 2, 5, 5)), jnp.ones((3, 2, 3, 3))
    np.testing.assert_array_equal(trace.fast_convolutions(apply)(image, kernel), apply(image, kernel))


def test_a_scan_stays_whole_and_shows_its_body():
    def function(x):
        return jax.lax.scan(lambda c, _: (c * 2, None), x, length=3)[0]

    [equation] = trace.read(function, 1.0).equations
    assert equation.name == "scan"
    assert [names(body) for body in nested(equation)] == [["mul"]]


@pytest.mark.parametrize("x", [-1.0, 0.0, 2.0])
def test_second_derivatives_pass_through_an_evaluated_program(x):
    def function(v):
        return jax.nn.softplus(v) * jax.nn.relu(v) ** 2

    program = trace.read(function, x)
    got = jax.grad(jax.grad(lambda v: trace.evaluate(program, [v])[0]))(x)
    np.testing.assert_allclose(got, jax.grad(jax.grad(function))(x), rtol=1e-6)

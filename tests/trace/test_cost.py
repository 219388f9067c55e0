import jax
import jax.numpy as jnp

from fedrobust import ops, trace


def test_flops_of_a_dense_layer_are_two_per_multiply_add():
    assert trace.flops(lambda w, x: x @ w + 1, jnp.ones((5, 7)), jnp.ones((3, 5))) == 2 * 3 * 5 * 7


def test_flops_of_a_strided_grouped_convolution():
    image, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 2, 6))
    count = trace.flops(lambda w, x: ops.conv(x, w, strides=2, padding="SAME", groups=2), kernel, image)
    assert count == 2 * (4 * 4 * 6) * (3 * 3 * 2)


def test_flops_of_a_batched_product_and_of_elementwise_work():
    x = jnp.ones((4, 2, 3))
    assert trace.flops(lambda a: jnp.einsum("bij,bkj->bik", a, a), x) == 2 * 4 * 2 * 2 * 3
    assert trace.flops(lambda a: jnp.tanh(a) * a, x) == 0


def test_flops_of_control_flow():
    w, x = jnp.ones((3, 3)), jnp.ones(3)
    one = 2 * 9
    assert trace.flops(lambda x: jax.lax.scan(lambda c, _: (w @ c, None), x, length=5)[0], x) == 5 * one
    assert trace.flops(lambda x: jax.lax.cond(x[0] > 0, lambda c: w @ w @ c, lambda c: w @ c, x), x) == 54 + one
    assert trace.flops(lambda x: jax.lax.while_loop(lambda c: c[0] < 1, lambda c: w @ c, x), x) == one


def test_flops_do_not_compute_and_grow_with_the_batch():
    shapes = jax.ShapeDtypeStruct((100000, 100000), jnp.float32)
    count = trace.flops(jnp.dot, shapes, jax.ShapeDtypeStruct((100000, 8), jnp.float32))
    assert count == 2 * 10**10 * 8


def test_flops_of_fast_convolutions_are_those_of_plain_ones():
    """Counted once per kernel where kernels are batched, and in each of the three directions."""
    image, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 2, 6))
    one = 2 * (2 * 4 * 4 * 6) * (3 * 3 * 2)

    def apply(w, x):
        return ops.conv(x, w, strides=2, padding="SAME", groups=2)

    def loss(w, x):
        return jnp.sum(jnp.square(apply(w, x)))

    def plain(w, x):
        return jax.lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )

    assert trace.flops(apply, kernel, image) == one
    assert trace.flops(trace.fast_convolutions(plain), kernel, image) == one
    assert trace.flops(jax.vmap(trace.fast_convolutions(plain), (0, None)), jnp.stack([kernel] * 3), image) == 3 * one
    assert trace.flops(jax.vmap(apply, (None, 0)), kernel, image[None]) == one
    assert trace.flops(trace.fast_inference(lambda x: apply(kernel, x)), image) == one
    assert trace.flops(jax.vmap(apply), jnp.stack([kernel] * 5), jnp.stack([image] * 5)) == 5 * one
    assert trace.flops(jax.value_and_grad(loss), kernel, image) == 2 * one
    assert trace.flops(jax.value_and_grad(loss, (0, 1)), kernel, image) == 3 * one
    per_example = jax.vmap(jax.grad(lambda w, x: loss(w, x[None])), (None, 0))
    assert trace.flops(per_example, kernel, image) == 2 * one

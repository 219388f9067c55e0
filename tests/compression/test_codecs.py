"""What each codec promises of the update that arrives, and of the bytes that are sent."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust import trees
from fedrobust.compression.codecs import (
    assemble,
    error_feedback,
    identity,
    masked,
    power_sgd,
    qsgd,
    quantized,
    random_k,
    sign,
    terngrad,
    top_k,
)

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
UPDATE = {  # a wide range of sizes, as updates have
    "b": RNG.normal(size=3).astype(np.float32),
    "k": (RNG.normal(size=(3, 2, 4)) ** 3).astype(np.float32),
    "w": (100 * RNG.normal(size=(6, 5))).astype(np.float32),
}
SIZE = trees.size(UPDATE)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64)


@functools.partial(jax.jit, static_argnums=0)
def through(codec, key, state, update):
    """What is sent, what arrives of it, and the next state."""
    code, state = codec.encode(key, state, update)
    return code, codec.decode(code), state


def sent(codec, update=UPDATE):
    return through(codec._replace(shape=None), KEY, codec.init(update), update)[0]


def arrives(codec, update=UPDATE):
    return flat(through(codec._replace(shape=None), KEY, codec.init(update), update)[1])


def leafwise(tree, function):
    """`function` of each leaf, and the sum of what it gives."""
    return sum(function(np.ravel(x).astype(np.float64)) for x in jax.tree.leaves(tree))


def test_identity_changes_no_bit_and_costs_four_bytes_a_number():
    codec = identity(UPDATE)
    odd = jax.tree.map(np.copy, UPDATE)
    odd["b"][:] = [-0.0, np.nan, 1e-42]
    code = codec.deserialize(codec.serialize(codec.encode(KEY, (), odd)[0]))
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(codec.decode(code))] == [
        x.tobytes() for x in jax.tree.leaves(odd)
    ]
    assert codec.num_bits(code) == 32 * SIZE


def test_top_k_by_hand():
    like = jnp.asarray([1.0, -5.0, 0.5, 3.0, -2.0, 0.0])
    codec = top_k(like, share=0.4)  # 2.4 of 6: two
    code, _ = codec.encode(KEY, (), like)
    assert (code.place.tolist(), code.value.tolist()) == ([1, 3], [-5, 3])
    assert codec.decode(code).tolist() == [0, -5, 0, 3, 0, 0]
    # r = 0; gaps 1 and 1: 01 01; then the numbers
    assert codec.serialize(code) == bytes([0, 0b01010000]) + np.float32([-5, 3]).tobytes()


def test_top_k_takes_the_largest_of_all_leaves_together_and_sends_at_least_one():
    order = np.argsort(-abs(flat(UPDATE)))
    for share, num in ((1e-9, 1), (0.25, round(0.25 * SIZE)), (1.0, SIZE)):
        found = arrives(top_k(UPDATE, share=share))
        expected = np.zeros(SIZE)
        expected[order[:num]] = flat(UPDATE)[order[:num]]
        assert (found == expected).all()


def test_levels_that_are_almost_all_zero_cost_almost_nothing():
    like = jax.ShapeDtypeStruct((150_000,), jnp.float32)
    codec = qsgd(like, num_levels=1)
    update = np.random.default_rng(2).normal(size=150_000).astype(np.float32)
    code = sent(codec, update)
    num = int((code.level != 0).sum())
    assert 200 < num < 400  # about sqrt(150 000) * mean |normal| = 309
    assert codec.num_bits(code) == 8 * len(codec.serialize(code)) < num * 13


UNBIASED = {
    "random_k": functools.partial(random_k, share=0.3, unbiased=True),
    "qsgd": functools.partial(qsgd, num_levels=2),
    "qsgd of many levels": functools.partial(qsgd, num_levels=127),
    "terngrad": terngrad,
}


def variance_of(name, update):
    """E |C(x) - x|^2, or a bound of it, from the papers."""
    if name == "random_k":
        num = round(0.3 * SIZE)
        return (SIZE / num - 1) * (flat(update) ** 2).sum()
    if name == "terngrad":
        return leafwise(update, lambda x: abs(x).max() * abs(x).sum() - (x**2).sum())
    levels = 2 if name == "qsgd" else 127
    return leafwise(update, lambda x: min(len(x) / levels**2, len(x) ** 0.5 / levels) * (x**2).sum())


def jump_of(name, update):
    """[D], how far apart a number's two values are."""
    if name == "random_k":
        return SIZE / round(0.3 * SIZE) * abs(flat(update))
    scale = {"terngrad": lambda x: abs(x).max(), "qsgd": lambda x: np.linalg.norm(x) / 2}
    step = scale.get(name, lambda x: np.linalg.norm(x) / 127)
    return flat(jax.tree.map(lambda x: np.full(x.shape, step(x.ravel())), update))


@pytest.mark.parametrize("name", UNBIASED)
def test_an_unbiased_codec_is_unbiased_and_varies_no_more_than_its_paper_says(name):
    """By the empirical Bernstein bound (Audibert et al. 2009) over 4000 keys: false failures below 57 * 1e-8 each."""
    codec, num, risk = UNBIASED[name](UPDATE), 4000, np.log(3 / 1e-8)
    once = lambda key: trees.to_flat(codec.decode(codec.encode(key, (), UPDATE)[0]))  # noqa: E731
    keys = jax.random.split(jax.random.key(1), num)
    found = np.asarray(jax.jit(lambda keys: jax.lax.map(once, keys, batch_size=500))(keys), np.float64)
    error = found - flat(UPDATE)
    bound = np.sqrt(2 * found.var(axis=0) * risk / num) + 3 * jump_of(name, UPDATE) * risk / num
    assert (abs(error.mean(axis=0)) <= bound + 1e-5 * abs(flat(UPDATE))).all()
    assert (bound < 0.2 * jump_of(name, UPDATE)).all()  # rounding to the nearest would be out by up to half of it
    measured = (error**2).sum(axis=1)
    noise = 6 * measured.std() / np.sqrt(num)
    assert measured.mean() <= variance_of(name, UPDATE) + noise
    if not name.startswith("qsgd"):
        assert measured.mean() >= variance_of(name, UPDATE) - noise


def contraction(name, x):
    """The largest share of |x|^2 that may be lost."""
    num = round(0.2 * SIZE)
    lost = {
        "top_k": 1 - num / SIZE,
        "random_k": 1.0,
        "sign": leafwise(x, lambda x: (x**2).sum() - abs(x).sum() ** 2 / len(x)) / (flat(x) ** 2).sum(),
        "power_sgd": 1.0,
        "top_k of 2 bits": 1.0,
        "top_k of 1 bit": 1.0,
        "power_sgd of 8 bits": 1.02,  # its bits are of the factors
    }
    return lost[name]


BIASED = {
    "top_k": functools.partial(top_k, share=0.2),
    "random_k": functools.partial(random_k, share=0.2, unbiased=False),
    "sign": sign,
    "power_sgd": functools.partial(power_sgd, rank=1),
    "top_k of 2 bits": lambda like: quantized(top_k(like, share=0.2), num_bits=2),
    "top_k of 1 bit": lambda like: quantized(top_k(like, share=0.2), num_bits=1),
    "power_sgd of 8 bits": lambda like: quantized(power_sgd(like, rank=1), num_bits=8),
}


@functools.cache  # one compilation for two tests: from a residual of 0 it says what the codec itself says
def feeding_back(name):
    return error_feedback(BIASED[name](UPDATE))._replace(shape=None)


@pytest.mark.parametrize("name", BIASED)
def test_a_biased_codec_is_a_contraction(name):
    codec = feeding_back(name)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        x = jax.tree.map(lambda x, rng=rng: rng.standard_cauchy(x.shape).astype(np.float32), UPDATE)
        error = ((flat(through(codec, jax.random.key(seed), codec.init(x), x)[1]) - flat(x)) ** 2).sum()
        assert error < (contraction(name, x) + 1e-5) * (flat(x) ** 2).sum()


def test_a_contraction_of_random_places_loses_the_rest_on_average():
    """600 keys, 5 standard errors: false failures below 6e-7."""
    codec = random_k(UPDATE, share=0.2, unbiased=False)
    once = lambda key: trees.to_flat(codec.decode(codec.encode(key, (), UPDATE)[0]))  # noqa: E731
    found = jax.jit(lambda keys: jax.lax.map(once, keys))(jax.random.split(KEY, 600))
    lost = ((np.asarray(found, np.float64) - flat(UPDATE)) ** 2).sum(axis=1)
    expected = (1 - round(0.2 * SIZE) / SIZE) * (flat(UPDATE) ** 2).sum()
    assert abs(np.mean(lost) - expected) < 5 * np.std(lost) / np.sqrt(600)


@pytest.mark.parametrize("name", BIASED)
def test_with_error_feedback_nothing_is_lost_only_late(name):
    codec = feeding_back(name)
    state, said, meant = codec.init(UPDATE), np.zeros(SIZE), np.zeros(SIZE)
    for step in range(12):
        rng = np.random.default_rng(step)
        update = jax.tree.map(lambda x, rng=rng: rng.normal(size=x.shape).astype(np.float32), UPDATE)
        _, decoded, state = through(codec, jax.random.fold_in(KEY, step), state, update)
        said += flat(decoded)
        meant += flat(update)
        np.testing.assert_allclose(said + flat(state.residual), meant, atol=2e-4)
    assert abs(flat(state.residual)).max() > 0.1  # the codec alone would have lost it
    for bad in (np.nan, np.inf):  # one client's gradient that overflowed
        update = jax.tree.map(lambda x, bad=bad: np.full(x.shape, bad, np.float32), UPDATE)
        _, _, after = through(codec, KEY, state, update)
        jax.tree.map(np.testing.assert_array_equal, after, state)


def test_an_update_that_is_not_finite_does_not_stay_in_power_sgd():
    codec = power_sgd(UPDATE, rank=1)
    state = codec.init(UPDATE)
    _, after = codec.encode(KEY, state, jax.tree.map(lambda x: x * np.float32(np.nan), UPDATE))
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_sign_by_hand():
    update = [jnp.asarray([1.0, -2.0, 0.0]), jnp.asarray([[-6.0]])]
    codec = sign(update)
    code, _ = codec.encode(KEY, (), update)
    assert [x.tolist() for x in codec.decode(code)] == [[1, -1, 1], [[-6]]]
    assert codec.serialize(code) == np.float32([1, 6]).tobytes() + bytes([0b01010000])


def test_qsgd_and_terngrad_give_multiples_of_their_scales():
    for codec, scale in ((qsgd(UPDATE, num_levels=4), lambda x: np.linalg.norm(x) / 4), (terngrad(UPDATE), np.max)):
        got = through(codec._replace(shape=None), KEY, (), UPDATE)[1]
        for x, y in zip(*map(jax.tree.leaves, (UPDATE, got)), strict=True):
            multiple = np.asarray(y) / scale(abs(np.ravel(x).astype(np.float64)))
            np.testing.assert_allclose(multiple, np.round(multiple), atol=1e-5)
            assert (np.sign(y) * np.sign(x) >= 0).all()
    assert arrives(qsgd(jnp.asarray([3.0]), num_levels=1), jnp.asarray([3.0])) == [3.0]


def test_power_sgd_sends_a_matrix_of_its_rank_whole_and_finds_the_best_one_over_time():
    rng = np.random.default_rng(3)
    left, right = rng.normal(size=(12, 2)), rng.normal(size=(2, 10))
    low = {"w": (left @ right).reshape(3, 4, 10).astype(np.float32), "b": np.ones(4, np.float32)}
    np.testing.assert_allclose(arrives(power_sgd(low, rank=2), low), flat(low), atol=1e-5)
    codec = power_sgd(low, rank=1)
    state = codec.init(low)
    for _ in range(60):
        code, decoded, state = through(codec._replace(shape=None), KEY, state, low)
    u, s, v = np.linalg.svd(left @ right)
    np.testing.assert_allclose(flat(decoded)[4:], (s[0] * u[:, :1] @ v[:1]).ravel(), atol=1e-3)
    assert codec.num_bits(code) == 32 * (4 + 12 + 10)


def test_power_sgd_sends_numbers_themselves_where_factors_are_no_smaller():
    small = {"w": np.eye(2, 4, dtype=np.float32), "s": np.float32(3), "x": np.eye(4, dtype=np.float32)}
    codec = power_sgd(small, rank=2)
    assert codec.num_bits(zeros(codec.shape)) == 32 * (9 + 16)
    assert (arrives(codec, small) == flat(small)).all()


def zeros(shape):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)


def test_few_bits_by_hand():
    update = jnp.asarray([1.0, -9.0, 2.9, 5.2, 0.0])
    codec = quantized(top_k(update, share=0.8), num_bits=3)  # sizes 1 to 9 in four steps of 8 / 3
    np.testing.assert_allclose(arrives(codec, update), [1, -9, 1 + 8 / 3, 1 + 16 / 3, 0], rtol=1e-6)
    one = quantized(top_k(update, share=0.8), num_bits=1)
    np.testing.assert_allclose(arrives(one, update), np.array([1, -1, 1, 1, 0]) * 18.1 / 4, rtol=1e-6)


@pytest.mark.parametrize("num_bits", [1, 2, 8])
def test_more_bits_are_nearer_and_cost_no_more_than_they_say(num_bits):
    update = np.random.default_rng(5).normal(size=5000).astype(np.float32)
    whole, codec = top_k(update, share=0.1), quantized(top_k(update, share=0.1), num_bits=num_bits)
    code, back = sent(codec, update), sent(whole, update)
    assert codec.num_bits(code) == 8 * len(codec.serialize(code))
    values = whole.num_bits(back) - 32 * 500
    assert codec.num_bits(code) - values <= 500 * (num_bits + 0.6 * (num_bits > 1)) + 120
    step = (abs(back.value).max() - abs(back.value).min()) / (2 ** (num_bits - 1) - 1) if num_bits > 1 else 9
    assert abs(arrives(codec, update) - arrives(whole, update)).max() <= 0.51 * step


MASKS = {"b": np.float32([0, 1, 1]), "k": np.zeros((3, 2, 4), np.float32), "w": np.ones((6, 5), np.float32)}


def test_what_masks_close_is_never_sent_and_costs_nothing():
    junk = {**UPDATE, "k": np.full((3, 2, 4), np.nan, np.float32)}
    inside = 32
    plain = masked(identity, MASKS)
    found = plain.decode(plain.encode(KEY, plain.init(UPDATE), junk)[0])
    assert (flat(found) == np.nan_to_num(flat(junk)) * flat(MASKS)).all()
    assert plain.num_bits(zeros(plain.shape)) == 32 * inside
    late = masked(lambda like: error_feedback(top_k(like, share=1 / inside)), MASKS)
    state, said = late.init(UPDATE), np.zeros(SIZE)
    assert state.residual.shape == (inside,)
    for _ in range(3):
        code, state = late.encode(KEY, state, junk)
        assert len(code.value) == 1
        said += flat(late.decode(code))
    left = 3 * np.nan_to_num(flat(junk)) * flat(MASKS) - said
    np.testing.assert_allclose(left[flat(MASKS) > 0], state.residual, rtol=1e-5, atol=1e-3)
    assert (said[flat(MASKS) == 0] == 0).all()


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: top_k(UPDATE, share=0.0), "share is 0.0"),
        (lambda: random_k(UPDATE, share=1.5, unbiased=True), "share is 1.5"),
        (lambda: qsgd(UPDATE, num_levels=0), "num_levels is 0"),
        (lambda: qsgd(UPDATE, num_levels=128), "num_levels is 128"),
        (lambda: power_sgd(UPDATE, rank=0), "rank is 0"),
        (lambda: quantized(top_k(UPDATE, share=0.1), num_bits=10), "num_bits is 10"),
        (lambda: masked(identity, trees.zeros_like(MASKS)), "masks is 'all zero'"),
        (lambda: identity(jnp.zeros(3, jnp.bfloat16)), "dtype of an update is 'bfloat16'"),
        (lambda: assemble(None, None, None, jax.ShapeDtypeStruct((2,), jnp.float16)), "dtype of a code is 'float16'"),
    ],
)
def test_a_bad_setting_is_named(build, names):
    with pytest.raises(ValueError, match=f"^{names}: must be "):
        build()


def test_a_changed_byte_gives_a_code_of_the_right_shapes_or_a_value_error():
    for codec in (quantized(top_k(UPDATE, share=0.3), num_bits=4), qsgd(UPDATE, num_levels=3)):
        data = codec.serialize(sent(codec))
        num_refused = 0
        for place, bit in itertools.product(range(0, len(data), 3), (0, 7)):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            try:
                code = codec.deserialize(bytes(changed))
            except ValueError:
                num_refused += 1
            else:
                assert jax.tree.map(lambda x: (x.shape, x.dtype), code) == jax.tree.map(
                    lambda x: (x.shape, x.dtype), codec.shape
                )
        assert num_refused > 0

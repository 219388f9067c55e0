import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrobust import losses, ops, privacy, trees
from fedrobust.compression import (
    SCORES,
    find_channels,
    kept_units,
    masks,
    masks_from_units,
    num_kept,
    taylor_scores,
)
from fedrobust.compression.selection import num_removed
from fedrobust.types import Batch

ONE = jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32)
IMAGE = jax.random.uniform(jax.random.key(3), (6, 4, 4, 2))


def apply(p, x):
    """A residual stream of 6 channels, which its kernel holds by two axes, then 8 channels, all flattened."""
    x = jax.nn.relu(ops.conv(x, p["stem"]))
    x = x + jnp.tanh(ops.conv(x, p["body"]))
    x = jnp.tanh(ops.conv(x, p["last"], strides=2) + p["bias"])
    return x.reshape(x.shape[0], -1) @ p["head"]


SHAPES = {"stem": (3, 3, 2, 6), "body": (3, 3, 6, 6), "last": (3, 3, 6, 8), "bias": (8,), "head": (32, 3)}
PARAMS = {
    name: np.random.default_rng(i).normal(size=shape).astype(np.float32) / 4
    for i, (name, shape) in enumerate(SHAPES.items())
}
CHANNELS = find_channels(apply, PARAMS, ONE)
STREAM, LAST = (np.flatnonzero(CHANNELS.group == group) for group in (0, 1))
if len(STREAM) != 6:
    STREAM, LAST = LAST, STREAM


def members(unit):
    """The entries of a unit, leaf by leaf, one by one: where masking it alone leaves zeros."""
    alone = masks_from_units(CHANNELS, np.arange(len(CHANNELS.group)) != unit)
    return {name: np.argwhere(np.asarray(mask) == 0) for name, mask in alone.items()}


def vector(unit):
    """All parameters of a unit; those that the residual kernel holds by both axes appear in both slices."""
    if unit in STREAM:
        i = int(np.flatnonzero(unit == STREAM)[0])
        body, last = PARAMS["body"], PARAMS["last"]
        slices = (PARAMS["stem"][..., i], body[..., i], body[:, :, i], last[:, :, i])
    else:
        i = int(np.flatnonzero(unit == LAST)[0])
        slices = (PARAMS["last"][..., i], PARAMS["bias"][[i]], PARAMS["head"].reshape(4, 8, 3)[:, i])
    return np.concatenate([x.astype(np.float64).ravel() for x in slices])


@pytest.mark.parametrize(("name", "power"), [("l1", 1), ("l2", 2)])
def test_norms_count_every_entry_of_a_unit_once(name, power):
    found = SCORES[name](CHANNELS, PARAMS, None)
    for unit, score in enumerate(found):
        entries = [PARAMS[leaf][tuple(i)] for leaf, places in members(unit).items() for i in places]
        assert score == pytest.approx(sum(abs(float(w)) ** power for w in entries), rel=1e-6)


def test_fpgm_is_the_sum_of_distances_to_the_other_units_of_the_group():
    found = SCORES["fpgm"](CHANNELS, PARAMS, None)
    for group in (STREAM, LAST):
        for unit in group:
            distances = [np.linalg.norm(vector(unit) - vector(other)) for other in group]
            assert found[unit] == pytest.approx(sum(distances), rel=1e-9)


def test_fpgm_removes_the_twin_that_a_norm_would_keep():
    params = {name: x.copy() for name, x in PARAMS.items()}
    for name in ("last", "bias"):
        params[name][..., :3] = 5.0  # three large equal channels, the others small and scattered
    params["head"].reshape(4, 8, 3)[:, :3] = 5.0
    kept = {
        name: kept_units(CHANNELS, masks(CHANNELS, params, sparsity=0.25, score=name))[LAST] for name in ("l2", "fpgm")
    }
    assert kept["l2"][:3].all()
    far = np.asarray(SCORES["fpgm"](CHANNELS, params, None))[LAST]
    assert kept["fpgm"].sum() == 6 and not kept["fpgm"][np.argsort(far)[:2]].any()


def test_taylor_scores_are_the_squared_change_of_the_loss_to_first_order():
    def loss(params):
        return jnp.mean(losses.cross_entropy(apply)(jax.random.key(0), params, IMAGE, jnp.arange(6) % 3))

    gradient = jax.jit(jax.grad(loss))(PARAMS)
    found = taylor_scores(CHANNELS, PARAMS, gradient)
    change = jax.jit(lambda tangent: jax.jvp(loss, (PARAMS,), (tangent,))[1])
    for unit, score in enumerate(found):
        alone = masks_from_units(CHANNELS, np.arange(len(found)) != unit)
        removed = jax.tree.map(lambda w, m: w * (m - 1), PARAMS, alone)
        assert score == pytest.approx(float(change(removed)) ** 2, rel=1e-3, abs=1e-12)


def test_scores_of_a_private_gradient_are_the_noised_ones():
    """The path of the docstring: clipped, noised, then scored; without noise a score would be another one."""
    plan = privacy.Plan(
        unit="record", relation="add_or_remove_one", sampling="poisson", sampling_rate=0.5, num_steps=1,
        noise_multiplier=1.0, histogram_epsilon=0.0, epsilon=8.0, delta=1e-3,
    )  # fmt: skip
    params = {"a": PARAMS["stem"][0, 0], "b": PARAMS["bias"][:6], "c": PARAMS["head"][:6]}

    def dense(p, x):
        return jnp.tanh(x.mean((1, 2)) @ p["a"] + p["b"]) @ p["c"]

    channels = find_channels(dense, params, ONE)
    clipped = privacy.clipped_grad(losses.cross_entropy(dense), clip_norm=1.0)
    batch = Batch(IMAGE, jnp.arange(6) % 3, jnp.ones(6, bool))
    noised, _ = jax.jit(privacy.private_grad(clipped, plan, num_records=12))(jax.random.key(1), params, batch)
    bare, _ = jax.jit(lambda p: clipped(jax.random.key(1), p, batch))(params)
    found = taylor_scores(channels, params, noised)
    products = jax.tree.map(lambda w, g: w * np.asarray(g), params, noised)
    by_hand = np.square(products["a"].sum(0) + products["b"] + products["c"].sum(1))
    np.testing.assert_allclose(found, by_hand, rtol=1e-4)
    assert not np.allclose(found, taylor_scores(channels, params, trees.scale(bare, 1 / 6)), rtol=0.1)
    assert num_kept(channels, masks(channels, params, sparsity=0.5, score=found)) == [3]


def test_random_scores_follow_their_key():
    first, again, other = (
        kept_units(CHANNELS, masks(CHANNELS, PARAMS, sparsity=0.5, score="random", key=jax.random.key(i)))
        for i in (0, 0, 1)
    )
    assert (first == again).all() and (first != other).any()


SCORE = st.lists(st.integers(-3, 9), min_size=14, max_size=14)


@given(SCORE, st.floats(0, 0.999), st.sampled_from(["uniform", "global"]), st.sampled_from([1, 2, 3, 4, 8]))
def test_selection_obeys_its_laws(score, sparsity, scope, multiple_of):
    score = np.array(score, float)
    settings = {"score": score, "scope": scope, "multiple_of": multiple_of}
    keep = kept_units(CHANNELS, masks(CHANNELS, PARAMS, sparsity=sparsity, **settings))
    for group in (STREAM, LAST):
        kept, gone = score[group][keep[group]], score[group][~keep[group]]
        assert len(kept) >= 1 and (not len(gone) or gone.max() <= kept.min())
        assert len(kept) % multiple_of == 0 or not len(gone)  # each axis holds a unit once, or the head four times
    if multiple_of == 1:
        wanted = (
            {"uniform": int(sparsity * 6 + 1e-9) + int(sparsity * 8 + 1e-9)}
            | {"global": min(int(sparsity * 14 + 1e-9), 12)}
        )[scope]
        assert (~keep).sum() == wanted
    further = kept_units(CHANNELS, masks(CHANNELS, PARAMS, sparsity=(1 + sparsity) / 2, **settings))
    assert (further <= keep).all()


@given(SCORE, st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)))
def test_every_group_loses_its_own_share(score, shares):
    score = np.array(score, float)
    keep = kept_units(CHANNELS, masks(CHANNELS, PARAMS, sparsity=shares, score=score))
    for number, share in enumerate(shares):
        alone = kept_units(CHANNELS, masks(CHANNELS, PARAMS, sparsity=share, score=score))
        of_group = CHANNELS.group == number
        np.testing.assert_array_equal(keep[of_group], alone[of_group])


def test_global_scores_are_compared_relative_to_their_group():
    score = np.ones(14)
    score[STREAM] = 1000 * np.array([3, 3, 3, 3, 0.1, 3])
    score[LAST] = np.array([3, 3, 3, 3, 3, 3, 0.2, 3])
    keep = kept_units(CHANNELS, masks(CHANNELS, PARAMS, sparsity=2 / 14, score=score, scope="global"))
    assert not keep[STREAM[4]] and not keep[LAST[6]]
    small = score.copy()
    small[LAST] = 0.0  # nothing in this group matters: all but one of it go first
    keep = kept_units(CHANNELS, masks(CHANNELS, PARAMS, sparsity=7 / 14, score=small, scope="global"))
    assert keep[STREAM].all() and keep[LAST].sum() == 1


def test_fpgm_compares_units_of_unequal_sizes_as_if_padded_with_zeros():
    """By hand: (3, 0) and (0, 4), of which the first has one number only."""
    unit = ((np.array([0, 1, 1]),),)
    channels = CHANNELS._replace(unit=unit, group=np.zeros(2, int), shapes=((3,),), structure=jax.tree.structure(0))
    assert SCORES["fpgm"](channels, np.array([3.0, 0.0, 4.0]), None).tolist() == [5, 5]


def test_fpgm_of_almost_equal_units_is_a_number():
    """Their squared distances drown in what is rounded off, on either side of zero."""
    rows = np.random.default_rng(0).normal(size=40) + 1e-10 * np.random.default_rng(1).normal(size=(6, 40))
    unit = ((np.arange(6), np.full(40, -1)),)
    shape = {"group": np.zeros(6, int), "shapes": ((6, 40),), "structure": jax.tree.structure(0)}
    found = SCORES["fpgm"](CHANNELS._replace(unit=unit, **shape), rows, None)
    assert (found >= 0).all() and found.max() < 1e-5


def test_a_share_counts_as_written_not_as_rounded():
    """0.29 * 100 is 28.999999999999996 in floats."""
    assert [num_removed(share, 100) for share in (0.29, 0.57, 0.58, 0.0, 0.999)] == [29, 57, 58, 0, 99]


def test_a_wide_group_does_not_look_dispensable_for_being_wide():
    score = np.ones(14)
    score[STREAM[2]], score[LAST[3]] = 0.9, 0.95  # of six and of eight units
    keep = kept_units(CHANNELS, masks(CHANNELS, PARAMS, sparsity=1 / 14, score=score, scope="global"))
    assert np.flatnonzero(~keep).tolist() == [STREAM[2]]


def test_norm_groups_of_four_channels_satisfy_multiples_of_four_by_themselves():
    def normed(p, x):
        x = ops.group_norm(ops.conv(x, p["a"]), 4, p["s"], p["b"])
        return jax.nn.relu(x).mean((1, 2)) @ p["d"]

    rng = np.random.default_rng(0)
    shapes = {"a": (1, 1, 2, 16), "s": (16,), "b": (16,), "d": (16, 3)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    channels = find_channels(normed, params, ONE)
    for multiple_of, kept in ((4, 1), (8, 2), (16, 4), (3, 3), (5, 4)):
        found = num_kept(channels, masks(channels, params, sparsity=0.75, multiple_of=multiple_of))
        assert found.tolist() == [kept]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity is 1.0: must be in \[0, 1\)"),
        ({"sparsity": -0.5}, r"sparsity is -0.5: must be in \[0, 1\)"),
        ({"sparsity": (0.5, 1.5)}, r"sparsity is 1.5: must be in \[0, 1\)"),
        ({"sparsity": (0.1, 0.2, 0.3)}, r"sparsity is \(0.1, 0.2, 0.3\): must be 1 or 2 in number for scope 'uniform'"),
        (
            {"sparsity": (0.1, 0.2), "scope": "global"},
            r"sparsity is \(0.1, 0.2\): must be 1 in number for scope 'global'",
        ),
        ({"scope": "layer"}, "scope is 'layer': must be one of global, uniform"),
        ({"score": "fisher"}, "score is 'fisher': must be one of fpgm, l1, l2, random"),
        ({"score": np.ones(13)}, r"score is 'an array \(13,\)': must be \(14,\) finite numbers, one per unit"),
        ({"score": np.full(14, np.nan)}, r"score is 'an array \(14,\)': must be \(14,\) finite .*"),
        ({"score": "random"}, "key is None: must be given where units are drawn at random"),
        ({"multiple_of": 0}, "multiple_of is 0: must be a whole number >= 1"),
    ],
)
def test_bad_settings_are_named_in_one_line(setting, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        masks(CHANNELS, PARAMS, **{"sparsity": 0.5, **setting})


def test_trees_of_another_model_are_named_in_one_line():
    other = {**PARAMS, "bias": np.zeros(9, np.float32)}
    for name in SCORES:
        with pytest.raises(ValueError, match=r"^params is 'a tree of 5 leaves': must be of .*$"):
            masks(CHANNELS, other, sparsity=0.5, score=name, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"^gradient is 'a tree of 5 leaves': must be of .*$"):
        taylor_scores(CHANNELS, PARAMS, other)
    with pytest.raises(ValueError, match=r"^masks is 'a tree of 5 leaves': must be of .*$"):
        num_kept(CHANNELS, other)


def test_a_choice_is_of_every_unit():
    num = len(CHANNELS.group)
    for wrong in (num - 1, num + 1):
        with pytest.raises(ValueError, match=rf"^shape of keep is \({wrong},\): must be \({num},\)$"):
            masks_from_units(CHANNELS, np.ones(wrong, bool))

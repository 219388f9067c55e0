import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrobust.compression import n_of_m_masks, unstructured_masks

RNG = np.random.default_rng(2)
PARAMS = {
    "first": RNG.normal(size=(3, 3, 1, 8)).astype(np.float32),
    "kernel": RNG.normal(size=(3, 3, 8, 5)).astype(np.float32),
    "bias": RNG.normal(size=5).astype(np.float32),
    "head": 100 * RNG.normal(size=(12, 3)).astype(np.float32),
}


def test_two_of_four_keeps_the_largest_of_each_run_of_inputs():
    kernel = np.array([[1, -4], [-3, 2], [2, 0], [0, 3], [5, 1], [5, 1], [5, 1], [5, 1]], np.float32)
    found = n_of_m_masks({"w": kernel})["w"]
    assert found[:4].tolist() == [[0, 1], [1, 0], [1, 0], [0, 1]]
    assert found[4:].sum(0).tolist() == [2, 2]  # of equal weights two stay, not none and not four


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (4, 4), (1, 1)])
def test_every_run_keeps_n_and_they_are_its_largest(n, m):
    found = n_of_m_masks(PARAMS, n=n, m=m)
    assert (np.asarray(found["bias"]) == 1).all()
    assert (np.asarray(found["first"]) == 1).all()  # one input is no multiple of m
    for name in ("kernel", "head"):
        leaf, mask = np.abs(PARAMS[name]), np.asarray(found[name])
        places = [range(size) for size in leaf.shape]
        for *window, start, output in itertools.product(*places[:-2], range(0, leaf.shape[-2], m), places[-1]):
            run = (*window, slice(start, start + m), output)
            kept, gone = leaf[run][mask[run] == 1], leaf[run][mask[run] == 0]
            assert len(kept) == n and (not len(gone) or gone.max() <= kept.min())


@given(st.floats(0, 0.999), st.sampled_from(["uniform", "global"]))
def test_unstructured_masks_remove_the_smallest_weights(sparsity, scope):
    found = jax.tree.map(np.asarray, unstructured_masks(PARAMS, sparsity=sparsity, scope=scope))
    assert (found["bias"] == 1).all()
    kernels = ("first", "kernel", "head")
    for pool in [kernels] if scope == "global" else [(name,) for name in kernels]:
        size = np.concatenate([np.abs(PARAMS[name]).ravel() for name in pool])
        keep = np.concatenate([found[name].ravel() for name in pool]) == 1
        assert (~keep).sum() == min(int(sparsity * len(size) + 1e-9), len(size) - len(pool))
        largest = np.concatenate([np.abs(PARAMS[name]).ravel() == np.abs(PARAMS[name]).max() for name in pool])
        assert keep[largest].all()
        assert not (~keep).any() or size[~keep].max() <= size[keep & ~largest].min(initial=np.inf)


def test_scopes_differ_where_layers_differ_in_size():
    uniform, everywhere = (
        unstructured_masks(PARAMS, sparsity=0.5, scope=scope)["head"].mean() for scope in ("uniform", "global")
    )
    assert (uniform, everywhere) == (0.5, 1)  # its weights are a hundred times larger


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: n_of_m_masks(PARAMS, n=5, m=4), r"n is 5: must be a whole number in \[1, m = 4\]"),
        (lambda: n_of_m_masks(PARAMS, n=1.5), r"n is 1.5: must be a whole number in \[1, m = 4\]"),
        (lambda: n_of_m_masks(PARAMS, n=0), r"n is 0: must be a whole number in \[1, m = 4\]"),
        (lambda: n_of_m_masks(PARAMS, m=0), "m is 0: must be a whole number >= 1"),
        (lambda: unstructured_masks(PARAMS, sparsity=1.0), r"sparsity is 1.0: must be in \[0, 1\)"),
        (lambda: unstructured_masks(PARAMS, sparsity=-0.1), r"sparsity is -0.1: must be in \[0, 1\)"),
        (lambda: unstructured_masks(PARAMS, sparsity=0.5, scope="x"), "scope is 'x': must be one of global, uniform"),
    ],
)
def test_bad_settings_are_named_in_one_line(build, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        build()

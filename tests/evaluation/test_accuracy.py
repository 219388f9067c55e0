"""Laws of metrics and predictions, against scikit-learn."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from fedrobust.evaluation import metrics, predict


@settings(max_examples=30)
@given(num_classes=st.integers(2, 5), seed=st.integers(0, 999))
def test_metrics_equal_scikit_learn(num_classes, seed):
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.concatenate([np.arange(num_classes), rng.integers(0, num_classes, 40)]))
    logits = rng.normal(size=(len(label), num_classes)) + np.eye(num_classes)[label]
    found = metrics(logits.astype(np.float32), label)
    logits = logits.astype(np.float32).astype(np.float64)
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    auc = roc_auc_score(label, share[:, 1] if num_classes == 2 else share, multi_class="ovr", average="macro")
    prediction = logits.argmax(1)
    np.testing.assert_allclose(
        found[:3], [accuracy_score(label, prediction), balanced_accuracy_score(label, prediction), auc], atol=1e-12
    )


def test_a_constant_predictor_is_named_and_not_rewarded():
    label = np.asarray([1] * 390 + [0] * 234)
    found = metrics(np.tile([0.0, 1.0], (624, 1)), label)
    assert found == (0.625, 0.5, 0.5, True)


def test_metrics_by_hand():
    found = metrics([[2, 1], [0, 1], [0, 1], [0, 3]], [0, 0, 1, 1])
    assert found == (0.75, 0.75, 0.875, False)


def test_auc_is_none_when_a_class_is_missing_or_a_logit_is_not_finite():
    assert metrics([[1, 0, 0], [0, 1, 0]], [0, 1]) == (1.0, 1.0, None, False)
    assert metrics([[1, 0], [0, np.inf]], [0, 1]).auc is None


def test_nan_is_never_right():
    assert metrics([[np.nan, 0], [np.nan, np.nan], [0, 1]], [0, 0, 1]) == (1 / 3, 0.5, None, False)
    assert metrics([[np.nan, 0]] * 2, [0, 1]) == (0.0, 0.0, None, True)


@pytest.mark.parametrize(
    ("logits", "label"), [([[0, 1]], [2]), ([[0, 1]], [-1]), (np.zeros((0, 2)), []), ([[0, 1]], [0, 1])]
)
def test_bad_input_is_one_line(logits, label):
    with pytest.raises(ValueError) as error:
        metrics(logits, np.asarray(label, int))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 50])
def test_batches_and_padding_change_nothing_and_compile_once(batch_size):
    image = np.random.default_rng(0).uniform(size=(7, 2, 3, 1)).astype(np.float32)
    weight = np.random.default_rng(1).normal(size=(6, 2)).astype(np.float32)
    shapes = []

    def apply(params, x):
        shapes.append(x.shape)
        return jnp.reshape(x, (len(x), -1)) @ params

    logits = predict(apply, weight, image, batch_size)
    np.testing.assert_allclose(logits, image.reshape(7, 6) @ weight, rtol=1e-5, atol=1e-6)
    assert shapes == [(batch_size, 2, 3, 1)]


def test_bad_batch_sizes_and_empty_sets_are_named():
    with pytest.raises(ValueError, match=r"^batch_size is 0"):
        predict(lambda p, x: x, (), np.zeros((1, 2, 2, 1)), 0)
    with pytest.raises(ValueError, match="number of images"):
        predict(lambda p, x: x, (), np.zeros((0, 2, 2, 1)), 4)

"""The laws of every partition, and what sets each one apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrobust.data import PARTITIONS, dirichlet, iid, partition, quantity_skew, shards

OPTIONS = {
    "iid": {},
    "dirichlet": {"alpha": 0.1},
    "shards": {"num_shards_per_client": 2},
    "quantity_skew": {"alpha": 0.1},
}


def test_every_partition_of_the_registry_is_tested():
    assert set(OPTIONS) == set(PARTITIONS)


@pytest.mark.parametrize("name", PARTITIONS)
@settings(max_examples=40)
@given(data=st.data())
def test_parts_are_disjoint_exhaustive_sorted_seeded_and_large_enough(name, data):
    num = data.draw(st.integers(2, 200))
    num_clients = data.draw(st.integers(1, num // 2))
    min_size = data.draw(st.integers(1, num // num_clients))
    seed = data.draw(st.integers(0, 2**32))
    label = np.random.default_rng(seed).integers(0, data.draw(st.integers(1, 10)), num)

    def parts(seed):
        return PARTITIONS[name](np.random.default_rng(seed), label, num_clients, min_size=min_size, **OPTIONS[name])

    given_out = parts(seed)
    assert len(given_out) == num_clients
    assert min(map(len, given_out)) >= min_size
    np.testing.assert_array_equal(np.sort(np.concatenate(given_out)), np.arange(num))
    for part, again in zip(given_out, parts(seed), strict=True):
        assert (np.diff(part) > 0).all()
        np.testing.assert_array_equal(part, again)


@pytest.mark.parametrize("name", PARTITIONS)
def test_another_generator_gives_another_partition(name):
    label = np.arange(100) % 5
    first, second = (PARTITIONS[name](np.random.default_rng(s), label, 4, **OPTIONS[name]) for s in (0, 1))
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize(
    ("num_clients", "min_size", "named"),
    [(11, 1, "num_clients"), (0, 1, "num_clients"), (4, 3, "min_size"), (2, 0, "min_size")],
)
def test_what_cannot_be_shared_out_is_named_in_one_line(name, num_clients, min_size, named):
    with pytest.raises(ValueError, match=f"^{named} is ") as caught:
        PARTITIONS[name](np.random.default_rng(0), np.zeros(10, int), num_clients, min_size=min_size, **OPTIONS[name])
    assert "\n" not in str(caught.value)


def test_iid_sizes_differ_by_one_at_most():
    sizes = [len(part) for part in iid(np.random.default_rng(0), np.zeros(103, int), 10)]
    assert sorted(sizes) == [10] * 7 + [11] * 3


def test_one_shard_per_client_of_two_even_classes_gives_one_class_each():
    label = np.array([0, 1] * 10)
    for part in shards(np.random.default_rng(0), label, 4, num_shards_per_client=1):
        assert len(part) == 5
        assert len(set(label[part])) == 1


def test_a_client_of_s_even_shards_sees_at_most_s_classes():
    label = np.arange(1000) % 10
    parts = shards(np.random.default_rng(0), label, 20, num_shards_per_client=3)
    assert max(len(set(label[part])) for part in parts) <= 2 * 3  # a shard of 16 or 17 may straddle two classes of 100
    assert np.mean([len(set(label[part])) for part in parts]) < 5


def test_which_examples_make_a_shard_and_which_shards_a_client_is_left_to_chance():
    """Half of what a client has with one seed it has with another, too; in order it would be all, and one class."""
    one_class, classes = np.zeros(200, int), np.repeat([0, 1, 2, 3], 50)
    first, second = (shards(np.random.default_rng(seed), one_class, 2, num_shards_per_client=1) for seed in (0, 1))
    assert 30 < len(np.intersect1d(first[0], second[0])) < 70  # 50 of 100; a standard deviation is 3.5
    rngs = map(np.random.default_rng, range(20))
    held = {tuple(classes[part[[0, -1]]]) for part in (shards(rng, classes, 2)[0] for rng in rngs)}
    assert len(held) >= 4  # of the six pairs of shards


@pytest.mark.parametrize("partition", [dirichlet, quantity_skew])
def test_which_examples_of_a_class_a_client_has_is_left_to_chance(partition):
    """Not one piece of the file, which may be in the order of its patients."""
    biggest = max(partition(np.random.default_rng(0), np.zeros(1000, int), 4, alpha=0.5), key=len)
    assert 300 < len(biggest) < 900
    assert biggest[0] < 50  # of 300 at random out of 1000 the first is beyond with a chance of 0.7^50
    assert biggest[-1] >= 950


def test_a_small_client_is_filled_up_with_random_examples_of_the_largest():
    """All of both classes fall to one client with most seeds; what the other is given is of both."""
    label, filled = np.repeat([0, 1], 100), []
    for seed in range(20):
        parts = dirichlet(np.random.default_rng(seed), label, 2, alpha=1e-3, min_size=40)
        small = min(parts, key=len)
        if len(small) == 40:
            filled.append(label[small].mean())
    assert len(filled) >= 5
    assert abs(np.mean(filled) - 0.5) < 0.15  # 200 or more coins: a standard deviation is 0.035


def test_the_largest_give_and_give_alike():
    parts = np.split(np.arange(17), [10, 16])
    sizes = [sorted(map(len, partition._finish(np.random.default_rng(0), parts, size))) for size in (3, 5)]
    assert sizes == [[3, 6, 8], [5, 6, 6]]


def test_dirichlet_tends_to_even_labels_for_large_alpha_and_to_few_classes_for_small():
    label = np.arange(5000) % 5
    even = dirichlet(np.random.default_rng(0), label, 5, alpha=1e6)
    for part in even:
        # 1 000 +- 1 of each class at alpha = infinity; the draw's own deviation at 1e6 is 1000 * 4e-4
        assert np.abs(np.bincount(label[part]) - 200).max() <= 5
    skewed = dirichlet(np.random.default_rng(0), label, 5, alpha=0.01)
    assert np.mean([np.bincount(label[part], minlength=5).max() / len(part) for part in skewed]) > 0.8


def test_dirichlet_shares_have_the_stated_variance():
    # The share of one client in one class at K 4, alpha 0.5 has variance
    # (K-1) / (K^2 (K alpha + 1)) = 0.1875 / 3 = 0.0625.
    label, shares = np.zeros(400, int), []
    rng = np.random.default_rng(0)
    for _ in range(500):
        shares += [len(part) / 400 for part in dirichlet(rng, label, 4, alpha=0.5)]
    assert abs(np.var(shares) - 0.0625) < 0.006  # five standard errors; fixed seed


def test_tiny_alpha_ends_at_once_and_keeps_the_minimum():
    label = np.zeros(1000, int)
    sizes = sorted(len(part) for part in dirichlet(np.random.default_rng(0), label, 100, alpha=1e-3, min_size=9))
    assert sizes[0] == 9
    assert sizes[-1] > 50


def test_quantity_skew_skews_sizes_and_not_labels():
    label = np.arange(10000) % 2
    parts = quantity_skew(np.random.default_rng(0), label, 5, alpha=0.5)
    sizes = [len(part) for part in parts]
    assert max(sizes) > 3 * min(sizes)
    big = max(parts, key=len)
    assert abs(label[big].mean() - 0.5) < 5 * 0.5 / np.sqrt(len(big))


@pytest.mark.parametrize("partition", [dirichlet, quantity_skew])
@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf")])
def test_alpha_out_of_range_is_named(partition, alpha):
    with pytest.raises(ValueError, match=r"^alpha is "):
        partition(np.random.default_rng(0), np.zeros(10, int), 2, alpha=alpha)


def test_more_shards_than_examples_are_named():
    with pytest.raises(ValueError, match=r"^num_shards_per_client is "):
        shards(np.random.default_rng(0), np.zeros(10, int), 4, num_shards_per_client=3)

"""Cohorts: pure in (seed, round), sampled as stated, padded with nothing."""

import math
from itertools import chain

import numpy as np
import pytest

from fedrobust.data import CohortSettings, load, make_cohorts
from fedrobust.privacy.sampling import fixed_size, poisson
from fedrobust.types import Dataset

SIZES = (10, 4, 7, 1)
PARTS = np.split(np.random.default_rng(7).permutation(22), np.cumsum(SIZES)[:-1])
# The image of example i is filled with i, so that a batch tells which examples are in it.
DATASET = Dataset(
    np.broadcast_to(np.arange(22, dtype=np.float32)[:, None, None, None], (22, 2, 3, 1)), np.arange(22) % 3, 3
)
SHUFFLE = CohortSettings(3, "all", "shuffle", batch_size=3)
SAMPLED = CohortSettings(4, "sampler", "sampler")
SAMPLERS = {"client_sampler": poisson(0.5, 4, multiple=1), "batch_sampler": poisson(0.3, 10, multiple=8)}


def examples(cohort, row):
    """The examples of each batch of one row."""
    image, mask = cohort.batch.image[row], cohort.batch.mask[row]
    return [list(image[step, mask[step], 0, 0, 0].astype(int)) for step in range(len(mask))]


def assert_equal_cohorts(a, b):
    for x, y in zip((*a[:3], *a.batch), (*b[:3], *b.batch), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("settings", "samplers"),
    [(SHUFFLE, {}), (SAMPLED, SAMPLERS), (CohortSettings(2, "fixed", "shuffle", 2, batch_size=4), {})],
)
def test_a_cohort_is_a_pure_function_of_seed_and_round(settings, samplers):
    forward = make_cohorts(DATASET, PARTS, settings, seed=3, **samplers)
    there = [forward(r) for r in range(4)]
    other = make_cohorts(DATASET, PARTS, settings, seed=3, **samplers)
    for r in (2, 0, 3, 1):
        assert_equal_cohorts(there[r], other(r))
    assert any((there[0].batch.image != there[r].batch.image).any() for r in (1, 2, 3))
    reseeded = [make_cohorts(DATASET, PARTS, settings, seed=4, **samplers)(r) for r in range(4)]
    assert any((a.batch.image != b.batch.image).any() for a, b in zip(there, reseeded, strict=True))


@pytest.mark.parametrize(("settings", "samplers", "shape"), [(SHUFFLE, {}, (4, 3, 3)), (SAMPLED, SAMPLERS, (4, 4, 16))])
def test_types_shapes_and_places_are_those_of_a_cohort_in_every_round(settings, samplers, shape):
    cohorts = make_cohorts(DATASET, PARTS, settings, seed=0, malicious=[2], **samplers)
    for r in range(5):
        cohort = cohorts(r)
        k, s, b = shape
        assert (cohort.id.shape, cohort.id.dtype) == ((k,), np.int32)
        assert (cohort.weight.shape, cohort.weight.dtype) == ((k,), np.float32)
        assert (cohort.malicious.shape, cohort.malicious.dtype) == ((k,), np.bool_)
        assert (cohort.batch.image.shape, cohort.batch.image.dtype) == ((k, s, b, 2, 3, 1), np.float32)
        assert (cohort.batch.label.shape, cohort.batch.label.dtype) == ((k, s, b), np.int32)
        assert (cohort.batch.mask.shape, cohort.batch.mask.dtype) == ((k, s, b), np.bool_)
        assert len(set(cohort.id)) == k
        present = cohort.weight > 0
        np.testing.assert_array_equal(present, cohort.id < len(SIZES))
        np.testing.assert_array_equal(cohort.malicious, cohort.id == 2)
        assert not cohort.batch.mask[~present].any()
        # real examples come first, and labels are those of the images
        assert (np.diff(cohort.batch.mask.astype(int), axis=-1) <= 0).all()
        index = cohort.batch.image[..., 0, 0, 0].astype(int)
        np.testing.assert_array_equal(cohort.batch.label, np.where(cohort.batch.mask, index % 3, 0))
        assert not cohort.batch.image[~cohort.batch.mask].any()
        for row in np.flatnonzero(present):
            assert {i for batch in examples(cohort, row) for i in batch} <= set(PARTS[cohort.id[row]])


def test_shuffled_batches_go_through_every_example_once_per_epoch():
    # Client 0 has 10 examples: 4 batches of 3, 3, 3, 1 make an epoch; 3 steps a round make 3 epochs in 4 rounds.
    cohorts = make_cohorts(DATASET, PARTS, SHUFFLE, seed=0)
    stream = [batch for r in range(4) for batch in examples(cohorts(r), 0)]
    assert [len(batch) for batch in stream] == [3, 3, 3, 1] * 3
    epochs = [list(chain(*stream[i : i + 4])) for i in (0, 4, 8)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(PARTS[0])
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_small_client_sees_each_example_once_per_round_and_then_empty_batches():
    cohorts = make_cohorts(DATASET, PARTS, SHUFFLE, seed=0)
    for r in range(3):
        assert [len(batch) for batch in examples(cohorts(r), 1)] == [3, 1, 0]
        assert sorted(chain(*examples(cohorts(r), 1))) == sorted(PARTS[1])
        assert examples(cohorts(r), 3) == [[PARTS[3][0]], [], []]


@pytest.mark.parametrize("sampled", [False, True])
def test_the_batches_of_a_client_do_not_depend_on_who_takes_part(sampled):
    batches, size = ("sampler", None) if sampled else ("shuffle", 3)
    sampler = poisson(0.4, 10, multiple=8) if sampled else None
    everyone, some = (
        make_cohorts(
            DATASET, PARTS, CohortSettings(3, who, batches, num, batch_size=size), seed=5, batch_sampler=sampler
        )
        for who, num in (("all", None), ("fixed", 2))
    )
    seen = set()
    for r in range(8):
        few, all_ = some(r), everyone(r)
        for row, client in enumerate(few.id):
            assert examples(few, row) == examples(all_, client)
            seen.add(int(client))
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("sampler", [None, poisson(0.5, 11, multiple=8), fixed_size(6, 11)])
def test_clients_of_equal_size_draw_independently(sampler):
    parts = [np.arange(11), np.arange(11, 22)]
    batches, size = ("shuffle", 6) if sampler is None else ("sampler", None)
    settings = CohortSettings(4, "all", batches, batch_size=size)
    cohort = make_cohorts(DATASET, parts, settings, seed=0, batch_sampler=sampler)(0)
    assert [[i + 11 for i in batch] for batch in examples(cohort, 0)] != examples(cohort, 1)


def test_fixed_sampling_draws_every_client_equally_often_and_never_twice():
    cohorts = make_cohorts(DATASET, PARTS, CohortSettings(1, "fixed", "shuffle", num_clients=2, batch_size=1), seed=0)
    ids = np.array([cohorts(r).id for r in range(1000)])
    assert (ids[:, 0] < ids[:, 1]).all()
    # Binomial(1000, 1/2): 5.5 standard deviations are 87, 4 clients: false failure below 2e-7
    assert np.abs(np.bincount(ids.ravel(), minlength=4) - 500).max() < 87


def test_poisson_inclusion_has_the_stated_rate_independently():
    num, rate, rounds, steps = 6, 0.3, 500, 4
    dataset = Dataset(np.arange(num, dtype=np.float32).reshape(num, 1, 1, 1), np.zeros(num, int), 2)
    samplers = {"client_sampler": poisson(0.4, 2, multiple=1), "batch_sampler": poisson(rate, 3, multiple=8)}
    settings = CohortSettings(steps, "sampler", "sampler")
    cohorts = make_cohorts(dataset, [np.arange(3), np.arange(3, 6)], settings, seed=0, **samplers)
    took_part, drawn = np.zeros((rounds, 2)), []
    for r in range(rounds):
        cohort = cohorts(r)
        took_part[r, cohort.id[cohort.weight > 0]] = 1
        for row in np.flatnonzero(cohort.weight > 0):
            low = 3 * cohort.id[row]
            drawn += [[low + i in batch for i in range(3)] for batch in examples(cohort, row)]
    drawn = np.array(drawn, float)
    # 5.5 standard errors throughout, 16 comparisons: false failure below 1e-6 (the seed is fixed as well)
    assert np.abs(took_part.mean(0) - 0.4).max() < 5.5 * math.sqrt(0.24 / rounds)
    assert np.abs(drawn.mean(0) - rate).max() < 5.5 * math.sqrt(rate * (1 - rate) / len(drawn))
    # independence: all pairs of examples, of consecutive steps and of clients are uncorrelated
    together = np.concatenate([drawn[:-1], drawn[1:]], axis=1)
    assert np.abs(np.corrcoef(together.T) - np.eye(6)).max() < 5.5 / math.sqrt(len(drawn))
    assert abs(np.corrcoef(took_part.T)[0, 1]) < 5.5 / math.sqrt(rounds)
    # the sizes vary as Binomial(3, rate) does: a shuffled batch of fixed size would not
    assert abs(drawn.sum(1).var() - 3 * rate * (1 - rate)) < 0.1


def test_rate_one_takes_everyone_and_everything():
    samplers = {"client_sampler": poisson(1.0, 4, multiple=1), "batch_sampler": poisson(1.0, 10, multiple=8)}
    cohort = make_cohorts(DATASET, PARTS, CohortSettings(2, "sampler", "sampler"), seed=0, **samplers)(0)
    assert cohort.batch.mask.shape == (4, 2, 16)
    np.testing.assert_array_equal(cohort.batch.mask.sum(-1), np.repeat(SIZES, 2).reshape(4, 2))


def test_poisson_batches_are_those_of_one_generator_per_client_and_round():
    """Numbers of trainings made so far stay what they are."""
    settings = CohortSettings(3, "all", "sampler")
    cohort = make_cohorts(DATASET, PARTS, settings, seed=7, batch_sampler=poisson(0.3, 10, multiple=8))(5)
    for client, part in enumerate(PARTS):
        drawn = np.random.default_rng([7, 2, 5, client]).random((3, len(part))) < 0.3
        assert examples(cohort, client) == [part[row].tolist() for row in drawn]


def test_every_purpose_has_random_streams_of_its_own(monkeypatch):
    """NumPy takes [s], [s, 0] and [s, 0, 0] for one seed: what is compared are the states that seeds lead to."""
    streams, make = [], np.random.default_rng

    def watched(seed):
        streams.append(tuple(np.random.SeedSequence(seed).generate_state(4)))
        return make(seed)

    monkeypatch.setattr("numpy.random.default_rng", watched)
    load("digits", seed=3)
    draw = make_cohorts(DATASET, PARTS, SAMPLED, seed=3, **SAMPLERS)
    present = sum(int((draw(r).weight > 0).sum()) for r in range(6))
    assert len(streams) == len(set(streams)) == 1 + 6 + present  # the splits; in each round who, and which of each


def test_every_client_may_have_its_own_sampler():
    settings, samplers = CohortSettings(2, "all", "sampler"), [fixed_size(-(-num // 2), num) for num in SIZES]
    cohort = make_cohorts(DATASET, PARTS, settings, seed=0, batch_sampler=samplers)(0)
    assert cohort.batch.mask.shape == (4, 2, 5)
    np.testing.assert_array_equal(cohort.batch.mask.sum(-1), np.repeat([5, 2, 4, 1], 2).reshape(4, 2))


def test_without_a_seed_nobody_draws_the_same_batches_again():
    draw = make_cohorts(DATASET, PARTS, SAMPLED, seed=None, **SAMPLERS)
    assert_equal_cohorts(draw(3), draw(3))  # within a run a round stays what it is
    other = make_cohorts(DATASET, PARTS, SAMPLED, seed=None, **SAMPLERS)
    assert any((draw(r).batch.mask != other(r).batch.mask).any() for r in range(10))  # equal: 22 fair-ish coins x 40


def test_a_seed_from_the_system_is_beyond_guessing(monkeypatch):
    asked = []
    monkeypatch.setattr("secrets.randbits", lambda num_bits: asked.append(num_bits) or 0)
    make_cohorts(DATASET, PARTS, SAMPLED, seed=None, **SAMPLERS)
    assert len(asked) == 1 and asked[0] >= 128


def test_weights_are_equal_or_by_examples():
    equal = make_cohorts(DATASET, PARTS, CohortSettings(1, "all", "shuffle", batch_size=2, weighting="equal"), seed=0)
    np.testing.assert_array_equal(equal(0).weight, np.ones(4))
    by_examples = make_cohorts(DATASET, PARTS, SHUFFLE, seed=0)
    np.testing.assert_allclose(by_examples(0).weight, np.array(SIZES) / 10)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (CohortSettings(0, "all", "shuffle", batch_size=1), "num_steps"),
        (CohortSettings(1, "some", "shuffle", batch_size=1), "client_sampling"),
        (CohortSettings(1, "all", "random", batch_size=1), "batch_sampling"),
        (CohortSettings(1, "all", "shuffle", batch_size=1, weighting="size"), "weighting"),
        (CohortSettings(1, "all", "shuffle"), "batch_size"),
        (CohortSettings(1, "all", "shuffle", batch_size=0), "batch_size"),
        (CohortSettings(1, "all", "sampler", batch_size=4), "batch_size"),
        (CohortSettings(1, "all", "sampler"), "batch_sampler"),
        (CohortSettings(1, "fixed", "shuffle", batch_size=1), "num_clients"),
        (CohortSettings(1, "fixed", "shuffle", num_clients=5, batch_size=1), "num_clients"),
        (CohortSettings(1, "all", "shuffle", num_clients=2, batch_size=1), "num_clients"),
        (CohortSettings(1, "sampler", "shuffle", batch_size=1), "client_sampler"),
    ],
)
def test_settings_out_of_range_are_named_in_one_line(settings, named):
    with pytest.raises(ValueError, match=f"^{named} is ") as caught:
        make_cohorts(DATASET, PARTS, settings, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_sampler": poisson(0.3, 9, multiple=8)}, "batch_sampler, drawing from"),  # the largest client has 10
        ({"batch_sampler": fixed_size(2, 10)}, "batch_sampler, drawing from"),
        ({"batch_sampler": [SAMPLERS["batch_sampler"]] * 3}, "batch_sampler"),
        ({"client_sampler": poisson(0.5, 3, multiple=1)}, "client_sampler, drawing from"),
        ({"client_sampler": None}, "client_sampler"),
    ],
)
def test_a_sampler_made_for_others_is_refused(changes, named):
    with pytest.raises(ValueError, match=f"^{named} is "):
        make_cohorts(DATASET, PARTS, SAMPLED, seed=0, **SAMPLERS | changes)
    for settings in (SHUFFLE, CohortSettings(1, "fixed", "sampler", num_clients=2)):
        with pytest.raises(ValueError, match=r"^(batch|client)_sampler is "):
            make_cohorts(DATASET, PARTS, settings, seed=0, **SAMPLERS)


def test_parts_ids_and_seeds_that_do_not_exist_are_named():
    for arguments, named in [
        ({"parts": [np.arange(3), np.arange(0)]}, "num_examples"),
        ({"parts": []}, "num_examples"),
        ({"parts": [np.array([22])]}, "parts"),
        ({"parts": [np.array([0]), np.array([-1, 3])]}, "parts"),
        ({"malicious": [4]}, "malicious"),
        ({"seed": -1}, "seed"),
    ]:
        given = {"parts": PARTS, "seed": 0, **arguments}
        with pytest.raises(ValueError, match=f"^{named} is "):
            make_cohorts(DATASET, given.pop("parts"), SHUFFLE, **given)


@pytest.mark.parametrize("parts", [[[0, 1, 1]], [[0, 1], [2, 1]]], ids=["by one client", "by two"])
def test_a_record_is_of_one_client_once(parts):
    with pytest.raises(ValueError, match=r"^parts hold index 1 2 times: each record is of one client, once$"):
        make_cohorts(DATASET, [np.array(part) for part in parts], SHUFFLE, seed=0)

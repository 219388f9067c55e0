"""What a private trainer must obey, seen from outside.

Each law takes the trainer's module and a seed and raises AssertionError where it is broken. Random laws compare with
limits six standard deviations away: false alarms below 1e-8 for each comparison.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.privacy.zoo.measures import KEY, clipped_sum, close_std, compiled, leaves, some, unrelated, vector, without


@functools.cache
def gradient_of_one(t: Any) -> Any:
    """The gradient of one record's loss; the trainer's loss does not depend on its key."""
    loss = t.make_loss()
    return jax.jit(jax.grad(lambda params, x, y: loss(KEY(0), params, x[None], y[None])[0]))


def sum_equals_a_loop(t: Any, seed: int) -> None:
    """The clipped sum is a loop over records, each differentiated alone and clipped as one vector, in float64."""
    params, dataset = t.init(seed), some(t, seed)
    batch = t.batch(dataset)
    weight = np.random.default_rng(seed).uniform(size=len(batch.label)).astype(np.float32)
    mask = np.arange(len(batch.label)) % 5 != 3
    expected = 0.0
    for i in np.flatnonzero(mask):
        g = vector(gradient_of_one(t)(params, dataset.image[i], dataset.label[i]))
        expected = expected + weight[i] * g * min(1, t.CLIP_NORM / np.linalg.norm(g))
    found = clipped_sum(t, seed, params, batch._replace(mask=mask), weight)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-6)


def one_record_moves_the_sum_by_no_more_than_the_sensitivity(t: Any, seed: int) -> None:
    """Whatever the record: huge, tiny, not finite, weighted beyond 1, or one of many that are equal."""
    params, dataset, rng = t.init(seed), some(t, seed), np.random.default_rng(seed)
    image = dataset.image * np.float32(10 ** rng.uniform(-2, 4))
    image[2:5], dataset.label[2:5] = image[2], dataset.label[2]
    image[6] = rng.choice([np.nan, np.inf, 1e38])
    full = dataset._replace(image=image)
    fewer = full._replace(image=np.delete(image, 2, 0), label=np.delete(full.label, 2))
    other = full._replace(image=np.where(np.arange(len(image))[:, None, None, None] == 2, 1 - image, image))
    bound = t.clipped().sensitivity("add_or_remove_one")
    assert bound <= t.CLIP_NORM * (1 + 1e-9), "sensitivity is not the clip norm"
    rows = [t.batch(t.rows(x)) for x in (full, fewer, other)]
    weights = [np.full(len(x.label), 3.0, np.float32) for x in rows]
    base, removed, replaced = (clipped_sum(t, seed, params, x, w) for x, w in zip(rows, weights, strict=True))
    assert np.isfinite(base).all(), "a record that is not finite is in the sum"
    slack = 1e-5 * np.linalg.norm(base)  # rounding of a sum of many
    assert np.linalg.norm(base - removed) <= bound + slack, "one record's contribution exceeds the sensitivity"
    assert np.linalg.norm(base - replaced) <= t.clipped().sensitivity("replace_one") + slack
    assert t.clipped().sensitivity("replace_one") >= 1.999 * bound, "replacing one record can move the sum by 2 C"


def one_record_alone_is_within_the_clip_norm(t: Any, seed: int) -> None:
    """Rounding included."""
    params, dataset = t.init(seed), some(t, seed)
    batch = t.batch(dataset)
    for i in range(len(batch.label)):
        alone = np.arange(len(batch.label)) == i
        length = np.linalg.norm(clipped_sum(t, seed, params, batch._replace(mask=alone)))
        assert length <= t.CLIP_NORM, "beyond the clip norm"


def records_do_not_see_each_other(t: Any, seed: int) -> None:
    """The loss couples no two records, and replacing one changes no other's contribution by one bit."""
    params, dataset = t.init(seed), some(t, seed)
    try:
        t.require_isolated(params, dataset)
    except ValueError as error:
        raise AssertionError(str(error)) from None
    batch = t.batch(dataset)
    neighbour = batch._replace(image=np.where(np.arange(len(batch.label))[:, None, None, None] == 1, 0.5, batch.image))
    for i in (0, 2):
        alone = (np.arange(len(batch.label)) == i).astype(np.float32)
        before, after = (clipped_sum(t, seed, params, b, alone) for b in (batch, neighbour))
        assert (before == after).all(), "a record changes another one's contribution"


def padding_is_nothing(t: Any, seed: int) -> None:
    """Whatever it holds."""
    params, batch = t.init(seed), without(t.batch(some(t, seed)), 3)
    sums = []
    for junk in (0.0, 0.7, np.nan, np.inf):
        image = batch.image.copy()
        image[3] = junk
        sums.append(clipped_sum(t, seed, params, batch._replace(image=image)))
    assert all((s == sums[0]).all() for s in sums), "padding is in the sum"


@functools.cache
def released(t: Any) -> Any:
    """One compiled private gradient."""
    return jax.jit(t.grad())


def an_empty_batch_is_noise_of_the_planned_size(t: Any, seed: int) -> None:
    """Normal, of multiplier times sensitivity over the nominal batch size, independent from leaf to leaf."""
    params, batch = t.init(seed), t.batch(some(t, seed))
    nothing = batch._replace(mask=np.zeros_like(batch.mask))
    noise = leaves(released(t)(KEY(seed), params, nothing)[0])
    stddev = t.plan().noise_multiplier * t.CLIP_NORM / (t.SAMPLING_RATE * t.NUM_RECORDS)
    close_std(np.concatenate(noise), stddev)
    for leaf in noise:
        if leaf.size > 500:
            close_std(leaf, stddev)
            unrelated(leaf[1:], leaf[:-1])
    size = min(leaf.size for leaf in noise if leaf.size > 500)
    big = [leaf[:size] for leaf in noise if leaf.size > 500]
    for i, leaf in enumerate(big):
        for other in big[:i]:
            unrelated(leaf, other)
    assert len(np.unique(np.concatenate(noise))) > 0.99 * sum(map(len, noise)), "the same numbers twice"


def the_scale_does_not_tell_how_many_took_part(t: Any, seed: int) -> None:
    """With one key, a batch and no batch differ by the clipped sum over the nominal size."""
    params, batch = t.init(seed), t.batch(some(t, seed))
    nothing = batch._replace(mask=np.zeros_like(batch.mask))
    for size in (1, 5, 12):
        part = batch._replace(mask=np.arange(len(batch.mask)) < size)
        found = vector(released(t)(KEY(seed), params, part)[0]) - vector(released(t)(KEY(seed), params, nothing)[0])
        expected = clipped_sum(t, seed, params, part) / (t.SAMPLING_RATE * t.NUM_RECORDS)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-6 + 1e-5 * np.abs(expected).max())


def every_noise_is_drawn_once(t: Any, seed: int) -> None:
    """Over rounds, silos and steps: nothing correlates, nothing cancels, nothing adds up."""
    sent = t.run(seed, t.empty(t.cohorts(seed)))
    sent = np.concatenate([x.reshape(t.NUM_ROUNDS, t.NUM_SILOS, -1) for x in jax.tree.leaves(sent)], axis=-1)
    sent = sent.astype(np.float64)
    stddev = t.plan().noise_multiplier * t.CLIP_NORM / (t.SAMPLING_RATE * t.NUM_RECORDS)
    close_std(sent.ravel(), stddev * math.sqrt(t.LOCAL_STEPS))
    close_std(sent.mean(axis=1).ravel(), stddev * math.sqrt(t.LOCAL_STEPS / t.NUM_SILOS))
    close_std(sent.mean(axis=0).ravel(), stddev * math.sqrt(t.LOCAL_STEPS / t.NUM_ROUNDS))
    correlation = np.corrcoef(sent.reshape(-1, sent.shape[-1])) - np.eye(t.NUM_ROUNDS * t.NUM_SILOS)
    assert np.abs(correlation).max() < 6 / math.sqrt(sent.shape[-1]), "the same noise twice"


def the_loss_and_the_noise_do_not_share_a_stream(t: Any, seed: int) -> None:
    """A loss that draws its own normals must not draw those that hide it."""
    params = t.init(seed)
    batch = t.batch(some(t, seed))
    nothing = batch._replace(mask=np.zeros_like(batch.mask))
    noise = vector(released(t)(KEY(seed), params, nothing)[0])
    drawn = vector(compiled(t.grad_of_a_random_sum())(KEY(seed), params, batch)[0]) - noise
    unrelated(noise, drawn)


def methods_and_microbatches_agree(t: Any, seed: int) -> None:
    """They change speed, never what is released."""
    params, dataset = t.init(seed), some(t, seed)
    batch = without(t.batch(dataset), 4)
    batch.image[5] = np.nan
    weight = np.random.default_rng(seed).uniform(size=len(batch.label)).astype(np.float32)
    expected = clipped_sum(t, seed, params, batch, weight)
    for other in (t.clipped_by("norms_first", 5), t.clipped_by("per_example", 5)):
        found = vector(compiled(other.apply)(KEY(seed), params, batch, weight)[0])
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
        assert other.sensitivity("add_or_remove_one") == t.clipped().sensitivity("add_or_remove_one")


def groups_share_the_clip_norm(t: Any, seed: int) -> None:
    """Clipped layer by layer, one record is still within C."""
    params, dataset = t.init(seed), some(t, seed)
    batch = t.batch(dataset)._replace(image=dataset.image * 1e3)
    grouped = t.clipped_by("per_example", None, t.privacy.by_layer)
    for i in range(3):
        alone = batch._replace(mask=np.arange(len(batch.mask)) == i)
        length = np.linalg.norm(vector(compiled(grouped.apply)(KEY(seed), params, alone, None)[0]))
        assert length <= grouped.sensitivity("add_or_remove_one") * (1 + 1e-6), "beyond the clip norm"


def shares_add_up_to_the_noise(t: Any, seed: int) -> None:
    """Silos that add shares for a secure sum add the planned noise together, and no less."""
    params, batch = t.init(seed), t.batch(some(t, seed))
    nothing = batch._replace(mask=np.zeros_like(batch.mask))
    share = compiled(t.share_of_grad())
    sent = [vector(share(KEY(1000 * seed + k), params, nothing)[0]) for k in range(t.NUM_SILOS)]
    stddev = t.plan().noise_multiplier * t.CLIP_NORM / (t.SAMPLING_RATE * t.NUM_RECORDS)
    close_std(np.sum(sent, axis=0), stddev)
    close_std(sent[0], stddev / math.sqrt(t.NUM_SILOS))


def clients_are_clipped_and_noised_once(t: Any, seed: int) -> None:
    """Client level: every present client counts the same, clipped; noise of the sum, once; a fixed denominator."""
    rng, mean = np.random.default_rng(seed), t.client_mean()
    apply = compiled(mean.apply)
    expected_size = t.client_plan().sampling_rate * t.NUM_CLIENTS
    params = {"a": jnp.zeros(20_000), "b": jnp.zeros(300)}
    sent = {k: np.zeros((5, *v.shape), np.float32) for k, v in params.items()}
    stddev = t.client_plan().noise_multiplier * t.CLIENT_CLIP_NORM / expected_size
    for weight in (np.zeros(5), np.array([1, 0.2, 0, 3, 1])):
        noise = apply(KEY(seed), mean.init(params), sent, weight.astype(np.float32))[0]
        close_std(vector(noise), stddev)
    sent["b"][:, 0] = rng.choice([0.3, 5.0, 40.0], 5)
    sent["a"][np.arange(5), np.arange(5)] = rng.choice([0.2, 7.0], 5)
    sent["a"][1, 7] = rng.choice([0.1, np.nan])
    moved = vector(apply(KEY(seed), mean.init(params), sent, weight.astype(np.float32))[0]) - vector(noise)
    expected = 0.0
    for k in (0, 1, 3, 4):
        update = np.concatenate([sent["a"][k], sent["b"][k]]).astype(np.float64)
        length = np.linalg.norm(update)
        expected = expected + (update * min(1, t.CLIENT_CLIP_NORM / length) if np.isfinite(length) else 0)
    np.testing.assert_allclose(moved, expected / expected_size, atol=1e-5)


def an_auditor_finds_no_more_than_is_claimed(t: Any, seed: int) -> None:
    """The noise along the strongest canary's direction, over 400 draws, is what the plan says."""
    params, batch = t.init(seed), t.batch(some(t, seed))
    canary = without(batch._replace(mask=np.arange(len(batch.mask)) == 0), 1)
    direction = clipped_sum(t, seed, params, canary)
    direction = (direction / np.linalg.norm(direction)).astype(np.float32)
    scores = audit_scores(t)(jax.random.split(KEY(seed), 400), params, canary, direction)
    stddev = np.std(np.asarray(scores, np.float64)) * t.SAMPLING_RATE * t.NUM_RECORDS
    seen = stddev / t.CLIP_NORM * (1 + 6 / math.sqrt(2 * 400))
    assert seen >= t.plan().noise_multiplier, "the noise an auditor sees is smaller than planned"


@functools.cache
def audit_scores(t: Any) -> Any:
    """For many keys the released gradient along a direction."""

    def score(key: Any, params: Any, batch: Any, direction: Any) -> Any:
        gradient, _ = t.grad()(key, params, batch)
        return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(gradient)]) @ direction

    return jax.jit(jax.vmap(score, (0, None, None, None)))


LAWS = (
    sum_equals_a_loop,
    one_record_moves_the_sum_by_no_more_than_the_sensitivity,
    one_record_alone_is_within_the_clip_norm,
    records_do_not_see_each_other,
    padding_is_nothing,
    an_empty_batch_is_noise_of_the_planned_size,
    the_scale_does_not_tell_how_many_took_part,
    every_noise_is_drawn_once,
    the_loss_and_the_noise_do_not_share_a_stream,
    methods_and_microbatches_agree,
    groups_share_the_clip_norm,
    shares_add_up_to_the_noise,
    clients_are_clipped_and_noised_once,
    an_auditor_finds_no_more_than_is_claimed,
)

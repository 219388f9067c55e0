"""What a private trainer must obey, seen from outside.

Each law takes the trainer's module and a seed and raises AssertionError where it is broken. Random laws compare with
limits six standard deviations away: false alarms below 1e-8 for each comparison.
"""

import functools
import math
import tempfile
from pathlib import Path
from typing import Any

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
from dp_accounting import pld

KEY = jax.random.key


def vector(tree: Any) -> np.ndarray:
    """All scalars of a tree, float64."""
    return np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)])


def leaves(tree: Any) -> list[np.ndarray]:
    """Every leaf as a vector, float64."""
    return [np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)]


def some(t: Any, seed: int, size: int = 12) -> Any:
    """A few records: short and long gradients among them."""
    rng = np.random.default_rng([seed, 7])
    rows = rng.choice(t.NUM_SILOS * t.NUM_RECORDS, size, replace=False)
    found = t.records(seed)
    stretch = rng.choice([0.05, 1.0, 3.0], size).astype(np.float32)[:, None, None, None]
    return found._replace(image=found.image[rows] * stretch, label=found.label[rows])


def without(batch: Any, index: int) -> Any:
    """The batch when one record is not in it."""
    mask = batch.mask.copy()
    mask[index] = False
    return batch._replace(mask=mask)


@functools.cache
def compiled(function: Any) -> Any:
    """One compilation for all seeds."""
    return jax.jit(function)


def clipped_sum(t: Any, seed: int, params: Any, batch: Any, weight: Any = None) -> np.ndarray:
    """The clipped sum as a float64 vector."""
    weight = np.ones(len(batch.label), np.float32) if weight is None else weight
    return vector(compiled(t.clipped().apply)(KEY(seed), params, batch, weight)[0])


def close_std(sample: np.ndarray, stddev: float) -> None:
    """A sample of a normal distribution with mean 0: by its mean, its spread, its tails."""
    n = sample.size
    assert abs(sample.mean()) < 6 * stddev / math.sqrt(n), "biased"
    assert abs(sample.std() / stddev - 1) < 6 / math.sqrt(2 * n), (
        f"spread {sample.std() / stddev:.3f} of what it must be"
    )
    for limit, share in ((1, 0.6826895), (2, 0.9544997)):
        inside = np.mean(np.abs(sample) < limit * stddev)
        assert abs(inside - share) < 6 * math.sqrt(share * (1 - share) / n) + 1e-3, "not normal"


def unrelated(a: np.ndarray, b: np.ndarray) -> None:
    """No correlation."""
    assert abs(np.corrcoef(a, b)[0, 1]) < 6 / math.sqrt(a.size), "correlated"


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


def batches_are_poisson(t: Any, seed: int) -> None:
    """Every record enters every step with the planned rate and on its own: sizes scatter, draws are unrelated."""
    cohort, num_rounds = t.cohorts(seed), 60
    q, n = t.plan().sampling_rate, t.NUM_RECORDS
    inside = np.zeros((num_rounds, t.NUM_SILOS, t.LOCAL_STEPS, n), bool)
    for r in range(num_rounds):
        batch = cohort(r).batch
        assert batch.mask.any(), "nobody"
        for k in range(t.NUM_SILOS):
            for s in range(t.LOCAL_STEPS):
                pixel = batch.image[k, s, batch.mask[k, s], 0, 0, 0]
                place = np.rint(pixel * t.NUM_SILOS * n).astype(int) - k * n
                assert len(set(place.tolist())) == len(place), "a record twice in one batch"
                inside[r, k, s, place] = True
    trials = inside[..., 0].size
    limit = 6 * math.sqrt(q * (1 - q) / trials)
    assert np.abs(inside.mean(axis=(0, 1, 2)) - q).max() < limit, "a record enters with another rate"
    assert abs(inside.mean() - q) < limit / math.sqrt(n), "another sampling rate"
    sizes = inside.sum(axis=-1).ravel()
    variance = n * q * (1 - q)
    assert abs(sizes.var() / variance - 1) < 6 * math.sqrt(2 / sizes.size), "batch sizes do not scatter like Poisson's"
    centred = inside - q
    for other in (np.roll(centred, 1, 0), np.roll(centred, 1, 1), np.roll(centred, 1, 2)):
        product = float(np.mean(centred * other)) / (q * (1 - q))
        assert abs(product) < 6 / math.sqrt(inside.size), "draws hang together"


def epsilon_of(q: float, sigma: float, steps: int, delta: float, histogram_epsilon: float = 0.0) -> float:
    """By dp-accounting, put together here."""
    accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma)), steps)
    if histogram_epsilon:
        accountant.compose(dp_accounting.LaplaceDpEvent(1 / histogram_epsilon))
    return accountant.get_epsilon(delta)


def the_plan_says_what_it_costs(t: Any, seed: int) -> None:
    """Its epsilon is that of all the steps really taken, at its delta, with the rest of the budget."""
    del seed
    plan = t.plan()
    cohort = t.cohorts(0)(0)
    steps = t.NUM_ROUNDS * cohort.batch.mask.shape[1]
    honest = epsilon_of(t.SAMPLING_RATE, plan.noise_multiplier, steps, plan.delta, t.HISTOGRAM_EPSILON)
    assert honest <= plan.epsilon * 1.005, f"{honest:.2f} is spent, {plan.epsilon:.2f} is claimed"
    assert plan.epsilon <= t.EPSILON, "beyond the budget"
    assert honest >= 0.95 * plan.epsilon, "far more noise than planned"
    assert plan.delta < 1 / t.NUM_RECORDS, "delta is not below one over the number of records"
    assert plan.num_steps == steps, "planned for another number of steps"
    assert plan.relation == "add_or_remove_one"


def overfull_batches_are_paid_for(t: Any, seed: int) -> None:
    """A capacity below the largest draw costs delta."""
    del seed
    steps, tail, sigma = 20, 5e-8, 1.5
    event = t.plan_with(noise_multiplier=sigma).event._replace(truncation_probability=tail)
    claimed = t.privacy.total_epsilon([(event, steps)], relation="add_or_remove_one", delta=1e-4, accountant="pld")
    left = 1e-4 - (1 + math.exp(claimed)) * steps * tail
    assert left > 0, "delta is used up"
    honest = epsilon_of(t.SAMPLING_RATE, sigma, steps, left)
    assert honest <= claimed * 1.005, "truncation is not in delta"
    assert t.plan().truncation_probability == t.plan().sampler.tail > 0, "the plan does not pay for its sampler"


def only_sampling_amplifies(t: Any, seed: int) -> None:
    """Shuffled epochs cost every pass over the data a whole Gaussian; replacing a record moves twice the distance."""
    del seed
    shuffled = t.plan_with(
        sampling="shuffle", relation="zero_out", batch_size=10, num_units=40, sampling_rate=None, num_steps=20
    )
    accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
    accountant.compose(dp_accounting.GaussianDpEvent(1.0), math.ceil(shuffled.num_steps * 10 / 40))
    assert shuffled.epsilon >= 0.995 * accountant.get_epsilon(shuffled.delta), "shuffling amplifies nothing"
    for relation in ("add_or_remove_one", "replace_one"):
        whole = t.plan_with(relation=relation, sampling_rate=1.0, num_steps=1)
        closed = gaussian_delta(whole.epsilon, whole.noise_multiplier)
        assert closed <= whole.delta * 1.001, f"one Gaussian costs more under {relation}"


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """The least delta of one Gaussian of noise sigma over its sensitivity (Balle, Wang 2018)."""
    cdf = lambda x: 0.5 * math.erfc(-x / math.sqrt(2))  # noqa: E731
    return cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * cdf(-0.5 / sigma - epsilon * sigma)


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


def the_count_for_the_clip_norm_is_noised(t: Any, seed: int) -> None:
    """Adaptive clipping: one record moves the count by one half, noise is of the stated size, and the plan pays."""
    rng, rate, size = np.random.default_rng(seed), 0.3, 20.0
    rule = t.privacy.adaptive_clip_norm(
        initial=1.0, quantile=0.5, learning_rate=rate, count_noise_stddev=t.COUNT_NOISE, expected_size=size
    )
    update = jax.jit(jax.vmap(rule.update, (0, None, None, None)))
    norm, mask = rng.uniform(0.2, 2, 30).astype(np.float32), rng.random(30) < 0.8
    norm[0] = np.nan

    def count(mask: np.ndarray) -> np.ndarray:
        learned = update(jax.random.split(KEY(seed), 3000), jnp.float32(1), norm, mask)
        return size * (0.5 - np.log(np.asarray(learned, np.float64)) / rate - 0.5)

    expected = np.where(mask, np.where(norm <= 1, 0.5, -0.5), 0).sum()
    close_std(count(mask) - expected, t.COUNT_NOISE)
    for i in np.flatnonzero(mask)[:3]:
        moved = count(mask & (np.arange(30) != i)) - count(mask)
        np.testing.assert_allclose(np.abs(moved), 0.5, atol=1e-3, err_msg="one record moves the count by another step")
    with_count = t.plan_with(count_noise_stddev=t.COUNT_NOISE)
    joint = (1.0 + (0.5 / t.COUNT_NOISE) ** 2) ** -0.5
    honest = epsilon_of(t.SAMPLING_RATE, joint, with_count.num_steps, with_count.delta)
    assert with_count.epsilon >= honest * 0.995, "the count is not in the budget"


def the_ledger_never_says_less_than_was_spent(t: Any, seed: int) -> None:
    """Killed anywhere, torn, resumed, done again, or run anew with another seed."""
    ledger, plan = t.privacy.ledger, t.plan_with(noise_multiplier=2.0)
    budget, rng = ledger.Budget(50.0, plan.delta), np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"

        def charge(run: str, first: int, steps: int) -> None:
            entry = ledger.Entry("silo 0", "record", plan.relation, "gradient", run, first, steps, plan.event)
            try:
                ledger.charge(path, budget, [entry])
            except ValueError as error:
                raise AssertionError(f"a run cannot go on: {error}") from None

        done = {"a": 0, "b": 0}
        for run in ("a", "a", "a", "b"):  # "a" is killed and resumed: from its last checkpoint, some steps back
            first = max(0, done[run] - int(rng.integers(0, 4)))
            steps = int(rng.integers(5, 9))
            charge(run, first, steps)
            done[run] = max(done[run], first + steps)
            with path.open("a") as file:
                file.write('{"scope": "silo 0", "uni')  # torn by a kill in the midst of a line
        charge("a", 0, 3)
        honest = epsilon_of(plan.sampling_rate, 2.0, sum(done.values()), plan.delta)
        found = ledger.spent(path, "silo 0", plan.delta)
        assert found >= 0.995 * honest, f"{found:.2f} on record, {honest:.2f} spent"
        assert found <= 1.01 * honest, "steps done again are charged again"


def a_charge_beyond_the_budget_is_refused(t: Any, seed: int) -> None:
    """Before anything runs, whatever the scope has spent on: and nothing is written."""
    ledger, plan = t.privacy.ledger, t.plan_with(noise_multiplier=2.0)
    allowed = 6 + seed % 5
    budget = ledger.Budget(1.002 * epsilon_of(plan.sampling_rate, 2.0, allowed, plan.delta), plan.delta)
    with tempfile.TemporaryDirectory() as folder:
        path, taken = Path(folder) / "ledger.jsonl", 0
        for step in range(allowed + 2):
            entry = ledger.Entry("silo 0", "record", plan.relation, "gradient", "a", step, 1, plan.event)
            before = path.read_bytes() if path.exists() else b""
            try:
                ledger.charge(path, budget, [entry])
                taken += 1
            except ValueError:
                assert path.read_bytes() == before, "a refused charge was written"
                break
        assert taken <= allowed, f"{taken} steps were let through, the budget is for {allowed}"
        assert taken == allowed, "refused within the budget"


def label_counts_are_noised(t: Any, seed: int) -> None:
    """Laplace noise of scale one over epsilon on every silo's counts, seen through the weight of a class nobody has."""
    counts = np.tile(np.array([[0.0, 1e6, 1e6]]), (t.NUM_SILOS, 1))
    weight = np.array([t.label_weight(s, counts) for s in range(2000 * seed, 2000 * seed + 2000)], np.float64)
    assert ((weight > 0) & (weight <= 1)).all(), "a weight outside (0, 1]"
    seen = np.rint(weight[:, 1] * 1e6 * t.NUM_SILOS)  # max(1, noise) of the empty class
    laplace = np.random.default_rng(0).laplace(scale=1 / t.HISTOGRAM_EPSILON, size=(100_000, t.NUM_SILOS))
    expected = np.maximum(laplace.sum(axis=1), 1)
    error = 6 * expected.std() / math.sqrt(len(seen))
    assert abs(seen.mean() - expected.mean()) < error, "label counts with another noise"


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
    batches_are_poisson,
    the_plan_says_what_it_costs,
    overfull_batches_are_paid_for,
    only_sampling_amplifies,
    methods_and_microbatches_agree,
    groups_share_the_clip_norm,
    shares_add_up_to_the_noise,
    the_count_for_the_clip_norm_is_noised,
    the_ledger_never_says_less_than_was_spent,
    a_charge_beyond_the_budget_is_refused,
    label_counts_are_noised,
    clients_are_clipped_and_noised_once,
    an_auditor_finds_no_more_than_is_claimed,
)

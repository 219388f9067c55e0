"""What the account of a private trainer must obey: who is drawn, what it costs, what is on record."""

import math
import tempfile
from pathlib import Path
from typing import Any

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
from dp_accounting import pld

from tests.privacy.zoo.measures import KEY, close_std


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


LAWS = (
    batches_are_poisson,
    the_plan_says_what_it_costs,
    overfull_batches_are_paid_for,
    only_sampling_amplifies,
    the_count_for_the_clip_norm_is_noised,
    the_ledger_never_says_less_than_was_spent,
    a_charge_beyond_the_budget_is_refused,
    label_counts_are_noised,
)

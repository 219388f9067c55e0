"""Mistakes in the account of private training: who is drawn, what it costs, what is on record."""

from tests.privacy.zoo.patching import Bug

_PLAN = "the_plan_says_what_it_costs"
_POISSON = "batches_are_poisson"
_COUNT = "the_count_for_the_clip_norm_is_noised"
_LEDGER, _BUDGET = "the_ledger_never_says_less_than_was_spent", "a_charge_beyond_the_budget_is_refused"
_MAKE, _ACCOUNTING = "fedrobust.privacy.plan", "fedrobust.privacy.accounting"

BUGS = (
    # the sampling
    Bug(
        "shuffled, accounted as Poisson",
        _POISSON,
        "trainer",
        'batch_sampling="sampler", weighting="equal"\n    )\n    return data.make_cohorts('
        "rows(records(0)), parts(), settings, seed=seed, batch_sampler=plan().sampler)",
        'batch_sampling="shuffle", weighting="equal", batch_size=int(SAMPLING_RATE * NUM_RECORDS)\n    )\n'
        "    return data.make_cohorts(rows(records(0)), parts(), settings, seed=seed)",
    ),
    Bug(
        "every round draws the same batches",
        _POISSON,
        "fedrobust.data.cohort",
        "[seed, _BATCHES, round, client]",
        "[seed, _BATCHES, client]",
    ),
    Bug(
        "every silo draws the same places",
        _POISSON,
        "fedrobust.data.cohort",
        "[seed, _BATCHES, round, client]",
        "[seed, _BATCHES, round]",
    ),
    Bug(
        "batches are filled up to a fixed size",
        _POISSON,
        "fedrobust.privacy.sampling",
        "np.flatnonzero(rng.random(num) < rate)[:capacity]",
        "rng.permutation(num)[: round(rate * num)]",
    ),
    Bug(
        "batches are cut at the expected size",
        _POISSON,
        "fedrobust.privacy.sampling",
        "np.flatnonzero(rng.random(num) < rate)[:capacity]",
        "np.flatnonzero(rng.random(num) < rate)[: int(rate * num)]",
    ),
    Bug(
        "a record is drawn twice",
        _POISSON,
        "fedrobust.privacy.sampling",
        "np.flatnonzero(rng.random(num) < rate)[:capacity]",
        "np.sort(rng.integers(0, num, rng.binomial(num, rate)))",
    ),
    # the accounting
    Bug(
        "rounds are counted, not steps",
        _PLAN,
        "trainer",
        "num_steps=NUM_ROUNDS * LOCAL_STEPS,\n        num_units",
        "num_steps=NUM_ROUNDS,\n        num_units",
    ),
    Bug(
        "the rate of the federation for that of a silo",
        _PLAN,
        "trainer",
        "sampling_rate=SAMPLING_RATE,\n        num_steps",
        "sampling_rate=SAMPLING_RATE / NUM_SILOS,\n        num_steps",
    ),
    Bug("a delta above one over the number of records", _PLAN, "trainer", "6.0, 1e-3, 0.5", "6.0, 5e-2, 0.5"),
    Bug(
        "label counts cost nothing", _PLAN, _MAKE, "if self.histogram_epsilon == 0:", "if self.histogram_epsilon >= 0:"
    ),
    Bug(
        "overfull batches cost nothing",
        "overfull_batches_are_paid_for",
        _ACCOUNTING,
        "sum(event.truncation_probability * count for event, count in releases)",
        "0",
    ),
    Bug(
        "the plan does not pay for its sampler",
        "overfull_batches_are_paid_for",
        _MAKE,
        "plan = replace(plan, truncation_probability=plan.sampler.tail)",
        "pass",
    ),
    Bug(
        "shuffling is accounted as amplified",
        "only_sampling_amplifies",
        _ACCOUNTING,
        'if event.sampling == "poisson":',
        'if event.sampling in ("poisson", "shuffle"):',
    ),
    Bug(
        "an epoch is a step too long",
        "only_sampling_amplifies",
        _ACCOUNTING,
        "math.ceil(1 / event.sampling_rate - 1e-9)",
        "math.ceil(1 / event.sampling_rate) + 1",
    ),
    Bug(
        "replacing is accounted like removing",
        "only_sampling_amplifies",
        _ACCOUNTING,
        "event.noise_multiplier * (2 if twice else 1)",
        "event.noise_multiplier * (4 if twice else 1)",
    ),
    Bug(
        "the count of adaptive clipping is free",
        _COUNT,
        _MAKE,
        "if count_noise_stddev == 0:\n        return noise_multiplier",
        "if count_noise_stddev >= 0:\n        return noise_multiplier",
    ),
    Bug(
        "the count of adaptive clipping has no noise",
        _COUNT,
        "fedrobust.privacy.adaptive",
        "noise = count_noise_stddev * jax.random.normal(key)",
        "noise = 0 * jax.random.normal(key)",
    ),
    Bug(
        "the count of adaptive clipping is not centred",
        _COUNT,
        "fedrobust.privacy.adaptive",
        "jnp.where(norm <= clip_norm, 0.5, -0.5)",
        "jnp.where(norm <= clip_norm, 1.0, 0.0)",
    ),
    Bug(
        "label counts without noise",
        "label_counts_are_noised",
        "fedrobust.privacy.histogram",
        "np.asarray(silo_counts, np.float64) + rng.laplace(scale=1 / histogram_epsilon, size=np.shape(silo_counts))",
        "np.asarray(silo_counts, np.float64)",
    ),
    Bug(
        "one noise for all silos' label counts",
        "label_counts_are_noised",
        "fedrobust.privacy.histogram",
        "size=np.shape(silo_counts))",
        "size=np.shape(silo_counts)[1:])",
    ),
    # the ledger
    Bug("the ledger is lost on resume", _LEDGER, "fedrobust.jsonl", "content = file.read()\n", 'content = b""\n'),
    Bug(
        "a torn line takes the one before with it",
        _LEDGER,
        "fedrobust.jsonl",
        'whole = content.rfind(b"\\n") + 1',
        'whole = content.rfind(b"\\n", 0, content.rfind(b"\\n")) + 1',
    ),
    Bug(
        "runs with other seeds count once",
        _LEDGER,
        "fedrobust.privacy.ledger",
        "return entry.scope, entry.run, entry.mechanism",
        "return entry.scope, '', entry.mechanism",
    ),
    Bug(
        "the last entry counts, not the sum",
        _LEDGER,
        "fedrobust.privacy.ledger",
        "steps[place] += entry.num_steps",
        "steps[place] = entry.num_steps",
    ),
    Bug(
        "the budget is looked at without the new charge",
        _BUDGET,
        "fedrobust.privacy.ledger",
        "every = _of([*held, *added], scope)",
        "every = _of(held, scope)",
    ),
    Bug(
        "the budget is not looked at",
        _BUDGET,
        "fedrobust.privacy.ledger",
        "if not would_be <= budget.epsilon:",
        "if would_be < 0:",
    ),
    Bug(
        "written, then refused",
        _BUDGET,
        "fedrobust.jsonl",
        "        records = new(_parse(path, content[:whole]) if parsed else [])",
        "        held = _parse(path, content[:whole]) if parsed else []\n"
        '        file.write(b"" if not held else content[:whole].splitlines()[-1] + b"\\n")\n'
        "        file.flush()\n        records = new(held)",
    ),
)

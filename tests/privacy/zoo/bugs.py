"""Mistakes that private training has seen, each as a patch to the right code. `law` is the one that must catch it."""

from patching import Bug

_SUM = "sum_equals_a_loop"
_SENSITIVITY = "one_record_moves_the_sum_by_no_more_than_the_sensitivity"
_EMPTY = "an_empty_batch_is_noise_of_the_planned_size"
_ONCE = "every_noise_is_drawn_once"
_PLAN = "the_plan_says_what_it_costs"
_POISSON = "batches_are_poisson"
_CLIENTS = "clients_are_clipped_and_noised_once"
_ISOLATED = "records_do_not_see_each_other"
_CLIPPING, _NOISE, _MAKE = "fedrobust.privacy.clipping", "fedrobust.privacy.noise", "fedrobust.privacy.plan"

BUGS = (
    # the clip
    Bug("the batch's sum is clipped, not each record", _SENSITIVITY, _CLIPPING,
        "total = trees.weighted_sum(weight * batch.mask * clip_factor(norm, clip_norm), gradient)",
        "total = clip(trees.weighted_sum(weight * batch.mask, gradient), clip_norm * jnp.sum(batch.mask))[0]"),
    Bug("every layer is clipped to the whole norm", _SENSITIVITY, _CLIPPING,
        "total = trees.weighted_sum(weight * batch.mask * clip_factor(norm, clip_norm), gradient)",
        "total = jax.tree.map(lambda g: trees.weighted_sum(weight * batch.mask * clip_factor("
        "jnp.linalg.norm(g.reshape(len(g), -1), axis=1), clip_norm), g), gradient)"),
    Bug("biases are left out of the norm", _SUM, _CLIPPING,
        "return gradient, trees.norm(gradient), value",
        "return gradient, trees.norm([g for g in jax.tree.leaves(gradient) if g.ndim > 1]), value"),
    Bug("short gradients are stretched to the clip norm", _SUM, _CLIPPING,
        "clip_norm / jnp.maximum(norm * (1 + _ROUNDING), clip_norm)", "clip_norm / (norm * (1 + _ROUNDING))"),
    Bug("the clip lets rounding through", "one_record_alone_is_within_the_clip_norm", _CLIPPING,
        "norm * (1 + _ROUNDING)", "norm * (1 - _ROUNDING)"),
    Bug("the norm is not the root of the squares", _SUM, "fedrobust.trees",
        "return jnp.sqrt(sum(squares, jnp.float32(0)))", "return sum(squares, jnp.float32(0))"),
    Bug("a record that is not finite stays in the sum", _SENSITIVITY, _CLIPPING,
        "jnp.where(jnp.isfinite(norm), ", "jnp.where(norm >= -1, "),
    Bug("weights above 1 lengthen the contribution", _SENSITIVITY, _CLIPPING,
        "jnp.clip(weight, 0, 1)", "jnp.asarray(weight)"),
    Bug("padding is counted", "padding_is_nothing", _CLIPPING,
        "batch, weight = blank_padding(batch, weight)", "batch = batch._replace(mask=batch.mask | True)"),
    Bug("replacing a record is taken for removing one", _SENSITIVITY, _CLIPPING,
        "return 2 * self.clip_norm if", "return self.clip_norm if"),
    Bug("the sensitivity is half of what it is", _SENSITIVITY, _CLIPPING,
        "else self.clip_norm", "else self.clip_norm / 2"),
    Bug("views of a record are rows of their own", _SENSITIVITY, "trainer",
        "    return records\n",
        "    return records._replace(image=np.concatenate([records.image, records.image[:, :, ::-1]]), "
        "label=np.concatenate([records.label] * 2))\n"),
    # records that see each other
    Bug("BatchNorm", _ISOLATED, "trainer",
        "x = jnp.tanh(", "x = (x - x.mean(0)) / (x.std(0) + 1e-3); x = jnp.tanh("),
    Bug("mixup inside the batch", _ISOLATED, "trainer",
        "x = image.reshape(len(image), -1)", "x = image.reshape(len(image), -1); x = 0.7 * x + 0.3 * jnp.roll(x, 1, 0)"),
    Bug("one perturbation for the whole batch", _ISOLATED, "trainer",
        "return attacks.fgsm(norm=\"linf\", eps=0.1)(key, logits_fn, image, label)",
        "return image + jnp.mean(attacks.fgsm(norm=\"linf\", eps=0.1)(key, logits_fn, image, label) - image, 0)"),
    Bug("attack steps normalised over the batch", _ISOLATED, "trainer",
        "return attacks.fgsm(norm=\"linf\", eps=0.1)(key, logits_fn, image, label)",
        "g = jax.grad(lambda x: -logits_fn(x)[jnp.arange(len(label)), label].sum())(image); "
        "return image + g / jnp.linalg.norm(g)"),
    # the noise
    Bug("noise of the mean's size on the sum", _EMPTY, _NOISE,
        "add_gaussian(noise_key, total, stddev)", "add_gaussian(noise_key, total, stddev / expected_batch_size)"),
    Bug("division by the batch that was drawn", "the_scale_does_not_tell_how_many_took_part", _NOISE,
        "1 / expected_batch_size", "1 / jnp.maximum(jnp.sum(batch.mask), 1)"),
    Bug("the same noise in every leaf", _EMPTY, _NOISE,
        "pieces = jnp.split(noise, ends[:-1])", "pieces = [noise[: x.size] for x in leaves]"),
    Bug("uniform numbers for normal ones", _EMPTY, _NOISE,
        "jax.random.normal(key, (trees.size(tree),))",
        "jax.random.uniform(key, (trees.size(tree),), minval=-1.732, maxval=1.732)"),
    Bug("the loss draws from the key of the noise", "the_loss_and_the_noise_do_not_share_a_stream", _NOISE,
        "loss_key, noise_key = jax.random.split(key)", "loss_key = noise_key = key"),
    Bug("one noise for all rounds", _ONCE, "fedrobust.federated.loop",
        "jax.random.fold_in(key, r)", "jax.random.fold_in(key, 0)"),
    Bug("one noise for all steps of a round", _ONCE, "fedrobust.federated.client",
        "jax.random.fold_in(key, index)", "jax.random.fold_in(key, 0)"),
    Bug("one noise for all silos", _ONCE, "fedrobust.keys",
        "jax.random.fold_in(key, i)", "jax.random.fold_in(key, 0)"),
    Bug("noise of the silos cancels", _ONCE, "fedrobust.federated.algorithms",
        "        if update_attack is not None:\n",
        "        updates = jax.tree.map(lambda u: u - jnp.roll(u, 1, 0), updates)\n        if update_attack is not None:\n"),
    # the sampling
    Bug("shuffled, accounted as Poisson", _POISSON, "trainer",
        "batch_sampling=\"poisson\",\n        batch_rate=plan().sampling_rate,",
        "batch_sampling=\"shuffle\",\n        batch_size=int(plan().sampling_rate * NUM_RECORDS),"),
    Bug("every round draws the same batches", _POISSON, "fedrobust.data.cohort",
        "[seed, _POISSON, round, client]", "[seed, _POISSON, client]"),
    Bug("every silo draws the same places", _POISSON, "fedrobust.data.cohort",
        "[seed, _POISSON, round, client]", "[seed, _POISSON, round, 0]"),
    Bug("batches are filled up to a fixed size", _POISSON, "fedrobust.data.cohort",
        "return [np.flatnonzero(row)[: shape.batch_size] for row in drawn]",
        "return [rng.permutation(num)[: round(num * settings.batch_rate)] for row in drawn]"),
    # the accounting
    Bug("rounds are counted, not steps", _PLAN, "trainer",
        "num_steps=NUM_ROUNDS * LOCAL_STEPS,\n        histogram_epsilon=HISTOGRAM_EPSILON,\n    )\n\n\n@functools.cache\ndef clipped",
        "num_steps=NUM_ROUNDS,\n        histogram_epsilon=HISTOGRAM_EPSILON,\n    )\n\n\n@functools.cache\ndef clipped"),
    Bug("the rate of the federation for that of a silo", _PLAN, "trainer",
        "delta=DELTA,\n        sampling_rate=SAMPLING_RATE,\n        num_steps=NUM_ROUNDS * LOCAL_STEPS,\n        histogram_epsilon=HISTOGRAM_EPSILON,\n    )\n\n\n@functools.cache\ndef clipped",
        "delta=DELTA,\n        sampling_rate=SAMPLING_RATE / NUM_SILOS,\n        num_steps=NUM_ROUNDS * LOCAL_STEPS,\n        histogram_epsilon=HISTOGRAM_EPSILON,\n    )\n\n\n@functools.cache\ndef clipped"),
    Bug("a delta above one over the number of records", _PLAN, "trainer",
        "DELTA, HISTOGRAM_EPSILON = 0.5, 6.0, 1e-3, 0.5", "DELTA, HISTOGRAM_EPSILON = 0.5, 6.0, 5e-2, 0.5"),
    Bug("label counts cost nothing", _PLAN, _MAKE,
        "if histogram_epsilon == 0:", "if histogram_epsilon >= 0:"),
    Bug("overfull batches cost nothing", "overfull_batches_are_paid_for", _MAKE,
        "accounted_delta = delta - truncated", "accounted_delta = delta"),
    Bug("label counts without noise", "label_counts_are_noised", "fedrobust.privacy.histogram",
        "np.asarray(silo_counts, np.float64) + rng.laplace(scale=1 / histogram_epsilon, size=np.shape(silo_counts))",
        "np.asarray(silo_counts, np.float64)"),
    Bug("one noise for all silos' label counts", "label_counts_are_noised", "fedrobust.privacy.histogram",
        "size=np.shape(silo_counts))", "size=np.shape(silo_counts)[1:])"),
    # the client level
    Bug("big clients weigh more", _CLIENTS, _NOISE,
        "present.astype(jnp.float32), clipped", "weight, clipped"),
    Bug("clients' updates are not clipped", _CLIENTS, _NOISE,
        "clip(update, clip_norm))(updates)", "clip(update, 1e9))(updates)"),
    Bug("division by the clients that came", _CLIENTS, _NOISE,
        "1 / expected_num_clients", "1 / jnp.maximum(jnp.sum(present), 1)"),
    Bug("every client adds the whole noise", _CLIENTS, _NOISE,
        "plan.noise_multiplier * clip_norm)", "plan.noise_multiplier * clip_norm * jnp.sqrt(jnp.sum(present)))"),
)

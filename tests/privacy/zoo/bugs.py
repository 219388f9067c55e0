"""Mistakes that private training has seen, each as a patch to the right code. `law` is the one that must catch it."""

from tests.privacy.zoo.patching import Bug

_SUM = "sum_equals_a_loop"
_SENSITIVITY = "one_record_moves_the_sum_by_no_more_than_the_sensitivity"
_EMPTY = "an_empty_batch_is_noise_of_the_planned_size"
_ONCE = "every_noise_is_drawn_once"
_CLIENTS = "clients_are_clipped_and_noised_once"
_ISOLATED = "records_do_not_see_each_other"
_CLIPPING, _SUMS, _NOISE = "fedrobust.privacy.clipping", "fedrobust.privacy.clip_sums", "fedrobust.privacy.noise"

BUGS = (
    # the clip
    Bug(
        "one clip factor for the whole batch",
        _SENSITIVITY,
        _SUMS,
        "factor = weight * clip_factor(bound, clip_norm / math.sqrt(len(places)))",
        "factor = weight * clip_factor(jnp.nanmin(bound), clip_norm)",
    ),
    Bug(
        "every layer is clipped to the whole norm",
        "groups_share_the_clip_norm",
        _SUMS,
        "clip_norm / math.sqrt(len(places))",
        "clip_norm",
    ),
    Bug(
        "biases are left out of the norm",
        _SUM,
        _SUMS,
        "bound = jnp.sqrt(sum(bounds[i] for i in group))",
        "bound = jnp.sqrt(sum(bounds[i] for i in group if leaves[i].ndim > 2))",
    ),
    Bug(
        "short gradients are stretched to the clip norm",
        _SUM,
        _SUMS,
        "clip_norm / jnp.maximum(norm * (1 + _ROUNDING), clip_norm)",
        "clip_norm / (norm * (1 + _ROUNDING))",
    ),
    Bug(
        "the clip lets rounding through",
        "one_record_alone_is_within_the_clip_norm",
        _SUMS,
        "norm * (1 + _ROUNDING)",
        "norm * (1 - _ROUNDING)",
    ),
    Bug(
        "the norm is not the root of the squares",
        _SUM,
        _SUMS,
        "bound = jnp.sqrt(sum(bounds[i] for i in group))",
        "bound = sum(bounds[i] for i in group)",
    ),
    Bug(
        "a record that is not finite stays in the sum",
        _SENSITIVITY,
        "fedrobust.trees",
        "jnp.where(weight[i] == 0, 0, weight[i].astype(x.dtype) * x[i])",
        "weight[i].astype(x.dtype) * x[i]",
    ),
    Bug(
        "weights above 1 lengthen the contribution",
        _SENSITIVITY,
        _CLIPPING,
        "jnp.clip(weight, 0, 1)",
        "jnp.asarray(weight)",
    ),
    Bug(
        "padding is counted",
        "padding_is_nothing",
        _CLIPPING,
        "batch, weight = blank_padding(batch, weight)",
        "batch = batch._replace(mask=batch.mask | True)",
    ),
    Bug(
        "replacing a record is taken for removing one",
        _SENSITIVITY,
        _CLIPPING,
        "return 2 * self.clip_norm if",
        "return self.clip_norm if",
    ),
    Bug(
        "the sensitivity is half of what it is",
        _SENSITIVITY,
        _CLIPPING,
        "else self.clip_norm",
        "else self.clip_norm / 2",
    ),
    Bug(
        "views of a record are rows of their own",
        _SENSITIVITY,
        "trainer",
        "    return records\n",
        "    return records._replace(image=np.concatenate([records.image, records.image[:, :, ::-1]]), "
        "label=np.concatenate([records.label] * 2))\n",
    ),
    Bug(
        "norms first, then weights without the clip",
        "methods_and_microbatches_agree",
        _SUMS,
        "factor = jnp.where(good, weight * clip_factor(norm, clip_norm), 0)",
        "factor = jnp.where(good, weight, 0)",
    ),
    Bug(
        "the last microbatch counts its padding",
        "methods_and_microbatches_agree",
        _SUMS,
        "batch = batch._replace(mask=batch.mask & real)",
        "pass",
    ),
    # records that see each other
    Bug("BatchNorm", _ISOLATED, "trainer", "x = jnp.tanh(", "x = (x - x.mean(0)) / (x.std(0) + 1e-3); x = jnp.tanh("),
    Bug(
        "mixup inside the batch",
        _ISOLATED,
        "trainer",
        "x = image.reshape(len(image), -1)",
        "x = image.reshape(len(image), -1); x = 0.7 * x + 0.3 * jnp.roll(x, 1, 0)",
    ),
    Bug(
        "one perturbation for the whole batch",
        _ISOLATED,
        "trainer",
        'return attacks.fgsm(norm="linf", eps=0.1)(key, logits_fn, image, label)',
        'return image + jnp.mean(attacks.fgsm(norm="linf", eps=0.1)(key, logits_fn, image, label) - image, 0)',
    ),
    Bug(
        "attack steps normalised over the batch",
        _ISOLATED,
        "trainer",
        'return attacks.fgsm(norm="linf", eps=0.1)(key, logits_fn, image, label)',
        "g = jax.grad(lambda x: -logits_fn(x)[jnp.arange(len(label)), label].sum())(image); "
        "return image + g / jnp.linalg.norm(g)",
    ),
    # the noise
    Bug(
        "noise of the mean's size on the sum",
        _EMPTY,
        _NOISE,
        "noise(noise_key, total, stddev)",
        "noise(noise_key, total, stddev / expected_batch_size)",
    ),
    Bug(
        "division by the batch that was drawn",
        "the_scale_does_not_tell_how_many_took_part",
        _NOISE,
        "1 / expected_batch_size",
        "1 / jnp.maximum(jnp.sum(batch.mask), 1)",
    ),
    Bug(
        "the same noise in every leaf",
        _EMPTY,
        "fedrobust.trees",
        "pieces = jnp.split(flat, list(itertools.accumulate(x.size for x in leaves))[:-1])",
        "pieces = [flat[: x.size] for x in leaves]",
    ),
    Bug(
        "uniform numbers for normal ones",
        _EMPTY,
        _NOISE,
        "jax.random.normal(key, (trees.size(tree),))",
        "jax.random.uniform(key, (trees.size(tree),), minval=-1.732, maxval=1.732)",
    ),
    Bug(
        "the loss draws from the key of the noise",
        "the_loss_and_the_noise_do_not_share_a_stream",
        _NOISE,
        "loss_key, noise_key = jax.random.split(key)",
        "loss_key = noise_key = key",
    ),
    Bug(
        "one noise for all rounds",
        _ONCE,
        "fedrobust.federated.loop",
        "jax.random.fold_in(key, r)",
        "jax.random.fold_in(key, 0)",
    ),
    Bug(
        "one noise for all steps of a round",
        _ONCE,
        "fedrobust.federated.client",
        "jax.random.fold_in(key, index)",
        "jax.random.fold_in(key, 0)",
    ),
    Bug("one noise for all silos", _ONCE, "fedrobust.keys", "jax.random.fold_in(key, i)", "jax.random.fold_in(key, 0)"),
    Bug(
        "noise of the silos cancels",
        _ONCE,
        "fedrobust.federated.algorithms",
        "        if update_attack is not None:\n",
        "        updates = jax.tree.map(lambda u: u - jnp.roll(u, 1, 0), updates)\n"
        "        if update_attack is not None:\n",
    ),
    Bug(
        "a share of the noise is divided once more",
        "shares_add_up_to_the_noise",
        _NOISE,
        "/ math.sqrt(num_shares)",
        "/ num_shares",
    ),
    # the client level
    Bug("big clients weigh more", _CLIENTS, _NOISE, "present.astype(jnp.float32), clipped", "weight, clipped"),
    Bug(
        "clients' updates are not clipped",
        _CLIENTS,
        _NOISE,
        "clip(update, bound))(updates)",
        "clip(update, 1e9))(updates)",
    ),
    Bug(
        "division by the clients that came",
        _CLIENTS,
        _NOISE,
        "1 / expected_num_clients",
        "1 / jnp.maximum(jnp.sum(present), 1)",
    ),
    Bug(
        "every client adds the whole noise",
        _CLIENTS,
        _NOISE,
        "total, plan.noise_multiplier * bound)",
        "total, plan.noise_multiplier * bound * jnp.sqrt(jnp.sum(present)))",
    ),
)

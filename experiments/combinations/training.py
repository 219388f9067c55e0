"""Training one model from its first round to its file, through kills."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.combinations import pruning
from experiments.combinations.account import Account, charged, note_look
from experiments.combinations.federation import (
    RULES,
    Apply,
    Hospitals,
    Recipe,
    cohorts,
    federation,
    training_attack,
)
from experiments.combinations.settings import AT
from experiments.display import Progress
from fedrobust import compression, evaluation, federated, keys, threads, trees
from fedrobust.data import Splits
from fedrobust.types import LogitsFn, Model, Params

HISTORY_POINTS = 20
BATCH_SIZE = 256  # of every prediction


class Trained(NamedTuple):
    """A trained model.

    Attributes:
        apply: the model's function; one object for all models of its shape, so that what is compiled for it is shared.
        params: the parameters it was left with, float32.
        channels: the full model's prunable units; None where nothing was pruned.
        masks: what was pruned; None likewise.
        shrink_difference: largest logit difference between masked and small model; None likewise.
        history: [n, 3] float64: round, loss and accuracy on val; n = 0 with malicious clients, where nobody asks. No
            training loss: under privacy nothing of the training records but what was charged may be in a row.
        sent: [2] float64: bytes that a client sent and was sent in a round, mean over rounds and clients.
        train_seconds: wall time spent in rounds, over all runs it took; other trainings may have gone on beside it.
    """

    apply: Apply
    params: Params
    channels: compression.Channels | None
    masks: Params | None
    shrink_difference: float | None
    history: np.ndarray
    sent: np.ndarray
    train_seconds: float

    def measured(self, splits: Splits) -> dict[str, dict[str, Any]]:
        """What a row says of the model as it was trained: its metrics on val, and, as "clean", on test."""
        found = {}
        for name, split in (("val", splits.val), ("clean", splits.test)):
            logits = evaluation.predict(self.apply, self.params, split.image, BATCH_SIZE)
            found[name] = evaluation.metrics(logits, split.label)._asdict()
        return found

    def course(self) -> dict[str, Any]:
        """What a row says of how the training went."""
        names = ("round", "val_loss", "val_accuracy")
        history = dict(zip(names, self.history.T.tolist(), strict=True))
        return {"history": history, "train_seconds": self.train_seconds}


class _Saved(NamedTuple):
    """What a checkpoint holds."""

    state: Any
    history: np.ndarray  # [HISTORY_POINTS + 2, 3], NaN where not reached
    sent: np.ndarray  # [num_rounds, 2], bytes up and down, NaN where not reached
    seconds: np.ndarray  # []


def _nothing(num_rounds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """History, what was sent, and seconds before the first round."""
    return np.full((HISTORY_POINTS + 2, 3), np.nan), np.full((num_rounds, 2), np.nan), np.zeros(())


class Job(NamedTuple):
    """One training to do.

    Attributes:
        recipe: how.
        site: on what.
        seed: of initialisation, batches, noise and attacks.
        num_rounds: when to stop, at most the recipe's rounds, which the schedules run over.
        compress: whether to prune.
        malicious: ids of dishonest clients.
        rule: "mean" or "rule", which aggregator is in force.
        folder: where its checkpoints go.
        account: what its looks at private data are charged to; None without privacy.
    """

    recipe: Recipe
    site: Hospitals
    seed: int
    num_rounds: int
    compress: bool
    malicious: tuple[int, ...]
    rule: str
    folder: Path
    account: Account | None


def train(job: Job, model: Model, progress: Progress) -> Trained:
    """Trains a model, going on from its last checkpoint if there is one.

    Args:
        job: what to train.
        model: the architecture; pass one object for all jobs of a study, so that they share compiled rounds.
        progress: told of every round.

    Returns:
        The trained model. The same bits whether or not it was killed in between.
    """
    key = keys.stream(keys.root(job.seed), "train")
    example = jnp.zeros((1, *job.site.splits.train.image.shape[1:]))
    params = model.init(keys.stream(keys.root(job.seed), "init"), example)
    algorithm = federation(job.recipe, model.apply, params)
    state = _chosen(algorithm.init(params), job.rule)
    start = _Saved(state, *_nothing(job.recipe.num_rounds))
    if not job.compress:
        done = _run_stage(job, "dense", algorithm, model.apply, start, None, job.num_rounds, key, progress)
        return _trained(job, model.apply, done, None, None, None)

    image = job.site.splits.val.image[:BATCH_SIZE]
    channels = pruning.channels(model, image.shape[1:])
    prune, begin, end = pruning.schedule(job.recipe.study.mc, channels, job.recipe.num_rounds)
    dense = _run_stage(job, "dense", algorithm, model.apply, start, None, begin, key, progress)
    masked = _run_stage(job, "masked", algorithm, model.apply, dense, prune, end, key, progress)
    with threads.COMPILING:
        apply, small_state, difference = pruning.shrink(model, channels, masked.state, image)
    teacher = _teacher(job.recipe, model.apply, dense.state.average)
    small = federation(job.recipe, apply, small_state.params, teacher)
    start = masked._replace(state=small.init(small_state.params)._replace(**small_state._asdict()))
    last = max(end, job.recipe.num_rounds - round(job.recipe.study.mc.aware_share * job.recipe.num_rounds))
    done = _run_stage(job, "small", small, apply, start, None, min(last, job.num_rounds), key, progress)
    if last < job.num_rounds:
        aware = _aware(job, apply, done.state.average, image)
        learner = federation(job.recipe, aware, small_state.params, teacher)
        done = _run_stage(job, "aware", learner, aware, done, None, job.num_rounds, key, progress)
    return _trained(job, apply, done, channels, masked.state.mask, difference)


def _teacher(recipe: Recipe, apply: Apply, params: Params) -> LogitsFn | None:
    """The full model before anything was pruned, where the small one learns from it.

    Its parameters are the server's: under privacy released already, so that asking it costs nothing more.
    """
    if recipe.study.mc.label_share == 1:
        return None
    return lambda image: apply(params, image)


def _aware(job: Job, apply: Apply, params: Params, image: np.ndarray) -> Apply:
    """The model as it will be served, rounding and all, with a slope; ranges are measured on images of val."""
    mc = job.recipe.study.mc
    if mc.activations == "float":
        return _rounded(apply, mc.bits, mc.symmetric, ())
    note_look(job.account, "activation ranges")
    with threads.COMPILING:
        served = compression.fake_quantize(params, bits=mc.bits, symmetric=mc.symmetric)
        ranges = compression.calibrate(apply, served, image)
    return _rounded(apply, mc.bits, mc.symmetric, tuple(ranges.items()))


@threads.cached(maxsize=16)  # one function for all models of a shape shares what is compiled for it
def _rounded(apply: Apply, bits: int, symmetric: bool, ranges: tuple[tuple[int, tuple[float, int]], ...]) -> Apply:
    aware = compression.fake_quantize_inputs(apply, dict(ranges)) if ranges else apply
    return lambda params, image: aware(compression.fake_quantize(params, bits=bits, symmetric=symmetric), image)


def _trained(
    job: Job,
    apply: Apply,
    done: _Saved,
    channels: compression.Channels | None,
    masks: Params | None,
    difference: float | None,
) -> Trained:
    history = done.history[~np.isnan(done.history[:, 0])]
    params = done.state.average
    if job.recipe.study.calibrate and job.site.splits.val.num_classes == 2:
        note_look(job.account, "calibration data")
        params = calibrated(job, apply, params)
    sent = np.nanmean(done.sent, axis=0)
    return Trained(apply, params, channels, masks, difference, history, sent, float(done.seconds))


def calibrated(job: Job, apply: Apply, params: Params) -> Params:
    """The same model with the bias of its last layer shifted to the best balanced accuracy on val.

    Where training is adversarial the shift weighs clean images and those under the training attack alike. Four bits
    move the margins: it is the model with rounded weights that is asked.
    """
    val, mc = job.site.splits.val, job.recipe.study.mc
    rounded = params
    if job.compress and mc.bits < 8:
        rounded = compression.fake_quantize(params, bits=mc.bits, symmetric=mc.symmetric)
    images = [val.image]
    if job.recipe.at:
        key = keys.stream(keys.root(job.seed), "calibrate")
        with threads.COMPILING:
            images.append(_attacked(apply, job.recipe.study.at, rounded, key, val.image, val.label))
    logits = [evaluation.predict(apply, rounded, image, BATCH_SIZE) for image in images]
    margins = [x[:, 1] - x[:, 0] for x in logits]
    if not np.isfinite(margins).all():
        return params  # diverged: nothing to mend
    (head,) = (name for name in params if name.startswith("dense"))
    bias = params[head]["bias"] + jnp.asarray([0.0, evaluation.best_shift(margins, val.label)])
    return {**params, head: {**params[head], "bias": bias}}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attacked(
    apply: Apply, settings: AT, params: Params, key: jax.Array, image: jax.Array, label: jax.Array
) -> jax.Array:
    return training_attack(settings, settings.eps)(key, lambda x: apply(params, x), image, label)


def _chosen(state: pruning.State, rule: str) -> pruning.State:
    aggregator = state.aggregator._replace(chosen=jnp.asarray(RULES.index(rule), jnp.int32))
    return state._replace(aggregator=aggregator)


def _run_stage(
    job: Job,
    name: str,
    algorithm: Any,
    apply: Apply,
    start: _Saved,
    prune: Callable[[pruning.State, int], pruning.State] | None,
    num_rounds: int,
    key: jax.Array,
    progress: Progress,
) -> _Saved:
    """Rounds up to `num_rounds`, from the stage's last checkpoint if it has one."""
    folder = job.folder / name
    found = federated.latest(folder, start)
    saved = start if found is None else found[1]
    total = job.num_rounds
    every = max(1, -(-total // HISTORY_POINTS))
    draw = charged(job.account, total, cohorts(job.recipe, job.site, job.seed, job.malicious))
    began, last_saved = time.perf_counter(), time.perf_counter()
    state, history, sent = saved.state, saved.history.copy(), saved.sent.copy()
    for done, state, info in federated.rounds(algorithm, saved.state, draw, key, num_rounds, between=prune):
        sent[done - 1] = _bytes(info.sent, state.params)
        if (done % every == 0 or done == total) and not job.malicious:
            val = job.site.splits.val
            logits = evaluation.predict(apply, state.average, val.image, BATCH_SIZE)
            loss = float(np.mean(optax.softmax_cross_entropy_with_integer_labels(logits, val.label)))
            accuracy = float(np.mean(evaluation.predicted_class(logits) == val.label))
            history[-(-done // every)] = (done, loss, accuracy)
            progress(done, total, {"val loss": loss, "val accuracy": accuracy})
        else:
            progress(done, total, {})
        now = time.perf_counter()
        if done == num_rounds or now - last_saved >= job.recipe.study.checkpoint_every:
            seconds = np.asarray(saved.seconds + (now - began))
            federated.save(folder, done, _Saved(state, history, sent, seconds))
            last_saved = now
    seconds = np.asarray(saved.seconds + (time.perf_counter() - began))
    return _Saved(state, history, sent, seconds)


def _bytes(sent: federated.Sent, params: Params) -> tuple[float, float]:
    """Bytes from a client, mean over those present, and to a client; of float32 parameters where nothing is coded."""
    as_it_is = 4.0 * trees.size(params)
    uplink, downlink = (np.asarray(way) for way in sent)
    return (
        uplink[uplink > 0].mean() / 8 if uplink.size else as_it_is,
        float(downlink) / 8 if downlink.size else as_it_is,
    )

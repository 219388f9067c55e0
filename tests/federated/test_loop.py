"""Rounds one after the other: one compilation, and the same bits after a stop and a restart from disk."""

import collections
import functools
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedrobust import data, losses
from fedrobust.defenses import mean
from fedrobust.federated import fedavg, latest, local_update, map_clients, mean_grad, rounds, save
from fedrobust.privacy import Plan, clipped_grad, private_grad
from fedrobust.privacy.sampling import poisson
from fedrobust.types import Dataset, Federated

KEY = jax.random.key(0)
NUM_ROUNDS = 10
PARAMS = {"w": jnp.zeros((4, 2)), "b": jnp.ones(2)}


def apply(params, image):
    return image.reshape(image.shape[0], -1) @ params["w"] + params["b"]


@functools.cache
def build(private, backend="scan"):
    loss = losses.cross_entropy(apply)
    gradient = mean_grad(loss)
    if private:
        clipped = clipped_grad(loss, clip_norm=1.0, microbatch_size=2)
        plan = Plan("record", "zero_out", "poisson", 0.5, NUM_ROUNDS, 1.0, 0.0, 8.0, 1e-5)
        gradient = private_grad(clipped, plan, num_records=8)
    return fedavg(
        lambda round: local_update(gradient, optax.adam(0.1 / (1 + round)), skip_empty=not private),
        mean(),
        optax.sgd(1.0, momentum=0.5),
        functools.partial(map_clients, backend=backend),
        average_decay=0.5,
    )


@functools.cache
def cohorts():
    """Six clients, each there in half the rounds, with Poisson batches: sizes differ from round to round."""
    rng = np.random.default_rng(0)
    dataset = Dataset(rng.uniform(size=(60, 2, 2, 1)).astype(np.float32), rng.integers(0, 2, 60).astype(np.int32), 2)
    settings = data.CohortSettings(num_steps=2, client_sampling="sampler", batch_sampling="sampler")
    samplers = {"client_sampler": poisson(0.5, 6, multiple=1), "batch_sampler": poisson(0.2, 10, multiple=8)}
    return data.make_cohorts(dataset, np.array_split(np.arange(60), 6), settings, seed=1, **samplers)


def bits(tree):
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), jax.tree.leaves(tree))


def compilations(caplog):
    """Compiled programs that bear the name of a round."""
    return [
        r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling") and "round" in r.getMessage()
    ]


@pytest.mark.parametrize(("private", "backend"), [(True, "scan"), (False, "shard_map"), (False, "pmap")])
def test_a_round_compiles_once_over_ten_rounds_of_different_sizes(private, backend, caplog):
    algorithm = build.__wrapped__(private, backend)
    sizes = {(int((cohorts()(r).weight > 0).sum()), int(cohorts()(r).batch.mask.sum())) for r in range(NUM_ROUNDS)}
    assert len({clients for clients, _ in sizes}) > 2
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        present = [int(info.num_present) for *_, info in rounds(algorithm, algorithm.init(PARAMS), cohorts(), KEY, 10)]
    assert len(set(present)) > 2
    assert len(compilations(caplog)) == 1, compilations(caplog)


def test_leaving_the_loop_and_coming_back_compiles_nothing_again(caplog, tmp_path):
    algorithm = build.__wrapped__(private=False)
    state = algorithm.init(PARAMS)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for done in range(1, 4):
            _, state, _ = next(rounds(algorithm, state, cohorts(), KEY, NUM_ROUNDS))
            save(tmp_path, done, state)
            state = latest(tmp_path, state)[1]
    assert len(compilations(caplog)) == 1, compilations(caplog)


@pytest.mark.parametrize("private", [False, True])
def test_a_run_resumed_from_disk_equals_the_unbroken_one_bit_for_bit(private, tmp_path):
    algorithm = build(private)
    start = algorithm.init(PARAMS)
    unbroken = {done: (bits(state), bits(info)) for done, state, info in rounds(algorithm, start, cohorts(), KEY, 7)}
    assert list(unbroken) == list(range(1, 8))
    for done, state, _ in rounds(algorithm, start, cohorts(), KEY, 7):
        save(tmp_path, done, state)
        if done == 3:
            break  # killed
    step, state = latest(tmp_path, start)
    assert step == 3
    assert bits(state) == unbroken[3][0]
    resumed = {done: (bits(s), bits(info)) for done, s, info in rounds(algorithm, state, cohorts(), KEY, 7)}
    assert resumed == {done: unbroken[done] for done in range(4, 8)}


def test_what_the_server_does_between_rounds_is_seen_by_the_next_one():
    algorithm = build(private=False)
    start = algorithm.init(PARAMS)

    def hold(state, done):  # every second round is undone
        return start._replace(round=state.round) if done % 2 == 0 else state

    held = {done: bits(state.params) for done, state, _ in rounds(algorithm, start, cohorts(), KEY, 4, between=hold)}
    assert held[2] == held[4] == bits(start.params) != held[1]
    third = start._replace(round=jnp.asarray(2, jnp.int32))
    assert held[3] == bits(next(rounds(algorithm, third, cohorts(), KEY, 4))[1].params)


def test_a_finished_run_yields_nothing():
    algorithm = build(private=False)
    state = algorithm.init(PARAMS)._replace(round=jnp.asarray(5, jnp.int32))
    assert list(rounds(algorithm, state, cohorts(), KEY, 5)) == []


def test_every_round_has_its_own_key_and_cohort_wherever_it_is_resumed():
    Counted = collections.namedtuple("Counted", "round")
    show = Federated(
        lambda params: Counted(0), lambda key, state, r: (Counted(state.round + 1), (jax.random.bits(key), r))
    )

    def seen(start):
        return [(done, *map(int, info)) for done, _, info in rounds(show, Counted(start), lambda r: 10 * r, KEY, 4)]

    expected = [(r + 1, int(jax.random.bits(jax.random.fold_in(KEY, r))), 10 * r) for r in range(4)]
    assert seen(0) == expected
    assert seen(2) == expected[2:]
    assert len({bits for _, bits, _ in expected}) == 4


def test_nothing_saved_is_none(tmp_path):
    assert latest(tmp_path / "missing", PARAMS) is None
    assert latest(tmp_path, PARAMS) is None
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    "other", [{"w": np.zeros(3)}, {"w": np.zeros(2), "b": np.zeros((2, 2))}, {"w": np.zeros(2), "c": {"d": np.ones(4)}}]
)
def test_the_state_of_another_training_is_one_line(other, tmp_path):
    save(tmp_path, 3, other)
    with pytest.raises(ValueError, match=r"^checkpoint .*3 is damaged or of another training: remove it$"):
        latest(tmp_path, {"w": np.zeros(2), "b": np.zeros(2)})


@pytest.mark.parametrize("step", [5, 3, -1])
def test_a_step_that_is_not_larger_is_refused_and_the_last_state_stays(step, tmp_path):
    save(tmp_path, 5, {"w": np.zeros(2)})
    with pytest.raises(ValueError, match=rf"^step is {step}: must be a whole number > 5$"):
        save(tmp_path, step, {"w": np.ones(2)})
    assert latest(tmp_path, {"w": np.ones(2)})[1]["w"].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"^step is -1: must be a whole number > -1$"):
        save(tmp_path / "new", -1, {"w": np.ones(2)})


def test_a_state_that_changed_on_disk_is_not_believed(tmp_path):
    state = {"w": np.random.default_rng(0).normal(size=(200, 200)).astype(np.float32)}
    save(tmp_path, 1, state)
    largest = max(tmp_path.rglob("*"), key=lambda path: path.stat().st_size)
    whole = largest.read_bytes()
    assert len(whole) > 100_000
    for changed in (whole[:50_000] + bytes([whole[50_000] ^ 1]) + whole[50_001:], whole[:50_000]):
        largest.write_bytes(changed)
        with pytest.raises(ValueError, match=r"^checkpoint .*1 is damaged or of another training: remove it$"):
            latest(tmp_path, state)
    largest.write_bytes(whole)
    np.testing.assert_array_equal(latest(tmp_path, state)[1]["w"], state["w"])
    for path in (tmp_path / "1" / "default").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=r"^checkpoint .*1 is damaged or of another training: remove it$"):
        latest(tmp_path, state)


def test_the_last_whole_state_is_restored_with_its_structure_and_dtypes(tmp_path):
    algorithm = build(private=False)
    state = algorithm.init(PARAMS)
    state = state._replace(params={"w": state.params["w"] + 0.1, "b": jnp.asarray([np.nan, -0.0])})
    for step in (1, 2, 5):
        save(tmp_path / "new" / "folder", step, state._replace(round=jnp.asarray(step, jnp.int32)))
    torn = tmp_path / "new" / "folder" / "7.orbax-checkpoint-tmp"  # what a kill during the write leaves behind
    torn.mkdir()
    step, found = latest(tmp_path / "new" / "folder", state)
    assert step == 5
    assert found.round == 5
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(state)]
    assert bits(found._replace(round=state.round)) == bits(state)

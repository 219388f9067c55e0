"""Runs a `Search` over many images: a batch of slots, each filled again as soon as its try is over.

One try of one example is a job. Jobs wait in a queue, every example's first try before any second; examples known to be
misclassified are passed over. So the work shrinks as examples break, the model always sees full batches of one
shape, and memory does not grow with steps or tries.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from fedrobust import check, devices, keys, trace
from fedrobust.attacks import objectives
from fedrobust.attacks.spread import Examples, over_devices
from fedrobust.types import Answer, Attack, Found, Key, LogitsFn, Run, Search


class _Jobs(NamedTuple):
    """What the slots are at. Rows [B]; a slot that is not open has nothing to do."""

    example: jax.Array
    attempt: jax.Array  # the number of the try
    open: jax.Array
    image: jax.Array
    label: jax.Array
    state: Any
    asked: jax.Array  # questions so far
    best: jax.Array  # [B,H,W,C]
    value: jax.Array  # of the objective (or margin) at `best`
    won: jax.Array


class _Board(NamedTuple):
    """What is known of the examples. Rows [N]."""

    image: jax.Array
    value: jax.Array
    attempt: jax.Array  # the try that `image` comes from
    winner: jax.Array  # the first try with a success, -1 for the clean image, num_tries for none yet
    asked: jax.Array  # [N,num_tries]


class _Game(NamedTuple):
    """The functions of one run, its model, key and examples inside."""

    begin: Callable[[jax.Array, jax.Array, jax.Array], _Jobs]
    turn: Callable[[_Jobs], _Jobs]


Ask = Callable[[tuple[jax.Array, jax.Array, jax.Array], jax.Array, jax.Array, Any], tuple[jax.Array, Answer]]
"""`((number[B] of the example, try[B], question[B]), point[B,H,W,C], label[B], state) -> (logits [B,L], Answer [B])`.

Those logits are what counts; the answer is what the search is told.
"""


def run(
    search: Search,
    *,
    num_slots: int,
    compact: bool = True,
    num_samples: int | None = None,
    num_devices: int | None = 1,
) -> Run:
    """The function that runs a search over N images.

    Args:
        search: what to run.
        num_slots: images per call of the model >= 1, on each device; on an accelerator, what fills it.
        compact: fill slots again as their tries end. False keeps all N examples in one batch, in step, to the
            end of every try, broken or not: the same result, for comparison.
        num_samples: None for a deterministic model `logits_fn(image)`. For a randomised one, `logits_fn(key, image)`,
            the draws >= 1 per question: what counts are its mean logits and its mean gradient. Among many questions one
            succeeds by the luck of its draws: no try ends at a success, and the point of the largest margin is judged
            once more, by new draws.
        num_devices: local devices to deal the examples out to; None for all.

    Returns:
        `(key, logits_fn, image[N,H,W,C] in [0, 1], label[N], todo[N] bool) -> Found`, to be compiled as one program.
        `logits_fn` may give a pair of logits: the first are judged, the search sees the second (see `transfer`).

    Raises:
        ValueError: a number out of range.

    Guarantees:
        Success is a point inside the ball where the argmax is not the label, or a logit is NaN (of a randomised model
        such a point is found only if its margin is the largest). Example i draws from
        `fold_in(key, i)`, its try r from `fold_in(that, r)`: neither slots nor devices nor `compact` nor the other
        examples change its result beyond the rounding of the model's batches. Where `todo` is False the
        image comes back untouched, not wrong, and the model is not asked. The clean image is judged once: with a radius
        of 0 exactly the clean errors are wrong. Plain convolutions of the model are run by `fedrobust.ops.conv`.
    """
    check.at_least("num_slots", num_slots, 1)
    if num_samples is not None:
        check.at_least("num_samples", num_samples, 1)
    on = devices.local(num_devices)

    def attack(key: Key, logits_fn: Callable[..., Any], image: jax.Array, label: jax.Array, todo: jax.Array) -> Found:
        chex.assert_rank([image, label, todo], [4, 1, 1])
        chex.assert_equal_shape_prefix([image, label, todo], 1)
        check.at_least("the number of images", len(label), 1)
        ask = _ask(search, key, trace.fast_convolutions(logits_fn), num_samples)
        one = functools.partial(_attack, search, ask, key, num_slots if compact else None, num_samples is not None)
        examples = Examples(*map(jnp.asarray, (jnp.arange(len(label)), image, label, todo)))
        found = over_devices(one, on)(examples)
        return found._replace(num_queries=found.num_queries * (num_samples or 1))

    return attack


def as_attack(search: Search) -> Attack:
    """A search as an `Attack`, for use wherever one is expected; all examples of a batch side by side."""

    def attack(key: Key, logits_fn: LogitsFn, image: jax.Array, label: jax.Array) -> jax.Array:
        return run(search, num_slots=len(label))(key, logits_fn, image, label, jnp.ones(len(label), bool)).image

    return attack


def _attack(
    search: Search, ask: Ask, key: Key, num_slots: int | None, is_randomised: bool, examples: Examples
) -> Found:
    """The search over the examples of one device; all of them in step where there are no slots."""
    _, image, label, todo = examples
    num, num_tries = len(label), search.num_tries
    width = num if num_slots is None else min(num_slots, num * num_tries)
    logits = _logits(ask, examples, width, num_tries)
    board = _Board(
        image,
        jnp.full(num, -jnp.inf),
        jnp.full(num, num_tries),
        winner=jnp.where(todo & _is_wrong(logits, label), -1, num_tries),
        asked=jnp.zeros((num, num_tries), jnp.int32),
    )
    game = _game(search, ask, key, examples, logits, is_randomised)
    board = (_in_step if num_slots is None else _compacted)(search, game, board, todo, width, key)
    counted = jnp.arange(num_tries) <= board.winner[:, None]
    found = Found(board.image, board.winner < num_tries, todo + jnp.sum(board.asked * counted, axis=1))
    if not is_randomised:
        return found
    unjudged = jnp.any(found.image != image, axis=(1, 2, 3))
    logits = _logits(ask, examples._replace(image=found.image, todo=unjudged), width, num_tries + 1)
    wrong = found.wrong | (unjudged & _is_wrong(logits, label))
    return found._replace(wrong=wrong, num_queries=found.num_queries + unjudged)


def _ask(search: Search, key: Key, logits_fn: Callable[..., Any], num_samples: int | None) -> Ask:
    stream = keys.stream(key, "model")

    def once(key: Key | None, point: jax.Array, label: jax.Array, state: Any) -> tuple[jax.Array, Answer]:
        def model(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            if key is None:
                logits = logits_fn(x)
            else:
                logits = jax.tree.map(lambda z: z[:, 0], jax.vmap(lambda k, x: logits_fn(k, x[None]))(key, x))
            return logits if isinstance(logits, tuple) else (logits, logits)

        objective = search.objective
        if objective is None or state is None:
            judged, logits = trace.fast_inference(model)(point)
            return judged, Answer(logits, jnp.zeros(len(point), logits.dtype), jnp.zeros_like(point))

        def total(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
            judged, logits = model(x)
            values = jax.vmap(objective)(logits, label, state)
            return jnp.sum(values), (judged, logits, values)

        gradient, (judged, logits, values) = jax.grad(total, has_aux=True)(point)
        return judged, Answer(logits, values, gradient)

    def mean(
        question: tuple[jax.Array, ...], point: jax.Array, label: jax.Array, state: Any
    ) -> tuple[jax.Array, Answer]:
        def draw(sample: jax.Array) -> tuple[jax.Array, Answer]:
            draws = jax.vmap(lambda *numbers: functools.reduce(jax.random.fold_in, (*numbers, sample), stream))(
                *question
            )
            return once(draws, point, label, state)

        def add(total: Any, sample: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, draw(sample)), None

        shapes = jax.eval_shape(draw, jnp.int32(0))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = lax.scan(add, zero, jnp.arange(num_samples))
        return jax.tree.map(lambda x: x / num_samples, total)

    return mean if num_samples else lambda _, point, label, state: once(None, point, label, state)


def _logits(ask: Ask, examples: Examples, width: int, attempt: int) -> jax.Array:
    """The logits [N,L] at the images to attack, others 0, in batches of `width`; `attempt` names the draws."""
    number, image, label, todo = examples
    num = len(label)
    size = min(width, num)
    order = jnp.nonzero(todo, size=num + size, fill_value=num)[0]  # a whole batch may start at the last example

    def logits_of(rows: jax.Array) -> jax.Array:
        none = jnp.zeros(size, jnp.int32)
        return ask((number[rows], none + attempt, none), image[rows], label[rows], None)[0]

    def batch(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        begin, logits = carry
        rows = lax.dynamic_slice(order, (begin,), (size,))
        return begin + size, logits.at[rows].set(logits_of(jnp.minimum(rows, num - 1)), mode="drop")

    shape = jax.eval_shape(logits_of, jnp.zeros(size, jnp.int32))
    none = jnp.zeros((num, shape.shape[1]), shape.dtype)
    return lax.while_loop(lambda carry: carry[0] < jnp.sum(todo), batch, (jnp.int32(0), none))[1]


def _game(search: Search, ask: Ask, key: Key, examples: Examples, logits: jax.Array, is_randomised: bool) -> _Game:
    number, image, label, _ = examples

    def begin(example: jax.Array, index: jax.Array, is_open: jax.Array) -> _Jobs:
        def one(example: jax.Array, index: jax.Array) -> Any:
            key_of_try = jax.random.fold_in(jax.random.fold_in(key, number[example]), index)
            return search.start(key_of_try, image[example], logits[example], label[example], index)

        none = jnp.zeros(example.shape, jnp.int32)
        x, state = image[example], jax.vmap(one)(example, index)
        value = jnp.full(example.shape, -jnp.inf)
        return _Jobs(example, index, is_open, x, label[example], state, none, x, value, none > 0)

    def turn(jobs: _Jobs) -> _Jobs:
        point = jax.vmap(search.point)(jobs.state)
        judged, answer = ask((number[jobs.example], jobs.attempt, jobs.asked), point, jobs.label, jobs.state)
        by_margin = search.objective is None or is_randomised
        value = jax.vmap(objectives.margin)(judged, jobs.label) if by_margin else answer.value
        counts = jobs.open & jax.vmap(search.inside)(jobs.image, point)
        moved = jnp.any(point != jobs.image, axis=(1, 2, 3))  # the clean image has been judged
        won = counts & moved & _is_wrong(judged, jobs.label) & (not is_randomised)
        better = won | (counts & (value > jobs.value))
        state = jax.vmap(search.learn)(jobs.state, answer)
        asked = jobs.asked + jobs.open
        over = won | (asked >= search.num_queries) | jax.vmap(search.ended)(state)
        return jobs._replace(
            open=jobs.open & ~over,
            state=state,
            asked=asked,
            best=_select(better, point, jobs.best),
            value=jnp.where(better, value, jobs.value),
            won=jobs.won | won,
        )

    return _Game(begin, turn)


def _in_step(search: Search, game: _Game, board: _Board, todo: jax.Array, width: int, _: Key) -> _Board:
    """All examples side by side, try after try."""

    def attempt(board: _Board, index: jax.Array) -> tuple[_Board, None]:
        alive = todo & (board.winner == search.num_tries)
        jobs = game.begin(jnp.arange(width), jnp.full(width, index), alive)
        jobs, _ = lax.scan(lambda jobs, _: (game.turn(jobs), None), jobs, length=search.num_queries)
        return _merge(board, jobs, alive, search.num_tries), None

    return lax.scan(attempt, board, jnp.arange(search.num_tries))[0]


def _compacted(search: Search, game: _Game, board: _Board, todo: jax.Array, width: int, key: Key) -> _Board:
    """Slots filled from the queue; see the module's first lines."""
    num, num_tries = len(todo), search.num_tries

    def alive(board: _Board) -> jax.Array:
        return todo & (board.winner == num_tries)

    def fill(jobs: _Jobs, board: _Board, index: jax.Array, begin: jax.Array) -> tuple[_Jobs, jax.Array, jax.Array]:
        """The queue stands before example `begin` of try `index`. One turn takes jobs from one try only."""
        waiting = alive(board) & (jnp.arange(num) >= begin)
        done = ~jnp.any(waiting)
        index, waiting = index + done, jnp.where(done, alive(board), waiting) & (index + done < num_tries)
        place = jnp.cumsum(~jobs.open) - 1  # of a free slot among the free
        example = jnp.nonzero(waiting, size=width, fill_value=num)[0][jnp.maximum(place, 0)]
        taken = ~jobs.open & (example < num)
        new = game.begin(jnp.minimum(example, num - 1), jnp.full(width, index), taken)
        last = jnp.max(jnp.where(taken, example, -1))
        jobs = jax.tree.map(lambda new, old: _select(taken, new, old), new, jobs)
        return jobs, index, jnp.where(jnp.any(taken), last + 1, jnp.where(done, 0, begin))

    def is_going(carry: tuple[_Jobs, _Board, jax.Array, jax.Array]) -> jax.Array:
        jobs, board, index, begin = carry
        waiting = alive(board) & ((index < num_tries - 1) | (jnp.arange(num) >= begin))
        return jnp.any(jobs.open) | jnp.any(waiting & (index < num_tries))

    def body(carry: tuple[_Jobs, _Board, jax.Array, jax.Array]) -> tuple[_Jobs, _Board, jax.Array, jax.Array]:
        jobs, board, index, begin = carry
        is_free = jnp.any(~jobs.open) & (index < num_tries)
        jobs, index, begin = lax.cond(is_free, fill, lambda jobs, _, *queue: (jobs, *queue), jobs, board, index, begin)
        after = game.turn(jobs)
        board = _merge(board, after, jobs.open & ~after.open, num_tries)
        moot = board.winner[after.example] < after.attempt  # an earlier try has a success
        return after._replace(open=after.open & ~moot), board, index, begin

    none = jnp.zeros(width, jnp.int32)
    idle = _blank(key, jax.eval_shape(game.begin, none, none, none > 0))
    return lax.while_loop(is_going, body, (idle, board, jnp.int32(0), jnp.int32(0)))[1]


def _blank(key: Key, shapes: Any) -> Any:
    """Zeros, all slots closed; any key where a state holds keys."""

    def leaf(x: jax.ShapeDtypeStruct) -> jax.Array:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jnp.broadcast_to(key, x.shape) if is_key else jnp.zeros(x.shape, x.dtype)

    return jax.tree.map(leaf, shapes)


def _merge(board: _Board, jobs: _Jobs, over: jax.Array, num_tries: int) -> _Board:
    """The board after some jobs are over: of an example, the first try with a success, else the largest objective."""

    def beats(won: Any, value: Any, index: Any, than_won: Any, than_value: Any, than_index: Any) -> jax.Array:
        sooner = index < than_index
        larger = (value > than_value) | ((value == than_value) & sooner)
        return jnp.where(won == than_won, jnp.where(won, sooner, larger), won)

    num, at = len(board.value), jobs.example
    rank = (jobs.won, jobs.value, jobs.attempt)
    rivals = beats(*(x[None] for x in rank), *(x[:, None] for x in rank)) & (at[None] == at[:, None]) & over[None]
    has_won = board.winner[at] < num_tries
    is_best = over & ~jnp.any(rivals, axis=1) & beats(*rank, has_won, board.value[at], board.attempt[at])
    rows, counted = jnp.where(is_best, at, num), jnp.where(over, at, num)
    return _Board(
        image=board.image.at[rows].set(jobs.best, mode="drop"),
        value=board.value.at[rows].set(jobs.value, mode="drop"),
        attempt=board.attempt.at[rows].set(jobs.attempt, mode="drop"),
        winner=board.winner.at[rows].set(jnp.where(jobs.won, jobs.attempt, num_tries), mode="drop"),
        asked=board.asked.at[counted, jobs.attempt].set(jobs.asked, mode="drop"),
    )


def _is_wrong(logits: jax.Array, label: jax.Array) -> jax.Array:
    """[B] bool; logits with a NaN are never right."""
    return (jnp.argmax(logits, axis=-1) != label) | jnp.any(jnp.isnan(logits), axis=-1)


def _select(row: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(row.reshape(row.shape + (1,) * (new.ndim - 1)), new, old)

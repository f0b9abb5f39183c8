"""A damaged run answers with the right bits or with advice, never wrongly; so does bad input."""

import dataclasses
import pathlib
import re
import time
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import bits, compile_once  # noqa: F401  # the fixture is there for who imports it

import replay
from replay.journal import Durable, frame, frames
from replay.log import HEADER, JOURNAL, Log
from replay.program import Inputs
from replay.store import Place, StoredArray, rows
from replay.trajectory import LocalEngine

SEGMENTS = [(0, 8), (8, 16), (16, 24)]
# Written for readers of the zarr groups, and for recorders that meet; nothing is read from them.
UNREAD = re.compile(r"lock|.*zarr\.json")


@dataclasses.dataclass(frozen=True)
class Intact:
    """The run as it was recorded: its files, and all that it answers."""

    files: dict[str, bytes]
    states: list
    history: dict[str, np.ndarray]
    ids: np.ndarray
    programs: dict[str, bytes]
    durable: Durable

    def copy(
        self, path: pathlib.Path, changed: Mapping[str, bytes | None] = types.MappingProxyType({})
    ) -> pathlib.Path:
        """Write the run, with some files changed or left out."""
        for name, data in {**self.files, **changed}.items():
            if data is not None:
                file = path / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
        return path


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    path = tmp_path_factory.mktemp("intact") / "run"
    with tiny.recorder(path) as recorder:
        while recorder.advance(5):
            recorder.log(reached=recorder.step)
    run, place = replay.open(path), Place(path)
    assert run.verify().grade is replay.Grade.BITWISE
    files = {name: place.read(name) for name in place.list()}
    assert len([name for name in files if not UNREAD.fullmatch(name)]) == 30
    return Intact(
        files=files,
        states=[bits(state) for _, state in run.states(slice(None))],
        history=run.history(),
        ids=run.ids(0, run.steps),
        programs={name: run.log.program(name) for name in run.log.header.programs},
        durable=run.log.durable,
    )


def array_of(file):
    """Return what an error calls a file: the array that a chunk belongs to, or the file itself."""
    return "/".join(file.split("/")[:2])


def assert_advice(error, files):
    assert isinstance(error, replay.ReplayError), repr(error)
    assert error.what and error.why and error.fix
    assert any(array_of(file) in str(error) for file in files), (files, str(error))


def assert_right_or_refused(path, intact, *files):
    """Ask a run with damaged files for everything; tell whether the damage was noticed."""
    noticed = []

    def answer(question, *arguments):
        try:
            return question(*arguments)
        except replay.ReplayError as error:
            assert_advice(error, files)
            noticed.append(error)

    run = answer(replay.open, path)
    if run is None:
        return True
    sound = set()
    audit = run.verify()
    for what in audit.damage:
        assert any(array_of(file) in what for file in files), what
        assert audit.grade is replay.Grade.FAILED
        noticed.append(what)
    for segment in audit.segments:
        assert segment.grade in (replay.Grade.BITWISE, replay.Grade.FAILED), segment
        if segment.grade is replay.Grade.BITWISE:
            sound |= {*range(segment.start, segment.stop)}
        else:
            assert any(array_of(file) in segment.error for file in files), segment
            noticed.append(segment)
    for number, expected in enumerate(intact.states):
        state = answer(run.state, number)
        assert state is not None or number not in sound, f"state {number} was said to be sound"
        assert state is None or bits(state) == expected, f"state {number} is wrong"
    for name, column in (answer(run.history) or {}).items():
        there = ~np.isnan(column)  # a journal that is cut off has fewer metrics
        expected = intact.history[name][: len(column)]
        assert column[there].tobytes() == expected[there].tobytes(), name
    if (ids := answer(run.ids, 0, run.steps)) is not None:
        assert ids.tolist() == intact.ids[: run.steps].tolist()
    for name, program in intact.programs.items():
        found = answer(run.log.program, name)
        assert found in (None, program), name
        assert found is not None or any(f"program/{name}" in what for what in audit.damage)
    return bool(noticed) or run.log.durable != intact.durable


# ------------------------------------------------------------------------------------ one damage


def test_an_intact_run_shows_no_damage(intact, tmp_path):
    assert not assert_right_or_refused(intact.copy(tmp_path), intact)


@pytest.mark.parametrize("flips", [40, pytest.param(500, marks=pytest.mark.full)])
def test_a_flipped_bit_anywhere_is_noticed_or_without_effect(intact, tmp_path, flips):
    """Half of the places are drawn by file, so that small files are met, half by size."""
    random = np.random.Generator(np.random.Philox(9))
    names = sorted(name for name in intact.files if intact.files[name])
    sizes = np.array([len(intact.files[name]) for name in names])
    met = set()
    for number in range(flips):
        by_size = sizes / sizes.sum() if number % 2 else None
        name = names[int(random.choice(len(names), p=by_size))]
        data = bytearray(intact.files[name])
        place, bit = int(random.integers(len(data))), int(random.integers(8))
        data[place] ^= 1 << bit
        path = intact.copy(tmp_path / str(number), {name: bytes(data)})
        noticed = assert_right_or_refused(path, intact, name)
        assert noticed != bool(UNREAD.fullmatch(name)), (name, place, bit)
        met.add(array_of(name))
    assert len(met) >= 15


def damages(intact):
    for name, data in intact.files.items():
        yield name, None
        if data:
            yield name, data[: len(data) // 2]
            yield name, b""


def test_every_file_may_be_deleted_truncated_or_emptied(intact, tmp_path):
    unread = {name: data for name, data in damages(intact) if UNREAD.fullmatch(name)}
    assert len(unread) == 14
    path = intact.copy(tmp_path / "unread", unread)
    assert not assert_right_or_refused(path, intact), "nothing is read from these files"
    for number, (name, data) in enumerate(damages(intact)):
        if not UNREAD.fullmatch(name):
            path = intact.copy(tmp_path / str(number), {name: data})
            assert assert_right_or_refused(path, intact, name), (name, data)


def chunks(intact, *arrays):
    return sorted(name for name in intact.files if re.match(rf"({'|'.join(arrays)})/c/", name))


def test_swapped_checkpoints_are_noticed(intact, tmp_path):
    """Every chunk is sound in itself; only the digest of the state tells that it is another's."""
    pairs = [
        (f"states/{i}/c/1{rest}", f"states/{i}/c/2{rest}") for i, rest in [(0, "/0/0"), (3, "/0")]
    ]
    pairs += [("states/0/c/1/0/0", "states/2/c/1/0/0"), ("states/1/c/0/0", "states/1/c/3/0")]
    for number, (one, other) in enumerate(pairs):
        swapped = {one: intact.files[other], other: intact.files[one]}
        path = intact.copy(tmp_path / str(number), swapped)
        assert assert_right_or_refused(path, intact, one, other), one


def test_swapped_programs_are_noticed(intact, tmp_path):
    one, other = "program/step", "program/update"
    path = intact.copy(tmp_path, {one: intact.files[other], other: intact.files[one]})
    assert assert_right_or_refused(path, intact, one, other)
    error = replay.open(path).verify().segments[0].error
    assert "program/step is damaged: its checksum does not agree" in error


def test_the_advice_names_the_file_of_a_state_that_is_not_its_own(intact, tmp_path):
    one, other = "states/1/c/1/0", "states/1/c/2/0"
    run = replay.open(intact.copy(tmp_path, {one: intact.files[other]}))
    with pytest.raises(replay.LogError) as caught:
        run.state(9)
    assert caught.value.what.endswith(
        "the stored state 8 does not agree with its digest, first in states/1/c/1 (params/out)"
    )
    assert caught.value.fix == "restore the folder states/ from a copy of the run"
    assert bits(run.state(7)) == intact.states[7] and bits(run.state(16)) == intact.states[16]


def test_a_damaged_last_state_is_found_by_an_audit(intact, tmp_path):
    path = intact.copy(tmp_path, {"states/0/c/3/0/0": None})
    audit = replay.open(path).verify()
    assert [(s.start, s.stop, s.grade.name) for s in audit.segments] == [
        (0, 8, "BITWISE"),
        (8, 16, "BITWISE"),
        (16, 24, "BITWISE"),
        (24, 24, "FAILED"),
    ]
    assert audit.grade is replay.Grade.FAILED and "states/0" in audit.segments[-1].error
    assert replay.open(path).verify(range(8, 16)).grade is replay.Grade.BITWISE


# --------------------------------------------------------------------------------------- journal


def records_of(intact):
    """Return `(begin, end, record)` of every record of the journal."""
    found = list(frames(intact.files[JOURNAL], JOURNAL))
    begins = [0, *(end for end, _ in found)]
    return [(begin, end, record) for begin, (end, record) in zip(begins, found, strict=False)]


def test_a_journal_cut_at_any_byte_of_its_last_records_says_what_stood_before(intact, tmp_path):
    records, journal = records_of(intact), intact.files[JOURNAL]
    kinds = [record["kind"] for _, _, record in records]
    assert kinds == ["steps", "checkpoint"] * 4 + ["steps", "closed"]
    for number, (begin, end, _) in enumerate(records[-3:]):
        before = Durable.read(journal[:begin], JOURNAL)
        path = intact.copy(tmp_path / str(number))
        for cut in range(begin, end):
            (path / JOURNAL).write_bytes(journal[:cut])
            assert Log(Place(path)).durable == before, cut
        assert assert_right_or_refused(path, intact, JOURNAL)


@pytest.mark.parametrize("change", ["repeated", "left out"])
def test_a_record_of_the_journal_may_be_repeated_or_left_out(intact, tmp_path, change):
    journal = intact.files[JOURNAL]
    for number, (begin, end, _) in enumerate(records_of(intact)):
        changed = journal[: end if change == "repeated" else begin] + (
            journal[begin:] if change == "repeated" else journal[end:]
        )
        path = intact.copy(tmp_path / str(number), {JOURNAL: changed})
        assert_right_or_refused(path, intact, JOURNAL)


def test_garbage_after_the_journal_is_a_torn_tail(intact, tmp_path):
    garbage = np.random.Generator(np.random.Philox(2)).bytes(300)
    for number, tail in enumerate([garbage, garbage[:3], b"RPLY" * 9, bytes(50)]):
        path = intact.copy(tmp_path / str(number), {JOURNAL: intact.files[JOURNAL] + tail})
        assert not assert_right_or_refused(path, intact, JOURNAL)


def test_garbage_between_two_records_is_damage(intact, tmp_path):
    journal, (begin, *_) = intact.files[JOURNAL], records_of(intact)[-1]
    path = intact.copy(tmp_path, {JOURNAL: journal[:begin] + b"garbage" + journal[begin:]})
    with pytest.raises(replay.LogError, match=f"journal.msgpack is damaged at byte {begin}"):
        replay.open(path)


@pytest.mark.parametrize(
    "record",
    [
        "no record",
        {"kind": "unheard of"},
        {"kind": "steps", "end": 25, "digest": bytes(12), "metrics": []},
        {"kind": "steps", "end": -1, "digest": bytes(12), "metrics": []},
        {"kind": "steps", "end": 2.0, "digest": bytes(12), "metrics": []},
        {"kind": "steps", "end": 24, "digest": "text", "metrics": []},
        {"kind": "steps", "end": 24, "digest": bytes(12), "metrics": [[3, {"a": "much"}]]},
        {"kind": "steps", "end": 24, "digest": bytes(12), "metrics": [[3, "a"]]},
        {"kind": "checkpoint", "state": 24, "row": 3, "digest": bytes(12)},
        {"kind": "checkpoint", "state": 24, "row": 2**40, "digest": bytes(32)},
        {"kind": "checkpoint", "state": 2**47, "row": 3, "digest": bytes(32)},
        {"kind": "checkpoint", "state": 12, "row": 3, "digest": bytes(31)},
        {"kind": "dropped", "states": [5]},
        {"kind": "dropped", "states": 8},
        {"kind": "resumed", "state": "8"},
        {"kind": "selftest"},
    ],
    ids=str,
)
def test_a_record_that_no_recorder_writes_is_refused(intact, tmp_path, record):
    path = intact.copy(tmp_path, {JOURNAL: intact.files[JOURNAL] + frame(record)})
    with pytest.raises(replay.LogError, match="journal.msgpack") as caught:
        replay.open(path)
    assert caught.value.why == "the journal decides which data exists"
    assert "copy of the run" in caught.value.fix


# ---------------------------------------------------------------------------------------- shards


def test_every_byte_of_a_sharded_chunk_counts(tmp_path):
    """Large leaves are files of several pieces with an index, which the tiny run has none of."""
    spec = rows("states/0", (2, 512, 1025), 2, "float32", ("checkpoint", "a", "b", "c"))
    assert spec.inner == (1, 1, 512, 1025)
    place = Place(tmp_path)
    array = StoredArray(place, spec, label="params/large")
    values = np.random.Generator(np.random.Philox(4)).normal(size=(1, 2, 512, 1025))
    array.write(1, values.astype(np.float32))
    [name] = place.list()
    file = tmp_path / name
    data = file.read_bytes()
    random = np.random.Generator(np.random.Philox(5))
    places = [*random.integers(0, len(data), 20).tolist(), len(data) - 1, len(data) - 20, 0]
    for at in places:
        file.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(replay.LogError, match=r"states/0 \(params/large\) cannot be read"):
            array.read(1)
    for size in (0, 3, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(replay.LogError, match=r"states/0 \(params/large\) cannot be read"):
            array.read(1)
    file.write_bytes(data)
    assert array.read(1).tobytes() == values.astype(np.float32).tobytes()
    with pytest.raises(replay.LogError, match=r"states/0 \(params/large\) cannot be read"):
        array.read(0)


# ------------------------------------------------------------------------------------ divergence


def nudge(monkeypatch, step, leaf, index, change=lambda x: np.nextafter(x, np.float32(np.inf))):
    """Change one element of the state, by default in its last place, after a step of a replay."""
    advance = LocalEngine.advance

    def nudged(engine, state, stretch):
        for row in range(stretch.first, stretch.stop):
            for executed in advance(engine, state, stretch._replace(first=row, stop=row + 1)):
                if executed.start == step:
                    leaves = [np.array(x) for x in executed.after]
                    flat = leaves[leaf].reshape(-1)
                    flat[index] = change(flat[index])
                    executed = executed._replace(after=engine.load(leaves))
                state = executed.after
                yield executed

    monkeypatch.setattr(LocalEngine, "advance", nudged)


@jax.jit
def _one_step(state, step, ids, batch):
    inputs = Inputs.fold(tiny.KEY, step, ids, jnp.ones(tiny.BATCH), batch)
    losses, _, grads, carry = tiny.PROGRAM.gradient(state, inputs)
    return losses, tiny.PROGRAM.update(state, carry, grads, losses)


def heals(run, step, leaf, index):
    """Whether rounding undoes a nudge before a loss or a stored state shows it: a loop tells.

    That is a matter of the processor, whose vectors decide in which order products are added.
    """

    def walk(state):
        seen = []
        for t in range(step + 1, step // tiny.EVERY * tiny.EVERY + tiny.EVERY):
            ids = np.asarray(run.ids(t, t + 1)[0])
            batch = {name: x[ids] for name, x in tiny.DATA.items()}
            losses, state = _one_step(state, np.uint32(t), ids, batch)
            seen.append(np.asarray(losses).tobytes())
        return seen, bits(state)

    whole = run.state(step + 1)
    leaves, tree = jax.tree.flatten(whole)
    changed = [np.array(x) for x in leaves]
    flat = changed[leaf].reshape(-1)
    flat[index] = np.nextafter(flat[index], np.float32(np.inf))
    known = walk(whole)
    assert known[1] == bits(run.state((step // tiny.EVERY + 1) * tiny.EVERY))
    return walk(jax.tree.unflatten(tree, changed)) == known


PATHS = ["params/hidden", "params/out", "opt_state/0/trace/hidden", "opt_state/0/trace/out"]


@pytest.mark.parametrize(
    ("step", "leaf", "index"),
    [(0, 0, 0), (8, 1, 3), (9, 0, 4), (11, 1, 3), (15, 0, 7), (15, 2, 1), (20, 2, 0), (23, 1, 4)],
)
def test_one_unit_in_the_last_place_is_found_and_lies_in_the_interval(
    intact, tmp_path, monkeypatch, step, leaf, index
):
    run = replay.open(intact.copy(tmp_path), program=tiny.PROGRAM)
    while heals(run, step, leaf, index):
        index += 1  # the next weight; the leaf would be at its end before all of them heal
    nudge(monkeypatch, step, leaf, index)
    audit = run.verify()
    assert audit.grade is replay.Grade.NUMERIC
    for segment in audit.segments:
        inside = segment.start <= step < segment.stop
        assert (segment.grade is replay.Grade.NUMERIC) == inside, str(audit)
        if inside:
            divergence = segment.divergence
            kind, number = re.fullmatch(
                r"(state|the losses of step) (\d+)", divergence.before
            ).groups()
            assert divergence.after == f"state {segment.start}"
            assert step + 1 <= int(number) <= (segment.stop - (kind != "state"))
            assert 0 < divergence.deviation < 1e-3
            if step + 1 == segment.stop:
                assert (kind, divergence.tensor) == ("state", PATHS[leaf])
    assert f"states {step // 8 * 8} to {step // 8 * 8 + 8}: NUMERIC: between state" in str(audit)


def test_a_digest_at_every_step_finds_even_what_rounding_heals(intact, tmp_path, monkeypatch):
    """A step later these are gone again: no loss and no stored state has ever shown them."""
    with tiny.recorder(tmp_path / "each", commit_steps=1) as recorder:
        while recorder.advance(1):
            pass
    rare = replay.open(intact.copy(tmp_path / "rare"), program=tiny.PROGRAM)
    each = replay.open(tmp_path / "each")
    assert set(each.log.durable.digests) == set(range(25))
    elements = [(leaf, i) for leaf, size in enumerate((15, 5, 15, 5)) for i in range(size)]
    healing = [place for place in elements if heals(rare, 11, *place)]
    assert healing
    for leaf, index in healing[:2]:
        with monkeypatch.context() as patch:
            nudge(patch, 11, leaf, index)
            assert rare.verify().grade is replay.Grade.BITWISE
            [segment] = [s for s in each.verify().segments if s.grade is not replay.Grade.BITWISE]
            found = (segment.start, segment.divergence.after, segment.divergence.before)
            assert found == (8, "state 11", "state 12")
            with pytest.raises(replay.DivergenceError, match="between state 11 and state 12"):
                each.state(13)


@pytest.mark.parametrize(
    "question",
    [
        lambda run: list(run.states(slice(None))),
        lambda run: list(run.states(slice(12, 17))),
        lambda run: list(run.trajectory()),
        lambda run: list(run.trajectory(15, 16)),
    ],
    ids=["states", "some states", "trajectory", "one step"],
)
def test_an_exact_replay_that_departs_is_an_error(intact, tmp_path, monkeypatch, question):
    run = replay.open(intact.copy(tmp_path))
    nudge(monkeypatch, 15, 0, 7)
    with pytest.raises(replay.DivergenceError) as caught:
        question(run)
    assert caught.value.what == (
        f"the replay of {tmp_path} departs from the run between state 8 and state 16; "
        "params/hidden differs"
    )
    assert caught.value.why.startswith("nothing that identifies the machine differs: the comp")
    assert "exact=False" in caught.value.fix


def test_an_executable_that_is_not_the_recorded_one_is_named_where_a_replay_departs(
    intact, tmp_path, monkeypatch
):
    run = replay.open(intact.copy(tmp_path))
    nudge(monkeypatch, 15, 0, 7)
    monkeypatch.setattr("replay.trajectory.LocalEngine.optimized", lambda self: {"step": "other"})
    with pytest.raises(replay.DivergenceError) as caught:
        list(run.trajectory(15, 16))
    assert "the compiler makes another executable" in caught.value.why


def test_no_state_is_handed_out_whose_digest_disagrees(intact, tmp_path, monkeypatch):
    run = replay.open(intact.copy(tmp_path))
    nudge(monkeypatch, 23, 1, 0)
    got = {}
    with pytest.raises(replay.DivergenceError, match="between state 16 and state 24"):
        for number, state in run.states(slice(14, None)):
            got[number] = bits(state)
    assert got == {t: intact.states[t] for t in range(14, 23)}


def test_a_replay_that_need_not_be_exact_goes_on_from_each_checkpoint(
    intact, tmp_path, monkeypatch
):
    run = replay.open(intact.copy(tmp_path))
    nudge(monkeypatch, 9, 0, 4, change=lambda x: x + np.float32(0.25))
    with pytest.warns(UserWarning, match="between state 8 and .*differs by up to 0") as caught:
        steps = list(run.trajectory(exact=False))
    assert len(caught) == 1 and len(steps) == 24
    for step in steps:
        right = bits(step.state) == intact.states[step.step]
        assert right == (not 10 <= step.step < 16)
        if step.step < 10:
            assert step.deviation == 0
        elif step.step < 16:
            assert np.isnan(step.deviation) or step.step == 10
        else:
            assert 0.1 < step.deviation < 1
    with pytest.warns(UserWarning, match="state 14 is not exact: between state 8 and the losses"):
        assert bits(run.state(14, exact=False)) != intact.states[14]
    with pytest.warns(UserWarning, match="not every step is exact: between state 8"):
        states = dict(run.states(slice(12, 20), exact=False))
    assert bits(states[12]) != intact.states[12] and bits(states[17]) == intact.states[17]


def test_a_departure_in_the_last_segment_is_told_as_well(intact, tmp_path, monkeypatch):
    run = replay.open(intact.copy(tmp_path))
    nudge(monkeypatch, 23, 1, 0)
    with pytest.warns(UserWarning, match="between state 16 and state 24; params/out differs by"):
        steps = list(run.trajectory(20, exact=False))
    assert [step.step for step in steps] == [20, 21, 22, 23]


@pytest.mark.parametrize(
    ("change", "deviation"),
    [(lambda x: -x, 5e-324), (lambda x: np.float32(np.nan), float("inf"))],
    ids=["the sign of a zero", "not a number"],
)
def test_a_deviation_is_never_zero_where_bits_differ(tmp_path, monkeypatch, change, deviation):
    still = {**tiny.WEIGHTS, "still": np.zeros(2, np.float32)}
    run = tiny.record(tmp_path / "run", tiny.program(init=still))
    nudge(monkeypatch, 7, 2, 1, change)
    segment = run.verify().segments[0]
    assert (segment.divergence.tensor, segment.divergence.deviation) == ("params/still", deviation)
    with pytest.warns(UserWarning, match="params/still differs"):
        steps = list(run.trajectory(exact=False))
    assert {step.deviation for step in steps[8:]} == {deviation}


# ------------------------------------------------------------------------------------- bad input


def refuse(error, what, question, *arguments, **options):
    """Check that a question is refused with three parts, the first of which matches."""
    with pytest.raises(error, match=what) as caught:
        question(*arguments, **options)
    assert re.search(what, caught.value.what), caught.value.what
    assert len(caught.value.why) > 20 and len(caught.value.fix) > 10
    return caught.value


def batched(losses):
    def loss(params, model_state, batch, key, sample_keys):
        return losses(params, batch), model_state

    return replay.Program(tiny.WEIGHTS, loss, optax.sgd(0.1), batched=True)


def with_key(kind):
    def init(key):
        return tiny.WEIGHTS, {"noise": jax.random.key(0, impl=kind)}

    def loss(params, model_state, batch, key, sample_keys):
        return jax.vmap(tiny.loss, (None, 0, 0))(params, batch, sample_keys), model_state

    return replay.Program(init, loss, optax.sgd(0.1), batched=True)


def calling(callback):
    def loss(params, example, key):
        callback(example["y"])
        return tiny.loss(params, example, key)

    return tiny.program(loss)


def from_python(y):
    form = jax.ShapeDtypeStruct((), jnp.float32)
    jax.experimental.io_callback(lambda x: x, form, y)


BAD_PROGRAMS = {
    "vector loss": (
        lambda: tiny.program(lambda params, example, key: example["x"] * params["out"][0]),
        r"loss of one example is float32\[3\], not a floating point scalar",
    ),
    "integer loss": (
        lambda: tiny.program(lambda params, example, key: jnp.int32(1)),
        r"loss of one example is int32\[\]",
    ),
    "one loss for a batch": (
        lambda: batched(lambda params, batch: jnp.sum(params["out"]) + jnp.sum(batch["y"])),
        r"batched loss returned float32\[\], not one .* for each of the 4 samples",
    ),
    "losses of a longer batch": (
        lambda: batched(lambda params, batch: params["out"]),
        r"batched loss returned float32\[5\], not one .* for each of the 4 samples",
    ),
    "integer parameter": (
        lambda: tiny.program(init={**tiny.WEIGHTS, "counts": np.arange(3, dtype=np.int32)}),
        r"parameter 'counts' is int32\[3\], not floating point",
    ),
    "line search": (
        lambda: replay.Program(tiny.WEIGHTS, tiny.loss, optax.lbfgs()),
        "the optimizer evaluates the loss itself",
    ),
    "debug print": (
        lambda: calling(lambda y: jax.debug.print("{}", y)),
        "the gradient program cannot be exported: .*callback",
    ),
    "callback": (
        lambda: calling(from_python),
        "the gradient program cannot be exported: .*callback",
    ),
    "other random numbers": (
        lambda: with_key("rbg"),
        "model_state/noise holds keys of the implementation 'rbg'",
    ),
}


@pytest.mark.parametrize("name", BAD_PROGRAMS)
def test_a_program_that_cannot_be_replayed_is_refused(tmp_path, name):
    make, what = BAD_PROGRAMS[name]
    refuse(replay.ProgramError, what, lambda: tiny.record(tmp_path / "run", make()))
    assert not (tmp_path / "run" / HEADER).exists()


@pytest.mark.parametrize(
    ("key", "what"),
    [
        (7, "key is 7, not one typed key"),
        (np.int32(7), r"key is int32\[\], not one typed key"),
        (None, "key is None, not one typed key"),
        (jax.random.PRNGKey(0), r"key is uint32\[2\], not one typed key"),
        (jax.random.split(jax.random.key(0), 3), r"key is key<fry>\[3\], not one typed key"),
        (jax.random.key(0, impl="rbg"), "of the implementation 'rbg'"),
        (jax.random.key(0, impl="unsafe_rbg"), "of the implementation 'unsafe_rbg'"),
    ],
    ids=["int", "numpy", "none", "raw", "keys", "rbg", "unsafe_rbg"],
)
def test_a_key_of_the_wrong_kind_is_refused(tmp_path, key, what):
    error = refuse(replay.ProgramError, what, tiny.recorder, tmp_path / "run", key=key)
    assert "jax.random" in error.fix


@pytest.mark.parametrize(
    ("options", "error", "what"),
    [
        ({"dispatch": "fast"}, replay.LogError, "dispatch='fast'"),
        ({"on_log_error": "ignore"}, replay.LogError, "on_log_error='ignore'"),
        ({"checkpoints": 0}, replay.LogError, "stored by {'every': 0}"),
        ({"checkpoints": -8}, replay.LogError, "stored by {'every': -8}"),
        ({"checkpoints": 2.5}, replay.LogError, "stored by {'every': 2.5}"),
        ({"checkpoints": True}, replay.LogError, "stored by {'every': True}"),
        ({"checkpoints": "often"}, replay.LogError, "stored by {'every': 'often'}"),
        ({"sample_weights": np.ones(15)}, replay.DataError, r"sample_weights has shape \[15\]"),
        ({"sample_weights": np.full(16, np.nan)}, replay.DataError, "values that are not finite"),
        ({"data": None}, replay.OrderError, "given an order alone"),
        ({"order": None}, replay.OrderError, "given data alone"),
        ({"order": [[0, 1, 2, 3]]}, replay.OrderError, "order is a list"),
        ({"order": tiny.ORDER.bind(32)}, replay.OrderError, "32 samples.*bound to 16 samples"),
        (
            {"order": replay.Order.explicit([[0, 1, 2, 16], [3, 4, 5, 99]])},
            replay.OrderError,
            r"explicit: there is no sample \[16, 99\]",
        ),
        ({"order": replay.Order.sequential(17)}, replay.OrderError, "16 samples.*one batch of 17"),
        (
            {"data": {**tiny.DATA, "x": tiny.DATA["x"].astype(np.float64)}},
            replay.DataError,
            "leaf 'x' holds float64 values",
        ),
        (
            {"data": None, "order": None, "dispatch": "block"},
            replay.ProgramError,
            "fed one by one cannot be dispatched by block",
        ),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_before_anything_is_written(tmp_path, options, error, what):
    refuse(error, what, tiny.recorder, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


class Restless:
    """A source whose samples are drawn anew at every reading."""

    def __init__(self):
        self.random = np.random.Generator(np.random.Philox(0))

    def __len__(self):
        return tiny.SAMPLES

    def __getitem__(self, i):
        return {"x": self.random.normal(size=3).astype(np.float32), "y": np.float32(0)}


def test_a_source_that_changes_is_refused(tmp_path):
    what = r"sample 0 \(leaf 'x'\) gives other bits when it is read again"
    refuse(replay.DataError, what, tiny.recorder, tmp_path / "run", data=Restless())


def test_a_place_that_is_taken_is_left_alone(intact, tmp_path):
    path = intact.copy(tmp_path / "run")
    refuse(replay.LogError, f"{path} already holds a run", tiny.record, path)
    assert not assert_right_or_refused(path, intact)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    refuse(replay.LogError, "already holds notes.txt", tiny.record, tmp_path / "folder")
    assert (tmp_path / "folder" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty folder"])
def test_what_is_no_run_is_not_opened(tmp_path, what):
    path = tmp_path / "run"
    if what == "a file":
        path.write_text("notes")
    if what == "an empty folder":
        path.mkdir()
    error = refuse(
        replay.LogError, f"{path} is not a run: it has no run.msgpack", replay.open, path
    )
    assert "replay ls" in error.fix


def test_a_run_of_a_newer_format_asks_for_a_newer_version(intact, tmp_path):
    [(_, header)] = frames(intact.files[HEADER], HEADER)
    header["format"] = 2
    path = intact.copy(tmp_path, {HEADER: frame({"format": 2, "more": "than is known"})})
    error = refuse(
        replay.LogError, "has format 2; this version of replay reads up to 1", replay.open, path
    )
    assert error.fix == "pip install --upgrade jax-replay"


def test_questions_about_what_is_not_there_are_refused(intact, tmp_path):
    run = replay.open(intact.copy(tmp_path))
    for state in (25, -26):
        refuse(replay.LogError, "has states 0 to 24, not ", run.state, state)
    for odd in (3.5, "3", None):
        refuse(replay.LogError, f"state {odd!r} is asked for", run.state, odd)
        refuse(replay.LogError, f"step {odd!r} is", lambda s=odd: list(run.trajectory(s)))
        refuse(replay.LogError, f"step {odd!r} is asked for", run.ids, 0, odd)
    for steps in [(0, 25), (-1, 3)]:
        refuse(replay.LogError, "has states 0 to 24, not", lambda s=steps: list(run.trajectory(*s)))
        refuse(replay.LogError, f"has steps 0 to 23, not {steps[0]} to", run.ids, *steps)
    refuse(replay.OrderError, "run backwards", lambda: list(run.states(slice(9, 3, -1))))
    refuse(replay.LogError, "1 states are to be kept", run.thin, 1)


BATCH = {name: column[: tiny.BATCH] for name, column in tiny.DATA.items()}


@pytest.mark.parametrize(
    ("error", "what", "misuse"),
    [
        (replay.OrderError, "no order to advance in", lambda r: r.advance()),
        (
            replay.DataError,
            r"batch of step 1 is Data\(3 samples.*batches of 4 samples",
            lambda r: r.feed({name: column[:3] for name, column in tiny.DATA.items()}),
        ),
        (
            replay.DataError,
            r"batch of step 1 is Data\(4 samples, x: float32\[2\]",
            lambda r: r.feed({**BATCH, "x": BATCH["x"][:, :2]}),
        ),
        (replay.DataError, r"ids of step 1 are \[1, 2\]", lambda r: r.feed(BATCH, ids=[1, 2])),
        (replay.DataError, r"ids of step 1 are \[0.5", lambda r: r.feed(BATCH, ids=[0.5, 1, 2, 3])),
        (replay.DataError, r"ids of step 1 are \[-2", lambda r: r.feed(BATCH, ids=[-2, 1, 2, 3])),
        (
            replay.DataError,
            "ids of step 1 are .*4294967296",
            lambda r: r.feed(BATCH, ids=[2**32] * 4),
        ),
        (
            replay.DataError,
            "weights of step 1 are .*nan",
            lambda r: r.feed(BATCH, None, [np.nan] * 4),
        ),
        (replay.DataError, r"weights of step 1 are \[1.0\]", lambda r: r.feed(BATCH, None, [1.0])),
        (replay.LogError, "metric 'a' is 'much'", lambda r: r.log(a="much")),
        (replay.LogError, r"metric 'a' has shape \[2\]", lambda r: r.log(a=np.ones(2))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fed_recorder_refuses_what_does_not_fit_and_goes_on(tmp_path, error, what, misuse):
    with tiny.recorder(tmp_path / "run", data=None, order=None) as recorder:
        recorder.feed(BATCH)
        refuse(error, what, misuse, recorder)
        recorder.feed(BATCH)
    run = replay.open(tmp_path / "run")
    assert run.steps == 2 and run.verify().grade is replay.Grade.BITWISE


def test_a_recorder_is_used_inside_its_with_block(tmp_path):
    recorder = tiny.recorder(tmp_path / "run")
    refuse(replay.LogError, "is not being recorded yet", recorder.advance)
    with recorder:
        refuse(replay.OrderError, "reads its batches from data", recorder.feed, BATCH)
        assert recorder.advance()


# ------------------------------------------------------------------------- changed data and code


def external(path, data):
    return tiny.record(path, data=data, order=replay.Order.sequential(4), embed=False)


def more_data():
    random = np.random.Generator(np.random.Philox(6))
    return {
        "x": random.normal(size=(64, 3)).astype(np.float32),
        "y": random.normal(size=64).astype(np.float32),
    }


def test_changed_data_is_refused_when_the_run_is_opened(tmp_path):
    external(tmp_path / "run", more_data())
    other = more_data()
    other["y"][0] += 1
    refuse(
        replay.DataError, "sample 0 has other content", replay.open, tmp_path / "run", data=other
    )
    fewer = {name: column[:-1] for name, column in more_data().items()}
    refuse(replay.DataError, "63 samples, .* 64", replay.open, tmp_path / "run", data=fewer)
    renamed = {"x": more_data()["x"], "z": more_data()["y"]}
    refuse(
        replay.DataError, "lacks a leaf .*: y: float32", replay.open, tmp_path / "run", data=renamed
    )


def test_one_changed_sample_is_found_by_the_checksum_of_its_batch(tmp_path):
    external(tmp_path / "run", more_data())
    other = more_data()
    other["y"][22] = np.nextafter(other["y"][22], np.float32(9))  # no probe, in step 5
    run = replay.open(tmp_path / "run", data=other)
    what = r"the batch of step 5 \(samples \[20, 21, 22, 23\], ...\) has other content"
    refuse(replay.DataError, what, run.state, 7)
    refuse(replay.DataError, what, lambda: list(run.trajectory()))
    audit = run.verify()
    assert [s.grade.name for s in audit.segments] == ["FAILED", "BITWISE"]
    assert re.search(what, audit.segments[0].error)
    assert replay.open(tmp_path / "run", data=more_data()).verify().grade is replay.Grade.BITWISE
    refuse(replay.DataError, "does not hold its data", replay.open(tmp_path / "run").state, 7)


def test_data_that_changes_while_it_is_recorded_is_found(tmp_path):
    data = more_data()
    with tiny.recorder(
        tmp_path / "run", data=data, order=replay.Order.sequential(4, epochs=30), embed=False
    ) as recorder:
        recorder.advance(70)  # some of the next are read already
        data["y"][1] += 1
        recorder.advance()
    run = replay.open(tmp_path / "run", data=data)
    refuse(replay.DataError, r"batch of step 0 \(samples \[0, 1, 2, 3\]", run.state, 5)
    data["y"][1] -= 1
    run = replay.open(tmp_path / "run", data=data)
    assert run.verify(slice(0, 64)).grade is replay.Grade.BITWISE
    what = r"batch of step (80|96|[1-4]\d\d) \(samples \[0, 1, 2, 3\]"
    refuse(replay.DataError, what, lambda: list(run.trajectory()))


def test_a_changed_program_is_refused_by_the_line_or_the_leaf(intact, tmp_path):
    path = intact.copy(tmp_path)

    def with_program(program):
        return replay.open(path, program=program, data=tiny.DATA)

    assert bits(with_program(tiny.program()).state(9)) == intact.states[9]
    what = r"the program is not the one in .*: step has '.*6.0+e-02.* where the run has '.*5.0+e-02"
    refuse(replay.IdentityError, what, with_program, tiny.program(rate=0.06))
    deeper = {
        **tiny.WEIGHTS,
        "out": np.zeros(6, np.float32),
        "hidden": np.zeros((3, 6), np.float32),
    }
    what = r"state has params/hidden: float32\[3,6\], the run has params/hidden: float32\[3,5\]"
    refuse(replay.IdentityError, what, with_program, tiny.program(init=deeper))
    longer = {**tiny.WEIGHTS, "extra": np.zeros(2, np.float32)}
    refuse(replay.IdentityError, "state has params/extra", with_program, tiny.program(init=longer))


# ------------------------------------------------------------------------------ odd but recorded


def test_a_loss_that_is_no_number_is_told_and_replays_bit_for_bit(tmp_path):
    data = {name: column.copy() for name, column in tiny.DATA.items()}
    data["y"][9] = np.inf  # in step 2 of a sequential order
    order = replay.Order.sequential(4, epochs=3)
    with pytest.warns(RuntimeWarning, match="the mean loss of step 2 is inf; recording goes on"):
        run = tiny.record(tmp_path / "run", data=data, order=order)
    assert run.steps == 12
    finite = np.isfinite(run.history()["loss"])
    assert finite.tolist() == [True, True] + [False] * 10
    assert run.verify().grade is replay.Grade.BITWISE
    assert np.isnan(run.state(12).params["out"]).all()


def test_a_loss_that_is_no_number_ends_a_training_where_warnings_are_errors(tmp_path):
    data = {**tiny.DATA, "y": np.full(16, np.nan, np.float32)}
    with pytest.raises(RuntimeWarning, match="the mean loss of step 0 is nan"):
        tiny.record(tmp_path / "run", data=data)
    assert replay.open(tmp_path / "run").verify().grade is replay.Grade.BITWISE


@pytest.mark.parametrize(
    "source",
    [
        time.perf_counter,
        pytest.param(np.random.Generator(np.random.Philox(0)).random, marks=pytest.mark.full),
    ],
)
def test_a_loss_that_reads_the_clock_or_random_numbers_starts_at_numeric(tmp_path, source):
    program = tiny.program(lambda params, example, key: tiny.loss(params, example, key) + source())
    with pytest.warns(
        RuntimeWarning, match="will not replay bit for bit: the program, traced twice"
    ):
        run = tiny.record(tmp_path / "run", program, self_test=True)
    assert run.grade is replay.Grade.NUMERIC
    assert "NUMERIC" in repr(run)
    # What was traced first is what the run carries: it replays, but not from its source.
    assert run.verify().grade is replay.Grade.BITWISE


def test_ids_that_are_not_logged_are_made_again_and_compared(tmp_path, monkeypatch):
    run = tiny.record(tmp_path / "run", log_ids=False)
    assert not run.log.has_column("ids") and run.verify().grade is replay.Grade.BITWISE
    other = replay.Order.shuffled(tiny.BATCH, 6, 1).swap(0, 3).bind(tiny.SAMPLES)
    monkeypatch.setattr(Log, "order", other)
    run = replay.open(tmp_path / "run")
    refuse(replay.IdentityError, "does not give the sample ids of the recording", run.state, 3)
    assert [s.grade.name for s in run.verify().segments] == ["FAILED"] * 3

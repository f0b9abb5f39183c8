"""What is kept is never anything but what a replay would give, and nobody replays it again."""

import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time

import google_crc32c
import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import xarray
from hypothesis import strategies as st
from test_query import LABELS, Recorded, bits_of, both, questions, questions_of, tiny_truth
from tiny import compile_once  # noqa: F401  # the fixture is there for who imports it

import replay
from replay import cache, cli, execute, pieces, reuse
from replay.cache import Cache, Cell
from replay.query.expressions import Expression
from replay.query.nodes import restrict
from replay.store import KeyValues, Place

TESTS = pathlib.Path(__file__).parent


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """Let answers be kept, under a key of this test alone."""
    monkeypatch.setenv("REPLAY_CACHE_BYTES", str(2**27))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def run_of_200(tmp_path_factory):
    order = replay.Order.shuffled(batch_size=4, epochs=50, seed=3)
    run = tiny.record(tmp_path_factory.mktemp("long") / "run", order=order, checkpoints=20)
    return Recorded(run, tiny_truth(order), LABELS)


@pytest.fixture
def path(run_of_200, tmp_path):
    """A copy of a run of 200 steps, stored every 20; cells are of 64 steps."""
    shutil.copytree(run_of_200.run.path, tmp_path / "run")
    return tmp_path / "run"


def files(path):
    return sorted(file for file in (path / "cache").rglob("*") if file.is_file())


def asked(path, question, **options):
    """Ask somebody who has only the directory."""
    found = question(replay.open(path)).compute(**options)
    return bits_of(found), found.attrs["steps"], found.attrs["grade"]


def path_length(run):
    return abs(run.updates).sum("step")


# ------------------------------------------------------------------------------- asking again


def test_who_asks_again_replays_nothing_and_gets_the_same_bits(path):
    cold = replay.compute(*questions_of(replay.open(path)), cache=False)
    assert not (path / "cache").exists()
    first = replay.compute(*questions_of(replay.open(path)))
    run = replay.open(path)
    assert "kept from earlier questions" in path_length(run).explain()
    assert not re.search(r"replay [\d,]+ steps", path_length(run).explain())
    warm = replay.compute(*questions_of(run))
    assert (first[0].attrs["steps"], warm[0].attrs["steps"]) == (200, 0)
    for a, b, c in zip(cold, first, warm, strict=True):
        assert bits_of(a) == bits_of(b) == bits_of(c)
        assert a.attrs["grade"] == b.attrs["grade"] == c.attrs["grade"] == "BITWISE"
        assert a.attrs["plan"] == c.attrs["plan"]


@pytest.mark.parametrize(
    "number",
    [n if n in (0, 3) else pytest.param(n, marks=pytest.mark.full) for n in range(10)],
)
def test_of_overlapping_ranges_only_the_rest_is_replayed(path, number):
    question = questions_of(replay.open(path))[number]
    if "step" not in {scan.walked for scan in question.plan.scans()}:
        half = _states(question)
    else:
        half = _steps(question)
    half.compute()
    told = question.explain()
    found, cold = question.compute(), question.compute(cache=False)
    assert bits_of(found) == bits_of(cold)
    ranked = number in (3, 4)  # their cells are of 512 steps where merging has no order
    assert found.attrs["steps"] < 200 or ranked
    assert f"replay {found.attrs['steps']} steps" in told


@pytest.mark.parametrize("ask", [lambda x: x.max("step"), lambda x: x.sel(step=[1])])
def test_few_weights_of_samples_are_not_cut_from_what_is_kept(tmp_path, ask):
    """They are summed by themselves, and may have other bits than in a product."""

    def over_time(params, example, key):
        return jnp.sin(example["x"] @ params["w"]).sum()

    random = np.random.Generator(np.random.Philox(1))
    data = {"x": random.normal(size=(16, 32, 64)).astype(np.float32)}
    weights = {"w": random.normal(size=(64, 48)).astype(np.float32)}
    path = tmp_path / "run"
    run = tiny.record(path, tiny.program(over_time, weights, rate=1e-4), data)
    ask(run.sample_grads["w"]).compute()
    narrow = ask(replay.open(path).sample_grads["w"].sel(weight=[0, 5, 17]))
    assert bits_of(narrow.compute()) == bits_of(narrow.compute(cache=False))


def _narrowed(expression, **where):
    """Ask for other steps of everything that a question scans."""
    plan = expression.plan
    (dim, steps), *_ = where.items()
    scanned = {scan.walked for scan in plan.scans()}
    assert scanned == {dim}

    def change(node):
        if node.walked == dim:
            return restrict(node, dim, steps)
        return node.rebuilt(change)

    return Expression(change(plan), expression.source)


def _steps(expression):
    return _narrowed(expression, step=np.arange(0, 140))


def _states(expression):
    return _narrowed(expression, state=np.arange(0, 140))


def test_a_tensor_a_slice_of_weights_and_coarser_windows_are_cut_from_what_is_kept(path):
    run = replay.open(path)
    replay.compute(
        path_length(run),
        run.weights.norm("weight"),
        abs(run.sample_grads).sum(("step", "position")),
        run.sample_grads.groupby(LABELS).sum(),
        run.updates.coarsen(step=64).sum("step"),
        run.grads.mean("step"),
        run.grads.sel(step=slice(0, 64)),
    )
    run = replay.open(path)
    for question in (
        path_length(run).sel(tensor="out"),
        abs(run.updates["hidden", 1:, ::2]).sum("step"),
        abs(run.sample_grads["hidden"]).sum(("step", "position")),
        abs(run.sample_grads["hidden", 2, 3]).sum(("step", "position")),
        run.sample_grads["out", 1:3].groupby(LABELS).sum(),
        run.updates.sum("step"),
        run.updates["hidden"].coarsen(step=128).sum("step"),
        run.grads["out", 3].mean("step"),
        run.grads["hidden", 0].sel(step=slice(0, 64)),
        run.weights.norm("weight").sel(state=slice(64, 128)).max(),
    ):
        found, cold = question.compute(), question.compute(cache=False)
        assert bits_of(found) == bits_of(cold), question
        assert found.attrs["steps"] in (0, 64), question  # of states: another question


def test_weights_whose_bits_depend_on_their_neighbours_are_not_cut_from_what_is_kept(path):
    """XLA takes a logarithm otherwise at the end of an array than in its middle."""

    def asked(grads):
        return np.log(abs(grads)).sum("step"), np.arctan(grads).sel(step=slice(0, 64))

    run = replay.open(path)
    replay.compute(*asked(run.grads))
    for chosen in (run.grads["hidden", 0], run.grads["hidden", 1:, ::2], run.grads["out", 2:]):
        for question in asked(chosen):
            assert bits_of(question.compute()) == bits_of(question.compute(cache=False))


def test_a_selection_of_every_third_step_is_not_mistaken_for_all_of_them(path):
    run = replay.open(path)
    for stride in (1, 3, 1, 2):
        for question in (
            run.grads.sel(step=slice(0, 200, stride)).sum("step"),
            run.sample_losses.sel(step=slice(0, 200, stride)).diff("step").max("step"),
            run.weights.sel(state=slice(0, 200, stride)).max("state"),
        ):
            assert bits_of(question.compute()) == bits_of(question.compute(cache=False))


def test_what_looks_back_at_the_step_before_does_so_across_what_is_kept(path):
    run = replay.open(path)
    run.sample_losses.diff("step").max("position").sel(step=slice(64, 128)).compute()
    question = run.sample_losses.diff("step").max("position")
    assert bits_of(question.compute()) == bits_of(question.compute(cache=False))


def test_what_stops_early_stops_at_what_is_kept(path):
    run = replay.open(path)
    losses = run.sample_losses.max("position")
    worst = float(losses.compute()["value"].max())
    cold = (losses >= worst).first("step").compute(cache=False)
    found = (losses >= worst).first("step").compute()
    again = (losses >= worst).first("step").compute()
    assert int(cold) == int(found) == int(again)
    assert again.attrs["steps"] == 0 and again.attrs["grade"] == cold.attrs["grade"]


def test_other_labels_of_as_many_samples_are_another_question(path):
    run = replay.open(path)
    for labels in (LABELS, np.roll(LABELS, 1)):
        question = run.sample_losses.groupby(labels).sum()
        found, cold = question.compute(), question.compute(cache=False)
        assert bits_of(found) == bits_of(cold) and found.attrs["steps"] == 200
        assert question.compute().attrs["steps"] == 0


def test_other_samples_are_told_apart_by_what_they_hold(path):
    test = {name: rows[:6] for name, rows in tiny.DATA.items()}
    changed = {**test, "y": test["y"] + 1}
    run = replay.open(path)
    found = [
        asked(path, lambda run, data=data: run.on(data).sample_losses.sel(state=30).mean())
        for data in (test, changed, test)
    ]
    assert found[0][0] == found[2][0] != found[1][0]
    assert [steps for _, steps, _ in found] == [10, 10, 0]
    cold = run.on(changed).sample_losses.sel(state=30).mean().compute(cache=False)
    assert found[1][0] == bits_of(cold)


@hypothesis.settings(
    max_examples=5 if hypothesis.settings.default.max_examples < 100 else 200,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(questions(), st.integers(0, 200), st.integers(0, 2**32 - 1))
def test_any_question_has_the_same_bits_cold_warm_half_warm_and_after_losses(
    run_of_200,
    path,
    drawn,
    cut,
    seed,
):
    quantity, chain = drawn
    question, _ = both(run_of_200._replace(run=replay.open(path)), quantity, chain)
    cold = question.compute(cache=False)
    walked = {scan.walked for scan in question.plan.scans()}
    if walked <= {"step"} and not any(kind == "sel" for kind, *_ in chain):
        half, _ = both(
            run_of_200._replace(run=replay.open(path)), quantity,
            [("sel", "step", slice(None, cut)), *chain],
        )  # fmt: skip
        half.compute()
    half_warm, warm = question.compute(), question.compute()
    assert bits_of(cold) == bits_of(half_warm) == bits_of(warm)
    assert warm.attrs["steps"] == 0 or not cold.attrs["steps"]
    random = np.random.Generator(np.random.Philox(seed))
    for file in files(path):
        fate = random.integers(0, 4)
        if fate == 0:
            file.unlink()
        elif fate == 1 and file.stat().st_size:
            data = bytearray(file.read_bytes())
            data[random.integers(0, len(data))] ^= 1 << random.integers(0, 8)
            file.write_bytes(data)
    assert bits_of(question.compute()) == bits_of(cold)


@pytest.mark.parametrize("where", ["a path", "memory://cache/"])
def test_arrays_of_all_kinds_come_back_from_any_place(tmp_path, where):
    place = Place(tmp_path / "run" if where == "a path" else where)
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    arrays = [
        values, values.T, values[:0], np.asarray(3, np.int64), values > 5,
        values.astype("bfloat16"), values.astype(np.complex64), np.arange(2**19),
    ]  # fmt: skip

    def same(one, other):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())

    kept = Cache(place, "both", 2**27)
    dims = ["x", "y", "z"]
    kept.keep("plan", {"a": [1]}, [(x, dims[: x.ndim], {}) for x in arrays], about="", seconds=1.0)
    shelf = kept.shelf("family", ["w/ ", "v/ "], "about", cuts=False)
    shelf.write("0-all", Cell({"each": [[1], [2]]}, [[jnp.asarray(values)], arrays]), 1.0)
    kept.flush()
    again = Cache(place, "both", 2**27)
    found = again.answer("plan")
    assert found is not None and found[0] == {"a": [1]}
    one = again.shelf("family", ["v/ "], "about", cuts=False)
    ((where_it_is, *_),) = one.there().values()
    cell = one.read(where_it_is)
    assert cell is not None and cell.plain == {"each": [[2]]}
    for x, y, z in zip(arrays, found[1], cell.parts[0], strict=True):
        same(x, y)
        same(x, z)
    assert Cache(place, "another", 2**27).answer("plan") is None


# ---------------------------------------------------------------------- who is not to be trusted


def test_a_flipped_bit_anywhere_is_never_an_answer(path):
    question = lambda run: run.updates.coarsen(step=64).norm("step")  # noqa: E731
    cold, _, _ = asked(path, question)
    pristine = {file: file.read_bytes() for file in files(path)}
    random = np.random.Generator(np.random.Philox(3))
    answers = [file for file in pristine if "answers" in file.parts]
    for _ in range(20):
        for file in answers:
            file.unlink(missing_ok=True)  # what remains are the cells
        file = [f for f in pristine if f not in answers][
            random.integers(len(pristine) - len(answers))
        ]
        data = bytearray(pristine[file])
        data[random.integers(len(data))] ^= 1 << random.integers(8)
        file.write_bytes(data)
        assert asked(path, question)[0] == cold
        for file, data in pristine.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    for file in answers:
        data = bytearray(pristine[file])
        for place in random.integers(0, len(data), 3):
            file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            assert asked(path, question)[0] == cold
        file.write_bytes(data)


def test_a_changed_answer_with_the_right_checksum_is_no_answer(path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 16)  # so that every array has several
    cold, _, _ = asked(path, path_length)
    (file,) = (path / "cache" / "answers").glob("*/0/c/0")
    data = file.read_bytes()
    assert len(data) == 15 * 4 + 4
    for changed in (
        data[16:32] + data[:16] + data[32:60],
        bytes(16) + data[16:60],
        data[:44] + data[48:60] + data[44:48],
        bytes([data[0] ^ 1]) + data[1:60],
    ):
        file.write_bytes(changed + struct.pack("<I", google_crc32c.value(changed)))
        (group,) = (path / "cache" / "answers").iterdir()
        read = xarray.open_zarr(group, consolidated=False)["0"].values  # which the checksum allows
        assert read.tobytes() == changed
        found, steps, _ = asked(path, path_length)
        assert found == cold and steps == 0  # from its cells


def test_what_an_earlier_version_has_kept_is_listed_and_deleted_but_no_answer(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_VERSION", 1)
        cold, _, _ = asked(path, path_length)
    notes = json.loads(next((path / "cache" / "answers").glob("*/zarr.json")).read_text())
    notes["attributes"]["tag"] = notes["attributes"].pop("digests")[0]
    next((path / "cache" / "answers").glob("*/zarr.json")).write_text(json.dumps(notes))
    earlier = files(path)
    assert asked(path, path_length)[:2] == (cold, 200)
    run = replay.open(path)
    assert sorted(entry.kind for entry in run.cache.entries()) == [*["answer"] * 2, *["cells"] * 2]
    run.cache.clear()
    assert not any(file.exists() for file in earlier)


def test_a_ranking_is_kept_in_as_few_bytes_as_hold_it_and_comes_back_as_it_was(path):
    run = replay.open(path)
    ranked = abs(run.sample_grads.sel(step=slice(100, 104))).top_k(20, dim=("step", "position"))
    cold = ranked.compute(cache=False)
    assert (cold["out.step"].values < 0).any()  # of 16 samples, the last ranks are nobody's
    ranked.compute()
    (group,) = (path / "cache" / "answers").iterdir()
    kept = xarray.open_zarr(group, consolidated=False)
    fields = [(x.attrs.get("field"), x.dtype.name) for x in kept.data_vars.values()]
    assert sorted(fields) == [
        ("number", "int8"), ("number", "int8"), ("step", "int8"), ("step", "int8"),
        ("value", "float32"), ("value", "float32"),
    ]  # fmt: skip
    for question in (ranked, ranked.sel(rank=2)):  # the other is cut out of what is kept
        warm, again = question.compute(), question.compute(cache=False)
        assert warm.attrs["steps"] == 0 and bits_of(warm) == bits_of(again)
    wide = np.asarray([-1, 40_000], np.int32), np.asarray([0, 300], np.int32)
    assert [reuse._narrow(x).dtype.name for x in wide] == ["int32", "uint16"]


def test_what_a_stranger_has_put_there_is_as_good_as_missing(path, tmp_path, monkeypatch):
    cold, steps, _ = asked(path, path_length)
    assert asked(path, path_length)[1] == 0 < steps
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "somebody else"))
    assert asked(path, path_length) == (cold, steps, "BITWISE")
    secret = tmp_path / "home" / "jax-replay" / "secret"
    assert secret.stat().st_size == 32 and secret.stat().st_mode & 0o077 == 0


def test_what_departs_from_its_run_is_not_kept(path, monkeypatch):
    run = replay.open(path)
    column = run.log.column

    def other_losses_at_step_5(name, start, stop):
        found = column(name, start, stop)
        return np.where(np.arange(start, stop) == 5, ~found, found) if name == "witness" else found

    monkeypatch.setattr(run.log, "column", other_losses_at_step_5)
    with pytest.warns(UserWarning, match="not every step is exact"):
        found = path_length(run).compute(exact=False)
    assert found.attrs["grade"] == "NUMERIC" and files(path) == []
    with pytest.raises(replay.DivergenceError):
        abs(run.updates.sel(step=slice(0, 64))).sum("step").compute()


def test_of_what_has_stopped_early_no_half_a_cell_is_kept(path):
    run = replay.open(path)
    grads = abs(run.grads.sel(step=slice(0, 80)))  # a cell of 64 steps, and what audits it
    most = {
        name: grads[name].max("weight").compute(cache=False)["value"].values
        for name in ("hidden", "out")
    }
    # A limit that one tensor exceeds soon, and the other later in that cell and never after it.
    later, limit = next(
        (late, limit)
        for soon, late in (("hidden", "out"), ("out", "hidden"))
        for step in range(1, 64)
        if (limit := most[late][step] * 0.999) > max(most[late][:step].max(), most[late][64:].max())
        and most[soon][:step].max() > limit
    )
    found, never = replay.compute((grads > limit).any(), (grads > 1e9).any())
    assert bool(found) and not bool(never) and found.attrs["steps"] == 80
    assert bool((grads[later] > limit).any().compute())


def test_notes_that_make_no_sense_are_no_answer(path):
    cold, _, _ = asked(path, path_length)
    (notes,) = (path / "cache" / "answers").glob("*/zarr.json")
    good = json.loads(notes.read_text())
    for name, value in {
        "arrays": 5, "bytes": None, "seconds": "x", "digests": "", "plain": "", "mine": None,
    }.items():  # fmt: skip
        bad = {**good, "attributes": {**good["attributes"], name: value}}
        notes.write_text(json.dumps(bad))
        assert asked(path, path_length)[0] == cold
        cli.main(["cache", "ls", str(path)])
    notes.write_text("[" * 100_000)
    assert asked(path, path_length)[0] == cold
    larger = json.loads(json.dumps(good))
    larger["attributes"]["arrays"][0][1] = [2**40]
    notes.write_text(json.dumps(larger))
    assert asked(path, path_length)[0] == cold
    (parts,) = (path / "cache" / "cells").rglob("parts")
    parts.write_bytes(bytes(32) + b"\x81\xa5parts\x90")
    assert cli.main(["cache", "ls", str(path)]) == 0


def test_a_kept_cell_under_another_name_is_not_taken_for_it(path):
    run = replay.open(path)
    run.grads.sel(step=slice(0, 140)).sum("step").compute()
    cells = [file for file in files(path) if "~" in file.name]
    first, _, second = sorted(cells, key=lambda file: file.name)  # two in a row add up the same
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    shutil.rmtree(path / "cache" / "answers")
    question = run.grads.sel(step=slice(0, 140)).sum("step")
    assert bits_of(question.compute()) == bits_of(question.compute(cache=False))


def test_a_run_that_cannot_be_written_is_asked_all_the_same(path):
    (path / "cache").write_text("no directory")
    found, steps, _ = asked(path, path_length)
    assert (steps, found) == (200, asked(path, path_length, cache=False)[0])


def test_another_run_in_the_same_place_is_another_run(path, tmp_path):
    asked(path, path_length)
    other = tiny.record(tmp_path / "other", program=tiny.program(rate=0.04), checkpoints=8)
    shutil.copytree(path / "cache", pathlib.Path(other.path, "cache"))
    assert asked(other.path, path_length)[1] == 24


# ------------------------------------------------------------------------------------ its size


def test_the_budget_holds_and_what_saves_little_for_its_size_goes_first(path, monkeypatch):
    run = replay.open(path)
    for stride in (1, 2, 3, 5, 7):
        run.sample_grads.sel(step=slice(0, 200, stride)).max("position").compute()
    before = sum(file.stat().st_size for file in files(path))
    monkeypatch.setenv("REPLAY_CACHE_BYTES", "20000")
    replay.open(path).sample_grads.sel(step=slice(0, 200, 11)).max("position").compute()
    after = sum(file.stat().st_size for file in files(path))
    assert after < 40_000 < before  # what TensorStore writes beside the values comes on top
    monkeypatch.setenv("REPLAY_CACHE_BYTES", "0")
    replay.open(path).grads.max("step").compute()
    assert sum(file.stat().st_size for file in files(path)) == after
    monkeypatch.setenv("REPLAY_CACHE_BYTES", "much")
    with pytest.raises(replay.DataError, match="REPLAY_CACHE_BYTES is 'much'"):
        replay.open(path).grads.max("step").compute()


# --------------------------------------------------------------------------- several processes

ASK = """
import os, sys, time
sys.path.insert(0, {tests!r})
import replay
run = replay.open({path!r})
print("ready", flush=True)
kind = int(sys.argv[1]) if len(sys.argv) > 1 else 0
sel = slice(10 * kind, 200 - 5 * kind)
total = abs(run.updates.sel(step=sel)).sum("step").compute()
ranks = abs(run.sample_grads.sel(step=sel)).top_k(2, dim=("step", "position")).compute()
losses = run.sample_losses.max("position").compute()
import hashlib
print([hashlib.sha256(b"".join(v.values.tobytes() for v in x.variables.values())).hexdigest()
       for x in (total, ranks, losses)])
"""


def start(path, *arguments):
    source = ASK.format(tests=str(TESTS), path=str(path))
    return subprocess.Popen(
        [sys.executable, "-c", source, *map(str, arguments)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
    )  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("count", [2, 8])
def test_processes_that_ask_overlapping_questions_at_once_agree(path, count):
    together = [start(path, number // 2) for number in range(count)]
    found = [process.communicate()[0].splitlines()[-1] for process in together]
    assert [process.returncode for process in together] == [0] * count
    shutil.rmtree(path / "cache")
    for number in range(0, count, 2):
        alone = start(path, number // 2).communicate()[0].splitlines()[-1]
        assert set(found[number : number + 2]) == {alone}


def test_a_killed_question_goes_on_from_what_it_had(path):
    process = start(path)
    while process.poll() is None and len([f for f in files(path) if "~" in f.name]) < 2:
        time.sleep(1e-3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    shutil.rmtree(path / "cache" / "answers", ignore_errors=True)
    found, steps, _ = asked(path, path_length)
    assert found == asked(path, path_length, cache=False)[0]
    assert steps < 200


def test_ctrl_c_keeps_the_cells_that_are_finished(path, monkeypatch):
    taken, take = [], execute.Local

    def interrupted(*arguments):
        taken.append(arguments[1])
        if len(taken) > 150:
            raise KeyboardInterrupt
        return take(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(execute, "Local", interrupted)
        with pytest.raises(KeyboardInterrupt):
            asked(path, path_length)
    found, steps, _ = asked(path, path_length)
    assert (found, steps) == (asked(path, path_length, cache=False)[0], 80)


def test_whoever_flushes_waits_for_all_that_was_kept_before(path, monkeypatch):
    write, pause = KeyValues.write_arrays, threading.Event()

    def slowly(self, *arguments):
        pause.wait(0.1)
        return write(self, *arguments)

    monkeypatch.setattr(KeyValues, "write_arrays", slowly)
    kept = Cache(Place(path), "both", 2**24)
    plans, together, lost = ["one", "two", "three"], threading.Barrier(3), []

    def work(plan):
        value = (np.ones(3), ["a"], {})
        kept.keep(plan, {}, [value], about=plan, seconds=1.0)
        together.wait()
        kept.flush()
        lost.extend(plan for plan in plans if not kept.has(plan))

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(work, plans))
    assert lost == []


def test_an_executor_shares_what_is_kept(path):
    run = replay.open(path)
    cold = path_length(run).compute(cache=False)
    abs(run.updates.sel(step=slice(0, 80))).sum("step").compute()
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        found = path_length(run).compute(executor=executor)
        assert bits_of(found) == bits_of(cold) and found.attrs["steps"] < 200
        assert path_length(run).compute(executor=executor).attrs["steps"] == 0


# ------------------------------------------------------------------------------------ as it lies


def test_a_kept_answer_opens_in_xarray(path):
    run = replay.open(path)
    found = path_length(run).compute()
    (group,) = (path / "cache" / "answers").iterdir()
    opened = xarray.open_zarr(group, consolidated=False)
    assert [opened[name].attrs["tensor"] for name in ("0", "1")] == ["hidden", "out"]
    assert opened["0"].values.tobytes() == found["hidden"].values.tobytes()
    assert "scan" in opened.attrs["plan"]


def test_what_is_kept_is_listed_and_deleted(path, capsys):
    run = replay.open(path)
    assert cli.main(["cache", "ls", str(path)]) == 0
    assert capsys.readouterr().out == "0 bytes kept, answers that took 0 s\n"
    path_length(run).compute()
    run.sample_losses.max().compute()
    kinds = [(entry.kind, entry.count) for entry in run.cache.entries()]
    assert sorted(kinds) == [("answer", 1), ("answer", 2), ("cells", 4), ("cells", 4)]
    assert all(entry.bytes > 0 and entry.seconds > 0 for entry in run.cache.entries())
    assert cli.main(["cache", "ls", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "sum over step, of map abs, of scan" in printed and "4 cells" in printed
    assert cli.main(["cache", "clear", str(path)]) == 0
    assert capsys.readouterr().out.endswith(" deleted\n")
    assert run.cache.entries() == [] and files(path) == []
    assert path_length(run).compute().attrs["steps"] == 200

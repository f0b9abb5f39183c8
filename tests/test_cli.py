import base64
import hashlib
import itertools
import json
import os
import pathlib
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import replay
from replay import cli, demo, prices, questions
from replay.log import Log
from replay.store import Place

COMMANDS = (
    "demo", "ls", "show", "verify", "state", "plot", "fork", "tree", "ask", "compare", "sql",
    "explain", "calibrate", "index", "thin", "cache",
)  # fmt: skip
ASKED = ("samples", "weights", "explosion", "zero", "compare")


def loss(params, example, key):
    near = jax.random.normal(key) * 0.1 + params["scale"].astype(jnp.float32)
    return (near * jnp.sum(params["w"] * example) - 1.0) ** 2


def plain_loss(params, example, key):
    return (jax.random.normal(key) * 0.1 + jnp.sum(params["w"] * example) - 1.0) ** 2


PLAIN = {"w": np.ones(3, np.float32)}
INITIAL = {"w": np.ones(3, np.float32), "scale": np.asarray(1, ml_dtypes.bfloat16)}
SAMPLES = np.linspace(0.1, 1.0, 24, dtype=np.float32).reshape(8, 3)


def record(path, *, name="tiny", initial=INITIAL, function=loss, epochs=33, order=None, **options):
    """Record four steps an epoch; the test of the test is elsewhere."""
    program = replay.Program(initial, function, optax.sgd(0.01, momentum=0.9), name=name)
    order = replay.Order.shuffled(2, epochs, seed=0) if order is None else order
    options = {"key": jax.random.key(0), "checkpoints": 50, "self_test": False} | options
    replay.record(path, program, SAMPLES, order, **options)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("recorded") / "digits"
    record(path)
    return path


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty working directory, and a user who remembers nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def run(recorded) -> str:
    """`runs/digits`, a run of one's own below the working directory."""
    shutil.copytree(recorded, "runs/digits")
    return "runs/digits"


@pytest.fixture(scope="session")
def plainly_recorded(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("recorded") / "digits"
    record(path, initial=PLAIN, function=plain_loss)
    return path


@pytest.fixture
def plain(plainly_recorded) -> str:
    """`runs/digits` of float32 weights in one tensor."""
    shutil.copytree(plainly_recorded, "runs/digits")
    return "runs/digits"


def ask(capsys, *words) -> tuple[int, str, str]:
    """Run a command; return its exit code, what it printed, and what it printed to stderr."""
    code = cli.main(list(map(str, words)))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def row(printed: str, name: str) -> str:
    """Return what stands behind a name in a table of two columns."""
    (line,) = [line for line in printed.splitlines() if line.startswith(f"{name}  ")]
    return line.removeprefix(name).strip()


def damage(path: str, group: str, name: str, change) -> None:
    """Write changed values, with checksums that agree, over an array of a run."""
    log = Log(Place(path))
    names = [spec.name for spec in log.header.arrays[group]]
    array = log.array(group, names.index(name))
    written = len(log.durable.checkpoints) if group == "states" else log.durable.steps
    for start in range(0, written, array.spec.chunk[0]):
        values = array.read(slice(start, min(start + array.spec.chunk[0], written))).copy()
        change(values, start)
        array.write(start, values)


def change_the_witness_of_step_60(path):
    def change(values, start):
        values[60] ^= np.uint64(1)

    damage(path, "steps", "steps/witness", change)


def change_a_weight_of_state_50(path):
    def change(values, row):
        if row == 1:
            values[...] += 1

    damage(path, "states", "states/0", change)


# ------------------------------------------------------------------------------ help and errors


def test_the_help_lists_every_command_with_an_example(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"{{{','.join(COMMANDS)}}}" in printed
    assert [
        line.partition("Example: replay ")[2].split()[0]
        for line in printed.splitlines()
        if "Example: replay" in line
    ] == [*COMMANDS]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(x, marks=pytest.mark.full) if x in ("demo", "calibrate") else x
        for x in COMMANDS
    ],
)
def test_the_example_in_the_help_of_a_command_works_as_it_stands(
    command, plain, capsys, monkeypatch
):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    example, *of_questions = [line for line in lines if line.startswith("Example: ")]
    assert len(of_questions) == (len(ASKED) if command == "ask" else 0)
    replay_, *words = shlex.split(example.removeprefix("Example: "))
    assert (replay_, words[0]) == ("replay", command)

    whole = demo.main
    monkeypatch.setattr(demo, "main", lambda directory: whole(directory, epochs=1))
    code, printed, errors = ask(capsys, *words)
    assert (code, errors) == (0, "")
    assert printed


def test_calibrate_shows_what_it_has_measured_and_later_processes_know_it(capsys, monkeypatch):
    monkeypatch.setattr(prices, "PRICES", {"element": prices.PRICES["element"]})
    code, printed, errors = ask(capsys, "calibrate")
    assert (code, errors) == (0, "")
    assert "element [ns]" in printed and "kept for this machine" in printed
    found, known = prices.prices()
    assert known and f"{1e6 * found['element'].call:.3g}" in printed


def test_compare_says_where_runs_part_and_how_far_apart_they_are(run, capsys):
    order = replay.Order.shuffled(2, 33, seed=0).swap(70, 71)
    record("runs/swapped", order=order)
    np.save("test.npy", SAMPLES[:3] + 1)
    words = ("compare", run, "runs/swapped", "--test", "test.npy", "--top", 2)
    code, printed, errors = ask(capsys, *words, "--plot", "compared.png")
    assert (code, errors) == (0, "")
    first, *lines = printed.splitlines()
    assert first.startswith(
        "digits and swapped: samples, or their factors, first differ at step 70"
    )
    a, b = replay.open(run), replay.open("runs/swapped")
    flat = [np.concatenate([np.ravel(x).astype(np.float64) for x in state.params.values()])
            for state in (a.state(-1), b.state(-1))]  # fmt: skip
    (last,) = [line.split() for line in lines if line.split()[:2] == ["132", "swapped"]]
    assert f"{np.linalg.norm(flat[0] - flat[1]):.4g}" in last
    assert "held-out samples whose losses differ most at state 132" in lines
    assert lines[-2:] == ["BITWISE: 0 steps replayed", "the picture is in compared.png"]
    assert pathlib.Path("compared.png").read_bytes().startswith(b"\x89PNG")
    code, printed, _ = ask(capsys, *words, "--state", 60, "--explain")
    assert code == 0 and "10 steps of runs/digits (states 0 to 0, 50 to 60)" in printed


@pytest.mark.parametrize("question", ASKED)
def test_the_example_in_the_help_of_a_question_works_as_it_stands(question, plain, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["ask", plain, question, "--help"])
    assert ended.value.code == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    (example,) = [line for line in lines if line.startswith("Example: ")]
    words = shlex.split(example.removeprefix("Example: replay "))
    assert words[:3] == ["ask", "runs/digits", question]
    code, printed, errors = ask(capsys, *words)
    assert (code, errors) == (0, "")
    assert (
        printed.splitlines()[-1].partition(": ")[2].partition(" ")[2].startswith("steps replayed")
    )


def test_the_help_of_ask_lists_every_question(capsys):
    with pytest.raises(SystemExit):
        cli.main(["ask", "--help"])
    assert f"{{{','.join(ASKED)}}}" in capsys.readouterr().out


def test_an_error_is_printed_in_its_three_parts(capsys):
    code, printed, errors = ask(capsys, "show", "nowhere")
    assert (code, printed) == (2, "")
    assert errors == (
        "error: nowhere is not a run: it has no run.msgpack\n"
        "  why: that file names the program, the order and the layout of everything else\n"
        "  fix: check the path; `replay ls DIR` lists the runs below a directory\n"
    )


def test_a_word_that_is_not_known_ends_with_2(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["shwo", "runs/digits"])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["ls", "nowhere"], "nowhere is not a directory"),
        (["verify", "runs/digits", "--steps", "ten"], "--steps ten"),
        (["verify", "runs/digits", "--steps", "1:2:3"], "--steps 1:2:3"),
        (["verify", "runs/digits", "--steps", ""], "--steps "),
        (["verify", "runs/digits", "--steps", "132:"], "runs/digits has steps 0 to 131, not 132:"),
        (["verify", "runs/digits", "--steps", "9:3"], "runs/digits has steps 0 to 131, not 9:3"),
        (["state", "runs/digits", "133", "--out", "s.npz"], "runs/digits has states 0 to 132, not"),
        (["state", "runs/digits", "7", "--out", "no/s.npz"], "no is not a directory that can be"),
        (["state", "runs/digits", "7", "--out", "runs"], "runs exists"),
        (["plot", "runs/digits", "--out", "loss.doc"], "loss.doc does not end in a known format"),
        (["plot", "runs/digits", "--out", "runs"], "runs exists"),
        (["thin", "runs/digits", "--keep", "1"], "1 states are to be kept"),
        (["fork", "runs/digits", "runs/b", "--at", "133"], "a fork at step 133 of runs/digits"),
        (["fork", "runs/digits", "runs/b", "--weigh", "a=1"], "--weigh: 'a' is not a number"),
        (["fork", "runs/digits", "runs/b", "--weigh", "1"], "--weigh: '' is not a number"),
        (["fork", "runs/digits", "runs/b", "--reverse", "x"], "--reverse: 'x' is not a number"),
        (["fork", "runs/digits", "runs/b", "--drop", "9"], "sample_weights: there is no sample 9"),
        (["fork", "runs/digits", "--detach"], "runs/digits is not a fork"),
        (["fork", "runs/digits", "--at", "5"], "a change of runs/digits, and no FORK"),
        (["fork", "runs/digits", "--no-train"], "a change of runs/digits, and no FORK"),
        (["tree", "nowhere"], "nowhere is not a directory"),
        (["ask", "nowhere", "weights"], "nowhere is not a run"),
        (["ask", "runs/digits", "weights", "--plot", "x.doc"], "x.doc does not end in a known"),
        (["ask", "runs/digits", "weights", "--plot", "no/x.png"], "no is not a directory that"),
        (["ask", "runs/digits", "weights", "--top", "0"], "top is 0"),
        (["ask", "runs/digits", "samples", "--epoch", "33"], "there is no epoch 33"),
        (["ask", "runs/digits", "samples", "--by-class"], "the data has no leaf 'label' that"),
        (["ask", "runs/digits", "zero", "--weight", "w"], "w is not one weight"),
        (["ask", "runs/digits", "compare", "nowhere"], "nowhere is not a run"),
        (["ask", "runs/digits", "explosion", "--share", "2"], "more than a share of 2.0 of all"),
        (["compare", "runs/digits"], "1 run is compared"),
        (["compare", "runs/digits", "nowhere"], "nowhere is not a run"),
        (["compare", "runs/digits", "runs/digits", "--state", "133"], "the runs are compared at"),
        (["compare", "runs/digits", "runs/digits", "--plot", "x.doc"], "x.doc does not end in a"),
        (["compare", "runs/digits", "runs/digits", "--test", "no.npz"], "no.npz cannot be read"),
    ],
)
def test_what_cannot_be_answered_ends_with_2_and_writes_nothing(words, error, run, capsys):
    code, printed, errors = ask(capsys, *words)
    assert (code, printed) == (2, "")
    assert errors.startswith(f"error: {error}")
    assert os.listdir() == ["runs"]


# ----------------------------------------------------------------------------------- ls and show


def test_ls_finds_every_run_below_a_directory_and_names_what_it_cannot_open(run, capsys):
    shutil.copytree(run, "runs/deeper/copy")
    shutil.copytree(run, "runs/broken")
    pathlib.Path("runs/broken/run.msgpack").write_bytes(b"no run")
    code, printed, _ = ask(capsys, "ls", "runs")
    assert code == 0
    _, head, _, *rows = printed.split("\n")
    assert head.split() == [
        *("run", "program", "steps", "weights", "bytes", "closed", "created", "grade")
    ]
    assert [line.split()[:4] for line in rows[:2]] == [
        ["deeper/copy", "tiny", "132", "4"],
        ["digits", "tiny", "132", "4"],
    ]
    assert [line.split()[-1] for line in rows[:2]] == ["UNAUDITED", "UNAUDITED"]
    assert rows[-2].startswith("broken cannot be opened: runs/broken: run.msgpack is damaged")


def test_ls_does_not_look_for_runs_inside_of_runs(run, capsys):
    shutil.copytree(run, "copy")
    shutil.copytree("copy", f"{run}/cache/inner")
    assert "inner" not in ask(capsys, "ls", "runs")[1]


def test_ls_says_that_there_are_no_runs(capsys):
    assert ask(capsys, "ls") == (0, "there are no runs below .\n", "")


def test_ls_of_a_run_lists_that_run(run, capsys):
    assert ask(capsys, "ls", run)[1].split("\n")[3].split()[:2] == ["runs/digits", "tiny"]


def test_show_says_what_a_run_is_and_what_it_takes(run, capsys):
    code, printed, _ = ask(capsys, "show", run)
    assert code == 0
    assert row(printed, "run") == "runs/digits"
    assert row(printed, "grade") == "UNAUDITED"
    assert row(printed, "program") == "tiny, dispatched by step"
    assert row(printed, "steps").startswith("132 of 132, closed, recorded 20")
    assert row(printed, "batches") == "2 samples each"
    assert row(printed, "order").startswith("Order.shuffled(batch_size=2, epochs=33, seed=0)")
    assert row(printed, "data") == "embedded"
    assert row(printed, "stored states") == "4 (0, 50, 100, 132)"
    assert f"jax {jax.__version__}, " in row(printed, "recorded with")
    assert ", threads " in row(printed, "recorded with")
    assert row(printed, "weights") == "4 in 2 tensors"
    assert "scale: bfloat16[]" in printed and "w: float32[3]" in printed
    losses = replay.open(run).history()["loss"]
    assert f"first {losses[0]:.4g}, last {losses[-1]:.4g}, least {losses.min():.4g}" in printed
    size = sum(file.stat().st_size for file in pathlib.Path(run).rglob("*") if file.is_file())
    assert row(printed, "bytes").startswith(f"{size / 1000:.1f} kB (states ")
    # 132 steps of 2 samples and 4 weights of 4 bytes
    assert "4.2 kB would hold every weight at every sample, 0 times that" in printed


def test_show_lists_the_first_twenty_tensors(capsys):
    initial = {f"w{i:02}": np.ones(1, np.float32) for i in range(23)}
    record("run", initial=initial, epochs=1, function=lambda p, x, key: p["w07"][0] * x[0])
    printed = ask(capsys, "show", "run")[1]
    assert row(printed, "weights") == "23 in 23 tensors"
    assert "w19: float32[1]" in printed and "w20" not in printed
    assert "and 3 more" in printed


def test_show_still_shows_a_run_whose_losses_are_damaged(run, capsys):
    shutil.rmtree(f"{run}/steps/loss/c")
    code, printed, _ = ask(capsys, "show", run)
    assert code == 0
    assert "steps/loss cannot be read" in row(printed, "loss")
    assert row(printed, "stored states") == "4 (0, 50, 100, 132)"


# --------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize(
    ("change", "code", "grade"),
    [
        (lambda path: None, 0, "BITWISE"),
        (change_the_witness_of_step_60, 1, "NUMERIC"),
        (change_a_weight_of_state_50, 1, "FAILED"),
    ],
)
def test_verify_exits_with_0_only_if_every_bit_agrees(change, code, grade, run, capsys):
    change(run)
    found, printed, errors = ask(capsys, "verify", run)
    assert (found, errors) == (code, "")
    assert printed.startswith(f"{grade}: ")
    assert "132 steps in 3 segments (all of runs/digits)" in printed


def test_verify_of_some_steps_audits_their_segments(run, capsys):
    change_the_witness_of_step_60(run)
    code, printed, _ = ask(capsys, "verify", run, "--steps", ":50")
    assert code == 0
    assert "50 steps in 1 segments (part of runs/digits)" in printed
    assert ask(capsys, "verify", run, "--steps", "60")[0] == 1


def test_a_run_that_does_not_hold_its_data_is_given_it(capsys):
    record("outside", embed=False)
    code, printed, errors = ask(capsys, "verify", "outside")
    assert (code, printed) == (2, "")
    assert errors.startswith("error: outside does not hold its data, and none was given\n")
    assert "--data data.npz" in errors
    np.save("samples.npy", SAMPLES)
    assert ask(capsys, "verify", "outside", "--data", "samples.npy")[0] == 0
    words = ("state", "outside", "7", "--out", "state.npz")
    assert ask(capsys, *words, "--data", "samples.npy")[0] == 0
    assert ask(capsys, "state", "outside", "50", "--out", "stored.npz")[0] == 0
    np.save("other.npy", SAMPLES + 1)
    code, _, errors = ask(capsys, "verify", "outside", "--data", "other.npy")
    assert code == 2 and "error: sample 0 has other content" in errors


def test_data_with_names_is_read_by_the_paths_of_its_leaves(capsys):
    program = replay.Program(
        INITIAL, lambda params, x, key: loss(params, x["a"]["x"] + x["a-b"], key), optax.sgd(0.01)
    )
    data = {"a": {"x": SAMPLES}, "a-b": SAMPLES[::-1].copy()}
    order = replay.Order.shuffled(2, 2, seed=0)
    options = {"embed": False, "self_test": False, "key": jax.random.key(0)}
    replay.record("outside", program, data, order, **options)
    np.savez("data.npz", **{"a-b": data["a-b"], "a/x": SAMPLES})
    assert ask(capsys, "verify", "outside", "--data", "data.npz")[0] == 0


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "No such file"),
        (b"", "No data left in file"),
        (b"PK\x03\x04 torn", "zip file"),
        (pickle.dumps({"x": 1}), "contains pickled (object) data\n"),
    ],
)
def test_a_file_without_arrays_is_no_data(content, error, run, capsys):
    if content is not None:
        pathlib.Path("data.npz").write_bytes(content)
    code, printed, errors = ask(capsys, "verify", run, "--data", "data.npz")
    assert (code, printed) == (2, "")
    assert errors.startswith("error: data.npz cannot be read: ") and error in errors


def test_the_package_itself_is_the_command(run):
    done = subprocess.run(
        [sys.executable, "-m", "replay", "verify", "nowhere"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nowhere is not a run")


@pytest.mark.parametrize(
    ("steps", "parsed"),
    [
        (":", slice(0, None)),
        ("0:100", slice(0, 100)),
        (":100", slice(0, 100)),
        ("7:", slice(7, None)),
        ("7", slice(7, 8)),
    ],
)
def test_steps_are_read_as_python_reads_them(steps, parsed):
    assert cli._slice(steps) == parsed


# ---------------------------------------------------------------------------- remembered audits


def grade(capsys, run):
    return row(ask(capsys, "show", run)[1], "grade")


def notes():
    return list(pathlib.Path(os.environ["XDG_CACHE_HOME"]).rglob("*.json"))


def test_the_audit_of_a_whole_run_is_remembered_outside_of_the_run(run, capsys):
    before = Place(run).list()
    ask(capsys, "verify", run)
    assert Place(run).list() == before
    (note,) = notes()
    day = json.loads(note.read_text())["date"]
    files = [pathlib.Path(run, name).read_bytes() for name in ("run.msgpack", "journal.msgpack")]
    assert note.parent.parts[-2:] == ("jax-replay", "audits")
    assert note.stem == hashlib.sha256(b"".join(files)).hexdigest()
    assert grade(capsys, run) == f"BITWISE (audited {day} on this machine)"
    assert ask(capsys, "ls", "runs")[1].split("\n")[3].split()[-1] == "BITWISE"


def test_an_audit_elsewhere_says_where(run, capsys):
    ask(capsys, "verify", run)
    (note,) = notes()
    note.write_text(json.dumps({"grade": "NUMERIC", "date": "2026-11-21", "host": "el[red]se\x1b"}))
    assert grade(capsys, run) == "NUMERIC (audited 2026-11-21 on el[red]se\\x1b)"


def test_a_run_that_has_changed_since_its_audit_is_unaudited(run, capsys):
    ask(capsys, "verify", run)
    ask(capsys, "thin", run, "--keep", 3)
    assert grade(capsys, run) == "UNAUDITED"


def test_the_audit_of_a_part_is_not_remembered(run, capsys):
    ask(capsys, "verify", run, "--steps", ":50")
    assert notes() == []


def test_a_run_that_could_not_be_replayed_is_not_remembered(run, capsys):
    change_a_weight_of_state_50(run)
    ask(capsys, "verify", run)
    assert notes() == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"grade": "BITWISE"}',
        '{"grade": "PERFECT", "date": "2026-11-21", "host": ""}',
        '{"grade": "BITWISE", "date": "yesterday", "host": ""}',
        '{"grade": ["BITWISE"], "date": "2026-11-21", "host": ""}',
        '{"grade": "BITWISE", "date": 20261121, "host": ""}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_note_is_as_good_as_none(text, run, capsys):
    note = cli._note(replay.open(run))
    note.parent.mkdir(parents=True)
    note.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert grade(capsys, run) == "UNAUDITED"


def test_a_cache_that_cannot_be_written_only_forgets(run, capsys, monkeypatch):
    pathlib.Path("file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(pathlib.Path("file").absolute()))
    assert ask(capsys, "verify", run)[0] == 0
    assert grade(capsys, run) == "UNAUDITED"


def test_an_account_without_a_home_only_forgets(run, capsys, monkeypatch):
    def expanduser(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pathlib.Path, "expanduser", expanduser)
    assert ask(capsys, "verify", run)[0] == 0
    assert grade(capsys, run) == "UNAUDITED"


# -------------------------------------------------------------------------- state, plot and thin


def bits(path, step):
    state = replay.open(path).state(step)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize(("word", "step"), [("77", 77), ("-1", 132), ("0", 0)])
def test_a_state_is_written_bit_for_bit(word, step, run, capsys):
    code, printed, _ = ask(capsys, "state", run, word, "--out", "state.npz")
    assert code == 0
    state = replay.open(run).state(step)
    with np.load("state.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == [
            *("opt_state/0/trace/scale", "opt_state/0/trace/w", "params/scale", "params/w")
        ]
        assert arrays["params/w"].dtype == np.float32
        assert arrays["params/w"].tobytes() == state.params["w"].tobytes()
        assert arrays["params/scale"].dtype == np.uint16
        assert arrays["params/scale"].view(ml_dtypes.bfloat16) == state.params["scale"]
        trace = state.opt_state["0"]["trace"]
        assert arrays["opt_state/0/trace/w"].tobytes() == trace["w"].tobytes()
        assert arrays["opt_state/0/trace/scale"].tobytes() == trace["scale"].tobytes()
    size = os.path.getsize("state.npz") / 1000
    assert printed.splitlines() == [
        "params/scale: uint16[], read it with .view(ml_dtypes.bfloat16)",
        "params/w: float32[3]",
        "opt_state/0/trace/scale: uint16[], read it with .view(ml_dtypes.bfloat16)",
        "opt_state/0/trace/w: float32[3]",
        f"state {step} of runs/digits is in state.npz, {size:.1f} kB",
    ]


def test_a_file_is_replaced_only_by_force(run, capsys):
    pathlib.Path("state.npz").write_text("mine")
    code, _, errors = ask(capsys, "state", run, 7, "--out", "state.npz")
    assert (code, errors.split("\n")[0]) == (2, "error: state.npz exists")
    assert pathlib.Path("state.npz").read_text() == "mine"
    assert ask(capsys, "state", run, 7, "--out", "state.npz", "--force")[0] == 0
    assert sorted(os.listdir()) == ["runs", "state.npz"]
    assert np.load("state.npz")["params/w"].shape == (3,)


def test_equal_states_give_equal_files(run, capsys):
    for out in ("a.npz", "b.npz"):
        ask(capsys, "state", run, 7, "--out", out)
    assert pathlib.Path("a.npz").read_bytes() == pathlib.Path("b.npz").read_bytes()
    with zipfile.ZipFile("a.npz") as archive:
        assert {info.date_time[0] for info in archive.infolist()} == {1980}


def test_plot_writes_the_format_that_the_file_name_asks_for(run, capsys):
    assert ask(capsys, "plot", run) == (0, "the picture is in loss.png\n", "")
    ask(capsys, "plot", run, "--out", "loss.png")
    ask(capsys, "plot", run, "--out", "loss.svg")
    assert pathlib.Path("loss.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in pathlib.Path("loss.svg").read_text()


# ------------------------------------------------------------------------------------------ ask


def table(printed: str) -> list[list[str]]:
    """Return the cells of the first table, its head first."""
    lines = [line.strip() for line in printed.splitlines()]
    rule = next(i for i, line in enumerate(lines) if set(line) == {"\u2500"})
    rows = itertools.takewhile(bool, lines[rule + 1 :])
    return [re.split(r"\s{2,}", line) for line in (lines[rule - 1], *rows)]


def test_ask_prints_a_table_and_the_grade_of_the_answer(plain, capsys):
    code, printed, errors = ask(capsys, "ask", plain, "weights", "--top", 3)
    assert (code, errors) == (0, "")
    head, *rows = table(printed)
    assert head == ["rank", "weight", "path", "net change"]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    paths = abs(replay.open(plain).updates).sum("step").compute()
    assert rows[0][2] == f"{float(paths['w'].max()):.4g}"
    assert (
        printed.splitlines()[-1] == "BITWISE: 132 steps replayed; every bit that was logged agrees"
    )


def test_ask_names_the_last_samples_before_an_explosion(plain, capsys):
    opened = replay.open(plain)
    norms = [max(np.abs(step.grads["w"]).max(), 0) for step in opened.trajectory(0, 20)]
    threshold = float(np.sort(norms)[-4])
    words = ("ask", plain, "explosion", "--threshold", threshold, "--share", 0, "--last", 4)
    _, *rows = table(ask(capsys, *words)[1])
    boom = int(rows[-1][0]) + 1
    assert [int(row[2]) for row in rows] == opened.ids(boom - 2, boom).reshape(-1).tolist()


def test_ask_says_that_it_never_happens_and_that_is_no_error(plain, capsys):
    code, printed, errors = ask(capsys, "ask", plain, "explosion")
    assert (code, errors) == (0, "")
    assert printed.startswith(
        "at no step do more than 10% of |gradients| exceed 1024: at most 0.00%"
    )


def test_ask_explains_what_an_answer_would_take_and_replays_nothing(plain, capsys):
    shutil.rmtree(f"{plain}/states")  # without them, nothing could be
    for words in (["weights"], ["samples"], ["zero", "--weight", "w[0]"], ["compare", plain]):
        code, printed, errors = ask(capsys, "ask", plain, *words, "--explain")
        assert (code, errors) == (0, "")
        assert "replay " in printed and "memory limit" in printed


def test_ask_draws_the_answer_too(plain, capsys):
    code, printed, _ = ask(capsys, "ask", plain, "weights", "--plot", "answer.png")
    assert code == 0
    assert printed.splitlines()[-1] == "the picture is in answer.png"
    assert pathlib.Path("answer.png").read_bytes().startswith(b"\x89PNG")


def test_ask_compares_a_run_with_another_in_another_order(plain, capsys):
    record("other", initial=PLAIN, function=plain_loss, order=replay.Order.shuffled(2, 3, seed=5))
    code, printed, errors = ask(capsys, "ask", plain, "compare", "other", "--step", 12)
    assert (code, errors) == (0, "")
    assert printed.startswith("weights of a = runs/digits and b = other after 12 steps\n")
    a, b = (replay.open(path).state(12).params["w"] for path in (plain, "other"))
    (w,) = [line for line in table(printed) if line[0] == "w"]
    assert float(w[1]) == pytest.approx(np.linalg.norm(a - b), rel=1e-3)


def test_ask_is_given_the_data_that_a_run_does_not_hold(capsys):
    record("outside", initial=PLAIN, function=plain_loss, embed=False, epochs=3)
    np.save("samples.npy", SAMPLES)
    code, printed, _ = ask(capsys, "ask", "outside", "samples", "--data", "samples.npy")
    assert code == 0
    assert "sum |share|" in printed


def test_fork_changes_what_its_options_say(run, capsys):
    at, words = replay.open(run), ("fork", run)
    order = at.order.since(100)
    for name, options, expected in (
        ("same", "", order),
        ("swapped", "--swap 100 101", order.swap(100, 101)),
        ("shorter", "--drop 3 --refill", order.drop([3])),
        ("turned", "--reverse all", order.reversed(None)),
        ("shuffled", "--reshuffle 30 --seed 7", order.shuffled_again(30, 7)),
        ("lighter", "--drop 3 --weigh 5=0.5 --key 4", order),
    ):
        code, printed, _ = ask(capsys, *words, f"runs/{name}", "--at", 100, *options.split())
        fork = replay.open(f"runs/{name}")
        assert code == 0 and printed.startswith(f"<Run runs/{name}: tiny, fork at step 100 (")
        assert (fork.order[:] == expected[:]).all() and fork.steps == len(expected)
    weights = {i: w for s in fork.trajectory(100) for i, w in zip(s.ids, s.weights, strict=True)}
    assert weights == {i: {3: 0.0, 5: 0.5}.get(i, 1.0) for i in range(8)}
    assert fork.edit == "weights {5: 0.5, 3: 0}; key"


def test_fork_trains_what_was_only_created_and_makes_it_independent(run, capsys):
    ask(capsys, "fork", run, "runs/fork", "--at", 60, "--no-train")
    assert replay.open("runs/fork").steps == 60
    _, printed, _ = ask(capsys, "show", "runs/fork")
    assert row(printed, "fork of") == "runs/digits from step 60 on: no edit"
    ask(capsys, "fork", "runs/fork", "--until", 90)
    assert replay.open("runs/fork").steps == 90
    shutil.move(run, "moved")
    code, _, errors = ask(capsys, "fork", "runs/fork", "--detach")
    assert code == 2 and "--detach --parent PATH" in errors
    code, printed, _ = ask(capsys, "fork", "runs/fork", "--detach", "--parent", "moved")
    assert code == 0 and printed.startswith("runs/fork is independent of its parent: ")
    shutil.rmtree("moved")
    assert ask(capsys, "fork", "runs/fork")[0] == 0
    assert ask(capsys, "verify", "runs/fork")[0] == 0
    assert "parent" not in ask(capsys, "ls", "runs")[1]


def test_an_interrupted_fork_says_how_it_goes_on(run, capsys, monkeypatch):
    from replay import recording

    execute = recording.Recording.execute

    def interrupted(self, stretch):
        execute(self, stretch)
        if self.step > 100:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recording.Recording, "execute", interrupted)
        for words in ((run, "runs/fork", "--at", 60), ("runs/fork",)):
            code, _, errors = ask(capsys, "fork", *words)
            steps = replay.open("runs/fork").steps
            assert code == 130 and 100 < steps <= 132
            assert errors == f"stopped at state {steps}; replay fork runs/fork goes on\n"
    assert ask(capsys, "fork", "runs/fork")[::2] == (0, "")
    assert replay.open("runs/fork").steps == 132


def test_tree_draws_families_and_names_who_is_missing(run, capsys):
    ask(capsys, "fork", run, "runs/a", "--at", 60, "--swap", 60, 61)
    ask(capsys, "fork", "runs/a", "runs/b", "--at", 80, "--drop", 3)
    ask(capsys, "fork", run, "runs/c", "--at", 10, "--no-train")
    _, printed, _ = ask(capsys, "tree", "runs")
    assert printed.splitlines() == [
        "runs",
        "└── digits  tiny, 132 of 132 steps",
        "    ├── a  from step 60: swap(60, 61); 132 of 132 steps",
        "    │   └── b  from step 80: weights {3: 0}; 132 of 132 steps",
        "    └── c  from step 10: no edit; 10 of 132 steps",
    ]
    shutil.copytree(run, "runs/a-copy")
    lines = ask(capsys, "tree", "runs")[1].splitlines()
    assert lines[1:3] == [
        "├── a-copy  tiny, 132 of 132 steps",
        "└── digits  tiny, 132 of 132 steps",
    ]
    shutil.rmtree("runs/a-copy")
    shutil.rmtree(run)
    pathlib.Path("runs/broken").mkdir()
    pathlib.Path("runs/broken/run.msgpack").write_bytes(b"no run")
    _, printed, _ = ask(capsys, "tree", "runs")
    assert "a  from step 60: swap(60, 61); 132 of 132 steps; its parent is not here" in printed
    assert "broken cannot be opened: runs/broken: run.msgpack is damaged" in printed
    pathlib.Path("empty").mkdir()
    assert ask(capsys, "tree", "empty")[1] == "there are no runs below empty\n"


def test_thin_leaves_every_answer_as_it_was(run, capsys):
    before = {step: bits(run, step) for step in (0, 60, 100, 132)}
    code, printed, _ = ask(capsys, "thin", run, "--keep", 2)
    assert code == 0
    assert printed.startswith("2 stored states given up, ")
    assert printed.endswith(" freed; left: 2 (0, 132)\n")
    assert {step: bits(run, step) for step in before} == before
    assert ask(capsys, "verify", run)[0] == 0


# ---------------------------------------------------------------------------------- hostile names

HOSTILE = "[red]x\x1b[31m\n:smile:\u202e\x07"
SHOWN = "[red]x\\x1b[31m\\n:smile:\\u202e\\x07"


@pytest.mark.parametrize(
    "words",
    [
        ["ls", "."],
        ["show", HOSTILE],
        ["verify", HOSTILE],
        ["state", HOSTILE, "3", "--out", "state.npz"],
        ["plot", HOSTILE, "--out", f"{HOSTILE}.png"],
        ["ask", HOSTILE, "weights"],
        ["ask", HOSTILE, "zero", "--weight", f"{HOSTILE}[0]"],
        ["ask", HOSTILE, "weights", "--explain"],
        ["state", HOSTILE, "9", "--out", "state.npz"],
        ["show", f"{HOSTILE}2"],
    ],
)
def test_names_neither_colour_nor_move_what_is_printed(words, capsys, monkeypatch):
    initial = {HOSTILE: np.ones(1, np.float32)}
    record(HOSTILE, name=HOSTILE, initial=initial, epochs=1, function=lambda p, x, k: p[HOSTILE][0])
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    _, printed, errors = ask(capsys, *words)
    lines = words[0] == "verify" or "--explain" in words  # of which no name can be the first
    assert SHOWN.replace("\\n", "\n  " if lines else "\\n") in printed + errors
    for hostile in ("\x1b[31mx", "x\x1b[31m", "\u202e", "\x07", "\U0001f604"):
        assert hostile not in printed + errors


def test_a_record_with_values_of_other_kinds_is_shown(run, capsys, monkeypatch):
    class Odd(Log):
        def __init__(self, place, parent=None):
            super().__init__(place, parent)
            odd = {"name": ["x"], "created": "never", "data": None, "environment": {"jax": [1]}}
            for name, value in odd.items():
                object.__setattr__(self.header, name, value)

    monkeypatch.setattr("replay.api.Log", Odd)
    code, printed, _ = ask(capsys, "show", run)
    assert code == 0
    assert row(printed, "steps") == "132 of 132, closed, recorded at a time unknown"
    assert ask(capsys, "ls", "runs")[0] == 0


# --------------------------------------------------------------------------------------- demo


def what_it_can_import(run):
    import os

    rows = {"run": f"{run.steps} steps", "directory": f"{len(os.listdir())} files"}
    for name in ("replay.demo", "flax", "sklearn", "optax"):
        rows[name] = "no" if sys.modules[name] is None else "yes"
    return rows


def test_questions_are_asked_in_an_empty_directory_without_the_code(run, monkeypatch):
    monkeypatch.setattr(demo, "QUESTIONS", (what_it_can_import,))
    rows, sections = demo.ask_elsewhere(pathlib.Path(run))
    assert sections == []
    assert rows == {
        "run": "132 steps",
        "directory": "0 files",
        "replay.demo": "no",
        "flax": "no",
        "sklearn": "no",
        "optax": "yes",
    }


def refuses(run):
    raise SystemExit(7)


def test_a_question_that_fails_is_an_error(run, monkeypatch):
    monkeypatch.setattr(demo, "QUESTIONS", (refuses,))
    with pytest.raises(replay.ReplayError, match="questions runs/digits ended with code 7"):
        demo.ask_elsewhere(pathlib.Path(run))


@pytest.mark.parametrize(("grade", "code"), [("BITWISE", 0), ("NUMERIC", 1), ("UNAUDITED", 1)])
def test_the_demo_exits_with_0_only_if_its_run_is_bitwise(
    grade, code, recorded, capsys, monkeypatch
):
    def record_digits(path, epochs, **_):
        shutil.copytree(recorded, path)
        return {"weights": "4"}

    monkeypatch.setattr(demo, "record_digits", record_digits)
    monkeypatch.setattr(demo, "ask_elsewhere", lambda path, other: ({"grade": grade}, []))
    for name in ("digits", "digits-2", "digits-3"):
        found, printed, _ = ask(capsys, "demo")
        assert found == code
        assert printed.splitlines()[0] == f"recording runs/{name}"
        assert row(printed, "pictures of the answers") == f"runs/{name}.html"
        assert pathlib.Path(f"runs/{name}.html").exists()


def pushed(run):
    """Which weights of <b>x</b>?"""
    return questions.weights(run, top=2)


def test_the_page_holds_the_pictures_and_the_tables_of_its_questions(plain, monkeypatch):
    monkeypatch.setattr(demo, "QUESTIONS", ())
    monkeypatch.setattr(demo, "PICTURES", (pushed,))
    rows, shown = demo.ask_elsewhere(pathlib.Path(plain), pathlib.Path("runs/fork"))
    titles = ["The training", "Which weights of <b>x</b>?"]
    titles += ["What if the second half had come in another order?"]
    assert [each["title"] for each in shown] == titles
    assert replay.open("runs/fork").edit == "shuffled_again(None, 1)"
    page = demo.page_of("a <title>", {"grade": "<script>"}, shown)
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(x)[:4] for x in found] == [b"\x89PNG"] * 3
    page = re.sub(r'src="data:[^"]+"', "", page)
    assert "src=" not in page and "href" not in page
    assert "<script" not in page and "<b>x" not in page
    assert "Which weights of &lt;b&gt;x&lt;/b&gt;?" in page and "a &lt;title&gt;" in page
    path = os.path.abspath(plain)
    assert f"replay ask {path} weights --top 2 --tensor &#x27;*&#x27;" in page
    assert "<th>net change</th>" in page
    fork = os.path.abspath("runs/fork")
    assert f"replay fork {path} {fork} --at 66 --reshuffle all --seed 1" in page


def test_without_its_extra_the_demo_names_it_and_records_nothing(capsys, monkeypatch):
    for name in ("flax", "sklearn"):
        monkeypatch.setitem(sys.modules, name, None)
    code, printed, errors = ask(capsys, "demo")
    assert (code, printed) == (2, "")
    assert errors.startswith("error: the demonstration needs flax and sklearn\n")
    assert errors.endswith('  fix: pip install "jax-replay[demo]"\n')
    assert os.listdir() == []


@pytest.mark.full
def test_the_whole_demo_learns_the_digits_and_is_bitwise(tmp_path):
    root = str(pathlib.Path(replay.__file__).parent.parent)
    script = f"import sys; sys.path.insert(0, {root!r}); from replay.cli import main; exit(main())"
    command = [sys.executable, "-c", script, "demo", "--directory", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert row(done.stdout, "grade") == "BITWISE"
    assert row(done.stdout, "steps") == "440 of 64 samples"
    assert float(row(done.stdout, "test accuracy")) > 0.95
    assert "never stored" in row(done.stdout, "norm of the weights at step 123")
    names = ["digits", "digits-reordered", "digits.html"]
    assert sorted(os.listdir(tmp_path / "runs")) == names
    page = (tmp_path / "runs" / "digits.html").read_text()
    assert page.count("data:image/png;base64,") == 6 and page.count("<h2>") == 6

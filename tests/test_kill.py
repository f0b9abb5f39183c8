"""Nothing durable is lost, whatever ends a recording: a kill, a full disk, an error, a rival."""

import contextlib
import errno
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import killed
import numpy as np
import optax
import pytest
from tiny import bits, compile_once  # noqa: F401  # the fixture is there for who imports it

import replay
import replay.store
from replay.journal import Durable, frames
from replay.store import Place, StoredArray

ROOT = pathlib.Path(__file__).parent.parent
JOURNAL = "journal.msgpack"


def start(path, *before, **options):
    """Start recording in another process, behind a command such as strace."""
    command = [*before, sys.executable, str(ROOT / "tests" / "killed.py"), str(path)]
    command += [f"{name}={value!r}" for name, value in options.items()]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def durable(path):
    place = Place(path)
    if place.size(JOURNAL) is None:
        return Durable()
    return Durable.read(place.read(JOURNAL), JOURNAL)


def assert_a_beginning_of(intact, run, states=()):
    """Compare all that a run has durable with the uninterrupted run, and replay it."""
    for name in ("witness", "loss", "ids"):
        found, expected = (x.log.column(name, 0, run.steps) for x in (run, intact))
        assert found.tobytes() == expected.tobytes(), name
    ours, theirs = run.log.durable.digests, intact.log.durable.digests
    # Other commits fall where time has them, but a checkpoint falls on the same states.
    expected = {state for state in intact.checkpoints if state <= run.steps - killed.EVERY}
    assert expected <= set(run.checkpoints)
    for state in set(run.checkpoints) & set(intact.checkpoints):
        assert ours[state] == theirs[state], state
    audit = run.verify()
    assert audit.grade is replay.Grade.BITWISE and audit.complete, str(audit)
    for state in states:
        assert bits(run.state(state)) == bits(intact.state(state)), state


def assert_the_same_run(intact, run):
    assert run.log.durable.closed and run.steps == intact.steps
    assert_a_beginning_of(intact, run, states=[intact.steps])
    assert set(run.checkpoints) >= set(intact.checkpoints)


def assert_the_same_metrics(intact, run):
    logged = [step for step, _ in run.log.durable.metrics]
    assert logged == sorted(set(logged)), "nothing is logged twice"
    # A checkpoint is made before the loop logs something at that state: if the recording is
    # killed in between, nobody has ever logged it durably.
    lost = {step for step, _ in intact.log.durable.metrics} - set(logged)
    assert lost <= set(run.log.durable.resumed)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Callable[..., replay.Run]:
    """Return the run that the others are compared with, recorded at the first call."""

    @functools.cache
    def recorded(**options):
        path = tmp_path_factory.mktemp("uninterrupted") / "run"
        killed.train(path, **options)
        return replay.open(path)

    return recorded


# ---------------------------------------------------------------------------------------- kill


class Moment(NamedTuple):
    """When to kill: at so many files, so many bytes of the journal, or while a row is written.

    Bytes and rows are counted from what the journal holds when the process starts.
    """

    phase: str
    number: int
    delay: float = 0.0  # seconds

    def reached(self, path, before):
        if self.phase == "files":
            return sum(len(files) for _, _, files in os.walk(path)) >= self.number
        if self.phase == "bytes":
            with contextlib.suppress(FileNotFoundError):
                return (path / JOURNAL).stat().st_size >= before.end + self.number
            return False
        return being_written(path, before.rows + self.number)


def being_written(path, row):
    """Tell whether something of a row of the states is on disk."""
    return any((path / "states").glob(f"*/c/{row}/*"))


def kills(chains, *, seed, files):
    """Draw pairs of moments: one for a recording, one for its continuation."""
    random = np.random.Generator(np.random.Philox(seed))

    def moment(phase):
        if phase == "files":
            return Moment(phase, int(random.integers(2, 22)))
        if phase == "bytes":
            return Moment(phase, int(random.integers(1, 1400)), float(random.uniform(0, 0.01)))
        return Moment(phase, int(random.integers(1, 5)))

    for chain in range(chains):
        first = "files" if chain < files else ("row", "bytes")[chain % 2]
        yield moment(first), moment(("bytes", "row")[chain % 2])


def kill_at(moment, path, **options):
    """Record until the moment and kill; tell whether that was in the middle of a checkpoint.

    Whoever watches may sleep through the moment, on a machine that has other things to do, and
    wake up after the end: then the same is tried again. That the recording yields helps.
    """
    before, earlier = durable(path), path.with_name(f"{path.name}-earlier")
    shutil.rmtree(earlier, ignore_errors=True)
    if path.exists():
        shutil.copytree(path, earlier)
    for _ in range(5):
        with start(path, "nice", **options) as process:
            while process.poll() is None and not moment.reached(path, before):
                time.sleep(1e-4)
            time.sleep(moment.delay)
            process.kill()
            output = process.stdout.read()
        if process.returncode == -9:
            return being_written(path, durable(path).rows)
        assert "trained to the end" in output, output
        shutil.rmtree(path)
        if earlier.exists():
            shutil.copytree(earlier, path)
    raise AssertionError(f"the recording always ended before {moment}")


def assert_nothing_is_lost(path, pairs, intact, **options):
    """Kill and resume as the pairs say; return how many kills fell where."""
    seen = {"after the first commit": 0, "during a checkpoint": 0}
    random = np.random.Generator(np.random.Philox(1))
    for number, moments in enumerate(pairs):
        run_path = path / str(number)
        for moment in moments:
            seen["during a checkpoint"] += kill_at(moment, run_path, **options)
            assert re.fullmatch(r"process \d+ on .+", (run_path / "lock").read_text())
            if not durable(run_path).checkpoints:
                with pytest.raises(replay.LogError, match="is not a run|names no stored state"):
                    replay.open(run_path).state(0)
                continue
            seen["after the first commit"] += 1
            run = replay.open(run_path)
            assert run.steps >= max(run.checkpoints)
            some = random.integers(0, run.steps + 1, 2).tolist()
            assert_a_beginning_of(intact, run, states=[*some, run.steps])
        killed.train(run_path, **options)
        assert_the_same_run(intact, replay.open(run_path))
        assert_the_same_metrics(intact, replay.open(run_path))
    return seen


def test_a_recording_killed_at_any_moment_keeps_what_was_durable_and_resumes_to_the_same_bits(
    uninterrupted, tmp_path
):
    pairs = list(kills(1, seed=1, files=0))
    seen = assert_nothing_is_lost(tmp_path, pairs, uninterrupted())
    assert seen["after the first commit"] == 2
    assert seen["during a checkpoint"] >= 1


@pytest.mark.full
def test_fifty_kills_lose_nothing(uninterrupted, tmp_path):
    seen = assert_nothing_is_lost(tmp_path, kills(25, seed=2, files=5), uninterrupted())
    assert seen["after the first commit"] >= 40
    assert seen["during a checkpoint"] >= 10


@pytest.mark.full
def test_a_recording_dispatched_by_block_loses_nothing_either(uninterrupted, tmp_path):
    intact = uninterrupted(dispatch="block")
    seen = assert_nothing_is_lost(tmp_path, kills(4, seed=3, files=1), intact, dispatch="block")
    assert seen["after the first commit"] >= 6


# ---------------------------------------------------------------------------------------- sync

_CALL = re.compile(r"(\d+) +(?:<\.\.\. )?(\w+)(?:\(| resumed>)(.*)")
_WRITES = ("write", "writev", "pwrite64", "pwritev", "pwritev2")
_SYNCS, _RENAMES = ("fsync", "fdatasync"), ("rename", "renameat", "renameat2")


def can_trace():
    with contextlib.suppress(OSError):
        return subprocess.run(["strace", "-o", os.devnull, "true"], check=False).returncode == 0
    return False


def calls_of(text):
    """Yield `(call, files)` from what strace printed: writes as they begin, others as they end."""
    begun = {}
    for line in text.splitlines():
        if not (found := _CALL.match(line)):
            continue
        thread, call, rest = found.groups()
        if "resumed>" not in line:
            quoted = re.findall(r'"([^"]*)"', rest)
            begun[thread] = quoted if call in _RENAMES else re.findall(r"^\d+<([^>]*)>", rest)
            if call in _WRITES and begun[thread]:
                yield "write", begun[thread]
        if not line.endswith("<unfinished ...>") and re.search(r"= 0$", line):
            if call in _SYNCS + _RENAMES:
                yield ("sync" if call in _SYNCS else "rename"), begun[thread]


def by_strace(path, monkeypatch):
    """Record in another process and return the calls that it made of the system."""
    output = path.with_name("calls")
    traced = ",".join((*_WRITES, *_SYNCS, *_RENAMES))
    command = ("strace", "-f", "-y", "-s", "0", "-o", str(output), "-e", f"trace={traced}")
    with start(path, *command, steps=320) as process:
        said = process.stdout.read()
    assert process.returncode == 0, said
    return list(calls_of(output.read_text()))


def by_wrapping(path, monkeypatch):
    """Record in this process and return what it asked of the system and of TensorStore.

    Where nothing can be traced, TensorStore's word is taken: with `file_io_sync` a write has
    returned when the file is synced and in its place.
    """
    calls = []
    assert replay.store._CONTEXT["file_io_sync"].to_json() is True

    def wrap(owner, name, before, after):
        original = getattr(owner, name)

        def wrapped(*arguments, **options):
            calls.extend(before(*arguments))
            result = original(*arguments, **options)
            calls.extend(after(*arguments))
            return result

        monkeypatch.setattr(owner, name, wrapped)

    def chunk(array, start, values):
        return f"{array._place}/{array.spec.name}/c/{start}"

    wrap(os, "fsync", lambda fd: (), lambda fd: [("sync", [os.readlink(f"/proc/self/fd/{fd}")])])
    wrap(os, "replace", lambda *_: (), lambda *files: [("rename", [*map(str, files)])])
    wrap(
        StoredArray,
        "write",
        lambda *them: [("write", [chunk(*them) + ".new"])],
        lambda *them: [
            ("sync", [chunk(*them) + ".new"]),
            ("rename", [chunk(*them) + ".new", chunk(*them)]),
            ("sync", [os.path.dirname(chunk(*them))]),
        ],
    )
    wrap(Place, "append", lambda place, name, _: [("write", [f"{place}/{name}"])], lambda *_: ())
    killed.train(path, steps=320)
    return calls


def assert_synced_before_named(calls, path):
    """Follow every file of the run; return the files that were in place for some journal record."""
    journal = str(path / JOURNAL)
    unsynced, synced, folders, placed = set(), set(), set(), set()
    records = 0
    for call, files in calls:
        if not files[-1].startswith(str(path)) or files[-1] == str(path / "lock"):
            continue
        if call == "write" and files[0] == journal:
            assert not unsynced, f"a record is written before {unsynced} are synced"
            assert not synced, f"a record is written before {synced} are in their places"
            assert not folders, f"a record is written before the folders {folders} are synced"
            records += 1
        if call == "write":
            unsynced.add(files[0])
        elif call == "sync":
            if files[0] in unsynced and files[0] != journal:
                synced.add(files[0])
            unsynced.discard(files[0])
            folders.discard(files[0])
        else:
            assert files[0] not in unsynced, f"{files[0]} is renamed before it is synced"
            synced.discard(files[0])
            folders.add(os.path.dirname(files[1]))
            placed.add(os.path.relpath(files[1], path))
    assert not unsynced, f"{unsynced} were never synced"
    assert records >= 6
    return placed


@pytest.mark.parametrize("watched", [by_wrapping] + [by_strace] * can_trace())
def test_data_is_synced_and_in_its_place_before_the_journal_names_it(
    watched, tmp_path, monkeypatch
):
    path = tmp_path / "run"
    calls = watched(path, monkeypatch)
    placed = assert_synced_before_named(calls, path)
    groups = {file.split("/")[0] for file in placed}
    assert groups == {"run.msgpack", "program", "data", "states", "steps"}
    # The same check must notice a record that is one sync too early.
    syncs = [i for i, (call, files) in enumerate(calls) if call == "sync" and "/c/" in files[0]]
    for left_out in (syncs[0], syncs[len(syncs) // 2], syncs[-1]):
        with pytest.raises(AssertionError, match="synced"):
            assert_synced_before_named(calls[:left_out] + calls[left_out + 1 :], path)


# ----------------------------------------------------------------------------------- full disk


class Disk:
    """A disk that is full after some writes, until there is room again."""

    def __init__(self, monkeypatch, writes):
        self.left, self.refused = writes, 0
        write, append = StoredArray.write, Place.append

        def full():
            self.left -= 1
            self.refused += self.left < 0
            return self.left < 0

        def write_some(array, start, values):
            if full():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), array.spec.name)
            write(array, start, values)

        def append_some(place, name, data):
            if full():
                append(place, name, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
            append(place, name, data)

        monkeypatch.setattr(StoredArray, "write", write_some)
        monkeypatch.setattr(Place, "append", append_some)

    def make_room(self):
        self.left = 10**9


# Data takes two writes, the first commit five; then four columns for each commit, one record,
# and four leaves where it is a checkpoint.
@pytest.mark.parametrize(
    "writes", [7, 19, 41, *(pytest.param(n, marks=pytest.mark.full) for n in (9, 11, 24))]
)
def test_training_goes_on_when_the_disk_is_full_and_the_log_stays_valid(
    uninterrupted, tmp_path, monkeypatch, writes
):
    intact, path = uninterrupted(steps=320), tmp_path / "run"
    disk = Disk(monkeypatch, writes)
    with (
        pytest.warns(RuntimeWarning, match="cannot be written.*No space left.*\n.*\n.*resume=True"),
        killed.recorder(path, steps=320) as recorder,
    ):
        while recorder.advance(10):
            recorder.log(reached=recorder.step)
        assert recorder.step == 320
        assert bits(recorder.params) == bits(intact.state(320).params)
    assert disk.refused == 1, "after the first refusal nothing is tried"
    run = replay.open(path)
    assert run.steps < 320 and not run.log.durable.closed
    assert_a_beginning_of(intact, run, states=[0, run.steps // 2, run.steps])
    disk.make_room()
    killed.train(path, steps=320)
    run = replay.open(path)
    assert run.log.durable.closed
    assert_a_beginning_of(intact, run, states=[320])


def test_training_stops_when_the_disk_is_full_if_asked_to(uninterrupted, tmp_path, monkeypatch):
    intact, path = uninterrupted(steps=320), tmp_path / "run"
    disk = Disk(monkeypatch, 20)
    with pytest.raises(replay.LogError, match="No space left") as caught:
        with killed.recorder(path, steps=320, on_log_error="raise") as recorder:
            while recorder.advance(10):
                pass
    assert "up to its last commit" in caught.value.why and "resume=True" in caught.value.fix
    assert_a_beginning_of(intact, replay.open(path))
    disk.make_room()
    killed.train(path, steps=320)
    assert_a_beginning_of(intact, replay.open(path), states=[320])


def test_a_full_disk_ends_a_training_where_warnings_are_errors(tmp_path, monkeypatch):
    Disk(monkeypatch, 20)
    with pytest.raises(RuntimeWarning, match="cannot be written"):
        with killed.recorder(tmp_path / "run", steps=320) as recorder:
            while recorder.advance(1):
                pass
    assert not [thread for thread in threading.enumerate() if thread.name == "replay-log"]


def test_a_disk_that_is_full_from_the_start_is_an_error_with_advice(tmp_path, monkeypatch):
    disk = Disk(monkeypatch, 1)
    with pytest.raises(replay.LogError, match="cannot be written.*No space left") as caught:
        killed.train(tmp_path / "run", steps=320)
    assert "make room" in caught.value.fix
    disk.make_room()
    killed.train(tmp_path / "run", steps=320)
    assert replay.open(tmp_path / "run").verify().grade is replay.Grade.BITWISE


def test_a_limit_on_file_size_does_not_end_a_training(uninterrupted, tmp_path):
    """The journal is the only file that outgrows the limit: its record is torn for real."""
    resource = pytest.importorskip("resource")
    intact, path = uninterrupted(), tmp_path / "run"
    with start(path) as process:
        while process.poll() is None and durable_size(path) < 900:
            time.sleep(1e-3)
        limit = durable_size(path) + 20
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        said = process.stdout.read()
    assert process.returncode == 0 and "trained to the end" in said, said
    assert "RuntimeWarning" in said and "cannot be written" in said and "File too large" in said
    run = replay.open(path)
    assert 0 < run.steps < intact.steps
    assert_a_beginning_of(intact, run)
    killed.train(path)
    assert_the_same_run(intact, replay.open(path))


def durable_size(path):
    return Place(path).size(JOURNAL) or 0


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[str], pathlib.Path]]:
    """Mount a file system of a given size, and give it another one at each further call."""
    folder = tmp_path / "small"
    folder.mkdir()

    def resize(size):
        remount = "remount," if os.path.ismount(folder) else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{remount}size={size}", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a file system is not permitted; its failures are simulated above")
        return folder

    yield resize
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


def test_a_run_survives_a_disk_that_is_really_full(uninterrupted, small_disk):
    intact, path = uninterrupted(steps=320), small_disk("300k") / "run"
    with pytest.warns(RuntimeWarning, match="cannot be written.*No space left"):
        killed.train(path, steps=320, checkpoints=10)
    run = replay.open(path)
    assert 0 < run.steps < 320
    assert run.verify().grade is replay.Grade.BITWISE
    assert bits(run.state(run.steps)) == bits(intact.state(run.steps))
    small_disk("8m")
    killed.train(path, steps=320, checkpoints=10)
    assert_the_same_run(intact, replay.open(path))


# ------------------------------------------------------------------------------- two recorders


def test_a_second_recorder_is_told_who_holds_the_run(tmp_path):
    path = tmp_path / "run"
    (tmp_path / "link").symlink_to(path)
    with killed.recorder(path, steps=320) as recorder:
        recorder.advance(10)
        for same in (path, tmp_path / "link", f"{tmp_path}/./run"):
            with pytest.raises(replay.LogError, match=f"by process {os.getpid()} on ") as caught:
                with killed.recorder(same, steps=320):
                    raise AssertionError("two recorders in one run")
            assert "overwrite" in caught.value.why and "wait" in caught.value.fix
        with pytest.raises(replay.LogError, match=f"by process {os.getpid()} on "):
            replay.open(path).thin(2)
        assert recorder.advance(10)
    assert replay.open(path).verify().grade is replay.Grade.BITWISE


def test_the_lock_of_another_process_holds_until_that_process_is_dead(uninterrupted, tmp_path):
    path = tmp_path / "run"
    with start(path, steps=320 * 100) as process:
        while not durable(path).checkpoints:
            assert process.poll() is None, process.stdout.read()
            time.sleep(1e-3)
        with pytest.raises(replay.LogError, match=f"by process {process.pid} on "):
            killed.train(path, steps=320 * 100)
        assert process.poll() is None, "the holder goes on"
        process.kill()
    steps = durable(path).steps
    assert str(process.pid) in (path / "lock").read_text()
    with killed.recorder(path, steps=320 * 100) as recorder:
        assert recorder.step <= steps
        recorder.advance(50)
    run = replay.open(path)
    assert run.log.durable.resumed and run.verify().grade is replay.Grade.BITWISE


# -------------------------------------------------------------------------------- other endings


def test_an_exception_ends_a_recording_and_loses_nothing(uninterrupted, tmp_path):
    intact, path = uninterrupted(steps=320), tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        with killed.recorder(path, steps=320) as recorder:
            while recorder.advance(min(100, 130 - recorder.step)):
                recorder.log(reached=recorder.step)
            recorder.log(reached=1 / 0)
    run = replay.open(path)
    assert run.steps == 130 and run.checkpoints == [0, 130] and not run.log.durable.closed
    assert [step for step, _ in run.log.durable.metrics] == [100, 130]
    assert_a_beginning_of(intact, run, states=[130])
    killed.train(path, steps=320)
    run = replay.open(path)
    assert_a_beginning_of(intact, run, states=[320])
    assert [step for step, _ in run.log.durable.metrics] == [100, 130, 200, 300, 320]


def test_an_interrupted_step_is_repeated_by_who_resumes(uninterrupted, tmp_path, monkeypatch):
    intact, path = uninterrupted(steps=320), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        with killed.recorder(path, steps=320) as recorder:
            recorder.advance(230)
            execute = recorder._recording.engine.advance

            def interrupted(state, stretch):
                for number, executed in enumerate(execute(state, stretch)):
                    if number == 7:
                        raise KeyboardInterrupt
                    yield executed

            monkeypatch.setattr(recorder._recording.engine, "advance", interrupted)
            recorder.advance(50)
    run = replay.open(path)
    assert 200 <= run.steps <= 230 and not run.log.durable.closed
    assert_a_beginning_of(intact, run, states=[run.steps])
    killed.train(path, steps=320)
    assert_the_same_run(intact, replay.open(path))


def test_a_recording_that_was_stopped_early_can_be_continued(uninterrupted, tmp_path):
    intact, path = uninterrupted(steps=320), tmp_path / "run"
    with killed.recorder(path, steps=320) as recorder:
        recorder.advance(130)
    run = replay.open(path)
    assert run.steps == 130 and run.log.durable.closed
    assert_a_beginning_of(intact, run, states=[130])
    killed.train(path, steps=320)
    assert_the_same_run(intact, replay.open(path))


def test_resuming_a_finished_run_changes_nothing(uninterrupted, tmp_path):
    intact, path = uninterrupted(steps=320), tmp_path / "run"
    killed.train(path, steps=320)
    place = Place(path)

    def contents():
        names = set(place.list()) - {JOURNAL, "lock"}
        return {name: place.read(name) for name in names}

    before = contents()
    for _ in range(2):
        with killed.recorder(path, steps=320) as recorder:
            assert recorder.step == 320 and not recorder.advance()
            assert bits(recorder.state) == bits(intact.state(320))
        assert contents() == before
        assert_the_same_run(intact, replay.open(path))
    run = replay.record(
        path,
        killed.program(),
        killed.DATA,
        killed.order(320),
        key=killed.KEY,
        resume=True,
        self_test=False,
    )
    assert_the_same_run(intact, run)


def test_what_a_kill_before_the_first_commit_leaves_is_begun_again(uninterrupted, tmp_path):
    intact, path = uninterrupted(steps=320), tmp_path / "run"
    killed.train(path, steps=320)
    place = Place(path)
    first = next(frames(place.read(JOURNAL), JOURNAL))[0]
    for name in place.list():
        if re.match(r"states/\d/c/[1-9]|steps/\w+/c/", name):
            place.delete(name)
    place.truncate(JOURNAL, first - 1)
    with pytest.raises(replay.LogError, match="journal.msgpack names no stored state"):
        replay.open(path).state(0)
    audit = replay.open(path).verify()
    assert (audit.grade, audit.segments) == (replay.Grade.UNAUDITED, ())
    killed.train(path, steps=320)
    assert_the_same_run(intact, replay.open(path))


def test_what_a_kill_left_half_written_never_ends_up_in_a_chunk(uninterrupted, tmp_path):
    """TensorStore's default lock file is not truncated: a shorter chunk would end with its rest."""
    intact, path = uninterrupted(steps=320), tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        with killed.recorder(path, steps=320) as recorder:
            recorder.advance(130)
            raise ZeroDivisionError
    chunks = [file for file in path.glob("*/*/c/**/*") if file.is_file()]
    rows = [path / "states" / "0" / "c" / row / "0" / "0" for row in ("2", "3")]
    for file in (*chunks, *rows):
        file.parent.mkdir(parents=True, exist_ok=True)
        for left in (".__lock", "_0123456789abcdef.__lock", ".part"):
            file.with_name(file.name + left).write_bytes(bytes(100_000))
    killed.train(path, steps=320)
    assert_the_same_run(intact, replay.open(path))
    assert not [name for name in Place(path).list() if name.endswith(("__lock", "part"))]


def test_a_run_that_has_lost_its_journal_is_not_begun_again(tmp_path):
    path = tmp_path / "run"
    killed.train(path, steps=320)
    (path / JOURNAL).unlink()
    names = Place(path).list()
    with pytest.raises(replay.LogError, match="journal.msgpack names none") as caught:
        killed.train(path, steps=320)
    assert "the journal was lost" in caught.value.why
    assert Place(path).list() == names


def test_thinning_a_run_that_was_killed_leaves_it_valid(uninterrupted, tmp_path):
    intact, path = uninterrupted(steps=320), tmp_path / "run"
    killed.train(path, steps=320, checkpoints=40)
    place = Place(path)
    records = list(frames(place.read(JOURNAL), JOURNAL))
    kinds = [record["kind"] for _, record in records]
    assert kinds[-4:] == ["steps", "checkpoint", "steps", "closed"]
    place.truncate(JOURNAL, records[-3][0] - 1)
    run = replay.open(path)
    assert run.checkpoints == [0, 40, 80, 120, 160, 200, 240, 280]
    assert run.thin(3) == [40, 80, 120, 200, 240]
    run = replay.open(path)
    assert run.checkpoints == [0, 160, 280]
    assert run.verify().grade is replay.Grade.BITWISE
    killed.train(path, steps=320, checkpoints=40)
    run = replay.open(path)
    assert run.verify().grade is replay.Grade.BITWISE
    assert bits(run.state(320)) == bits(intact.state(320))


# ---------------------------------------------------------------------- resuming something else


def changed(sample):
    x = killed.DATA["x"].copy()
    x[sample, 0] += 1
    return {**killed.DATA, "x": x}


def wider():
    weights = {"hidden": np.zeros((64, 17), np.float32), "out": np.zeros((17, 10), np.float32)}
    return replay.Program(weights, killed.loss, optax.sgd(0.05, momentum=0.9))


FACTORS = np.linspace(0, 1, 256, dtype=np.float32)


@pytest.mark.parametrize(
    ("other", "error", "named"),
    [
        (
            {"key": jax.random.key(8)},
            replay.IdentityError,
            r"key is \[0, 8\], the run has \[0, 7\]",
        ),
        (
            {"order": killed.order(320, seed=4)},
            replay.IdentityError,
            r"seed=4.*the run has Order.shuffled\(batch_size=8, epochs=10, seed=3\)",
        ),
        ({"steps": 352}, replay.IdentityError, r"epochs=11.*the run has .*epochs=10"),
        ({"program": killed.program(0.06)}, replay.IdentityError, "step has .*6.*e-02.*5.*e-02"),
        (
            {"program": wider()},
            replay.IdentityError,
            r"params/hidden: float32\[64,17\], the run has params/hidden: float32\[64,16\]",
        ),
        ({"data": changed(0)}, replay.DataError, "sample 0 has other content"),
        ({"data": changed(131)}, replay.DataError, r"sample 131 \(leaf 'x'\) has other content"),
        (
            {"data": {k: v[:-8] for k, v in killed.DATA.items()}, "order": killed.order(320)},
            replay.IdentityError,
            r"248 samples.*the run has .*256 samples",
        ),
        ({"sample_weights": FACTORS}, replay.IdentityError, "sample_weights are not those"),
    ],
    ids=["key", "seed", "epochs", "rate", "width", "probe", "sample", "samples", "weights"],
)
def test_a_run_is_resumed_only_by_what_recorded_it(tmp_path, finished, other, error, named):
    before = Place(finished).list()
    with pytest.raises(error, match=named) as caught:
        killed.train(finished, **({"steps": 320} | other))
    assert caught.value.why and caught.value.fix
    assert Place(finished).list() == before | {"lock": Place(finished).size("lock")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    killed.train(path, steps=320)
    return path


def test_sample_weights_are_taken_up_again_and_not_left_out(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    killed.train(whole, steps=320, sample_weights=FACTORS)
    with killed.recorder(parts, steps=320, sample_weights=FACTORS) as recorder:
        recorder.advance(130)
    with pytest.raises(replay.IdentityError, match="sample_weights are not those"):
        killed.train(parts, steps=320)
    killed.train(parts, steps=320, sample_weights=FACTORS)
    assert bits(replay.open(parts).state(320)) == bits(replay.open(whole).state(320))
    assert replay.open(parts).verify().grade is replay.Grade.BITWISE


# ------------------------------------------------------------------------------------------ fed


def feed(path, stop):
    """Feed batches up to a step; tell which steps the loop itself had to feed."""
    ids = killed.order(320).bind(256)[:]
    fed = []
    options = {"data": None, "order": None, "checkpoints": 40}
    with killed.recorder(path, **options) as recorder:
        while recorder.step < stop:
            step = recorder.step
            recorder.feed({name: rows[ids[step]] for name, rows in killed.DATA.items()}, ids[step])
            fed.append(step)
    return fed


def test_a_fed_run_keeps_its_batches_and_repeats_them_when_it_is_resumed(
    uninterrupted, tmp_path, capsys
):
    intact, path = uninterrupted(steps=320), tmp_path / "run"
    assert feed(path, 130) == list(range(130))
    assert "every batch is kept in" in capsys.readouterr().out
    place = Place(path)
    ends = [
        end for end, record in frames(place.read(JOURNAL), JOURNAL) if record["kind"] == "steps"
    ]
    place.truncate(JOURNAL, ends[-1] + 5)  # as a kill leaves it: steps, but no state 130
    run = replay.open(path)
    assert run.steps == 130 and run.checkpoints == [0, 40, 80, 120]
    assert run.verify().grade is replay.Grade.BITWISE
    assert feed(path, 320) == list(range(130, 320)), "steps 120 to 129 come from the run itself"
    run = replay.open(path)
    assert run.verify().grade is replay.Grade.BITWISE
    for state in (130, 200, 320):
        assert bits(run.state(state)) == bits(intact.state(state))

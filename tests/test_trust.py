"""A run from a stranger is data: it can be wrong, but it cannot do, reach or allocate anything."""

import copy
import dataclasses
import json
import os
import pathlib
import pickle
import re
import subprocess
import time
import tracemalloc
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
import tiny
from hypothesis import strategies as st
from jax import export
from jax.extend.mlir import deserialize_portable_artifact, ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir
from tiny import bits, compile_once  # noqa: F401  # the fixture is there for who imports it

import replay
import replay.replaying
import replay.worker
from replay import artifact
from replay.identity import NUMERIC_FLAGS, sha256
from replay.journal import frame, only_frame
from replay.log import HEADER, JOURNAL
from replay.store import Place

CALLBACK = "xla_ffi_python_cpu_callback"


@dataclasses.dataclass(frozen=True)
class Recorded:
    """An honest run, to forge others from."""

    files: dict[str, bytes]
    states: list
    signature: artifact.Signature

    def header(self) -> dict[str, Any]:
        """Return what run.msgpack says, to be changed."""
        return only_frame(self.files[HEADER], HEADER)

    def program(self, name: str) -> export.Exported:
        return artifact.load(name, self.files[f"program/{name}"], self.signature)

    def forge(self, path, header=None, journal=(), **files) -> pathlib.Path:
        """Write a run whose checksums are right whatever else is not.

        Args:
            path: where.
            header: another content of run.msgpack.
            journal: records that follow the honest ones.
            **files: other programs by name.
        """
        header = copy.deepcopy(header or self.header())
        changed = dict(self.files)
        for name, data in files.items():
            changed[f"program/{name}"] = data
            header["programs"][name] |= {"sha256": sha256(data), "bytes": len(data)}
        changed[HEADER] = frame(header)
        changed[JOURNAL] += b"".join(map(frame, journal))
        for name, data in changed.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        return path


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    path = tmp_path_factory.mktemp("honest") / "run"
    run, place = tiny.record(path), Place(path)
    return Recorded(
        files={name: place.read(name) for name in place.list()},
        states=[bits(state) for _, state in run.states(slice(None))],
        signature=run.log.header.signature,
    )


@pytest.fixture
def nothing_may_run(monkeypatch):
    """Return a function after whose call nothing is compiled and no process is started."""

    def fail(*arguments, **options):
        raise AssertionError("something of a stranger's run is executed")

    def begin():
        monkeypatch.setattr("replay.trajectory.compile", fail)
        monkeypatch.setattr(subprocess, "Popen", fail)

    return begin


def refuse(error, what, question, *arguments, **options):
    """Check that a question is refused with three parts, the first of which matches."""
    with pytest.raises(error, match=what) as caught:
        question(*arguments, **options)
    assert re.search(what, caught.value.what), caught.value.what
    assert caught.value.why and caught.value.fix
    return caught.value


# -------------------------------------------------------------------------------------- programs


def plainly(call):
    return call


def in_a_branch(call):
    return lambda x: jax.lax.cond(x.sum() > 0, call, lambda x: x, x)


def in_a_loop(call):
    return lambda x: jax.lax.fori_loop(0, 2, lambda i, x: call(x), x)


def in_a_function(call):
    return jax.jit(lambda x: jax.jit(call)(x))


def calling(honest, target, name="step", place=plainly):
    """Return the bytes of an honest program that makes a custom call besides."""

    def program(*raw):
        first, *rest = honest.program(name).call(*raw)
        form = jax.ShapeDtypeStruct(first.shape, first.dtype)
        return [place(lambda x: jax.ffi.ffi_call(target, form)(x))(first), *rest]

    allowed = [export.DisabledSafetyCheck.custom_call(target)]
    arguments = honest.signature.arguments(name)
    return bytes(export.export(jax.jit(program), disabled_checks=allowed)(*arguments).serialize())


def edited(honest, line, name="step"):
    """Return the bytes of a program with a line of StableHLO more."""
    exported = honest.program(name)
    with mlir.make_ir_context() as context:
        stablehlo.register_dialect(context)
        module = deserialize_portable_artifact(exported.mlir_module_serialized, context)
        text = module.operation.get_asm(enable_debug_info=False)
    at = text.index("    %")
    (ids,) = re.findall(r"(%arg\d+): tensor<4xi32>", text)
    text = f"{text[:at]}    {line.replace('IDS', ids)}\n{text[at:]}"
    with mlir.make_ir_context() as context:
        stablehlo.register_dialect(context)
        module = ir.Module.parse(text)
        data = stablehlo.serialize_portable_artifact(module, stablehlo.get_minimum_version())
    return bytes(dataclasses.replace(exported, mlir_module_serialized=data).serialize())


@pytest.mark.parametrize("place", [plainly, in_a_branch, in_a_loop, in_a_function])
def test_a_program_that_calls_python_is_refused_before_anything_runs(
    honest, tmp_path, nothing_may_run, place
):
    path = honest.forge(tmp_path, step=calling(honest, CALLBACK, place=place))
    nothing_may_run()
    run = replay.open(path)
    what = f"program/step calls '{CALLBACK}'"
    error = refuse(replay.IdentityError, what, run.state, 3)
    assert error.fix == f"if you trust who recorded it: replay.open(path, allow=['{CALLBACK}'])"
    refuse(replay.IdentityError, what, lambda: list(run.trajectory()))
    assert [segment.grade.name for segment in run.verify().segments] == ["FAILED"] * 3


@pytest.mark.parametrize(
    "target",
    [
        "xla_python_cpu_callback",
        "xla_ffi_partitioned_python_cpu_callback",
        "xla_python_gpu_callback",
        "triton_kernel_call",
        "tpu_custom_call",
        "lapack_sgetrf_ffi ",
        "LAPACK_SGETRF_FFI",
        "lapack_sgetrf_ffi\x00",
        "Sharding,Sharding",
    ],
)
def test_only_calls_on_the_list_are_made(honest, tmp_path, nothing_may_run, target):
    path = honest.forge(tmp_path, step=calling(honest, target))
    nothing_may_run()
    refuse(replay.IdentityError, "program/step calls '", replay.open(path).state, 3)
    allowing_others = replay.open(path, allow=["lapack", "triton", "*", "xla_ffi_python"])
    refuse(replay.IdentityError, "program/step calls '", allowing_others.state, 3)


def test_a_call_is_allowed_by_its_name(honest, tmp_path, monkeypatch):
    path = honest.forge(tmp_path, step=calling(honest, "my_kernel"))
    names = []
    monkeypatch.setattr(
        "replay.trajectory.compile", lambda exported, signature, name, **_: names.append(name)
    )
    run = replay.open(path, allow=["my_kernel"])
    with pytest.raises(TypeError):  # what was compiled instead cannot be called
        run.state(3)
    assert names == ["step"]


@pytest.mark.parametrize(
    "line",
    [
        '%call = "stablehlo.custom_call"(IDS) {call_target_name = "unheard_of", '
        "has_side_effect = true} : (tensor<4xi32>) -> tensor<4xi32>",
        '%t = stablehlo.create_token : !stablehlo.token %u:2 = "stablehlo.infeed"(%t) '
        '{infeed_config = ""} : (!stablehlo.token) -> (tensor<f32>, !stablehlo.token)',
        '%t = stablehlo.create_token : !stablehlo.token %u = "stablehlo.outfeed"(IDS, %t) '
        '{outfeed_config = ""} : (tensor<4xi32>, !stablehlo.token) -> !stablehlo.token',
        '%t = stablehlo.create_token : !stablehlo.token %u:2 = "stablehlo.recv"(%t) '
        "{channel_handle = #stablehlo.channel_handle<handle = 1, type = 3>, is_host_transfer = "
        "true} : (!stablehlo.token) -> (tensor<f32>, !stablehlo.token)",
    ],
    ids=["custom_call", "infeed", "outfeed", "recv"],
)
def test_a_line_that_reaches_out_of_a_program_is_refused(honest, tmp_path, nothing_may_run, line):
    path = honest.forge(tmp_path, step=edited(honest, line))
    nothing_may_run()
    refuse(replay.IdentityError, "program/step calls '", replay.open(path).state, 3)


def test_whoever_resumes_a_run_executes_the_program_they_passed_or_nothing(
    honest, tmp_path, nothing_may_run
):
    """The header may claim any text; the file is compared."""
    header = honest.header()
    path = honest.forge(tmp_path, header, step=calling(honest, CALLBACK))
    assert (
        header["programs"]["step"]["text"]
        == only_frame((path / HEADER).read_bytes(), HEADER)["programs"]["step"]["text"]
    )
    nothing_may_run()
    what = "the program is not the one in"
    refuse(replay.IdentityError, what, tiny.record, path, resume=True)
    refuse(replay.IdentityError, what, replay.open, path, program=tiny.PROGRAM, data=tiny.DATA)


def other_batch(*shape):
    """Export a step for another batch than the run's."""

    def export_it(honest):
        arguments = honest.signature.arguments("step")
        arguments[-1] = jax.ShapeDtypeStruct(shape, jnp.float32)
        forms = honest.signature.results("step")
        zeros = jax.jit(lambda *raw: [jnp.zeros(form.shape, form.dtype) for form in forms])
        return bytes(export.export(zeros)(*arguments).serialize())

    return export_it


def other_results(honest):
    zeros = jax.jit(lambda *raw: [jnp.zeros(4)])
    return bytes(export.export(zeros)(*honest.signature.arguments("step")).serialize())


def other_platform(honest):
    forms = honest.signature.results("step")
    zeros = jax.jit(lambda *raw: [jnp.zeros(form.shape, form.dtype) for form in forms])
    exported = export.export(zeros, platforms=["tpu"])(*honest.signature.arguments("step"))
    return bytes(exported.serialize())


@pytest.mark.parametrize(
    ("make", "error", "what"),
    [
        (other_batch(5), replay.LogError, "does not take or return the leaves"),
        (other_batch(4, 1), replay.LogError, "does not take or return the leaves"),
        (other_results, replay.LogError, "does not take or return the leaves"),
        (lambda honest: honest.files["program/update"], replay.LogError, "does not take or return"),
        (other_platform, replay.IdentityError, "the run was recorded on tpu"),
        (lambda honest: b"", replay.LogError, "is not a readable exported program"),
        (lambda honest: bytes(1000), replay.LogError, "is not a readable exported program"),
    ],
    ids=["batch", "dims", "results", "update", "platform", "empty", "zeros"],
)
def test_a_program_that_does_not_fit_the_run_is_refused(
    honest, tmp_path, nothing_may_run, make, error, what
):
    path = honest.forge(tmp_path, step=make(honest))
    nothing_may_run()
    refuse(error, what, replay.open(path).state, 3)


def test_a_program_that_does_not_compile_is_an_error_with_advice(honest, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such thing")

    monkeypatch.setattr("replay.trajectory.compile", fail)
    run = replay.open(honest.forge(tmp_path))
    what = "step cannot be compiled: JaxRuntimeError: INTERNAL: no such thing"
    refuse(replay.LogError, what, run.state, 3)
    assert bits(run.state(8)) == honest.states[8], "a stored state needs no program"


# ------------------------------------------------------------------------------------- unpickling


class Payload:
    """What a pickle would do if anything read it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (self.marker, "w"))


def test_nothing_is_ever_unpickled(honest, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("something is unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, fail)
    monkeypatch.setattr("marshal.loads", fail)
    monkeypatch.setattr(np.lib.format, "read_array", fail)
    run = replay.open(honest.forge(tmp_path / "run"))
    assert run.verify().grade is replay.Grade.BITWISE
    assert [bits(state) for _, state in run.states(slice(None))] == honest.states
    assert run.history() and len(list(run.trajectory())) == tiny.STEPS


def test_a_planted_pickle_stays_what_it_is(honest, tmp_path):
    marker = tmp_path / "marker"
    pickled = pickle.dumps(Payload(str(marker)))
    path = honest.forge(tmp_path / "program", step=pickled)
    refuse(replay.LogError, "program/step is not a readable", replay.open(path).state, 3)
    for number, data in enumerate([pickled, frame(pickled), frame(msgpack.ExtType(5, pickled))]):
        path = honest.forge(tmp_path / str(number))
        (path / HEADER).write_bytes(data)
        refuse(replay.LogError, "run.msgpack is", replay.open, path)
    for field in ("environment", "order", "signature", "fingerprint", "parent"):
        path = honest.forge(tmp_path / field, honest.header() | {field: pickled})
        refuse(replay.LogError, "run.msgpack", replay.open, path)
    assert not marker.exists()
    pickle.loads(pickled).close()
    assert marker.exists(), "the payload works"


# -------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "flags",
    [
        {"xla_dump_to": "/tmp/x"},
        {"xla_gpu_cuda_data_dir": "/tmp/x"},
        {"xla_cpu_max_isa": "AVX2 --xla_dump_to=/tmp/x"},
        {"xla_cpu_max_isa": "AVX2\n--xla_dump_to=/tmp/x"},
        {"xla_cpu_max_isa": "AVX2\t--xla_dump_to=/tmp/x"},
        {"xla_cpu_max_isa": "/tmp/x"},
        {"xla_cpu_max_isa": "'--xla_dump_to"},
        {"xla_cpu_max_isa": ""},
        {"xla_cpu_max_isa": ["--xla_dump_to=/tmp/x"]},
        {"xla_cpu_max_isa=AVX --xla_dump_to": "/tmp/x"},
        {5: "x", None: "y", b"xla_cpu_max_isa": "AVX2"},
        ["--xla_dump_to=/tmp/x"],
        "--xla_dump_to=/tmp/x",
        7,
        None,
    ],
    ids=str,
)
def test_other_flags_never_reach_a_worker(flags):
    variables = replay.worker._variables({"threads": 2, "xla_flags": flags})
    assert variables["XLA_FLAGS"] == ""
    assert set(variables) == {
        "NPROC",
        "XLA_FLAGS",
        "JAX_ENABLE_X64",
        "JAX_THREEFRY_PARTITIONABLE",
    }


def test_numeric_flags_and_the_thread_count_do_reach_a_worker():
    flags = {"xla_cpu_max_isa": "AVX2", "xla_disable_hlo_passes": "fusion,cse-1"}
    recorded = {"threads": 3, "x64": True, "matmul_precision": "highest", "platform": "cpu"}
    assert replay.worker._variables(recorded | {"xla_flags": flags, "LD_PRELOAD": "x.so"}) == {
        "NPROC": "3",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2 --xla_disable_hlo_passes=fusion,cse-1",
        "JAX_ENABLE_X64": "1",
        "JAX_THREEFRY_PARTITIONABLE": "1",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_PLATFORMS": "cpu",
    }
    assert not [name for name in NUMERIC_FLAGS if "dump" in name or "dir" in name]


@pytest.mark.parametrize(
    "setting",
    [
        {"platform": "cuda;rm"},
        {"platform": ["cpu"]},
        {"matmul_precision": "highest --x"},
        {"matmul_precision": ["highest"]},
        {"x64": "1"},
        {"threefry_partitionable": "no"},
    ],
    ids=str,
)
def test_a_setting_of_another_form_is_the_default(setting):
    assert replay.worker._variables({"threads": 1} | setting) == {
        "NPROC": "1",
        "XLA_FLAGS": "",
        "JAX_ENABLE_X64": "0",
        "JAX_THREEFRY_PARTITIONABLE": "1",
    }


@pytest.mark.parametrize(
    "threads", [0, -1, 4097, 10**9, 2.5, True, "2", None, [2], "2 --x"], ids=repr
)
def test_an_absurd_thread_count_is_refused(threads):
    what = re.escape(f"the run was recorded with {threads!r} threads")
    refuse(replay.IdentityError, what, replay.worker._variables, {"threads": threads})


def test_no_process_is_started_with_an_absurd_thread_count(honest, tmp_path, nothing_may_run):
    header = honest.header()
    header["environment"]["threads"] = 10**9
    run = replay.open(honest.forge(tmp_path, header))
    nothing_may_run()
    refuse(replay.IdentityError, "recorded with 1000000000 threads", run.state, 3)


def test_a_worker_of_a_forged_run_dumps_nothing(honest, tmp_path, monkeypatch):
    dump = tmp_path / "dump"
    header = honest.header()
    header["environment"]["xla_flags"] = {
        "xla_dump_to": str(dump),
        "xla_cpu_prefer_vector_width": f"256 --xla_dump_to={dump}",
        "xla_cpu_max_isa": f"AVX2 --xla_dump_to={dump}",
    }
    started = []
    start = subprocess.Popen

    def watched(*arguments, **options):
        started.append(options["env"])
        return start(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", watched)
    run = replay.open(honest.forge(tmp_path / "run", header))
    what = "a worker process could not be given the recorded settings: xla_flags is {}, recorded"
    refuse(replay.IdentityError, what, run.state, 3)
    assert [environment["XLA_FLAGS"] for environment in started] == [""]
    assert not dump.exists()


@pytest.mark.parametrize(
    "table",
    [
        5,
        None,
        [1],
        [{}],
        [{"name": 5, "shape": [4], "dtype": "float32"}],
        [{"name": "logits", "shape": 4, "dtype": "float32"}],
        [{"name": "logits", "shape": [-4], "dtype": "float32"}],
        [{"name": "logits", "shape": [4], "dtype": None}],
    ],
    ids=repr,
)
def test_a_table_of_activations_that_is_none_is_refused(honest, tmp_path, table):
    header = honest.header()
    header["programs"]["activations"] = {**header["programs"]["losses"], "table": table}
    path = honest.forge(tmp_path / "run", header)
    refuse(replay.LogError, "run.msgpack is not the header of a run", replay.open, path)


def test_activations_of_no_type_are_refused_when_they_are_asked_for(honest, tmp_path):
    header = honest.header()
    table = [{"name": "logits", "shape": [4], "dtype": "floats"}]
    header["programs"]["activations"] = {**header["programs"]["losses"], "table": table}
    run = replay.open(honest.forge(tmp_path / "run", header))
    question = run.activations("logits").sel(step=3)
    refuse(replay.LogError, "the table of activations is wrong", question.compute)


# ----------------------------------------------------------------------------------------- names

NAMES = ["../../escape", "/etc/passwd", "..", "params/../../x", "a/./b", "C:\\x", "~/x", "%2e%2e"]


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_tensor_is_never_a_path(honest, tmp_path, name):
    """Arrays are numbered, so that what a leaf is called decides nothing on disk."""
    header = honest.header()
    header["signature"]["state"][0]["path"] = name
    header["arrays"]["states"][0]["attributes"] = {"path": name}
    header["name"] = header["programs"]["step"]["text"] = name
    path = honest.forge(tmp_path / "a" / "b" / "run", header)
    everything = sorted(tmp_path.rglob("*"))
    run = replay.open(path)
    assert run.verify().grade is replay.Grade.BITWISE
    for number in (0, 3, 24):
        assert sorted(bits(run.state(number))) == sorted(honest.states[number])
    assert run.thin(2) == [8, 16]
    left = {file for file in everything if re.search(r"/states/\d/c/[12](/|$)", str(file))}
    assert set(everything) - left == set(tmp_path.rglob("*")) - {path / "lock"} | (
        {path / "lock"} & set(everything)
    )


@pytest.mark.parametrize(
    "name",
    [
        "states/../../x",
        "states/..",
        "../states/0",
        "/tmp/x",
        "states/0/../../../x",
        "states",
        "states/",
        "states/0/c",
        "states/0\n",
        "states/\x00",
        "STATES/0",
        "states/1",
        "steps/witness",
        "program/step",
        "data/0",
        "states/\u0660",
        b"states/0",
        0,
        None,
        ["states/0"],
    ],
    ids=repr,
)
def test_an_array_lies_where_its_number_says_or_nowhere(honest, tmp_path, name):
    header = honest.header()
    header["arrays"]["states"][0]["name"] = name
    path = honest.forge(tmp_path / "run", header)
    refuse(replay.LogError, "run.msgpack is not the header of a run", replay.open, path)


def test_a_file_that_is_a_device_a_pipe_or_a_folder_is_not_read(honest, tmp_path):
    for number, name in enumerate([HEADER, JOURNAL, "program/step"]):
        path = honest.forge(tmp_path / str(number))
        for kind in ("device", "pipe", "folder", "dangling"):
            (path / name).rmdir() if (path / name).is_dir() else (path / name).unlink()
            if kind == "device":
                (path / name).symlink_to("/dev/zero")
            elif kind == "pipe":
                os.mkfifo(path / name)
            elif kind == "folder":
                (path / name).mkdir()
            else:
                (path / name).symlink_to(tmp_path / "nowhere")
            with pytest.raises(replay.LogError, match=name):
                replay.open(path).state(3)


ESCAPE = "\x1b[2J\x1b]0;owned\x07\u202e[red]\r\x9b31m"


def test_names_cannot_steer_a_terminal(honest, tmp_path, monkeypatch):
    header = honest.header()
    header["name"] = f"tiny{ESCAPE}"
    header["environment"]["processor"] = ESCAPE
    for number in range(4):
        header["signature"]["state"][number]["path"] += ESCAPE
        header["arrays"]["states"][number]["attributes"]["path"] += ESCAPE
    for number in range(2):
        header["signature"]["grads"][number]["path"] += ESCAPE
    journal = [{"kind": "selftest", "differs": ESCAPE}]
    path = honest.forge(tmp_path / "run", header, journal)
    run = replay.open(path)
    shown = [repr(run), str(run.verify()), repr(run.verify())]
    with pytest.MonkeyPatch.context() as patch:
        advance = replay.replaying.LocalEngine.advance

        def nudged(engine, state, stretch):
            state = [jnp.asarray(leaf) + 1 for leaf in state]
            return advance(engine, state, stretch)

        patch.setattr(replay.replaying.LocalEngine, "advance", nudged)
        shown += [
            str(run.verify()),
            repr(run.verify().segments),
            str(run.verify().segments[0].divergence),
        ]
        with pytest.raises(replay.DivergenceError) as caught:
            run.state(7)
        shown += [str(caught.value), *map(str, caught.value.args)]
        with pytest.warns(UserWarning, match="state 7 is not exact") as warned:
            run.state(7, exact=False)
        shown += [str(warning.message) for warning in warned]
    (path / "states/1/c/1/0").write_bytes(b"damage")
    with pytest.raises(replay.LogError) as caught:
        run.state(9)
    shown += [str(caught.value), caught.value.what, str(run.verify())]
    assert any("params/hidden\\x1b[2J" in text for text in shown)
    assert any("params/out\\x1b[2J" in text for text in shown)
    for text in shown:
        assert all(c.isprintable() or c == "\n" for c in text), repr(text)


# ----------------------------------------------------------------------------------------- sizes


def grow(header, shape):
    """Give leaf 0 of the state another shape, in the signature as in the layout."""
    header["signature"]["state"][0]["shape"] = shape
    header["arrays"]["states"][0] |= {
        "shape": [tiny.STEPS + 1, *shape],
        "chunk": [1] * (len(shape) + 1),
        "inner": None,
        "dims": [str(i) for i in range(len(shape) + 1)],
    }


def with_samples(header, count):
    header["order"][1] = count
    for spec in header["arrays"]["data"]:
        spec["shape"][0] = count


def with_batches_of(header, count):
    header["signature"]["batch_size"] = count
    for leaves in ("losses", "aux"):
        for leaf in header["signature"][leaves]:
            leaf["shape"] = [count]
    for spec in header["arrays"]["steps"]:
        if len(spec["shape"]) == 2:
            spec["shape"][1] = count


def with_steps(header, count):
    header["steps"] = count
    for spec in header["arrays"]["steps"]:
        spec["shape"][0] = count
    for spec in header["arrays"]["states"]:
        spec["shape"][0] = count + 1


SIZES = {
    "a leaf of 1e12 elements": (lambda h: grow(h, [10**6, 10**6]), "3,725.3 GiB for one state"),
    "a leaf of 1e15 elements": (lambda h: grow(h, [10**15]), "is not a count below"),
    "a leaf of 1e36 elements": (lambda h: grow(h, [10**12] * 3), "GiB for one state"),
    "a leaf of a million dimensions": (lambda h: grow(h, [1] * 10**5), "an array of 100000 dim"),
    "a huge data set": (lambda h: with_samples(h, 2**31 - 1), "GiB for the embedded data"),
    "more samples than ids": (lambda h: with_samples(h, 2**40), "order is"),
    "an order over more samples": (
        lambda h: h["order"].__setitem__(1, 2**31 - 1),
        "the order is over 2147483647 samples, the data has 16",
    ),
    "huge batches": (lambda h: with_batches_of(h, 2**31 - 1), "GiB for the inputs of one call"),
    "batches beyond ids": (lambda h: with_batches_of(h, 2**40), "is not a count below"),
    "no batches": (lambda h: with_batches_of(h, 0), "samples in it are missing"),
    "huge blocks": (lambda h: h["signature"].update(block=2**31 - 1), "inputs of one call"),
    "huge gradients": (
        lambda h: h["signature"]["grads"][0].update(shape=[10**7, 10**6]),
        "GiB for the results of one call",
    ),
    "huge results": (
        lambda h: h["signature"]["carry"][0].update(shape=[10**7, 10**6]),
        "GiB for the results of one call",
    ),
    "a huge chunk": (
        lambda h: h["arrays"]["steps"][0].update(chunk=[2**34]),
        "128.0 GiB for a chunk of steps/witness",
    ),
    "a chunk beyond all bounds": (
        lambda h: h["arrays"]["steps"][0].update(chunk=[2**60]),
        "impossible chunks",
    ),
    "a negative chunk": (lambda h: h["arrays"]["steps"][0].update(chunk=[-1]), "impossible shape"),
    "2**60 steps": (lambda h: with_steps(h, 2**60), "steps is 1152921504606846976"),
    "fewer steps than the journal names": (lambda h: with_steps(h, 5), "journal.msgpack names"),
}


def measured(question):
    """Return what a question raises, the bytes that it took at most, and its seconds."""
    tracemalloc.start()
    begun = time.perf_counter()
    try:
        with pytest.raises(replay.ReplayError) as caught:
            question()
        return caught.value, tracemalloc.get_traced_memory()[1], time.perf_counter() - begun
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_refused_before_memory_is_taken_for_it(honest, tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 2**12}.get(name, 2**22))
    change, what = SIZES[name]
    header = honest.header()
    change(header)
    path = honest.forge(tmp_path, header)
    error, most, seconds = measured(lambda: replay.open(path))
    assert isinstance(error, replay.LogError) and what in error.what and error.fix
    assert most < 2**24 + 60 * (path / HEADER).stat().st_size and seconds < 5


def test_steps_that_a_journal_names_are_bounded_by_the_run_and_by_memory(honest, tmp_path):
    far = {"kind": "steps", "end": 2**46, "digest": bytes(12), "metrics": []}
    path = honest.forge(tmp_path / "short", journal=[far])
    error, most, _ = measured(lambda: replay.open(path))
    assert "cannot have" in error.what and most < 2**24
    header = honest.header()
    with_steps(header, 2**47)
    path = honest.forge(tmp_path / "long", header, [far])
    error, most, _ = measured(lambda: replay.open(path).history())
    assert "524,288.0 GiB for one column" in error.what and most < 2**24


NESTED = b"\x91" * 100_000 + b"\xc0"


@pytest.mark.parametrize(
    "payload",
    [
        NESTED,
        b"\x81\xa1a" * 100_000 + b"\xc0",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x05",
        b"\x81\x90\xc0",
        b"\x81\x80\xc0",
        b"\xc1",
        b"\xd9\x02\xff\xff",
        b"",
    ],
    ids=lambda payload: payload[:8].hex(),
)
def test_what_is_no_sound_msgpack_is_refused_at_once(honest, tmp_path, payload):
    data = frame_of(payload)
    path = honest.forge(tmp_path)
    (path / HEADER).write_bytes(data)
    error, most, seconds = measured(lambda: replay.open(path))
    assert "run.msgpack is damaged" in error.what
    assert most < 2**25 and seconds < 5
    (path / HEADER).write_bytes(honest.files[HEADER])
    (path / JOURNAL).write_bytes(data)
    error, most, _ = measured(lambda: replay.open(path).state(3))
    assert JOURNAL in str(error) and most < 2**25


def frame_of(payload):
    """Frame bytes as `frame` does, whether or not they are msgpack."""
    honest = frame(payload)
    head = bytearray(honest[:12])
    head[4:8] = len(payload).to_bytes(4, "little")
    head[8:12] = replay.journal._checksum(payload).to_bytes(4, "little")
    return bytes(head) + payload


@pytest.mark.parametrize("length", [2**28 + 1, 2**31, 2**32 - 1])
def test_a_frame_that_claims_to_be_huge_is_not_waited_for(honest, tmp_path, length):
    path = honest.forge(tmp_path)
    huge = b"RPLY" + length.to_bytes(4, "little") + bytes(4)
    (path / JOURNAL).write_bytes(honest.files[JOURNAL] + huge)
    tracemalloc.start()
    try:
        run = replay.open(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert run.log.durable.end == len(honest.files[JOURNAL]), "it is a torn tail"


@pytest.mark.parametrize("name", [HEADER, JOURNAL, "program/step"])
def test_a_file_that_is_huge_is_not_read(honest, tmp_path, name):
    path = honest.forge(tmp_path)
    with open(path / name, "r+b") as file:
        file.truncate(2**34)  # takes no space on disk
    error, most, seconds = measured(lambda: replay.open(path).state(3))
    assert f"{name} has 17,179,869,184 bytes, more than" in error.what
    assert most < 2**24 and seconds < 5


# ------------------------------------------------------------------------------- other metadata


def test_what_the_zarr_metadata_says_has_no_effect(honest, tmp_path):
    names = [name for name in honest.files if name.endswith("zarr.json")]
    assert len(names) == 13
    changes = [
        {"shape": [1], "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1]}}},
        {"data_type": "uint8"},
        {"codecs": [{"name": "bytes"}]},
        {"fill_value": 7, "attributes": {"path": "/etc/passwd"}},
        {"chunk_key_encoding": {"name": "v2"}, "zarr_format": 2},
        {"storage_transformers": [{"name": "x", "configuration": {"path": "../../.."}}]},
    ]
    for number, change in enumerate(changes):
        path = honest.forge(tmp_path / str(number))
        for name in names:
            (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | change))
        run = replay.open(path)
        assert run.verify().grade is replay.Grade.BITWISE
        assert [bits(state) for _, state in run.states(slice(None))] == honest.states
        assert len(run.history()["loss"]) == tiny.STEPS


# ------------------------------------------------------------------------------------- mutations

VALUES = st.one_of(
    st.sampled_from(
        [None, True, False, "", "x", "../x", "params/hidden", "float64", "uint32", b""]
    ),
    st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 16, 24, 25, 2**31, 2**32, 2**40, 2**63, 2**64 - 1]),
    st.sampled_from(
        [1.5, float("nan"), float("inf"), 1e300, "threefry2x32", "embedded", "spooled"]
    ),
    st.sampled_from(
        [[], {}, [1], [[]], {"a": 1}, [None], "float32", "int32", "O", "f4,i4", "external"]
    ),
)


def places(tree, path=()):
    """Yield the path of every node of a tree of dicts and lists."""
    yield path
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


def mutate(tree, path, how, value):
    """Replace, remove, repeat or swap what stands at a path."""
    *parents, last = path
    node = tree
    for key in parents:
        node = node[key]
    if how == "replace":
        node[last] = value
    elif how == "remove":
        del node[last]
    elif isinstance(node, list):
        node.insert(last, node[last]) if how == "repeat" else node.reverse()
    else:
        node["more"] = node[last]


class NoWorker:
    """In place of a process: what a record could do is done before it starts."""

    def __init__(self, signature, files, key, *, keep, recorded):
        variables = replay.worker._variables(recorded)
        assert re.fullmatch(r"(--xla_\w+=[\w.,-]+ ?)*", variables["XLA_FLAGS"])
        raise replay.IdentityError("no worker", why="there is none", fix="start one")


@hypothesis.settings(max_examples=150 if hypothesis.settings().max_examples < 100 else 5000)
@hypothesis.given(data=st.data())
def test_a_header_changed_at_random_is_refused_or_gives_the_same_answers(
    honest, tmp_path_factory, data
):
    header = honest.header()
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from([path for path in places(header) if path]))
        how = data.draw(
            st.sampled_from(["replace", "replace", "replace", "remove", "repeat", "swap"])
        )
        mutate(header, path, how, data.draw(VALUES))
    path = honest.forge(tmp_path_factory.mktemp("mutated"), header)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay.replaying, "RemoteEngine", NoWorker)
        try:
            run = replay.open(path)
        except replay.ReplayError as error:
            assert error.what and error.why and error.fix
            return
        assert all(c.isprintable() for c in repr(run))
        assert run.verify().grade is not replay.Grade.UNAUDITED
        for question in (run.history, lambda: run.ids(0, run.steps), lambda: run.order, run.verify):
            ask(question)
        for number in (0, 3, 8, 17, 24):
            state = ask(lambda n=number: run.state(n))
            assert state is None or sorted(bits(state)) == sorted(honest.states[number])


def ask(question):
    try:
        return question()
    except replay.ReplayError as error:
        assert error.what and error.why and error.fix

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
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir
from tiny import bits, compile_once  # noqa: F401  # the fixture is there for who imports it

import replay
import replay.replaying
import replay.worker
from replay import artifact
from replay.identity import NUMERIC_FLAGS, sha256
from replay.journal import frame, frames, only_frame
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
def nothing_runs(monkeypatch):
    """Fail if anything is compiled or a process is started."""

    def fail(*arguments, **options):
        raise AssertionError("something of a stranger's run is executed")

    monkeypatch.setattr("replay.trajectory.compile", fail)
    monkeypatch.setattr(subprocess, "Popen", fail)
    monkeypatch.setattr(export.Exported, "call", fail)


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
    return lambda x: jax.lax.cond(x[0] > 0, call, lambda x: x, x)


def in_a_loop(call):
    return lambda x: jax.lax.fori_loop(0, 2, lambda i, x: call(x), x)


def in_a_function(call):
    return jax.jit(lambda x: jax.jit(call)(x))


def calling(honest, target, name="gradient", place=plainly):
    """Return the bytes of an honest program that makes a custom call besides."""

    def program(*raw):
        first, *rest = honest.program(name).call(*raw)
        form = jax.ShapeDtypeStruct(first.shape, first.dtype)
        return [place(lambda x: jax.ffi.ffi_call(target, form)(x))(first), *rest]

    allowed = [export.DisabledSafetyCheck.custom_call(target)]
    arguments = honest.signature.arguments(name)
    return bytes(export.export(jax.jit(program), disabled_checks=allowed)(*arguments).serialize())


def edited(honest, line, name="gradient"):
    """Return the bytes of a program with a line of StableHLO more."""
    exported = honest.program(name)
    text = artifact.text(exported)
    at = text.index("    %cst")
    with mlir.make_ir_context() as context:
        stablehlo.register_dialect(context)
        module = ir.Module.parse(f"{text[:at]}    {line}\n{text[at:]}")
        data = stablehlo.serialize_portable_artifact(module, stablehlo.get_minimum_version())
    return bytes(dataclasses.replace(exported, mlir_module_serialized=data).serialize())


@pytest.mark.parametrize("place", [plainly, in_a_branch, in_a_loop, in_a_function])
def test_a_program_that_calls_python_is_refused_before_anything_runs(
    honest, tmp_path, nothing_runs_later, place
):
    path = honest.forge(tmp_path, gradient=calling(honest, CALLBACK, place=place))
    nothing_runs_later()
    run = replay.open(path)
    what = f"program/gradient calls '{CALLBACK}'"
    error = refuse(replay.IdentityError, what, run.state, 3)
    assert error.fix == f"if you trust who recorded it: replay.open(path, allow=['{CALLBACK}'])"
    refuse(replay.IdentityError, what, lambda: list(run.trajectory()))
    assert [segment.grade.name for segment in run.verify().segments] == ["FAILED"] * 3


@pytest.fixture
def nothing_runs_later(monkeypatch):
    """As `nothing_runs`, from when it is called: forging a program takes a compiler."""

    def fail(*arguments, **options):
        raise AssertionError("something of a stranger's run is executed")

    def begin():
        monkeypatch.setattr("replay.trajectory.compile", fail)
        monkeypatch.setattr(subprocess, "Popen", fail)

    return begin

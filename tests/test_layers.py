"""Imports point down the layers, heavy dependencies have one owner, `__init__` does no work."""

import ast
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parent.parent
HERE = "tests/test_layers.py"

# From the lowest layer up; a module imports only from layers below its own.
LAYERS = (
    ("kernels",),
    ("errors", "identity", "tree", "bounds", "pieces"),
    ("intervals",),
    ("program", "artifact", "activations", "order", "data", "store", "journal", "checkpoints"),
    ("ancestry", "edits", "grafting"),
    ("indexing",),
    ("log", "grads", "query", "cache"),
    ("trajectory", "tracing", "plan", "writer", "progress", "lanes"),
    ("worker", "selftest", "recording", "recorder", "replaying", "sample_gradients", "edited"),
    ("frames", "results", "values", "indexes", "evidence", "joining", "parting"),
    ("narrowing", "influence", "effects", "metrics"),
    ("cells", "tiles"),
    ("grouped", "reuse"),
    ("reducing",),
    ("local",),
    ("folds", "prices"),
    ("execute", "fork", "counterfactuals", "predicting"),
    ("asking", "quantities"),
    ("api", "questions", "contrast", "comparing", "report"),
    ("cli", "demo"),
    ("__main__",),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}

# (importer, imported) within one layer, and why.
WITHIN_A_LAYER = {
    ("identity", "errors"): "a fingerprint that does not match is an error with advice",
    ("tree", "errors"): "a tree that no file could hold is an error with advice",
    ("artifact", "program"): "an artifact is a program, exported",
    ("activations", "program"): "what is tagged stands in the loss of a program",
    ("selftest", "worker"): "the fresh process of the proof is a worker",
    ("replaying", "worker"): "a replay with another thread count runs in a worker",
    ("sample_gradients", "replaying"): "per-sample gradients are computed along a replay",
    ("quantities", "asking"): "a quantity is an expression that asks its run",
    ("recording", "selftest"): "the proof runs beside the first steps of a recording",
    ("recorder", "recording"): "a recorder ends by handing over a recording",
    ("recorder", "selftest"): "what is compiled for a recording is compiled for its proof",
    ("questions", "api"): "a ready-made question asks a run",
    ("contrast", "api"): "runs are walked through by asking them",
    ("comparing", "api"): "runs are compared that somebody has opened",
    ("comparing", "contrast"): "a comparison shows what the walks through its runs tell",
    ("comparing", "questions"): "a comparison prints tables, and tests samples, as a question does",
    ("report", "comparing"): "a picture shows runs side by side",
    ("report", "questions"): "a picture shows the answer of a ready-made question",
    ("report", "api"): "a picture is drawn of a run, and no run draws itself",
    ("cli", "demo"): "`replay demo` is one of the commands",
}

# What only these modules of replay and kernels may import.
OWNERS = {
    "tensorstore": ("store",),
    "matplotlib": ("report",),
    "sqlglot": ("query.sql",),
    "duckdb": ("query.sql",),
    "flax": ("program", "demo"),
    "sklearn": ("demo", "query.clusters"),
    "replay.kernels": ("grads",),
    "experiments": (),
    "tests": (),
}

# What nobody may import, experiments and tests included.
FORBIDDEN = {
    "jax._src": "private, and changes without notice",
    "kernels": "called replay.kernels once installed",
}

# Not installed with the core, so imported inside the function that needs it; all else on top.
EXTRAS = (
    "flax",
    "matplotlib",
    "sklearn",
    "sqlglot",
    "duckdb",
    "pyarrow",
    "replay.query.sql",
    "replay.kernels.top_k_cpu",
)

# Modules that are themselves imported late, and so import their extras at the top.
LATE = {"query.sql": ("sqlglot", "duckdb", "pyarrow", "replay.query.sql")}

MOST_PUBLIC_NAMES = 25


class Import(NamedTuple):
    """One imported name, in full: `from replay.errors import DataError` has three parts.

    It is late where importing the module does not import it: in a function, or for types only.
    """

    name: str
    line: int
    late: bool

    def is_of(self, package: str) -> bool:
        return f"{self.name}.".startswith(f"{package}.")


def imports(node: ast.AST, package: list[str], late: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import():
                yield from (Import(alias.name, child.lineno, late) for alias in child.names)
            case ast.ImportFrom():
                base = package[: len(package) + 1 - child.level] if child.level else []
                base = [*base, child.module] if child.module else base
                for alias in child.names:
                    yield Import(".".join([*base, alias.name]), child.lineno, late)
            case ast.Attribute(value=ast.Name("jax"), attr="_src"):
                yield Import("jax._src", child.lineno, late)
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        )
        yield from imports(child, package, late or deferred)


def misplaced(module: str, each: Import) -> Iterator[str]:
    """Yield what is wrong with an import in a module of replay, `""` being `replay` itself."""
    unit = module.split(".")[0]
    for package, owners in OWNERS.items():
        owned = any(f"{module}.".startswith(f"{owner}.") for owner in owners)
        if each.is_of(package) and not owned and f"replay.{unit}" != package:
            allowed = f"only {' and '.join(owners)}" if owners else "no module"
            yield f"imports {package}, which {allowed} may"
    own = [x for m, names in LATE.items() if f"{module}.".startswith(f"{m}.") for x in names]
    if each.late != (any(map(each.is_of, EXTRAS)) and not any(map(each.is_of, own))):
        where = "inside a function" if each.late else "at the top"
        other = "at the top" if each.late else "inside the function that needs it"
        yield f"imports {each.name} {where}: import it {other}"
    if each.is_of("replay"):
        other_unit = f"{each.name}.".split(".")[1]
        if other_unit not in LAYER:
            yield f"imports {each.name}, which no layer has: import it from where it is defined"
        elif (
            unit in LAYER
            and unit != other_unit
            and LAYER[unit] <= LAYER[other_unit]
            and (unit, other_unit) not in WITHIN_A_LAYER
        ):
            yield f"imports {other_unit}, which is not in a lower layer than {unit}"


def work(statement: ast.stmt) -> Iterator[str]:
    """Yield what is wrong with a statement of `replay/__init__.py`."""
    match statement:
        case ast.Expr(ast.Constant(str())):
            pass
        case ast.ImportFrom(module=str(module)) if f"{module}.".startswith("replay."):
            pass
        case ast.Assign([ast.Name("__version__")], ast.Constant()):
            pass
        case ast.Assign([ast.Name("__all__")], ast.List(names) | ast.Tuple(names)):
            if len(names) > MOST_PUBLIC_NAMES:
                yield f"has {len(names)} public names, more than {MOST_PUBLIC_NAMES}"
        case _:
            yield f"does work: `{ast.unparse(statement)}`; it may only re-export"


def violations(path: str, source: str) -> list[str]:
    """Return what a file does against the layers; `path` is relative to the root."""
    tree = ast.parse(source)
    file = pathlib.PurePosixPath(path).with_suffix("")
    parts = ["replay", *file.parts] if file.parts[0] == "kernels" else [*file.parts]
    module = ".".join(parts[1:] if parts[-1] != "__init__" else parts[1:-1])
    unit = module.split(".")[0]
    found: list[tuple[int, str]] = []
    if parts[0] == "replay" and unit not in ("", *LAYER):
        found += [(1, f"{unit} is in no layer: add it to LAYERS in {HERE}")]
    if path == "replay/__init__.py":
        found += [(statement.lineno, text) for statement in tree.body for text in work(statement)]
    for each in imports(tree, parts[:-1]):
        for package, reason in FORBIDDEN.items():
            if each.is_of(package):
                found += [(each.line, f"imports {package}, which is {reason}")]
        if parts[0] == "replay":
            found += [(each.line, text) for text in misplaced(module, each)]
        elif parts[0] == "experiments" and any(
            each.is_of(f"replay.{name}") for name in LAYER if name != "kernels"
        ):
            found += [(each.line, f"imports {each.name}, which is not a public name")]
    return [f"{path}:{line}: {text}" for line, text in found]


def files() -> list[str]:
    return [
        str(file.relative_to(ROOT))
        for folder in ("replay", "kernels", "experiments", "tests")
        for file in sorted((ROOT / folder).rglob("*.py"))
        if not file.is_relative_to(ROOT / "replay" / "kernels")  # the symlink, read as kernels/
    ]


def test_the_check_reads_every_folder_and_the_symlink_once():
    read = files()
    assert {"replay/errors.py", "kernels/__init__.py", HERE} <= set(read)
    assert "replay/kernels/__init__.py" not in read


@pytest.mark.parametrize("path", files())
def test_a_module_keeps_to_its_layer(path):
    assert violations(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "text"),
    [
        # layers
        (
            "replay/store.py",
            "from replay.log import Log",
            "imports log, which is not in a lower layer than store",
        ),
        (
            "replay/order.py",
            "from replay import data",
            "imports data, which is not in a lower layer than order",
        ),
        (
            "replay/grads/rules.py",
            "from ..query.nodes import Scan",
            "imports query, which is not in a lower layer than grads",
        ),
        (
            "replay/plan.py",
            "import replay",
            "imports replay, which no layer has: import it from where it is defined",
        ),
        (
            "replay/plan.py",
            "from replay import record",
            "imports replay.record, which no layer has: import it from where it is defined",
        ),
        (
            "replay/extra/part.py",
            "",
            "extra is in no layer: add it to LAYERS in tests/test_layers.py",
        ),
        # owners
        ("replay/log.py", "import tensorstore as ts", "imports tensorstore, which only store may"),
        (
            "replay/cli.py",
            "def draw():\n    from matplotlib import pyplot",
            "imports matplotlib, which only report may",
        ),
        (
            "replay/query/nodes.py",
            "def parse():\n    import sqlglot",
            "imports sqlglot, which only query.sql may",
        ),
        (
            "replay/query/nodes.py",
            "def rest():\n    import duckdb",
            "imports duckdb, which only query.sql may",
        ),
        (
            "replay/trajectory.py",
            "from replay.kernels import topk",
            "imports replay.kernels, which only grads may",
        ),
        ("replay/api.py", "import experiments.spike", "imports experiments, which no module may"),
        ("replay/api.py", "from tests import models", "imports tests, which no module may"),
        (
            "kernels/topk.py",
            "from replay.errors import DataError",
            "imports errors, which is not in a lower layer than kernels",
        ),
        (
            "kernels/topk.py",
            "from ..errors import DataError",
            "imports errors, which is not in a lower layer than kernels",
        ),
        # the top of the module
        (
            "replay/store.py",
            "def close():\n    import os",
            "imports os inside a function: import it at the top",
        ),
        (
            "replay/program.py",
            "from flax import nnx",
            "imports flax.nnx at the top: import it inside the function that needs it",
        ),
        (
            "replay/report.py",
            "import matplotlib",
            "imports matplotlib at the top: import it inside the function that needs it",
        ),
        (
            "replay/query/sql/session.py",
            "def parse():\n    import duckdb",
            "imports duckdb inside a function: import it at the top",
        ),
        (
            "replay/api.py",
            "from replay.query.sql import session",
            "imports replay.query.sql.session at the top: "
            "import it inside the function that needs it",
        ),
        # private and shadowed names
        (
            "replay/grads/taps.py",
            "from jax._src import core",
            "imports jax._src, which is private, and changes without notice",
        ),
        (
            "experiments/spike.py",
            "import jax\njax._src.core",
            "imports jax._src, which is private, and changes without notice",
        ),
        (
            "tests/test_topk.py",
            "from kernels import topk",
            "imports kernels, which is called replay.kernels once installed",
        ),
        (
            "experiments/spike.py",
            "from replay.log import Log",
            "imports replay.log.Log, which is not a public name",
        ),
        # the package itself
        (
            "replay/__init__.py",
            "import jax",
            "does work: `import jax`; it may only re-export",
        ),
        (
            "replay/__init__.py",
            "__all__ = sorted(globals())",
            "does work: `__all__ = sorted(globals())`; it may only re-export",
        ),
        (
            "replay/__init__.py",
            f"__all__ = {[f'name{number}' for number in range(26)]}",
            "has 26 public names, more than 25",
        ),
    ],
)
def test_a_violation_is_reported_where_it_stands(path, source, text):
    line = source.count("\n") + 1
    assert violations(path, source) == [f"{path}:{line}: {text}"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("replay/__init__.py", '"""Doc."""\nfrom replay.api import record\n__all__ = ["record"]'),
        ("replay/__init__.py", f"__all__ = {[f'name{number}' for number in range(25)]}"),
        ("replay/artifact.py", "from replay.program import Program"),
        ("replay/store.py", "import tensorstore as ts\nfrom replay.errors import LogError"),
        ("replay/grads/__init__.py", "from replay.grads.rules import norm\nfrom . import taps"),
        ("replay/grads/rules.py", "from replay.kernels import topk"),
        ("replay/query/sql/session.py", "import sqlglot\nfrom replay.query.sql import formulas"),
        ("replay/program.py", "if TYPE_CHECKING:\n    from flax import nnx"),
        ("replay/report.py", "def draw():\n    from matplotlib import pyplot"),
        ("kernels/topk.py", "import jax\nfrom . import squares"),
        ("experiments/spike.py", "import matplotlib\nimport replay\nfrom replay import record"),
        ("tests/test_log.py", "from replay.log import Log"),
    ],
)
def test_what_keeps_to_the_layers_is_left_alone(path, source):
    assert violations(path, source) == []

"""What a user gets is the same from a checkout, an editable install, a wheel and an sdist."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def python(script: str, *arguments: object, cwd: pathlib.Path, **environment: str) -> str:
    """Run a script with this environment's libraries, but not with what is installed editable.

    `-S` leaves the `.pth` files of site-packages unread; `-I` keeps PYTHONPATH and the working
    directory off the path.
    """
    start = f"import site, sys; sys.path.append({sysconfig.get_path('purelib')!r})\n"
    command = [sys.executable, "-I", "-S", "-c", start + script, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(hook: str, source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Call one hook of the build backend, as pip does, without a network."""
    script = f"from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
    target.mkdir()
    python(script, target, cwd=source)
    (built,) = target.iterdir()
    return built


def unpacked(archive: pathlib.Path) -> pathlib.Path:
    folder = archive.parent / "unpacked"
    if archive.suffix == ".whl":
        zipfile.ZipFile(archive).extractall(folder)
        return folder
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (inner,) = folder.iterdir()
    return inner


def modules(root: pathlib.Path, folder: str) -> set[str]:
    return {str(file.relative_to(root)) for file in (root / folder).rglob("*.py")}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> pathlib.Path:
    """A copy of what is built, so that building leaves nothing behind in the real one."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    pycache = shutil.ignore_patterns("__pycache__")
    for folder in ("replay", "kernels"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=pycache)
    for file in (*ROOT.glob("*.md"), ROOT / "LICENSE", ROOT / "pyproject.toml"):
        shutil.copy(file, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout) -> pathlib.Path:
    return build("build_wheel", checkout, checkout.parent / "wheel")


@pytest.fixture(scope="module")
def wheel_of_sdist(checkout) -> pathlib.Path:
    sdist = build("build_sdist", checkout, checkout.parent / "sdist")
    return build("build_wheel", unpacked(sdist), checkout.parent / "wheel_of_sdist")


@pytest.fixture(scope="module")
def editable(checkout) -> pathlib.Path:
    return build("build_editable", checkout, checkout.parent / "editable")


# In front of site-packages, where an editable install of the same name may stand.
FROM_FOLDER = "sys.path.insert(0, sys.argv[1]); site.addsitedir(sys.argv[1])\n"

IMPORT = f"""{FROM_FOLDER}
import importlib.util, replay, replay.kernels
print(replay.__file__, replay.kernels.__file__, importlib.util.find_spec("kernels"))
"""


def test_kernels_import_from_a_wheel_as_part_of_replay(wheel, tmp_path):
    site = unpacked(wheel)
    found = python(IMPORT, site, cwd=tmp_path).split()
    assert found == [f"{site}/replay/__init__.py", f"{site}/replay/kernels/__init__.py", "None"]


def test_kernels_import_from_an_editable_install_as_part_of_replay(editable, checkout, tmp_path):
    found = python(IMPORT, unpacked(editable), cwd=tmp_path).split()
    source = f"{checkout}/replay"
    assert found == [f"{source}/__init__.py", f"{source}/kernels/__init__.py", "None"]


def test_kernels_import_from_a_checkout_that_is_not_installed(checkout, tmp_path):
    found = python(IMPORT, checkout, cwd=tmp_path).split()
    assert found[:2] == [f"{checkout}/replay/__init__.py", f"{checkout}/replay/kernels/__init__.py"]


def test_the_symlink_to_the_kernels_is_relative():
    assert (ROOT / "replay" / "kernels").readlink() == pathlib.Path("../kernels")


def test_a_wheel_holds_every_module_the_marker_of_types_and_the_licence(checkout, wheel):
    kernels = {f"replay/{file}" for file in modules(checkout, "kernels")}
    names = set(zipfile.ZipFile(wheel).namelist())
    info = {name for name in names if name.startswith("jax_replay-0.1.0.dist-info/")}
    assert names - info == kernels | modules(checkout, "replay") | {"replay/py.typed"}
    assert "jax_replay-0.1.0.dist-info/licenses/LICENSE" in info


def test_a_wheel_built_from_the_sdist_holds_the_same_files(wheel, wheel_of_sdist):
    assert zipfile.ZipFile(wheel_of_sdist).namelist() == zipfile.ZipFile(wheel).namelist()


def test_importing_replay_asks_no_device(tmp_path):
    script = f"""{FROM_FOLDER}
import jax, replay
try:
    jax.devices()
except RuntimeError as error:
    print(error)
"""
    printed = python(script, ROOT, cwd=tmp_path, JAX_PLATFORMS="no_such_platform")
    assert "Unable to initialize backend 'no_such_platform'" in printed


def test_importing_replay_sets_no_flag_and_no_variable(tmp_path):
    script = f"""{FROM_FOLDER}
import jax, os
before = dict(jax.config.values), dict(os.environ)
import replay
after = dict(jax.config.values), dict(os.environ)
print(before == after)
jax.config.update("jax_enable_x64", True)
print(before[0] == jax.config.values)
"""
    assert python(script, ROOT, cwd=tmp_path).split() == ["True", "False"]


def test_importing_replay_needs_no_extra(tmp_path):
    script = f"""{FROM_FOLDER}
for extra in ("flax", "matplotlib", "sklearn", "sqlglot", "duckdb", "pyarrow"):
    sys.modules[extra] = None
import replay
print(replay.__name__)
"""
    assert python(script, ROOT, cwd=tmp_path) == "replay\n"

import doctest
import importlib
import pkgutil

import pytest

import replay

MODULES = [name for _, name, _ in pkgutil.iter_modules(replay.__path__, "replay.")]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_are_right(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0

"""The README's programs run as they stand, with the real libraries, and print what it says."""

import pathlib
import re
import subprocess
import sys

import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def run(program: str, directory: pathlib.Path) -> str:
    script = f"import sys; sys.path.insert(0, {str(README.parent)!r})\n" + program
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=directory, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_there_is_a_program_for_each_kind_of_script():
    words = ["replay.record", "Program.linen", "grain.MapDataset", "datasets.Dataset"]
    assert [[word in program for program in PROGRAMS].index(True) for word in words] == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Return what the programs print about the run of the first, one after the other; and where."""
    directory = tmp_path_factory.mktemp("read")
    parts = {"first": (0,), "asked": (6,), "questions": (7, 8), "index": (9,), "forks": (10, 11)}
    program = ""
    for name, numbers in parts.items():
        program += f"print('PART {name}')\n" + "".join(PROGRAMS[number] for number in numbers)
    _, *printed = re.split(r"^PART \w+\n", run(program, directory), flags=re.MULTILINE)
    return dict(zip(parts, printed, strict=True)), directory


def test_the_first_program_prints_what_the_readme_shows(told):
    printed = told[0]["first"].splitlines()
    shown = re.search(r"```text\n(.*?)```", README.read_text(), flags=re.DOTALL).group(1)
    first, grade, audit, *_ = shown.splitlines()
    assert printed[0] == first
    assert printed[1] == grade
    assert printed[2].rpartition(",")[0] == audit.rpartition(",")[0]
    steps = [line.split()[0] for line in printed[4:]]
    assert steps == ["100", "101", "102"]


def test_per_sample_gradients_are_explained(tmp_path):
    printed = run(PROGRAMS[4] + PROGRAMS[5] + "print(occurrences['w'].shape)", tmp_path)
    assert "rule     factored dot_general" in printed
    assert "(64, 10)" in printed
    assert "(5, 64, 10)" in printed


def test_a_recorded_run_is_asked_about_the_samples_it_has_seen(told):
    samples, grade = told[0]["asked"].splitlines()
    assert re.fullmatch(r"\[ *\d+ +\d+ +\d+\]", samples)
    assert grade.startswith("BITWISE ")
    assert float(grade.split()[1]) < 1e-5


def test_the_five_questions_are_answered(told):
    printed = told[0]["questions"]
    assert re.search(r"replay up to \d+ steps of runs/softmax", printed)
    assert "'occurrence': 64" in printed
    assert len(re.findall(r"^\d +\d +\d\.\d+ +\d+ +w$", printed, flags=re.MULTILINE)) == 5
    in_sql = re.findall(r"^ +(\d) +w +(\d+\.\d+)$", printed, flags=re.MULTILINE)
    assert len(in_sql) == 3 and "3 rows; BITWISE" in printed


def test_an_index_spares_replays(told):
    printed = told[0]["index"]
    assert re.search(r"\d+ segments skipped by path of each weight: states 0 to", printed)
    assert printed.endswith("\n0 steps replayed\n")


def test_forks_are_compared_and_counterfactuals_run(told):
    shown = re.findall(r"```text\n(.*?)```", README.read_text(), flags=re.DOTALL)[-1]
    lines = told[0]["forks"].splitlines()
    assert lines[:2] == shown.splitlines()[:2]
    assert (told[1] / "compared.png").exists()
    assert any("without" in line for line in lines[4:])


@pytest.mark.parametrize(
    "number",
    [1, *(pytest.param(number, marks=pytest.mark.full) for number in (2, 3))],
    ids=["linen", "grain", "hugging face"],
)
def test_the_programs_for_real_libraries_run(number, tmp_path):
    printed = run(PROGRAMS[number], tmp_path)
    if number == 1:
        accuracies = [float(x) for x in re.findall(r"\d\.\d+", printed)]
        assert len(accuracies) == 5
        assert accuracies[-1] > 0.7
    elif number == 2:
        assert "56 steps (closed)" in printed
    else:
        assert "BITWISE BITWISE" in printed

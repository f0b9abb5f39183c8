"""The gallery's questions give the output that stands below them."""

import contextlib
import io
import pathlib
import re

import jax
import pytest

GALLERY = pathlib.Path(__file__).parents[1] / "docs" / "gallery.md"
BLOCKS = re.findall(
    r"## ([^\n]+)\n(?:(?!```|\n## ).)*```python\n(.*?)```\n\n```text\n(.*?)```",
    GALLERY.read_text(),
    flags=re.DOTALL,
)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What each block prints, all in one namespace, as a reader would run them."""
    names, found = {"__name__": "gallery"}, {}
    with jax.numpy_rank_promotion("allow"), contextlib.chdir(tmp_path_factory.mktemp("gallery")):
        for title, program, _ in BLOCKS:
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(program, title, "exec"), names)
            found[title] = output.getvalue()
    return found


def test_every_block_has_an_output():
    assert len(BLOCKS) == GALLERY.read_text().count("```python")
    assert len(BLOCKS) > 12


@pytest.mark.full
@pytest.mark.parametrize(
    ("title", "shown"),
    [(title, shown) for title, _, shown in BLOCKS],
    ids=[title for title, *_ in BLOCKS],
)
def test_a_question_of_the_gallery_prints_what_it_shows(printed, title, shown):
    """Counts and names are compared; numbers within the last digits, for other processors."""
    words = [
        re.findall(r"-?\d+\.?\d*(?:e-?\d+)?|[A-Za-z]+", text) for text in (printed[title], shown)
    ]
    assert len(words[0]) == len(words[1]), printed[title]
    for here, there in zip(*words, strict=True):
        if re.match(r"-?\d", there):
            last = 10.0 ** -len(there.partition(".")[2])
            assert float(here) == pytest.approx(float(there), rel=0.01, abs=last), printed[title]
        else:
            assert here == there, printed[title]

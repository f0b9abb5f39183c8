"""What a statement is answered with: an Arrow table, printed, escaped, and read by others."""

import html
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from replay.errors import QueryError, printable

_SHOWN = 20


class Table:
    """The answer of a statement: an Arrow table, and other forms of it.

    It implements Arrow's interface (`__arrow_c_stream__`), so polars, pandas, DuckDB and others
    read it as it is: `polars.DataFrame(answer)`.

    Attributes:
        attrs: `plan` (what was replayed for it), `remaining` (the SQL that DuckDB ran), `grade`,
            `steps` (replayed) and, for attributed updates, `rule`.
    """

    def __init__(self, table: pa.Table, attrs: Mapping[str, Any]):
        self._table, self.attrs = table, dict(attrs)

    def to_arrow(self) -> pa.Table:
        """Return the `pyarrow.Table`."""
        return self._table

    arrow = to_arrow

    def df(self) -> Any:
        """Return a data frame of pandas."""
        return self._table.to_pandas()

    def to_parquet(self, path: Any) -> None:
        """Write a file of Parquet; an earlier one is replaced."""
        parquet.write_table(self._table, path)

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return self._table.column_names

    @property
    def rows(self) -> list[tuple[Any, ...]]:
        """The rows, as tuples of Python's numbers and texts."""
        lists = [x.to_pylist() for x in self._table.columns]
        return list(zip(*lists, strict=True)) if lists else []

    def item(self) -> Any:
        """Return the one value that this answer is.

        Raises:
            QueryError: it is more than one, or none.
        """
        if self._table.shape != (1, 1):
            raise QueryError(
                f"the answer is no single value: {self._table.num_rows} rows of "
                f"{self._table.num_columns} columns",
                why="it has entries",
                fix="reduce it in the statement, or read its rows",
            )
        return self._table.column(0)[0].as_py()

    def __len__(self) -> int:
        return self._table.num_rows

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self._table.__arrow_c_stream__(requested_schema)

    def __repr__(self) -> str:
        cells = [[printable(str(name)) for name in self.columns]]
        lists = [x.slice(0, _SHOWN).to_pylist() for x in self._table.columns]
        cells += [[_cell(x) for x in row] for row in zip(*lists, strict=True)]
        widths = [max(map(len, each)) for each in zip(*cells, strict=True)]
        lines = [
            "  ".join(x.rjust(width) for x, width in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        return "\n".join([*lines, self._footing()])

    def _footing(self) -> str:
        more = f", {_SHOWN} shown" if len(self) > _SHOWN else ""
        return f"{len(self):,} rows{more}; {self.attrs.get('grade', '')}"

    def _repr_html_(self) -> str:
        def line(cells, tag):
            return "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in cells)

        lists = [x.slice(0, _SHOWN).to_pylist() for x in self._table.columns]
        rows = [line([_cell(x) for x in row], "td") for row in zip(*lists, strict=True)]
        head = line([printable(str(name)) for name in self.columns], "th")
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<table><tr>{head}</tr>{body}</table><p>{html.escape(self._footing())}</p>"


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else "NULL" if value is None else str(value)
    return printable(text).replace("\n", "\\n")[:60]

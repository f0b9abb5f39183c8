"""SQL in DuckDB's dialect about recorded runs: names, limits, and the database that runs the rest.

Statements are parsed and qualified by sqlglot, what reads runs is lowered to expressions
(`replay.query.sql.lowering`) and answered in one replay, and DuckDB runs what is left over the
small results, through Arrow. It is locked: it reads no file, and knows no table but those.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError
from sqlglot.optimizer.qualify import qualify

from replay.errors import QueryError
from replay.query.expressions import Expression
from replay.query.nodes import QUANTITIES
from replay.query.sql.answers import Table
from replay.query.sql.formulas import Unlowerable, column, leaf, literal
from replay.query.sql.lowering import Lowering
from replay.query.sql.nan import with_our_nan
from replay.query.sql.relations import Dense, Key
from replay.query.sql.select import Later

LIMIT = 1_000_000

_TABLES = tuple(name for name in QUANTITIES if name not in ("activations", "column"))
_ELSEWHERE = ("sample_losses", "sample_grads")
_FUNCTIONS = ("range", "generate_series", "unnest")
_TOLD = ("memory", "strategy", "cache", "index")  # options on which the cost depends
_WRITES = (exp.DDL, exp.Insert, exp.Update, exp.Delete, exp.Command, exp.Into)


class Home:
    """A run, as a statement sees it.

    Args:
        run: anything with the quantities of a run.
        others: name -> the same for other samples, as `run.on(...)` returns it.
    """

    def __init__(self, run: Any, others: Mapping[str, Any]):
        self.run, self.others = run, dict(others)

    @property
    def samples(self) -> Expression:
        """The sample at every occurrence."""
        return self.run.samples

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """The samples of all steps, `int32[steps, batch]`, -1 for padding."""
        return self.run.ids(0, self.run.steps)

    @functools.cached_property
    def epochs(self) -> np.ndarray | None:
        """The epoch of each step, None where there are none."""
        order = self.run.order
        return None if order is None else np.asarray(order.epoch(np.arange(self.run.steps)))

    @property
    def count(self) -> int:
        """How many samples there are."""
        return self.run.asking.labels("sample", 0).size


class Reference(NamedTuple):
    """A table that a statement names."""

    home: Home
    quantity: str
    other: str
    name: str
    title: str


class Session:
    """What a statement may name, and the database that runs what is left of it.

    Args:
        homes: name -> run; the first is asked where no run is named.
        tables: name -> a table that is given: Arrow, pandas, polars, or a dict of columns.
        limit: how many rows may be read one by one.
        options: of `compute`.
    """

    def __init__(
        self,
        homes: Mapping[str, Home],
        tables: Mapping[str, Any],
        *,
        limit: int,
        options: Mapping[str, Any],
    ):
        self.homes, self.options, self.limit = dict(homes), dict(options), limit
        self.main = next(iter(homes.values()))
        self.given = {name.lower(): _arrow(name, table) for name, table in tables.items()}
        self._kept: dict[str, pa.Table] = {}
        self.references: dict[str, Reference] = {}
        self.attrs: dict[str, Any] = {"plan": [], "grade": "LOGGED", "steps": 0}
        self.schema: dict[str, dict[str, str]] = {}

    # ---- names

    def prepared(self, text: str, parameters: Any) -> exp.Query:
        """Parse and qualify a statement.

        Raises:
            QueryError: it is none, is no query, or names what does not exist.
        """
        node = _parsed(text)
        node = _with_aggregates(_bound(node, parameters))
        self._named(node)
        try:
            qualified = qualify(
                node, schema=dict(self.schema), dialect="duckdb", quote_identifiers=False,
                validate_qualify_columns=True,
            )  # fmt: skip
        except SqlglotError as error:
            raise self._unknown(error, text) from error
        for select in qualified.find_all(exp.Select):
            _spelled_out(select)
        return qualified  # type: ignore[return-value]

    def _unknown(self, error: Exception, text: str) -> QueryError:
        message = str(error).partition("\n")[0]
        found = re.search(r"[Cc]olumn:? '?\"?([\w.]+)'?\"?", message)
        place = re.search(r"[Ll]ine:? (\d+)", message)
        line = f" in line {place.group(1)}" if place else _line(text, found and found.group(1))
        used = {n: list(c) for n, c in self.schema.items()}
        told = "; ".join(
            f"{self._title(name)} has {', '.join(columns)}" for name, columns in used.items()
        )
        what = f"there is no column {found.group(1)!r}{line}" if found else message
        return QueryError(
            what,
            why="a column is one of a table that the statement names, and of one alone",
            fix=told or "FROM updates, for instance",
        )

    def _title(self, name: str) -> str:
        return self.references[name].title if name in self.references else name

    def _named(self, node: exp.Query) -> None:
        """Give every table of a run a name of its own.

        Raises:
            QueryError: there is no such table.
        """
        common = {x.alias.lower() for x in node.find_all(exp.CTE)}
        for table in list(node.find_all(exp.Table)):
            parts = [part.name for part in table.parts]
            function = table.this if isinstance(table.this, exp.Func) else None
            if function is not None:
                name = function.name if isinstance(function, exp.Anonymous) else function.sql_name()
                if name.lower() in _FUNCTIONS:
                    continue
                if name.lower() != "activations":
                    raise self._no_table(f"{name}(...)", table)
                given = [x.name for x in function.expressions if isinstance(x, exp.Literal)]
                if len(given) != 1:
                    raise QueryError(
                        "activations are named by one text",
                        why="a loss tags them by jax.ad_checkpoint.checkpoint_name(x, name)",
                        fix="FROM activations('hidden')",
                    )
                prefix = [p for p in (table.catalog, table.db) if p]
                reference = self._reference([*prefix, "activations"], table, given[0])
            else:
                if len(parts) == 1 and parts[0].lower() in common:
                    continue
                if len(parts) == 1 and parts[0].lower() in self.given:
                    name = parts[0].lower()
                    self._small(name, self.given[name])
                    self._replace(table, name, parts[0])
                    continue
                reference = self._reference(parts, table, "")
            name = f"__{len(self.references)}_{reference.quantity}"
            self.references[name] = reference
            if reference.quantity == "steps":
                self._small(name, _steps(reference.home))
            elif reference.quantity == "tensors":
                self._small(name, _tensors(reference.home))
            else:
                self.schema[name] = {x: _type(x) for x in self._relation(name).columns}
            self._replace(table, name, reference.quantity)

    def _replace(self, table: exp.Table, name: str, alias: str) -> None:
        alias = table.alias or alias
        new = exp.alias_(exp.to_table(name), alias, table=True)
        for key in ("joins", "laterals"):
            if table.args.get(key):
                new.set(key, table.args[key])
        columns = table.args["alias"].columns if table.args.get("alias") else []
        if columns:
            new.args["alias"].set("columns", columns)
        table.replace(new)
        parent = new.find_ancestor(exp.Select)
        if parent is not None:  # a.updates.value names the table that FROM a.updates brought in
            parts = [part.name.lower() for part in table.parts]
            for each in parent.find_all(exp.Column):
                if each.args.get("db") and [p.name.lower() for p in each.parts[:-1]] == parts:
                    for key in ("db", "catalog"):
                        each.set(key, None)

    def _reference(self, parts: Sequence[str], table: exp.Table, name: str) -> Reference:
        *prefix, quantity = [part.lower() for part in parts]
        home, other = self.main, ""
        homes = {key.lower(): x for key, x in self.homes.items()}
        if prefix and prefix[0] in homes:
            home = homes[prefix.pop(0)]
        sources = {key.lower(): key for key in home.others}
        if prefix and prefix[0] in sources:
            other = sources[prefix.pop(0)]
        title = ".".join(parts) + (f"({name!r})" if name else "")
        known = (*_TABLES, "steps", "tensors", "activations")
        known = (*_ELSEWHERE, "activations") if other else known
        if prefix or quantity not in known or (quantity == "activations" and not name):
            raise self._no_table(".".join(parts), table)
        return Reference(home, quantity, other, name, title)

    def _no_table(self, name: str, table: exp.Table) -> QueryError:
        first = next((x for x in table.find_all(exp.Identifier) if "line" in x.meta), None)
        line = f" in line {first.meta['line']}" if first is not None else ""
        known = [*_TABLES, "steps", "tensors", "activations('name')", *self.given]
        known += [f"{x}.{y}" for x in self.homes for y in ("updates",) if len(self.homes) > 1]
        known += [f"{x}.sample_losses" for x in self.main.others]
        return QueryError(
            f"there is no table {name!r}{line}",
            why="a statement reads quantities of runs, and tables that are given with it",
            fix=f"one of {', '.join(known)}",
        )

    def _small(self, name: str, table: pa.Table) -> None:
        self._kept[name] = table
        self.schema[name] = _schema(table)

    # ---- tables of runs

    def relation(self, name: str) -> Dense | None:
        """Return the relation of a table of a run, None for others."""
        if name not in self.references or name in self._kept:
            return None
        return self._relation(name)

    def _relation(self, name: str) -> Dense:
        home, quantity, other, tagged, title = self.references[name]
        whose: Any = home.others[other] if other else home.run
        expression = whose.activations(tagged) if tagged else getattr(whose, quantity)
        dims, plan = expression.dims, expression.plan
        keys: dict[str, Key] = {}
        columns: dict[str, exp.Expr] = {}
        values: dict[str, Any] = {}
        entries: dict[str, np.ndarray] = {}

        def key(column_name: str, key: Key) -> None:
            own = leaf()
            keys[own] = key
            columns[column_name] = column(own)

        walk = "step" if "step" in dims else "state"
        entries[walk] = np.asarray(plan.steps)
        key(walk, Key(walk))
        if walk == "step" and home.epochs is not None:
            steps = entries["step"]
            key("epoch", Key("step", steps, pa.array(home.epochs[steps])))
        if "position" in dims:
            entries["position"] = np.arange(home.run.asking.batches())
            entries["sample"] = np.arange(home.count)
            key("position", Key("position"))
            key("sample", Key("sample"))
        if "sample" in dims:
            scan = next(plan.scans())
            entries["sample"] = np.arange(scan.samples)
            key("sample", Key("sample"))
        parts = plan.parts
        if "weight" in dims:
            entries["weight"] = np.arange(sum(part.size for part in parts))
            key("tensor", Key("tensor"))
            key("weight", Key("weight"))
        if "unit" in dims:
            entries["unit"] = np.arange(_units(home, tagged))
            key("unit", Key("unit"))
        if quantity != "samples":
            values[own := leaf()] = expression
            columns["value"] = column(own)
        return Dense(title, home, dims, entries, parts, keys, values, columns)

    # ---- the database

    def query(self, query: exp.Query, *, keep: str = "", **tables: pa.Table) -> pa.Table:
        """Run SQL over small tables.

        Args:
            query: the statement.
            keep: the name under which the answer is kept for others; of none by default.
            **tables: those that only this statement sees.

        Raises:
            QueryError: DuckDB refuses it.
        """
        known = {**self._kept, **tables}
        schema = {name: _schema(table) for name, table in known.items()}
        query = with_our_nan(query.copy(), schema)
        text = query.sql("duckdb", identify=True)
        named = {x.name for x in query.find_all(exp.Table)}
        try:
            with _database() as database:
                for name in sorted(named & set(known)):
                    database.register(name, known[name])
                found = database.sql(text).to_arrow_table()
        except duckdb.Error as error:
            raise QueryError(
                f"DuckDB refuses the statement: {str(error).partition(chr(10))[0]}",
                why=f"what is left for it is: {text}",
                fix="see duckdb.org/docs/sql",
            ) from error
        if keep:
            self._small(keep, found)
        return found

    def answer(self, lowering: Lowering) -> None:
        """Answer all that is pending, in one replay, and keep it as tables."""
        pending, wanted = dict(lowering.pending), []
        questions: dict[str, dict[str, Expression]] = {}
        for name, (relation, leaves) in pending.items():
            questions[name] = relation.questions(leaves)
            wanted += questions[name].values()
        distinct = list({x.plan: x for x in wanted}.values())
        answers = {}
        if distinct:
            source = distinct[0].source
            for each in distinct[1:]:
                source = source if source is each.source else source.joint(each.source)
            found = source.compute(*distinct, **self.options)
            answers = {x.plan: answer for x, answer in zip(distinct, found, strict=True)}
            self._note(found)
        for name, (relation, leaves) in pending.items():
            mine = {key: answers[x.plan] for key, x in questions[name].items()}
            self._small(name, relation.rows_of(leaves, mine))
            del lowering.pending[name]
            lowering.done.add(name)

    def _note(self, found: Sequence[Any]) -> None:
        attrs = self.attrs
        attrs["steps"] += max(int(result.attrs["steps"]) for result in found)  # all in one replay
        for result in found:
            attrs["plan"].append(result.attrs["plan"])
            if "rule" in result.attrs:
                attrs["rule"] = result.attrs["rule"]
            grade = result.attrs["grade"]
            worse = ["LOGGED", "BITWISE", "UNAUDITED", "NUMERIC", "FAILED"]
            attrs["grade"] = max(attrs["grade"], grade, key=worse.index)


def ask(session: Session, text: str, parameters: Any = None) -> Table:
    """Answer a statement.

    Args:
        session: what it may name.
        text: one `SELECT`, in DuckDB's dialect.
        parameters: values of `?` and `$1` by place, or of `$name` by name.

    Raises:
        QueryError: it names what does not exist, reads more rows than the limit, or has no
            meaning.
    """
    node = session.prepared(text, parameters)
    names = [x.alias_or_name for x in node.selects]
    written = _written(text, names)
    lowering = Lowering(session.relation, session.query, session.limit, session.answer)
    try:
        rest = lowering.statement(node)
    except Unlowerable as reason:
        raise _refused(text, reason) from reason
    session.answer(lowering)
    table = session.query(rest)
    if len(written) == table.num_columns:
        table = table.rename_columns(written)
    plans = "\n".join(dict.fromkeys(session.attrs["plan"]))
    attrs = {**session.attrs, "plan": plans, "remaining": rest.sql("duckdb", pretty=True)}
    return Table(table, attrs)


def questions_of(
    session: Session, text: str, parameters: Any = None
) -> tuple[list[Expression], Any]:
    """Return what a statement asks of runs, as far as that is known beforehand, and the rest."""
    node = session.prepared(text, parameters)
    lowering = Lowering(session.relation, session.query, session.limit, None)
    try:
        rest = lowering.statement(node)
    except Unlowerable as reason:
        raise _refused(text, reason) from reason
    except Later:
        rest = None
    found: dict[Any, Expression] = {}
    for relation, leaves in lowering.pending.values():
        for each in relation.questions(leaves).values():
            found[each.plan] = each
    return list(found.values()), (rest, lowering.later)


def explain(session: Session, text: str, parameters: Any = None) -> str:
    """Tell what a statement asks of runs, what that takes, and what is left to DuckDB.

    Nothing is replayed.
    """
    expressions, (rest, later) = questions_of(session, text, parameters)
    lines = []
    if expressions:
        source = expressions[0].source
        for each in expressions[1:]:
            source = source if source is each.source else source.joint(each.source)
        options = {x: y for x, y in session.options.items() if x in _TOLD}
        lines.append(source.explain(*expressions, **options))
    else:
        lines.append("nothing is asked of a run but what its log tells")
    if later:
        lines.append("what the rest of the statement reads is chosen by this answer")
    if rest is not None:
        lines += [
            "then DuckDB runs",
            *(f"  {x}" for x in rest.sql("duckdb", pretty=True).split("\n")),
        ]
    return "\n".join(lines)


def _spelled_out(select: exp.Select) -> None:
    """Name the columns that `GROUP BY ALL` and `ORDER BY ALL` stand for."""
    group, order = select.args.get("group"), select.args.get("order")
    if group is not None and group.args.get("all"):
        plain = [x.unalias() for x in select.expressions if not x.find(exp.AggFunc, exp.Star)]
        plain = [x.copy() for x in plain if x.find(exp.Column)]
        select.set("group", exp.Group(expressions=plain) if plain else None)
    if order is not None and len(order.expressions) == 1:
        (term,) = order.expressions
        if term.this is not None and term.this.sql().upper() == "ALL":
            each = [
                exp.Ordered(**{**term.args, "this": exp.column(x.alias_or_name, quoted=True)})
                for x in select.expressions
            ]
            select.set("order", exp.Order(expressions=each))


def _refused(text: str, reason: Exception) -> QueryError:
    return QueryError(
        "the statement cannot be answered",
        why=str(reason),
        fix="ask for the parts of it one after the other",
    )


# -------------------------------------------------------------------------------- the statement


def _parsed(text: str) -> exp.Query:
    try:
        found = [x for x in sqlglot.parse(text, dialect="duckdb") if x is not None]
    except SqlglotError as error:
        errors = getattr(error, "errors", None) or [{}]
        line = errors[0].get("line")
        raise QueryError(
            f"the statement cannot be parsed{f', in line {line}' if line else ''}: "
            f"{errors[0].get('description') or error}",
            why="it is read as SQL of DuckDB",
            fix="SELECT tensor, sum(abs(value)) AS path FROM updates GROUP BY tensor",
        ) from error
    if len(found) != 1:
        raise QueryError(
            f"{len(found)} statements",
            why="an answer is that of one statement",
            fix="one SELECT, without what follows its semicolon",
        )
    (node,) = found
    if not isinstance(node, exp.Query) or node.find(*_WRITES):
        raise QueryError(
            f"a statement of {type(node).__name__.upper()}",
            why="a run is read, and never changed; so is everything else",
            fix="SELECT ..., or WITH ... SELECT ...",
        )
    if node.find(exp.TableSample):
        raise QueryError(
            "rows are chosen at random",
            why="a statement has the same answer whenever it is asked",
            fix="WHERE sample % 10 = 0, for instance",
        )
    return node


def _bound(node: exp.Query, parameters: Any) -> exp.Query:
    """Put values in the place of parameters, as literals and never as text.

    Raises:
        QueryError: one has no value, or one of another kind.
    """
    holders = list(node.find_all(exp.Placeholder, exp.Parameter))
    named = dict(parameters) if isinstance(parameters, Mapping) else {}
    given = [] if named or parameters is None else list(parameters)
    place = 0
    for holder in holders:
        inner = holder.this
        name = inner.name if isinstance(inner, exp.Expr) else str(inner or "")
        try:
            if name.isdigit():
                value = given[int(name) - 1]
            elif name:
                value = named[name]
            else:
                value = given[place]
                place += 1
        except (IndexError, KeyError) as error:
            raise QueryError(
                f"the parameter {name or place + 1!r} has no value",
                why="a statement with ? or $name is asked with values",
                fix="parameters=[...] for ? and $1, parameters={'name': ...} for $name",
            ) from error
        try:
            holder.replace(literal(value))
        except TypeError as error:
            raise QueryError(
                f"the parameter {name or place!r} is a {error}",
                why="parameters are numbers, texts, None, or lists of them",
                fix="give tables as tables={'name': ...}",
            ) from error
    return node


def _written(text: str, names: Sequence[str]) -> list[str]:
    """Return the names of columns as they were written: sqlglot folds their case."""
    try:
        plain = _parsed(text).selects
    except SqlglotError:
        return list(names)
    found = [x.alias_or_name for x in plain]
    own = [
        new if new and old.lower() == new.lower() else x.unalias().sql("duckdb")
        if old.startswith("_col_") else old
        for old, new, x in zip(names, found, plain, strict=False)
    ]  # fmt: skip
    return own if len(plain) == len(names) else list(names)


def _with_aggregates(node: exp.Query) -> exp.Query:
    """Tell the aggregates of DuckDB that sqlglot does not know from functions of a row."""
    for call in list(node.find_all(exp.Anonymous)):
        name = call.name.lower()
        if name == "mean" and len(call.expressions) == 1:
            call.replace(exp.Avg(this=call.expressions[0]))
        elif name in _aggregates():
            call.replace(exp.AnonymousAggFunc(this=name, expressions=call.expressions))
    return node


@functools.cache
def _aggregates() -> frozenset[str]:
    """Return the names of aggregates, and of macros that are made of them."""
    with _database() as database:
        found = database.sql(
            "SELECT function_name FROM duckdb_functions() WHERE function_type = 'aggregate'"
        ).fetchall()
    macros = ("geomean", "geometric_mean", "wavg", "weighted_avg")
    return frozenset((*(name for (name,) in found), *macros))


def _line(text: str, name: Any) -> str:
    """Tell in which line a name stands first."""
    name = str(name or "").rpartition(".")[2]
    for number, line in enumerate(text.splitlines(), 1):
        if name and re.search(rf"\b{re.escape(name)}\b", line, re.IGNORECASE):
            return f" in line {number}"
    return ""


# --------------------------------------------------------------------------------- small tables


def _database() -> duckdb.DuckDBPyConnection:
    """Return a database in memory that reaches no file, and no variable of Python."""
    return duckdb.connect(
        ":memory:",
        config={
            "enable_external_access": "false",
            "python_enable_replacements": "false",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "lock_configuration": "true",
        },
    )


def _arrow(name: str, table: Any) -> pa.Table:
    try:
        if isinstance(table, pa.Table):
            return table
        if hasattr(table, "__arrow_c_stream__"):
            return pa.table(table)
        if isinstance(table, Mapping):
            return pa.table({str(key): _column(x) for key, x in table.items()})
        return pa.Table.from_pandas(table, preserve_index=False)
    except (pa.ArrowException, TypeError, ValueError, AttributeError) as error:
        raise QueryError(
            f"the table {name!r} is a {type(table).__name__}: {error}",
            why="tables are given as Arrow, pandas or polars, or as a dict of columns",
            fix=f"tables={{{name!r}: {{'sample': range(len(labels)), 'label': labels}}}}",
        ) from error


def _column(values: Any) -> Any:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    return pa.array(values if isinstance(values, np.ndarray) else list(values))


def _steps(home: Home) -> pa.Table:
    steps = home.run.steps
    return pa.table({name: np.asarray(x)[:steps] for name, x in home.run.history().items()})


def _tensors(home: Home) -> pa.Table:
    leaves = home.run.tensors
    shapes = [list(leaf.shape) for leaf in leaves]
    return pa.table({
        "tensor": pa.array([leaf.path for leaf in leaves], pa.string()),
        "shape": pa.array(shapes, pa.list_(pa.int64())),
        "weights": pa.array([int(np.prod(shape)) for shape in shapes], pa.int64()),
    })  # fmt: skip


def _units(home: Home, name: str) -> int:
    table = home.run.log.header.programs["activations"]["table"]
    shape = next(entry["shape"] for entry in table if entry["name"] == name)
    return int(np.prod(shape[1:]))


def _type(name: str) -> str:
    return {"value": "FLOAT", "tensor": "VARCHAR"}.get(name, "BIGINT")


def _schema(table: pa.Table) -> dict[str, str]:
    found = {}
    for field in table.schema:
        kind = field.type
        if pa.types.is_floating(kind):
            found[field.name] = "DOUBLE" if kind == pa.float64() else "FLOAT"
        elif pa.types.is_integer(kind):
            found[field.name] = "BIGINT"
        elif pa.types.is_boolean(kind):
            found[field.name] = "BOOLEAN"
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            found[field.name] = "VARCHAR"
        else:
            found[field.name] = "UNKNOWN"
    return found


__all__ = ["LIMIT", "Home", "Session", "Table", "ask", "explain", "questions_of"]

"""Statements of SQL, lowered: what reads tables of a run becomes expressions, the rest stays SQL.

A statement is taken apart from the outside in. Each `SELECT` over tables of runs becomes one
`Dense` relation as far as it can; where it cannot, the rows it needs are read as a table, and what
is left of it is run by DuckDB over that. Nothing here replays.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from sqlglot import exp

from replay.errors import QueryError
from replay.query.expressions import Expression
from replay.query.sql.formulas import (
    MIRRORED,
    Unlowerable,
    affine,
    column,
    conjuncts,
    inside,
    leaf,
    leaves,
    literal,
    of_table,
    replaced,
    shown,
)
from replay.query.sql.relations import Dense, nothing
from replay.query.sql.select import Common, Environment, Later, Select, named


class Lowering:
    """Takes statements apart.

    Args:
        base: name of a table -> the relation that it is, or None.
        query: runs SQL over the small tables that are known, and returns a table.
        limit: how many rows may be read.
        answer: answers what is pending, and registers it; None to plan only.
    """

    def __init__(
        self,
        base: Callable[[str], Dense | None],
        query: Callable[..., pa.Table],
        limit: int,
        answer: Callable[["Lowering"], None] | None,
    ):
        self._base, self.run, self._limit, self._answer = base, query, limit, answer
        self.pending: dict[str, tuple[Dense, set[str]]] = {}
        self.done: set[str] = set()
        self.later: list[str] = []
        self.recursive: set[str] = set()  # names that only the whole statement knows

    # ---- statements

    def statement(self, node: exp.Query) -> exp.Query:
        """Return a statement over small tables only."""
        return self.rest(self.query(node, {}))

    def query(self, node: Any, outer: Environment) -> Dense | exp.Query:
        """Lower a query, as a relation or as a query over small tables."""
        if isinstance(node, exp.Subquery) and not node.args.get("pivots"):
            inner = self.query(node.this, outer)
            if not any(node.args.get(x) for x in ("order", "limit", "offset")):
                return inner
            node.set("this", self.rest(inner))
            return exp.select("*").from_(node)
        within = dict(outer)
        given = node.args.get("with_")
        if given is not None:
            if given.args.get("recursive"):
                return self._recursive(node, within)
            for each in given.expressions:
                columns = each.args["alias"].columns if each.args.get("alias") else []
                query = named(each.this, [x.name for x in columns])
                within[each.alias.lower()] = Common(query, dict(within))
            node.set("with_", None)
        if isinstance(node, exp.SetOperation):
            for side in ("this", "expression"):
                found = self.rest(self.query(node.args[side].copy(), within))
                node.set(side, found)
            return node
        if isinstance(node, exp.Select):
            return Select(self, node.copy(), within).lowered()
        return node

    def _recursive(self, node: Any, within: dict[str, Common]) -> exp.Query:
        own = {each.alias.lower() for each in node.args["with_"].expressions}
        self.recursive |= own
        visible = {name: query for name, query in within.items() if name not in own}
        for each in node.args["with_"].expressions:
            each.set("this", self.rest(self.query(each.this.copy(), visible)))
        node = node.copy()
        given = node.args["with_"]
        node.set("with_", None)
        rest = self.rest(self.query(node, visible))
        rest.set("with_", given)
        return rest

    def rest(self, found: Dense | exp.Query) -> exp.Query:
        """Return a query over small tables, reading the rows of a relation."""
        if not isinstance(found, Dense):
            return found
        return self.rows(found, found.columns)

    # ---- rows that are read

    def rows(self, relation: Dense, columns: Mapping[str, exp.Expr]) -> exp.Select:
        """Return a query over rows that will have been read.

        Raises:
            QueryError: they are too many.
        """
        name = f"__rows{len(self.pending) + len(self.done)}"
        wanted = set()
        for formula in (*columns.values(), *relation.residual):
            wanted |= leaves(formula)
        self._check(relation, wanted)
        self.pending[name] = (relation, wanted)
        chosen = [exp.alias_(of_table(formula, name), as_name, quoted=True)
                  for as_name, formula in columns.items()]  # fmt: skip
        found = exp.select(*chosen).from_(exp.to_table(name))
        for condition in relation.residual:
            found = found.where(of_table(condition, name), copy=False)
        return found

    def _check(self, relation: Dense, wanted: set[str]) -> None:
        rows = relation.read_one_by_one(wanted)
        if rows <= self._limit or self.later:
            return
        why = "; ".join(dict.fromkeys(relation.notes)) or "nothing in the statement reduces them"
        raise QueryError(
            f"{rows:,} rows of {relation.title} would be read one by one",
            why=f"the limit is {self._limit:,} rows; {why}",
            fix="aggregate with GROUP BY (sum, avg, count, min, max, var_pop, arg_max(sample, "
            "value, 10), ...), rank with ORDER BY value DESC LIMIT k, filter by step, epoch, "
            "tensor, weight or sample, or raise limit_rows",
        )

    def forced(self, query: exp.Query) -> str:
        """Answer a query now, and return the name of the table that holds it.

        Raises:
            Later: nothing may be executed.
        """
        name = f"__known{len(self.pending) + len(self.done)}"
        waits = [x.name for x in query.find_all(exp.Table) if x.name in self.pending]
        if waits:
            if self._answer is None:
                self.later.append(query.sql("duckdb"))
                raise Later
            self._answer(self)
        self.run(query, keep=name)
        self.done.add(name)
        return name

    def value(self, query: exp.Query) -> Any:
        """Answer a query for one value now: that of its first row, None if there is none."""
        name = self.forced(query)
        table = self.run(exp.select("*").from_(exp.to_table(name)))
        if table.num_columns != 1 or table.num_rows > 1:
            raise QueryError(
                f"a subquery that stands for a value has {table.num_rows} rows and "
                f"{table.num_columns} columns",
                why="it is compared with one value",
                fix="select one column, and reduce it to one row",
            )
        return table.column(0)[0].as_py() if table.num_rows else None

    def base(self, name: str) -> Dense | None:
        """Return the relation of a table of a run."""
        return self._base(name)

    def known(self, query: exp.Query) -> bool:
        """Whether a query needs nothing that has to be replayed first."""
        return not any(x.name in self.pending for x in query.find_all(exp.Table))

    # ---- keys

    def evaluated(
        self, relation: Dense, domain: str, formulas: Sequence[exp.Expr],
        more: Callable[[exp.Select], exp.Select] = lambda x: x,
    ) -> pa.Table:  # fmt: skip
        """Return formulas of keys for each entry of a dimension, `__at` and `c0`, `c1`, ..."""
        names = set().union(*(leaves(formula) for formula in formulas)) if formulas else set()
        table = relation.table(domain, names)
        chosen = [exp.alias_(of_table(x, "__keys"), f"c{i}") for i, x in enumerate(formulas)]
        at = exp.column("__at", table="__keys")
        query = more(exp.select(at, *chosen).from_(exp.to_table("__keys")))
        return self.run(query, __keys=table)

    def filtered(self, relation: Dense, condition: exp.Expr) -> Dense:
        """Return the rows that meet a condition, the scans limited where that is possible."""
        for part in conjuncts(condition):
            relation = self._filtered(relation, part)
        return relation

    def _filtered(self, relation: Dense, part: exp.Expr) -> Dense:
        names = leaves(part)
        foreign = any(x.table for x in part.find_all(exp.Column) if not inside(x, part))
        domain = relation.domain(names) if names and not foreign else None
        if domain is not None:
            keep = lambda q: q.where(of_table(part, "__keys"))  # noqa: E731
            found = self.evaluated(relation, domain, [part], keep)
            return relation.only(domain, np.unique(found.column("__at").to_numpy()))
        if not names and not foreign:
            found = self.run(exp.select(exp.alias_(part.copy(), "c")))
            if found.column(0)[0].as_py():
                return relation
            return nothing(relation)
        if not foreign:
            anchored = self._anchored(relation, part)
            if anchored is not None:
                return anchored
            try:
                mask = relation.condition(part)
                if not set(mask.dims) <= set(relation.dims):
                    raise Unlowerable("a condition on other rows")
                return dataclasses.replace(relation, masks=(*relation.masks, mask))
            except Unlowerable as reason:
                note = f"{shown(part)} is left to DuckDB: {reason}"
        else:
            note = f"{shown(part)} looks at another table"
        return dataclasses.replace(
            relation, residual=(*relation.residual, part), notes=(*relation.notes, note)
        )

    def _anchored(self, relation: Dense, part: exp.Expr) -> Dense | None:
        """Take rows before or after a step that is itself a question."""
        comparison = type(part)
        if comparison not in (*MIRRORED, exp.EQ):
            return None
        left, right = affine(part.this), affine(part.expression)
        if left is None or right is None:
            return self._settled_condition(relation, part)
        if left[0] in relation.missing:
            left, right, comparison = right, left, MIRRORED.get(comparison, exp.EQ)
        if right[0] not in relation.missing:
            return None
        own, shift = left[0], right[1] - left[1]
        anchor = relation.values[right[0]]
        assert isinstance(anchor, Expression)
        simple = {
            (exp.LT, 0): ("before", False), (exp.LTE, 0): ("before", True),
            (exp.LT, 1): ("before", True), (exp.LTE, -1): ("before", False),
            (exp.GT, 0): ("after", False), (exp.GTE, 0): ("after", True),
            (exp.GT, -1): ("after", True), (exp.GTE, 1): ("after", False),
        }.get((comparison, shift))  # fmt: skip
        if (
            simple is None
            or relation.taken is not None
            or own != relation.number("step")
            or anchor.dims
        ):
            return self._settled_condition(relation, part)
        options = {"before": simple[0] == "before", "inclusive": simple[1]}
        return dataclasses.replace(relation, taken=(anchor, options))

    def _settled_condition(self, relation: Dense, part: exp.Expr) -> Dense | None:
        """Answer the steps that a condition waits for, and choose by them."""
        names = leaves(part)
        waits = names & relation.missing
        if not waits or relation.domain(names - waits) is None:
            return None
        found = {name: literal(self.scalar(relation, name)) for name in waits}
        return self._filtered(relation, replaced(part, found))

    def scalar(self, relation: Dense, name: str) -> int | None:
        """Answer a step that is itself a question."""
        value = relation.values[name]
        one = dataclasses.replace(
            relation, dims=(), keys={}, values={name: value}, masks=(), residual=(),
            taken=None, kept={}, chosen=None, columns={},
        )  # fmt: skip
        return self.value(self.rows(one, {"value": column(name)}))

    def settled(self, relation: Dense) -> Dense:
        """Answer what rows are taken by, and choose their steps."""
        if relation.taken is None:
            return relation
        anchor, options = relation.taken
        name, number = leaf(), relation.number("step")
        assert number is not None
        values = {**relation.values, name: anchor}
        plain = dataclasses.replace(
            relation, taken=None, values=values, missing=relation.missing | {name}
        )
        try:
            found = self.scalar(plain, name)
        except Later:
            return dataclasses.replace(relation, taken=None)
        kinds = {(True, False): exp.LT, (True, True): exp.LTE,
                 (False, False): exp.GT, (False, True): exp.GTE}  # fmt: skip
        kind = kinds[options["before"], options["inclusive"]]
        condition = kind(this=column(number), expression=literal(found))
        return self._filtered(dataclasses.replace(relation, taken=None), condition)

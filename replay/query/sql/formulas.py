"""Formulas of SQL over leaves: how they are written, taken apart, and turned into expressions.

A leaf is a column without a table, `__7`: a key or a value of a relation. Formulas are trees of
sqlglot, so that what is not lowered is handed to DuckDB as it stands.
"""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from sqlglot import exp

from replay.query.expressions import Expression
from replay.query.nodes import Map, Reduce

_numbers = itertools.count()

CONDITIONS = frozenset(
    "less less_equal greater greater_equal equal not_equal logical_and logical_or logical_not "
    "logical_xor isnan isinf isfinite".split()
)
MIRRORED = {exp.LT: exp.GT, exp.LTE: exp.GTE, exp.GT: exp.LT, exp.GTE: exp.LTE}


class Unlowerable(Exception):
    """Why something cannot be reduced on the device; it never reaches the user as it is."""


def leaf() -> str:
    """Return a name that no column has."""
    return f"__{next(_numbers)}"


def column(name: str) -> exp.Expr:
    """Return a leaf as it stands in a formula."""
    return exp.Column(this=exp.to_identifier(name, quoted=True))


def leaves(formula: exp.Expr) -> set[str]:
    """Return the leaves of a formula."""
    return {x.name for x in formula.find_all(exp.Column) if not x.table}


def literal(value: Any) -> exp.Expr:
    """Return a value as SQL, never spliced: a text stays a text."""
    value = value.item() if isinstance(value, np.generic) else value
    if value is None:
        return exp.null()
    if isinstance(value, bool):
        return exp.true() if value else exp.false()
    if isinstance(value, int | float):
        if isinstance(value, float) and not math.isfinite(value):
            return exp.cast(exp.Literal.string(str(value)), "double")
        number = exp.Literal.number(repr(abs(value)))
        return exp.Neg(this=number) if value < 0 else number
    if isinstance(value, str):
        return exp.Literal.string(value)
    if isinstance(value, list | tuple | np.ndarray):
        return exp.Array(expressions=[literal(x) for x in value])
    raise TypeError(type(value).__name__)


def only_leaf(formula: Any) -> str | None:
    """Return the leaf that a formula is, or None."""
    while isinstance(formula, exp.Paren):
        formula = formula.this
    return formula.name if isinstance(formula, exp.Column) and not formula.table else None


def repr_of(formula: exp.Expr) -> str:
    """Return a text by which equal formulas are found."""
    return formula.sql("duckdb", identify=True, normalize=False)


def replaced(formula: exp.Expr, changes: Mapping[str, exp.Expr]) -> exp.Expr:
    """Return a formula with other formulas in the place of leaves, or of equal formulas."""

    def change(node):
        if isinstance(node, exp.Column) and not node.table and node.name in changes:
            return changes[node.name].copy()
        if isinstance(node, exp.Window | exp.AggFunc | exp.Filter) and repr_of(node) in changes:
            return changes[repr_of(node)].copy()
        return node

    return formula.copy().transform(change)


def exchanged(formula: exp.Expr, changes: Mapping[str, exp.Expr]) -> exp.Expr:
    """Put other formulas in the place of equal ones, from the outside in."""

    def visit(node: exp.Expr) -> exp.Expr:
        if not isinstance(node, exp.Literal | exp.Order | exp.Ordered | exp.Star):
            found = changes.get(repr_of(node))
            if found is not None:
                return found.copy()
        for key, child in list(node.args.items()):
            if isinstance(child, exp.Expr):
                node.set(key, visit(child))
            elif isinstance(child, list):
                node.set(key, [visit(x) if isinstance(x, exp.Expr) else x for x in child])
        return node

    return visit(formula.copy())


def affine(formula: exp.Expr) -> tuple[str, int] | None:
    """Return the leaf and the whole number of `leaf + number`, or None."""
    if isinstance(formula, exp.Paren):
        return affine(formula.this)
    if isinstance(formula, exp.Column) and not formula.table:
        return formula.name, 0
    if isinstance(formula, exp.Cast):
        kind = formula.to.this
        return affine(formula.this) if kind in exp.DataType.INTEGER_TYPES else None
    if isinstance(formula, exp.Add | exp.Sub):
        left, right = formula.this, formula.expression
        number = _whole(right)
        found = affine(left)
        if number is not None and found is not None:
            return found[0], found[1] + (number if isinstance(formula, exp.Add) else -number)
        number, found = _whole(left), affine(right)
        if number is not None and found is not None and isinstance(formula, exp.Add):
            return found[0], found[1] + number
    return None


def _whole(formula: exp.Expr) -> int | None:
    found = constant(formula)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def constant(formula: exp.Expr) -> Any:
    """Return the number that a formula is, or None."""
    if isinstance(formula, exp.Paren):
        return constant(formula.this)
    if isinstance(formula, exp.Neg):
        found = constant(formula.this)
        return None if found is None else -found
    if isinstance(formula, exp.Cast):
        inner = formula.this
        if isinstance(inner, exp.Literal) and inner.is_string:
            try:
                return float(inner.name)
            except ValueError:
                return None
        found = constant(inner)
        kind = formula.to.this
        if found is None:
            return None
        if kind in exp.DataType.FLOAT_TYPES or kind in exp.DataType.REAL_TYPES:
            return float(found)
        return found if kind in exp.DataType.INTEGER_TYPES and found == int(found) else None
    if isinstance(formula, exp.Literal) and not formula.is_string:
        text = formula.name
        return int(text) if text.isdigit() else float(text)
    if isinstance(formula, exp.Boolean):
        return bool(formula.this)
    return None


def conjuncts(condition: Any) -> list[exp.Expr]:
    """Return the conditions that all have to hold."""
    if condition is None:
        return []
    if isinstance(condition, exp.Paren):
        return conjuncts(condition.this)
    if isinstance(condition, exp.And):
        return [*conjuncts(condition.this), *conjuncts(condition.expression)]
    return [_first_of_equal(condition)]


def _first_of_equal(part: exp.Expr) -> exp.Expr:
    """Put the first of columns that were joined in the place of `coalesce`, which `USING` makes."""

    def change(node):
        plain = isinstance(node, exp.Coalesce) and all(
            isinstance(x, exp.Column) and x.name == node.this.name
            for x in (node.this, *node.expressions)
        )
        return node.this if plain else node

    return part.copy().transform(change)


def enclosed(formula: exp.Expr) -> exp.Expr:
    """Return a formula that can stand within another."""
    plain = isinstance(formula, exp.Column | exp.Literal | exp.Func | exp.Paren | exp.Boolean)
    return formula.copy() if plain else exp.Paren(this=formula.copy())


def of_table(formula: exp.Expr, table: str) -> exp.Expr:
    """Return a formula whose leaves are columns of a table."""

    def change(node):
        if isinstance(node, exp.Column) and not node.table:
            return exp.column(node.name, table=table, quoted=True)
        return node

    return formula.copy().transform(change)


def inside(node: exp.Expr, formula: exp.Expr) -> bool:
    """Whether something stands in a subquery of a formula."""
    above = node.parent
    while above is not None and above is not formula:
        if isinstance(above, exp.Select | exp.SetOperation):
            return True
        above = above.parent
    return False


def shown(part: exp.Expr) -> str:
    """Return the beginning of a formula, for messages."""
    return part.sql("duckdb")[:80]


# ------------------------------------------------------------------------------------- formulas


_UNARY = {
    exp.Abs: "abs", exp.Sign: "sign", exp.Sqrt: "sqrt", exp.Cbrt: "cbrt", exp.Exp: "exp",
    exp.Ln: "log", exp.Neg: "negative", exp.Floor: "floor", exp.Ceil: "ceil", exp.IsNan: "isnan",
    exp.IsInf: "isinf", exp.Not: "logical_not", exp.Sin: "sin", exp.Cos: "cos", exp.Tanh: "tanh",
}  # fmt: skip
_BINARY = {
    exp.Add: "add", exp.Sub: "subtract", exp.Mul: "multiply", exp.Div: "divide",
    exp.Pow: "power", exp.And: "logical_and", exp.Or: "logical_or", exp.LT: "less",
    exp.LTE: "less_equal", exp.GT: "greater", exp.GTE: "greater_equal", exp.EQ: "equal",
    exp.NEQ: "not_equal",
}  # fmt: skip


# Functions that are NULL where one of their arguments is.
_STRICT = (
    *(kind for kind in (*_UNARY, *_BINARY) if kind not in (exp.And, exp.Or)),
    exp.Paren, exp.Between, exp.Cast, exp.Mod, exp.IntDiv, exp.Round,
)  # fmt: skip


def spoiling(formula: exp.Expr) -> list[exp.Expr]:
    """Return the columns and windows of a formula that make it NULL where they are."""
    if isinstance(formula, exp.Column | exp.Window):
        return [formula]
    if type(formula) not in _STRICT:
        return []
    return [x for child in formula.iter_expressions() for x in spoiling(child)]


def never_null(formula: exp.Expr) -> bool:
    """Whether a formula is NULL only where one of its leaves is."""
    if isinstance(formula, exp.Column | exp.Literal | exp.Boolean):
        return True
    if type(formula) not in (exp.Paren, exp.Between, exp.Cast, *_UNARY, *_BINARY):
        return False
    parts = [x for x in formula.iter_expressions() if not isinstance(x, exp.DataType)]
    return all(map(never_null, parts))


class Formula:
    """Turns formulas into expressions of one relation."""

    def __init__(self, relation: Any):
        self._relation = relation

    def of(self, node: exp.Expr) -> Any:
        """Return an expression, or a number."""
        number = constant(node)
        if number is not None:
            return number
        if isinstance(node, exp.Paren):
            return self.of(node.this)
        if isinstance(node, exp.Column):
            return self._leaf(node)
        if isinstance(node, exp.Case | exp.If):
            return self._case(node)
        if isinstance(node, exp.Cast):
            return self._cast(node)
        if isinstance(node, exp.Between):
            low, high = (self.of(node.args[x]) for x in ("low", "high"))
            x = self.of(node.this)
            return self._map("logical_and", self._map("greater_equal", x, low),
                             self._map("less_equal", x, high))  # fmt: skip
        if isinstance(node, exp.In) and node.expressions:
            x = self.of(node.this)
            each = [self._map("equal", x, self.of(y)) for y in node.expressions]
            return functools.reduce(lambda a, b: self._map("logical_or", a, b), each)
        if isinstance(node, exp.Is) and isinstance(node.expression, exp.Null):
            x = self.of(node.this)  # a value is never NULL, and x <> x only where it is NaN
            return self._map("logical_and", self._map("equal", x, x), self._map("not_equal", x, x))
        if isinstance(node, exp.Greatest | exp.Least):
            name = "maximum" if isinstance(node, exp.Greatest) else "minimum"
            parts = [self.of(x) for x in (node.this, *node.expressions) if x is not None]
            return functools.reduce(lambda a, b: self._map(name, a, b), parts)
        if isinstance(node, exp.Coalesce):
            return self.of(node.this)
        if isinstance(node, exp.Pow) and constant(node.expression) == 2:
            return self._map("square", self.of(node.this))
        if isinstance(node, exp.Anonymous) and node.name.lower() == "isfinite":
            return self._map("isfinite", self.of(node.expressions[0]))
        for kinds, arity in ((_UNARY, 1), (_BINARY, 2)):
            if type(node) in kinds:
                parts = [node.this, node.expression][:arity]
                each = self.condition if isinstance(node, exp.Connector | exp.Not) else self.of
                return self._map(kinds[type(node)], *map(each, parts))
        raise Unlowerable(f"{node.sql('duckdb')} has no counterpart on the device")

    def condition(self, node: exp.Expr) -> Any:
        """Return what is true or false as an expression, or a constant; a number is true but 0."""
        found = self.of(node)
        if not isinstance(found, Expression):
            return bool(found)
        return found if holds(found.plan) else self._map("not_equal", found, 0)

    def _map(self, name: str, *arguments: Any) -> Any:
        if not any(isinstance(x, Expression) for x in arguments):
            raise Unlowerable("a formula of constants alone")
        counts = [_counts(x.plan) for x in arguments if isinstance(x, Expression)]
        real = any(isinstance(x, float) for x in arguments)
        if any(counts) and (real or not all(counts) or name == "divide"):
            raise Unlowerable("counts and other numbers in one formula")
        first = next(x for x in arguments if isinstance(x, Expression))
        return first._map(name, *arguments)

    def _leaf(self, node: exp.Column) -> Any:
        relation = self._relation
        value = relation.values.get(node.name)
        if isinstance(value, Expression):
            if node.name in relation.missing:
                raise Unlowerable("a step that may not exist stands in a formula")
            return value
        raise Unlowerable("a key stands in a formula of values")

    def _case(self, node: Any) -> Any:
        ifs = [node] if isinstance(node, exp.If) else node.args["ifs"]
        last = node.args.get("false") if isinstance(node, exp.If) else node.args.get("default")
        if last is None or (isinstance(node, exp.Case) and node.this is not None):
            raise Unlowerable("a CASE without ELSE, whose rows may be NULL, or one of values")
        found = self.of(last)
        for each in reversed(ifs):
            found = self._map("where", self.condition(each.this), self.of(each.args["true"]), found)
        return found

    def _cast(self, node: exp.Cast) -> Any:
        kind = node.to.this
        if kind == exp.DType.BOOLEAN:
            return self.condition(node.this)
        inner = self.of(node.this)
        if kind in exp.DataType.FLOAT_TYPES:
            return inner
        if kind in exp.DataType.INTEGER_TYPES and is_condition(node.this):
            return inner
        raise Unlowerable(f"a cast to {node.to.sql('duckdb')}")


def holds(plan: Any) -> bool:
    """Whether a plan, or a constant, tells what is true or false."""
    if isinstance(plan, Map):
        if plan.function == "where":
            return all(map(holds, plan.arguments[1:]))
        return plan.function in CONDITIONS
    if isinstance(plan, Reduce):
        return plan.how in ("any", "all") or (plan.how in ("min", "max") and holds(plan.child))
    child = getattr(plan, "child", None)
    return isinstance(plan, bool) if child is None else holds(child)


def _counts(plan: Any) -> bool:
    """Whether a plan tells whole numbers: how often something holds."""
    if not isinstance(plan, Reduce) or plan.how != "sum":
        return False
    return _counts(plan.child) or getattr(plan.child, "function", "") in CONDITIONS


def is_condition(node: Any) -> bool:
    """Whether a formula is true or false."""
    if isinstance(node, exp.Paren):
        return is_condition(node.this)
    if isinstance(node, exp.Cast):
        return node.to.this == exp.DType.BOOLEAN or is_condition(node.this)
    return isinstance(
        node, exp.Predicate | exp.Connector | exp.Not | exp.IsNan | exp.IsInf | exp.Between | exp.In
    ) and not isinstance(node, exp.SubqueryPredicate)

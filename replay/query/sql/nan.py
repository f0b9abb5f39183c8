"""What NaN means in the SQL that DuckDB runs: the same as in expressions."""

from typing import Any

from sqlglot import exp
from sqlglot.errors import SqlglotError
from sqlglot.optimizer.annotate_types import annotate_types


def with_our_nan(query: exp.Query, schema: dict[str, dict[str, str]]) -> exp.Query:
    """Give comparisons, extremes and orders of numbers the meaning that expressions give NaN.

    DuckDB calls NaN equal to itself and larger than all numbers. Here a comparison with NaN is
    false (`<>` is true), `min` and `max` hand it on, and in an order it comes first.
    """
    try:
        query = annotate_types(query, schema=schema, dialect="duckdb")  # type: ignore[assignment]
    except SqlglotError:
        return query

    def real(node: Any) -> bool:
        return (
            isinstance(node, exp.Expr)
            and not isinstance(node, exp.Literal)
            and node.type is not None
            and node.type.this in (exp.DType.FLOAT, exp.DType.DOUBLE)
        )

    def nan(*parts: Any) -> list[exp.Expr]:
        return [exp.IsNan(this=part.copy()) for part in parts if real(part)]

    for node in reversed(
        list(query.find_all(exp.Binary, exp.Between, exp.Ordered, exp.Min, exp.Max))
    ):
        if isinstance(node, exp.EQ | exp.NEQ | exp.LT | exp.LTE | exp.GT | exp.GTE):
            found = nan(node.this, node.expression)
            if not found:
                continue
            plain = exp.Paren(this=node.copy())
            if isinstance(node, exp.NEQ):
                new = exp.or_(plain, *found)
            else:
                new = exp.and_(plain, *[exp.Not(this=x) for x in found])
            node.replace(exp.Paren(this=new))
        elif isinstance(node, exp.Between):
            found = nan(node.this, node.args["low"], node.args["high"])
            if found:
                new = exp.and_(exp.Paren(this=node.copy()), *[exp.Not(this=x) for x in found])
                node.replace(exp.Paren(this=new))
        elif isinstance(node, exp.Ordered):
            if real(node.this) and not node.args.get("desc"):
                first = exp.Ordered(this=nan(node.this)[0], desc=True, nulls_first=False)
                siblings = node.parent
                if isinstance(siblings, exp.Order):
                    terms = list(siblings.expressions)
                    place = next(i for i, x in enumerate(terms) if x is node)
                    siblings.set("expressions", [*terms[:place], first, *terms[place:]])
        elif isinstance(node, exp.Min | exp.Max) and real(node.this):
            if node.args.get("count") is None:
                whole, kind = node, node.type  # with the rows that it is of
                while isinstance(whole.parent, exp.Filter | exp.Window) and whole.arg_key == "this":
                    whole = whole.parent
                spoiled = whole.copy()
                call = spoiled
                while isinstance(call, exp.Filter | exp.Window):
                    call = call.this
                some = exp.LogicalOr(this=nan(node.this)[0])
                spoiled = some if call is spoiled else (call.replace(some), spoiled)[1]
                blank = exp.cast(exp.Literal.string("nan"), "double")
                new = exp.Case(ifs=[exp.If(this=spoiled, true=blank)], default=whole.copy())
                new.type = kind
                whole.replace(new)
    return query

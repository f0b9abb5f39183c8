"""Aggregates of SQL over a `Dense` relation, as reductions of expressions.

What a group is decides what is reduced: groups by step, position, or tensor and weight keep a
dimension; groups by a function of the sample (a label, the sample itself), by epoch, by windows of
steps and by tensor are kept apart within a reduction. Groups by other functions of a dimension
keep that dimension, and DuckDB puts together what belongs together.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from sqlglot import exp

from replay.query.expressions import Expression
from replay.query.nodes import Group
from replay.query.sql.formulas import (
    Unlowerable,
    affine,
    column,
    constant,
    exchanged,
    holds,
    is_condition,
    leaf,
    leaves,
    literal,
    never_null,
    only_leaf,
    replaced,
    repr_of,
    shown,
)
from replay.query.sql.relations import RANKED, Counted, Dense, Key, Places

# How the parts of a group are put together where it was kept apart more finely.
_AGAIN = {
    "sum": exp.Sum,
    "min": exp.Min,
    "max": exp.Max,
    "any": exp.LogicalOr,
    "all": exp.LogicalAnd,
}
_CHAINED = tuple(_AGAIN)


class Aggregation:
    """What the groups of a relation are, and aggregates over them.

    Args:
        lowering: evaluates keys.
        relation: what is reduced.
        groups: formulas of keys.

    Attributes:
        relation: what has been reduced.
        groups: the formulas.
        again: whether DuckDB has to put groups together.

    Raises:
        Unlowerable: groups are not of keys, or entries of a dimension were left out.
    """

    def __init__(self, lowering: Any, relation: Dense, groups: Sequence[exp.Expr]):
        self._lowering, self._from, self.groups = lowering, relation, list(groups)
        if relation.residual or relation.there is not None:
            raise Unlowerable("; ".join(relation.notes) or "conditions that are left to DuckDB")
        if relation.empty:
            raise Unlowerable("there are no rows")
        self.again = False
        self._kept: list[str] = []
        self._chain: list[tuple[Group | None, tuple[str, ...]]] = []
        self._entries: dict[str, np.ndarray] = {}
        self._keys: dict[str, Key] = {}
        self._changes: dict[str, exp.Expr] = {}
        self._merges: dict[str, exp.Expr] = {}
        self._values: dict[str, Any] = {}
        self._missing: set[str] = set()
        self._masks: list[Expression] = []
        self._names: tuple[Any, ...] = ()
        self._exists: dict[str, np.ndarray] = {}
        self._counts: dict[Any, str] = {}
        self._plan()

    # ---- groups

    def _plan(self) -> None:
        given, relation = self._from, self._from
        by: dict[str, list[exp.Expr]] = {}
        for formula in self.groups:
            names = leaves(formula)
            if not names:
                continue
            if not names <= set(relation.keys):
                raise Unlowerable("groups by values")
            domains = {relation.keys[name].domain for name in names}
            for domain in domains:
                by.setdefault(domain, [])
            if domains == {"tensor", "weight"}:
                domains = {"weight"}
            if len(domains) == 1:
                by[domains.pop()].append(formula)
        if "weight" in by and "tensor" in by and "weight" in relation.dims:
            by["weight"] = [*by.pop("tensor"), *by["weight"]]
        labels: Group | None = None
        epoch: Group | None = None
        tensors: Group | None = None
        for domain, formulas in by.items():
            if domain == "sample" and "sample" not in relation.dims:
                continue
            if domain in WALKED and domain in relation.dims:
                epoch = self._of_steps(domain, formulas)
            elif domain == "tensor" and "weight" in relation.dims:
                tensors = Group("tensor")
                if not self._injective("tensor", formulas):
                    self.again = True
            elif domain in relation.dims:
                self._keep(domain, formulas)
            else:
                raise Unlowerable(f"groups by {domain}")
        if "sample" in by and "sample" not in relation.dims:
            if not {"step", "position"} <= set(self._kept):
                labels = self._of_samples(by["sample"])
        over = [dim for dim in relation.dims if dim not in self._kept]
        if "position" in self._kept and {"step"} & set(over):
            ids = relation.home.ids[relation.entries["step"]]
            if relation.chosen is not None or (ids < 0).any():
                raise Unlowerable("positions that have no sample at some steps")
        for dim in over:
            if dim in given.kept:
                raise Unlowerable(f"entries of {dim} are left out")
        steps = [dim for dim in over if dim in ("step", "state")]
        inside = [dim for dim in over if dim not in ("step", "state", "weight")]
        last = [dim for dim in over if dim == "weight"]
        groups = [(labels, inside), (epoch, steps), (tensors, last)]
        chosen = [(group, dims) for group, dims in groups if group is not None]
        if labels is not None and not {"position", "sample"} & set(over):
            raise Unlowerable("groups of samples whose positions are kept")
        if len(chosen) <= 1:
            group = chosen[0][0] if chosen else None
            self._chain = [(group, tuple(over))] if over else []
        else:
            if epoch is None:  # what is not told apart by epoch is reduced with the samples
                groups = [(labels, [*inside, *steps]), (tensors, last)]
                if labels is None:
                    groups = [(None, inside), (tensors, [*steps, *last])]
            self._chain = [(group, tuple(dims)) for group, dims in groups if dims]
        for dim in self._kept:
            self._entries[dim] = relation.entries[dim]
        for name, key in relation.keys.items():
            if key.domain in self._kept or (key.domain == "tensor" and "weight" in self._kept):
                self._keys[name] = key
            if key.domain == "sample" and "sample" in self._entries:
                self._keys[name] = key
        if tensors is not None:
            numbers = relation.known("tensor")
            self._entries["tensor"] = np.arange(len(numbers))
            for name, key in relation.keys.items():
                if key.domain == "tensor":
                    values = relation.read(name, "tensor", numbers)
                    values = values if isinstance(values, pa.Array) else pa.array(values)
                    self._keys[name] = Key("tensor", np.arange(len(numbers)), values)
        if "sample" in relation.entries and {"step", "position"} <= set(self._kept):
            for name, key in relation.keys.items():
                if key.domain == "sample":
                    self._keys[name] = key
            self._entries["sample"] = relation.entries["sample"]

    def _injective(self, domain: str, formulas: Sequence[exp.Expr]) -> bool:
        relation = self._from
        number = relation.number(domain)
        plain = {x[0] for x in map(affine, formulas) if x is not None}
        if number is not None and number in plain:
            if domain != "weight" or len(relation.known("tensor")) == 1:
                return True
            if relation.number("tensor") in plain:
                return True
        codes = self._codes(domain, formulas)
        return len(np.unique(codes)) == len(codes)

    def _codes(self, domain: str, formulas: Sequence[exp.Expr]) -> np.ndarray:
        """Return the number of the group of each entry of a dimension."""
        table = self._lowering.evaluated(self._from, domain, list(formulas))
        order = np.argsort(table.column("__at").to_numpy(), kind="stable")
        found = np.zeros(table.num_rows, np.int64)
        for i in range(len(formulas)):
            column_ = table.column(f"c{i}").combine_chunks().dictionary_encode()
            codes = column_.indices.fill_null(len(column_.dictionary)).to_numpy()
            found = found * (len(column_.dictionary) + 1) + codes
            found = np.unique(found, return_inverse=True)[1].reshape(-1)
        return found[order]

    def _keep(self, domain: str, formulas: Sequence[exp.Expr]) -> None:
        self._kept.append(domain)
        if not self._injective(domain, formulas):
            self.again = True

    def _of_steps(self, walk: str, formulas: Sequence[exp.Expr]) -> Group | None:
        relation = self._from
        if self._injective(walk, formulas) or walk == "state":
            self._keep(walk, formulas)
            return None
        codes = self._codes(walk, formulas)
        steps = relation.known(walk)
        epochs = relation.home.epochs
        if epochs is not None and _same_parts(codes, epochs[steps]):
            numbers = np.unique(epochs[steps])
            return self._function_of(
                walk, formulas, "epoch", epochs[steps], numbers, Group("epoch")
            )
        size = _window(codes, steps)
        if size:
            numbers = np.unique(steps // size)
            group = Group("window", size=size)
            return self._function_of(walk, formulas, "window", steps // size, numbers, group)
        self._keep(walk, formulas)
        return None

    def _function_of(self, walk, formulas, domain, numbers_at, numbers, group) -> Group:
        table = self._lowering.evaluated(self._from, walk, list(formulas))
        order = np.argsort(table.column("__at").to_numpy(), kind="stable")
        first = np.searchsorted(numbers_at, numbers)
        self._entries[domain] = numbers
        for i, formula in enumerate(formulas):
            values = table.column(f"c{i}").combine_chunks().take(pa.array(order[first]))
            self._keys[own := leaf()] = Key(domain, numbers, values)
            self._changes[repr_of(formula)] = column(own)
        return group

    def _of_samples(self, formulas: Sequence[exp.Expr]) -> Group:
        relation = self._from
        formulas = [x for x in formulas if x is not None]
        if not formulas:
            raise Unlowerable("groups by a function of several keys")
        known = relation.known("sample")
        if self._injective("sample", formulas):
            self._entries["sample"] = np.arange(relation.home.count)
            group = Group("sample", size=relation.home.count)
            codes = np.arange(relation.home.count)
            if not self._chain and len(known) <= relation.home.count:
                self._present("sample", codes)
            return group
        codes = self._codes("sample", formulas)
        table = self._lowering.evaluated(relation, "sample", list(formulas))
        order = np.argsort(table.column("__at").to_numpy(), kind="stable")
        names: Any = codes
        if len(formulas) == 1:  # the group is called what it is called in Python
            values = table.column("c0").combine_chunks().take(pa.array(order))
            if not values.null_count and pa.types.is_integer(values.type):
                names = values.to_numpy(zero_copy_only=False)
            elif not values.null_count and pa.types.is_string(values.type):
                names = np.asarray(values.to_pylist())
        labels = np.full(relation.home.count, names[0], names.dtype)
        labels[known] = names
        found, numbers = np.unique(labels, return_inverse=True)
        numbers = numbers.reshape(-1)
        group = Group("labels", numbers.astype("<i4").tobytes(), tuple(found.tolist()))
        self._names = group.names
        self._entries["group"] = np.arange(len(found))
        first = np.asarray([known[np.argmax(numbers[known] == i)] for i in range(len(found))])
        places = np.searchsorted(np.sort(known), first)
        for i, formula in enumerate(formulas):
            values = table.column(f"c{i}").combine_chunks().take(pa.array(order))
            self._keys[own := leaf()] = Key("group", np.arange(len(found)),
                                            values.take(pa.array(places)))  # fmt: skip
            self._changes[repr_of(formula)] = column(own)
        self._present("group", numbers)
        return group

    def _present(self, dim: str, code: np.ndarray) -> None:
        """Note which groups have any sample among those that are looked at."""
        relation = self._from
        if "position" not in relation.dims:
            return
        ids = relation.home.ids[relation.entries["step"]]
        ids = np.unique(ids[ids >= 0])
        if relation.chosen is not None:
            ids = np.intersect1d(ids, relation.chosen)
        there = np.unique(code[ids])
        if len(there) < len(self._entries[dim]):
            self._exists[dim] = there

    # ---- aggregates

    def of(self, calls: Sequence[exp.Expr]) -> "Aggregation":
        """Reduce.

        Raises:
            Unlowerable: an aggregate has no counterpart on the device.
        """
        relation = self._from
        for call in calls:
            key = repr_of(call)
            if key not in self._changes or key not in self._merges:
                self._changes[key] = self._call(call)
        dims = [*self._entries]
        if "sample" in dims and {"step", "position"} <= set(self._kept):
            dims.remove("sample")
        masks = list(self._masks)
        if relation.mask is not None and self.groups:
            masks.append(self._number(relation) > 0)
        inner = {"step", "position"} <= set(self._kept)
        there = None
        if (
            any(group is not None and group.dim in ("group", "sample") for group, _ in self._chain)
            and relation.walk in self._kept
            and "position" in relation.dims
        ):
            bare = dataclasses.replace(relation, masks=())
            counted = self._counted(bare)
            there = Counted(counted.dims, counted.array > 0)
            there = None if there.array.all() else there
        self.relation = dataclasses.replace(
            relation,
            dims=_ordered(dims),
            entries=self._entries,
            keys=self._keys,
            values=self._values,
            columns={},
            missing=frozenset(self._missing),
            masks=tuple(masks),
            chosen=relation.chosen if inner else None,
            kept={**{d: x for d, x in relation.kept.items() if d in dims}, **self._exists},
            names=self._names or (relation.names if "group" in dims else ()),
            there=there,
        )
        return self

    def formula(self, formula: exp.Expr) -> exp.Expr:
        """Return a formula with leaves in the place of aggregates and groups."""
        return exchanged(formula, self._changes)

    def again_of(self, formula: exp.Expr) -> exp.Expr:
        """Return a formula in which DuckDB puts groups together."""
        return exchanged(formula, {**self._changes, **self._merges})

    def _call(self, call: exp.Expr) -> exp.Expr:
        key, conditions = repr_of(call), []
        if isinstance(call, exp.Filter):
            conditions.append(call.args["expression"].this)
            call = call.this
        if isinstance(call, exp.CountIf):
            conditions.append(call.this)
            call = exp.Count(this=exp.Star())
        argument, otherwise = call.this, None
        if isinstance(call, exp.Sum | exp.Avg | exp.Min | exp.Max | exp.Count):
            otherwise, argument, zero = _condition_of(call, argument, self._from)
            if otherwise is not None and not zero:
                conditions.append(otherwise)
        relation = self._from
        for condition in conditions:
            relation = self._narrowed(relation, condition)
        whole = relation  # rows that count as zero are rows
        if otherwise is not None and otherwise not in conditions:
            relation = self._narrowed(relation, otherwise)
        guarded = bool(conditions) or (self._from.mask is not None and not self.groups)
        guard = whole if guarded else None
        if relation.empty:
            found, again = self._of_nothing(call, guard if whole is not relation else relation)
        else:
            found, again = self._one(call, argument, relation, guard)
        self._merges[key] = again if again is not None else found
        if self.again and again is None:
            raise Unlowerable(f"{shown(call)} cannot be put together from parts")
        return found

    def _narrowed(self, relation: Dense, condition: exp.Expr) -> Dense:
        found = self._lowering.filtered(relation, condition)
        if found.residual or found.taken or set(found.kept) != set(relation.kept):
            raise Unlowerable("; ".join(found.notes[len(relation.notes) :]) or "a filter")
        for dim in self._kept:
            if not np.array_equal(found.entries[dim], relation.entries[dim]):
                raise Unlowerable("a filter that leaves out groups")
        if found.entries.get("weight") is not relation.entries.get("weight") and any(
            group is not None and group.kind == "tensor" for group, _ in self._chain
        ):
            raise Unlowerable("a filter that leaves out weights of a tensor")
        if any(
            group is not None and group.kind in ("epoch", "window") for group, _ in self._chain
        ) and len(found.entries["step"]) != len(relation.entries["step"]):
            raise Unlowerable("a filter that leaves out steps of an epoch")
        return found

    def _of_nothing(self, call: Any, guard: Dense | None) -> tuple[exp.Expr, exp.Expr]:
        """Return what an aggregate is where its condition holds in no row."""
        if isinstance(call, exp.Count):
            return literal(0), literal(0)
        if not isinstance(call, _NOTHING):
            raise Unlowerable(f"{shown(call)} of no rows")
        if not isinstance(call, exp.Sum) or (guard is not None and guard.empty):
            return exp.null(), exp.null()
        found = self._guard(_double(literal(0)), guard)
        return found, exp.Sum(this=found.copy())

    def _one(
        self, call: Any, argument: Any, relation: Dense, guard: Dense | None
    ) -> tuple[exp.Expr, exp.Expr | None]:
        """Return an aggregate, and how those of parts are put together.

        Args:
            call: the aggregate.
            argument: of it, taken apart.
            relation: the rows that it is of.
            guard: the rows without which it is NULL; None where there always are some.
        """
        if isinstance(call, exp.Count):
            if isinstance(argument, exp.Distinct):
                raise Unlowerable("count(DISTINCT ...)")
            if argument is not None and not isinstance(argument, exp.Star):
                self._never_null(relation, argument)
            count = self._rows(relation)
            return count, exp.Sum(this=count)
        if isinstance(call, exp.ArgMax | exp.ArgMin):
            return self._places(call, relation), None
        if isinstance(call, exp.Min | exp.Max) and call.args.get("count") is not None:
            whole = type(call)(this=call.this)
            kind = exp.ArgMax if isinstance(whole, exp.Max) else exp.ArgMin
            again = kind(this=None, expression=argument, count=call.args["count"])
            return self._places(again, relation), None
        if isinstance(call, exp.Min | exp.Max) and leaves(argument) <= set(relation.keys):
            found = self._edge(call, argument, relation)
            return found, type(call)(this=found)
        if isinstance(call, exp.Sum) and constant(argument) is not None:
            count = exp.Mul(this=self._rows(relation), expression=argument.copy())
            found = self._guard(count, guard)
            return found, exp.Sum(this=found.copy())
        hows: dict[Any, Any] = {
            exp.Sum: "sum", exp.Avg: "mean", exp.Min: "min", exp.Max: "max",
            exp.LogicalOr: "any", exp.LogicalAnd: "all",
        }  # fmt: skip
        how = hows.get(type(call))
        if how is None:
            if not isinstance(argument, exp.Expr):
                raise Unlowerable(f"{shown(call)} has no counterpart on the device")
            return self._statistic(call, argument, relation, guard), None
        condition = how in ("any", "all")
        argument = _without_cast(argument) if condition else argument
        value = relation.condition(argument) if condition else relation.expression(argument)
        if not isinstance(value, Expression):
            raise Unlowerable("an aggregate of a constant")
        several = len(self._chain) > 1
        if how == "mean" and (relation.mask is not None or several or self.again):
            total = self._leaf(self._reduced(relation, value, "sum"))
            count = self._rows(relation)
            found = exp.Div(this=_double(total), expression=count)
            counts = exp.Sum(this=count.copy())
            again = exp.Div(this=exp.Sum(this=_double(total)), expression=counts)
            again = again if guard is None else _where_some(counts, again)
            return self._guard(exp.Paren(this=found), guard), exp.Paren(this=again)
        found = self._guard(self._leaf(self._reduced(relation, value, how)), guard)
        merge = _AGAIN.get(how)
        return found, merge(this=found.copy()) if merge else None

    def _statistic(self, call, argument, relation, guard) -> exp.Expr:
        if relation.mask is not None or len(self._chain) > 1:
            raise Unlowerable(f"{shown(call)} of rows that are filtered or grouped twice")
        value = relation.expression(argument)
        ddofs = {exp.VariancePop: 0, exp.Variance: 1, exp.StddevPop: 0, exp.Stddev: 1,
                 exp.StddevSamp: 1}  # fmt: skip
        if type(call) in ddofs:
            found = self._reduced(relation, value, "var", ddof=ddofs[type(call)])
            if isinstance(call, exp.Stddev | exp.StddevPop | exp.StddevSamp):
                found = found._map("sqrt", found)
            return self._guard(self._leaf(found), guard)
        share = {exp.Median: exp.Literal.number(0.5)}.get(type(call)) or call.args.get("expression")
        if share is None and isinstance(call, exp.ApproxQuantile):
            share = call.args.get("quantile")
        if isinstance(call, exp.PercentileCont | exp.Median | exp.ApproxQuantile):
            q = constant(share) if share is not None else None
            if not isinstance(q, int | float):
                raise Unlowerable("several quantiles at once")
            inside = relation.walk in self._kept or not relation.walk
            if not inside and len(relation.entries[relation.walk]) == 1:  # one step is all of them
                value, inside = value.max(relation.walk), True
            if not inside and not isinstance(call, exp.ApproxQuantile):
                raise Unlowerable(
                    "quantiles over steps are read off a sketch: approx_quantile(value, 0.5)"
                )
            found = self._reduced(relation, value, "quantile", q=(float(q),))
            return self._leaf(found.sel(quantile=0))
        raise Unlowerable(f"{shown(call)} has no counterpart on the device")

    def _leaf(self, value: Any) -> exp.Expr:
        for name, known in self._values.items():
            if isinstance(value, Expression) and isinstance(known, Expression):
                if known.plan == value.plan:
                    return column(name)
        self._values[name := leaf()] = value
        return column(name)

    def _guard(self, formula: exp.Expr, relation: Dense | None) -> exp.Expr:
        """Return NULL where a relation has no rows."""
        rows = None if relation is None else self._rows(relation)
        known = None if rows is None else self._values[rows.name]
        if rows is None or (isinstance(known, Counted) and (known.array > 0).all()):
            return formula
        return _where_some(rows, formula)

    def _reduced(self, relation: Dense, value: Expression, how: str, **settings: Any) -> Expression:
        """Reduce what stands in each row."""
        value = relation.of_samples(value) if "position" in value.dims else value
        if relation.chosen is not None and "position" not in value.dims:
            raise Unlowerable("samples are chosen after their steps were reduced")
        mask = relation.mask
        if mask is not None:
            if how == "any":
                value = value & mask
            elif how == "all":
                value = value | ~mask
            elif holds(value.plan):
                if how != "sum":
                    raise Unlowerable(f"{how} of conditions")
                value = value & mask
            else:
                blank = {"sum": 0.0, "min": math.inf, "max": -math.inf}.get(how)
                if blank is None:
                    raise Unlowerable(f"{how} of rows that are filtered")
                value = value.where(mask, blank)
        if not self._chain:
            if how in ("sum", "mean", "min", "max", "any", "all"):
                return value
            raise Unlowerable("a statistic of single rows")
        if len(self._chain) > 1 and how not in _CHAINED:
            raise Unlowerable(f"{how} of groups within groups")
        for group, over in self._chain:
            missing = set(over) - set(value.dims)
            if missing and (group is not None or how in ("sum", "var", "quantile")):
                raise Unlowerable(f"a value that is the same along {' and '.join(sorted(missing))}")
            if missing and how == "mean" and {"position", "step"} & set(over):
                raise Unlowerable("a mean of what is the same for all samples of a step")
            mine = tuple(dim for dim in over if dim in value.dims)
            value = value._reduce(how, mine, group, **settings) if mine else value
        return value

    # ---- counts

    def _never_null(self, relation: Dense, argument: exp.Expr) -> None:
        names = leaves(argument)
        placed = any(isinstance(relation.values.get(name), Places) for name in names)
        if names & relation.missing or placed or not never_null(argument):
            raise Unlowerable("a count of what may be NULL")
        for name in names & set(relation.keys):
            given = relation.keys[name].column
            if given is not None and given.null_count:
                raise Unlowerable("a count of what may be NULL")

    def _rows(self, relation: Dense) -> exp.Expr:
        """Return how many rows there are in each group."""
        walked = relation.entries[relation.walk].tobytes() if relation.walk else b""
        key = (relation.masks, tuple(len(x) for x in relation.entries.values()), walked,
               relation.chosen is None or relation.chosen.tobytes())  # fmt: skip
        if key not in self._counts:
            if relation.mask is not None:
                found: Any = self._number(relation)
            else:
                found = self._counted(relation)
            self._values[name := leaf()] = found
            self._counts[key] = name
        return column(self._counts[key])

    def _number(self, relation: Dense) -> Expression:
        mask = relation.mask
        assert mask is not None
        missing = set(relation.dims) - set(mask.dims)
        if missing - set(self._kept):
            raise Unlowerable("a condition that is the same for many rows")
        bare = dataclasses.replace(relation, masks=())
        return self._reduced(bare, mask, "sum")

    def _counted(self, relation: Dense) -> Counted:
        """Count rows by what the log knows: occurrences first, then what each has of the rest."""
        over = {dim for _, dims in self._chain for dim in dims}
        kinds = {group.kind: group for group, _ in self._chain if group is not None}
        dims, codes, walk = [], [], relation.walk
        steps = relation.entries[walk] if walk else np.zeros(1, np.int64)
        inner = next((dim for dim in ("position", "sample") if dim in relation.dims), "")
        there = np.ones((len(steps), len(relation.known(inner)) if inner else 1), bool)
        ids = np.broadcast_to(relation.known(inner) if inner else 0, there.shape)
        if inner == "position":
            ids = relation.home.ids[steps] if walk == "step" else ids
            there = ids >= 0 if walk == "step" else there
            if relation.chosen is not None:
                there = there & np.isin(ids, relation.chosen)

        def axis(dim, code, size):
            dims.append((dim, size))
            codes.append(np.broadcast_to(code, there.shape)[there])

        if walk in self._kept and walk:
            axis(walk, np.arange(len(steps))[:, None], len(steps))
        for kind in ("epoch", "window"):
            if kind in kinds and walk:
                size = kinds[kind].size
                number = relation.home.epochs[steps] if kind == "epoch" else steps // size
                places = np.searchsorted(self._entries[kind], number)
                axis(kind, places[:, None], len(self._entries[kind]))
        if inner and inner in self._kept:
            axis(inner, np.arange(there.shape[1])[None], there.shape[1])
        if "labels" in kinds:
            code = np.frombuffer(kinds["labels"].labels, "<i4")
            axis("group", code[np.maximum(ids, 0)], len(self._entries["group"]))
        if "sample" in kinds:
            axis("sample", np.maximum(ids, 0), len(self._entries["sample"]))
        found = np.zeros([size for _, size in dims], np.int64)
        np.add.at(found, tuple(codes), 1) if codes else found.fill(there.sum())
        names = [dim for dim, _ in dims]
        if "tensor" in kinds:
            own = relation.tensor_of(relation.entries["weight"])
            found = found[..., None] * np.unique(own, return_counts=True)[1]
            names.append("tensor")
        for dim in over - {walk, inner} - ({"weight"} if "tensor" in kinds else set()):
            found = found * len(relation.known(dim))
        return Counted(tuple(names), found)

    # ---- steps and places

    def _edge(self, call: Any, argument: exp.Expr, relation: Dense) -> exp.Expr:
        """Return the first or last step at which a condition holds, or a function of it."""
        names = leaves(argument)
        number = relation.number(relation.walk) if relation.walk else None
        last = isinstance(call, exp.Max)
        if names != {number} or affine(argument) is None:
            raise Unlowerable("an extreme of other keys than steps")
        if relation.walk in self._kept or any(group is not None for group, _ in self._chain):
            raise Unlowerable("the first step of a group")
        if "position" in relation.dims and relation.chosen is not None:
            raise Unlowerable("the first step of some samples")
        mask = relation.mask
        if mask is None:
            steps = relation.entries[relation.walk]
            return replaced(argument, {str(number): literal(int(steps[-1] if last else steps[0]))})
        if relation.walk not in mask.dims:
            raise Unlowerable("a condition that is the same for all steps")
        over = tuple(d for _, dims in self._chain for d in dims if d in mask.dims)
        inner = tuple(dim for dim in over if dim != relation.walk)
        held = mask.any(inner) if inner else mask
        found = held.last(relation.walk) if last else held.first(relation.walk)
        own = self._leaf(found)
        self._missing.add(own.name)
        return replaced(argument, {str(number): own})

    def _places(self, call: Any, relation: Dense) -> exp.Expr:
        told, value = call.this, call.expression
        count = call.args.get("count")
        k = 1 if count is None else constant(count)
        if not isinstance(k, int) or k < 1:
            raise Unlowerable("a ranking of no fixed length")
        if len(self._chain) != 1 or self._chain[0][0] is not None:
            raise Unlowerable("a ranking within groups other than steps and weights")
        smallest = isinstance(call, exp.ArgMin)
        rank = relation.expression(value)
        if not isinstance(rank, Expression):
            raise Unlowerable("a ranking by a constant")
        ((_, over),) = self._chain
        if not set(over) <= RANKED:
            raise Unlowerable(f"a ranking over {' and '.join(over)}")
        if set(over) - set(rank.dims):
            raise Unlowerable("a ranking by what is the same in many rows")
        key = ""
        if told is not None and told != value:
            names = leaves(told)
            domain = relation.domain(names) if names else None
            if domain is None:
                raise Unlowerable(f"arg_max of {shown(told)}, which is no key")
            key = only_leaf(told) or ""
            if not key:
                table = self._lowering.evaluated(relation, domain, [told])
                at = table.column("__at").to_numpy()
                order = np.argsort(at, kind="stable")
                values = table.column("c0").combine_chunks().take(pa.array(order))
                key = leaf()
                known = Key(domain, at[order], values)
                relation = dataclasses.replace(relation, keys={**relation.keys, key: known})
            domain = relation.keys[key].domain
            reach = {domain, "weight" if domain == "tensor" else domain}
            if domain == "sample" and "sample" not in relation.dims:
                if "position" not in over:
                    raise Unlowerable("samples of single positions")
            elif not reach & set(over):
                raise Unlowerable("a key that is the same in the whole group")
        rank = relation.of_samples(rank) if relation.chosen is not None else rank
        if relation.mask is not None:
            rank = rank.where(relation.mask, math.inf if smallest else -math.inf)
        found = rank._reduce("top_k", over, k=k, smallest=smallest)
        return self._leaf(Places(found, relation, key, count is None))


WALKED = ("step", "state")
# Aggregates that are NULL of no rows; some of DuckDB's are not.
_NOTHING = (
    exp.Sum, exp.Avg, exp.Min, exp.Max, exp.LogicalOr, exp.LogicalAnd, exp.ArgMax, exp.ArgMin,
)  # fmt: skip


def _ordered(dims: Sequence[str]) -> tuple[str, ...]:
    known = ("epoch", "window", "step", "state", "position", "sample", "tensor", "group")
    front = [dim for dim in known if dim in dims]
    return (*front, *(dim for dim in dims if dim not in front))


def _same_parts(first: np.ndarray, other: np.ndarray) -> bool:
    pairs = np.unique(np.stack([first, other]), axis=1).shape[1]
    return pairs == len(np.unique(first)) == len(np.unique(other))


def _window(codes: np.ndarray, steps: np.ndarray) -> int:
    """Return how many steps the windows have that steps are grouped by, or 0."""
    edges = steps[1:][codes[1:] != codes[:-1]]
    if not len(edges):
        return 0
    size = int(np.gcd.reduce(edges))
    return size if size > 1 and _same_parts(codes, steps // size) else 0


def _where_some(count: exp.Expr, formula: exp.Expr) -> exp.Expr:
    some = exp.GT(this=count.copy(), expression=exp.Literal.number(0))
    return exp.Case(ifs=[exp.If(this=some, true=formula)])


def _double(formula: exp.Expr) -> exp.Expr:
    return exp.cast(formula.copy(), "double")


def _without_cast(argument: exp.Expr) -> exp.Expr:
    """Return a condition as it is; a number that is made one stays what it is."""
    while isinstance(argument, exp.Paren) or (
        isinstance(argument, exp.Cast) and is_condition(argument.this)
    ):
        argument = argument.this
    return argument


def _condition_of(
    call: Any, argument: exp.Expr, relation: Dense
) -> tuple[exp.Expr | None, exp.Expr, bool]:
    """Take a `CASE` of one condition apart: into a filter and what is aggregated.

    A count of zeros and ones stays one value, the condition itself.

    Returns:
        The condition, the value, and whether other rows count as zero instead of being left out.
    """
    while isinstance(argument, exp.Paren):
        argument = argument.this
    if isinstance(argument, exp.Cast) and is_condition(argument.this):
        return None, _without_cast(argument), False
    if isinstance(argument, exp.Case):
        if argument.this is not None or len(argument.args["ifs"]) != 1:
            return None, argument, False
        first, other = argument.args["ifs"][0], argument.args.get("default")
    elif isinstance(argument, exp.If):
        first, other = argument, argument.args.get("false")
    else:
        return None, argument, False
    condition, value = first.this, first.args["true"]
    if other is None or isinstance(other, exp.Null):
        return condition, value, False
    if constant(other) == 0 and constant(value) == 1 and isinstance(call, exp.Sum | exp.Avg):
        if leaves(condition) & set(relation.values):
            plain = is_condition(condition)
            return None, condition if plain else exp.cast(condition.copy(), "boolean"), False
    if constant(other) == 0 and isinstance(call, exp.Sum):
        return condition, value, True
    return None, argument, False


__all__ = ["Aggregation"]

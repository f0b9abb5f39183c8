"""One `SELECT`, taken apart: its tables put together, its conditions, groups, order and limit."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from sqlglot import exp

from replay.query.sql.aggregates import Aggregation
from replay.query.sql.formulas import (
    MIRRORED,
    Unlowerable,
    affine,
    column,
    conjuncts,
    constant,
    enclosed,
    exchanged,
    inside,
    leaf,
    leaves,
    literal,
    of_table,
    only_leaf,
    replaced,
    spoiling,
)
from replay.query.sql.relations import WALKS, Dense, Key

_RANKS = (exp.RowNumber, exp.Rank, exp.DenseRank)


class Common(NamedTuple):
    """A common table expression, and those that it sees itself."""

    query: exp.Expr
    within: "Environment"


Environment = Mapping[str, Common]


class Later(Exception):
    """What is asked has to be answered before the rest can be planned; only `explain` sees it."""


class Select:
    """One `SELECT`."""

    def __init__(self, lowering: Any, node: exp.Select, environment: Environment):
        self._lowering, self._node, self._environment = lowering, node, environment
        self._columns: dict[str, Mapping[str, exp.Expr]] = {}
        self._outside: dict[str, Mapping[str, exp.Expr]] = {}  # of tables joined from the left
        self._answers: list[Dense] = []  # of subqueries that stand for a value

    def lowered(self) -> Dense | exp.Select:
        """Return it as a relation, or as a query over small tables."""
        node = self._node
        source = node.args.get("from_")
        if source is None:
            self._nested(node)
            return node
        joins = list(node.args.get("joins") or [])
        inner = all(_is_inner(join) for join in joins)
        places = [(source, "this"), *((join, "this") for join in joins)]
        pool = conjuncts(node.args["where"].this) if node.args.get("where") else []
        if inner:
            pool += [x for join in joins for x in conjuncts(join.args.get("on"))]
        if inner:
            pool = self._pushed(places, pool)
        dense: dict[str, Dense] = {}
        small: dict[str, exp.Expr] = {}
        for holder, key in places:
            alias = holder.args[key].alias_or_name
            found = self._relation(holder.args[key])
            if isinstance(found, Dense):
                dense[alias] = found
            else:
                small[alias] = found
                holder.set(key, found)
        if not dense:
            if inner:
                self._set_conditions(pool, joins)
            self._nested(node)
            return node
        try:
            if inner:
                found = self._merged(dict(dense), dict(small), pool)
            else:
                found = self._merged(*self._outer(dict(dense), dict(small), joins, pool))
            if found is None:
                raise Unlowerable("tables that are joined on other columns than their keys")
            return self._over(*found)
        except Unlowerable as reason:
            return self._fallback(dense, places, joins, pool, inner, str(reason))

    # ---- sources

    def _relation(self, source: exp.Expr) -> Dense | exp.Expr:
        alias = source.alias_or_name
        if isinstance(source, exp.Table) and not source.args.get("pivots"):
            common = self._environment.get(source.name.lower())
            if common is not None:
                found = self._lowering.query(common.query.copy(), common.within)
                return self._usable(found, alias)
            known = self._lowering.base(source.name)
            return source if known is None else known
        if isinstance(source, exp.Subquery) and not source.args.get("pivots"):
            names = source.args["alias"].columns if source.args.get("alias") else []
            query = named(source.this, [x.name for x in names])
            return self._usable(self._lowering.query(query, self._environment), alias)
        return source

    def _usable(self, found: Dense | exp.Query, alias: str) -> Dense | exp.Expr:
        if isinstance(found, Dense):
            return found
        return exp.Subquery(this=found, alias=exp.TableAlias(this=exp.to_identifier(alias)))

    def _pushed(self, places: Any, pool: list[exp.Expr]) -> list[exp.Expr]:
        """Move conditions into the subqueries that they look at."""
        kept = []
        for part in pool:
            tables = {x.table for x in part.find_all(exp.Column)}
            if len(tables) != 1 or part.find(exp.Query) is not None:
                kept.append(part)
                continue
            (table,) = tables
            holder, key = next(
                ((h, k) for h, k in places if h.args[k].alias_or_name == table), (None, "")
            )
            if holder is None or not self._push(holder, key, part):
                kept.append(part)
        return kept

    def _push(self, holder: Any, key: str, part: exp.Expr) -> bool:
        """Move a condition into a subquery; whether it need not be checked again."""
        source, name = holder.args[key], holder.args[key].name.lower()
        if isinstance(source, exp.Table) and name in self._environment:
            query, within = self._environment[name]
            inner = query.copy()
        elif isinstance(source, exp.Subquery) and isinstance(source.this, exp.Select):
            inner, within = source.this, None
        else:
            return False
        if not isinstance(inner, exp.Select) or _chooses_rows(inner):
            return False
        formulas = {x.alias_or_name: x.unalias() for x in inner.expressions}
        wanted = {x.name for x in part.find_all(exp.Column)}
        if not wanted <= set(formulas) or inner.args.get("distinct"):
            return False
        change = lambda node: (  # noqa: E731
            enclosed(formulas[node.name]) if isinstance(node, exp.Column) else node
        )
        mine = [formulas[name] for name in wanted]
        inside = part.copy().transform(change)
        if any(x.find(exp.Window) for x in mine):
            if inner.args.get("qualify") or _limit_of_rank(inside) is None:
                return False
            inner.set("qualify", exp.Qualify(this=inside))
        elif (
            any(x.find(exp.AggFunc, exp.Query) for x in mine)
            or inner.args.get("qualify")
            or any(x.find(exp.Window) for x in inner.expressions)
            or (not inner.args.get("group") and any(x.find(exp.AggFunc) for x in inner.expressions))
        ):
            return False
        else:
            inner.where(inside, copy=False)
        if within is not None:
            own = f"__cte{id(inner)}"
            self._environment = {**self._environment, own: Common(inner, within)}
            alias = source.alias_or_name
            holder.set(key, exp.alias_(exp.to_table(own), alias, table=True))
        return True

    # ---- one relation

    def _resolve(self, formula: exp.Expr) -> exp.Expr:
        """Put formulas of leaves in the place of columns."""

        def change(node):
            if isinstance(node, exp.Column) and node.table in self._columns:
                known = {name.lower(): x for name, x in self._columns[node.table].items()}
                if node.name.lower() in known:
                    return enclosed(known[node.name.lower()])
            return node

        return formula.copy().transform(change)

    def _merged(
        self, dense: dict[str, Dense], small: dict[str, exp.Expr], pool: list[exp.Expr]
    ) -> tuple[Dense, list[exp.Expr]] | None:
        self._columns = {**{alias: x.columns for alias, x in dense.items()}, **self._outside}
        relations = dict(dense)
        alone = []
        for part in pool:  # what limits one of them limits it before they are put together
            tables = {x.table for x in part.find_all(exp.Column)}
            if len(tables) == 1 and tables <= set(relations) and not part.find(exp.Query):
                (alias,) = tables
                if relations[alias].windows:
                    relations[alias], resolved = self._unwound(alias, relations[alias], pool)
                    self._columns[alias] = relations[alias].columns
                before = relations[alias]
                after = self._lowering.filtered(before, self._resolve(part))
                relations[alias] = after
            else:
                alone.append(part)
        for alias, relation in relations.items():
            if relation.windows:
                relations[alias], _ = self._unwound(alias, relation, pool)
                self._columns[alias] = relations[alias].columns
        pool = alone
        names = sorted(relations, key=lambda alias: -len(relations[alias].dims))
        whole = relations[names[0]]
        for alias in names[1:]:
            found = self._joined(whole, relations[alias], alias, pool)
            if found is None:
                return None
            whole, pool = found
        for alias, source in small.items():
            found = self._looked_up(whole, alias, source, pool, left=False)
            if found is None:
                return None
            whole, pool = found
        return whole, pool

    def _unwound(self, alias: str, relation: Dense, pool: Sequence[exp.Expr]) -> tuple[Dense, bool]:
        """Put neighbouring states in the place of windows, where rows without one drop out."""
        windows = {
            name for name, x in relation.columns.items()
            if any(isinstance(y, exp.Window) for y in spoiling(x))
        }  # fmt: skip
        strict = any(
            _rejects_null(part, alias, windows) for part in pool
        ) or self._strict_aggregates(alias, relation, windows, pool)
        if not strict:
            raise Unlowerable("a window whose first row has no neighbour, and is asked for")
        found, changes = relation.neighbours(relation.windows)
        columns = {name: replaced(x, changes) for name, x in relation.columns.items()}
        return dataclasses.replace(found, columns=columns), True

    def _strict_aggregates(
        self, alias: str, relation: Dense, windows: set[str], pool: Sequence[exp.Expr]
    ) -> bool:
        """Whether all that is asked leaves NULL out, and no group consists of it."""
        node = self._node
        tail = [node.args[x] for x in ("having", "qualify", "order") if node.args.get(x)]
        calls = [c for x in (*node.expressions, *tail) for c in x.find_all(exp.AggFunc)]
        walks = {name for name, key in relation.keys.items() if key.domain in WALKS}
        group = node.args.get("group")
        columns = [] if group is None else list(group.find_all(exp.Column))
        masked = any(leaves(self._resolve(x)) & set(relation.values) for x in pool)
        if (
            any(x.table != alias for x in columns)
            or any(leaves(self._resolve(x)) & walks for x in columns)
            or (group is not None and masked)
        ):
            return False  # a group may have the row without a neighbour alone
        return bool(calls) and all(
            isinstance(c, exp.Sum | exp.Avg | exp.Min | exp.Max)
            and _reaches(c.this, alias, windows)
            for c in calls
        )

    def _joined(
        self, first: Dense, other: Dense, alias: str, pool: list[exp.Expr]
    ) -> tuple[Dense, list[exp.Expr]] | None:
        """Put the columns of a relation beside those of a larger one."""
        if other.taken or other.residual or other.kept or other.ranked:
            return None
        if not other.dims:
            if other.masks:
                return None
            values = {**first.values, **other.values}
            return dataclasses.replace(
                first, values=values, missing=first.missing | other.missing
            ), pool
        if first.taken or first.ranked or first.kept:
            return None
        pairs, rest = [], []
        for part in pool:
            sides = None
            if isinstance(part, exp.EQ):
                sides = [affine(self._resolve(x)) for x in (part.this, part.expression)]
                if None not in sides:
                    if sides[0][0] in other.keys and sides[1][0] in first.keys:  # type: ignore
                        sides.reverse()
                    if not (sides[0][0] in first.keys and sides[1][0] in other.keys):  # type: ignore
                        sides = None
                else:
                    sides = None
            if sides is None:
                rest.append(part)
            else:
                pairs.append((*sides, part))
        for x, y, _ in pairs:  # steps beside states, and states beside the next
            a, b = first.keys[x[0]], other.keys[y[0]]
            if not (a.is_number() and b.is_number()):
                continue
            walks = {a.domain, b.domain}
            if walks == {"step", "state"} or (walks == {"state"} and x[1] != y[1]):
                return self._beside(first, other, alias, pool, x, y)
        same = set()
        for x, y, part in pairs:
            a, b = first.keys[x[0]], other.keys[y[0]]
            if a.is_number(b.domain) and b.is_number() and x[1] == y[1]:
                same.add(a.domain)
            else:  # it holds in some of the rows that are put together
                rest.append(part)
        for dim in ("tensor", "position", *other.dims):
            if dim in first.dims or (dim == "tensor" and "weight" in first.dims):
                if dim not in other.dims and not (dim == "tensor" and "weight" in other.dims):
                    continue
                mine, yours = first.known(dim), other.known(dim)
                if len(mine) == 1 and np.array_equal(mine, yours):
                    same.add(dim)
        foreign = first.home is not other.home
        if "sample" in same and "position" not in same and "position" in other.dims and not foreign:
            if self._once(first) and "step" in same:
                same.add("position")
        if "sample" in other.dims and "sample" not in same:
            return None
        if not set(other.dims) <= same or not set(other.dims) <= set(first.dims):
            return None
        if "weight" in other.dims and (
            "tensor" not in same or [(p.path, p.shape) for p in first.whole]
            != [(p.path, p.shape) for p in other.whole]
        ):  # fmt: skip
            return None
        if foreign and "position" in other.dims:
            return None
        for dim in other.dims:
            both = np.intersect1d(first.known(dim), other.known(dim))
            first, other = first.only(dim, both), other.only(dim, both)
        if first.kept or other.kept:
            return None
        own = {key.domain: name for name, key in first.keys.items() if key.entries is None}
        same_keys = {
            name: column(own[key.domain])
            for name, key in other.keys.items()
            if key.entries is None and key.domain in own
        }  # one name for one thing, by which ORDER BY and GROUP BY know it
        self._columns[alias] = {
            name: replaced(x, same_keys) for name, x in self._columns[alias].items()
        }
        chosen = first.chosen
        if other.chosen is not None:
            chosen = other.chosen if chosen is None else np.intersect1d(chosen, other.chosen)
        return dataclasses.replace(
            first,
            title=f"{first.title} and {other.title}" if first.title != other.title else first.title,
            keys={**first.keys, **other.keys},
            values={**first.values, **other.values},
            missing=first.missing | other.missing,
            masks=(*first.masks, *other.masks),
            residual=(*first.residual, *other.residual),
            chosen=chosen,
            notes=(*first.notes, *other.notes),
        ), rest

    def _beside(self, first, other, alias, pool, x, y):
        """Look at states from the steps that they are joined to."""
        a = first.keys[x[0]]
        if a.is_number("state") and other.keys[y[0]].is_number("state"):
            shift = x[1] - y[1]  # first + shift = other
            if abs(shift) != 1:
                return None
            offsets = (0, 1) if shift == 1 else (1, 0)
            changed = [r.beside(o) for r, o in zip((first, other), offsets, strict=True)]
        elif a.is_number("step"):
            if x[1] - y[1] not in (0, 1):
                return None
            changed = [(first, {}), other.beside(x[1] - y[1])]
        else:
            if y[1] - x[1] not in (0, 1):
                return None
            changed = [first.beside(y[1] - x[1]), (other, {})]
        changes = {**changed[0][1], **changed[1][1]}
        for name, formulas in self._columns.items():
            self._columns[name] = {n: replaced(f, changes) for n, f in formulas.items()}
        return self._joined(changed[0][0], changed[1][0], alias, pool)

    def _once(self, relation: Dense) -> bool:
        """Whether no sample occurs twice in a batch."""
        ids = relation.home.ids[relation.entries["step"]]
        ordered = np.sort(ids, axis=1)
        return not ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()

    def _looked_up(
        self, relation: Dense, alias: str, source: exp.Expr, pool: list[exp.Expr],
        *, left: bool,
    ) -> tuple[Dense, list[exp.Expr]] | None:  # fmt: skip
        """Make columns of a small table into keys, where each row has at most one."""
        lowering = self._lowering
        holder = exp.select("*").from_(source.copy())
        if any(x.name.lower() in lowering.recursive for x in holder.find_all(exp.Table)):
            return None
        if not lowering.known(holder):
            try:
                name = lowering.forced(holder)
            except Later:
                return None
            source = exp.alias_(exp.to_table(name), alias, table=True)
        mine, rest, names = [], [], set()
        for part in pool:
            resolved = self._resolve(part)
            tables = {x.table for x in resolved.find_all(exp.Column)} - {""}
            if alias in tables and tables == {alias} and not part.find(exp.Query):
                mine.append(resolved)
                names |= leaves(resolved)
            else:
                rest.append(part)
        domain = relation.domain(names) if names else None
        wanted = sorted({x.name for x in self._node.find_all(exp.Column) if x.table == alias})
        if names and domain is None:
            return None
        if not names:
            if left:
                return None
            query = exp.select(*[exp.column(x, table=alias, quoted=True) for x in wanted] or ["1"])
            table = lowering.run(query.from_(source.copy()))
            if table.num_rows != 1:
                return None
            self._columns[alias] = {
                name: literal(table.column(i)[0].as_py()) for i, name in enumerate(wanted)
            }
            return relation, pool
        on = exp.and_(*[of_table(x, "__keys") for x in mine])
        columns = [exp.alias_(exp.column(x, table=alias, quoted=True), f"t{i}")
                   for i, x in enumerate(wanted)]  # fmt: skip

        def more(query):
            kind = "left" if left else "inner"
            return query.select(*columns).join(source.copy(), on=on, join_type=kind)

        needed = [column(name) for name in sorted(names)]
        found = lowering.evaluated(relation, str(domain), needed, more)
        at = found.column("__at").to_numpy()
        order = np.argsort(at, kind="stable")
        unique = np.unique(at)
        if len(unique) != len(at):
            return None
        known = relation.only(str(domain), unique)
        keys, formulas = dict(known.keys), {}
        for i, name in enumerate(wanted):
            values = found.column(f"t{i}").combine_chunks().take(pa.array(order))
            keys[own := leaf()] = Key(str(domain), at[order], values)
            formulas[name] = column(own)
        self._columns[alias] = formulas
        return dataclasses.replace(known, keys=keys), rest

    def _outer(self, dense, small, joins, pool) -> tuple[Any, Any, list[exp.Expr]]:
        """Join small tables from the left, where that is all there is of outer joins."""
        outer = [join for join in joins if not _is_inner(join)]
        if len(dense) != 1 or not all(
            join.side.upper() == "LEFT" and join.this.alias_or_name in small and join.args.get("on")
            for join in outer
        ):
            raise Unlowerable("an outer join of tables of a run")
        ((alias, relation),) = dense.items()
        if relation.windows:
            raise Unlowerable("an outer join of windows")
        self._columns = {alias: relation.columns}
        for join in outer:
            name = join.this.alias_or_name
            found = self._looked_up(
                relation, name, small[name], conjuncts(join.args["on"]), left=True
            )
            if found is None or found[1]:
                raise Unlowerable("an outer join on other columns than keys")
            relation, _ = found
            self._outside[name] = self._columns[name]
            del small[name]
        dense[alias] = relation
        others = [x for join in joins if _is_inner(join) for x in conjuncts(join.args.get("on"))]
        return dense, small, [*pool, *others]

    # ---- what is asked of it

    def _over(self, relation: Dense, pool: Sequence[exp.Expr]) -> Dense | exp.Select:
        node, lowering = self._node, self._lowering
        for part in pool:
            resolved = self._resolve(self._values(part))
            relation = lowering.filtered(self._answered(relation), resolved)
        projections = {}
        for number, each in enumerate(node.expressions):
            name = each.alias_or_name or f"_col_{number}"
            while name in projections:
                name += "_1"
            projections[name] = self._resolve(self._values(each.unalias()))
        tail = {
            name: self._ordered(self._values(node.args[name]), projections)
            for name in ("having", "qualify", "order") if node.args.get(name)
        }  # fmt: skip
        relation = self._answered(relation)
        self._foreign(relation, [*projections.values(), *tail.values()])
        groups = self._groups(projections)
        calls = [
            call for x in (*projections.values(), *tail.values()) for call in _calls(x)
        ]  # fmt: skip
        distinct = node.args.get("distinct")
        if distinct is not None and not calls and groups is None:
            if distinct.args.get("on") is None and not any(
                x.find(exp.Window) for x in projections.values()
            ):
                groups = list(projections.values())
                node.set("distinct", None)
        if calls or groups is not None:
            try:
                return self._aggregated(relation, groups or [], calls, projections, tail)
            except Unlowerable:
                node.set("distinct", distinct)
                raise
        has_tail = any(
            node.args.get(x) for x in ("qualify", "order", "limit", "offset", "distinct")
        )
        windows = [w for x in projections.values() for w in x.find_all(exp.Window)]
        if not has_tail and all(isinstance(w.this, exp.Lag | exp.Lead) for w in windows):
            found = dataclasses.replace(relation, columns=projections)
            if not windows or not (found.masks or found.residual or found.taken):
                return found
        return self._finished(relation, projections, tail)

    def _foreign(self, relation: Dense, formulas: Sequence[exp.Expr]) -> None:
        known = set(relation.keys) | set(relation.values)
        for formula in formulas:
            for x in formula.find_all(exp.Column):
                if (x.table or x.name not in known) and not inside(x, formula):
                    raise Unlowerable(f"{x.sql('duckdb')} belongs to another table")

    def _groups(self, projections: Mapping[str, exp.Expr]) -> list[exp.Expr] | None:
        group = self._node.args.get("group")
        if group is None:
            return None
        if _has_sets(group):
            raise Unlowerable("grouping sets")
        if group.args.get("all"):
            return [x for x in projections.values() if not _calls(x)]
        return [self._resolve(x) for x in group.expressions]

    def _ordered(self, clause: exp.Expr, projections: Mapping[str, exp.Expr]) -> Any:
        """Resolve a clause that may name what is selected."""
        lower = {name.lower(): x for name, x in projections.items()}

        def change(node):
            if isinstance(node, exp.Column) and not node.table and node.name.lower() in lower:
                return enclosed(lower[node.name.lower()])
            return node

        return self._resolve(clause.copy().transform(change))

    def _aggregated(self, relation, groups, calls, projections, tail) -> Dense | exp.Select:
        lowering = self._lowering
        try:
            relation = lowering.settled(relation)
            found = Aggregation(lowering, relation, groups).of(calls)
        except Unlowerable as reason:
            raise Unlowerable(str(reason)) from None
        except Later:
            raise Unlowerable("what rows are chosen by has to be answered first") from None
        changed = {name: found.formula(x) for name, x in projections.items()}
        having, order, qualify = (
            found.formula(tail[x]) if x in tail else None for x in ("having", "order", "qualify")
        )
        after = found.relation
        if found.again:  # groups of what was kept apart
            return self._regrouped(found, projections, tail)
        self._foreign(after, [*changed.values(), *(x for x in (having, order, qualify) if x)])
        if having is not None:
            after = lowering.filtered(after, having.this)
        rest = {name: x for name, x in (("order", order), ("qualify", qualify)) if x is not None}
        has_tail = any(self._node.args.get(x) for x in ("limit", "offset", "distinct")) or rest
        if not has_tail and not any(x.find(exp.Window) for x in changed.values()):
            return dataclasses.replace(after, columns=changed)
        return self._finished(after, changed, rest)

    def _regrouped(self, found: Aggregation, projections, tail) -> exp.Select:
        node = self._node
        formulas = {name: found.again_of(x) for name, x in projections.items()}
        having, order, qualify = (
            found.again_of(tail[x]) if x in tail else None for x in ("having", "order", "qualify")
        )
        groups = [found.again_of(x) for x in found.groups]
        used = [*formulas.values(), *groups, *(x for x in (having, order, qualify) if x)]
        names = set().union(*(leaves(x) for x in used))
        base = self._lowering.rows(found.relation, {name: column(name) for name in names})
        rows = base.args["from_"].this.name
        chosen = [exp.alias_(of_table(x, rows), name, quoted=True) for name, x in formulas.items()]
        query = exp.select(*chosen).from_(exp.to_table(rows))
        query.set("where", base.args.get("where"))
        if groups:
            query = query.group_by(*[of_table(x, rows) for x in groups])
        for name, clause in (("having", having), ("qualify", qualify), ("order", order)):
            if clause is not None:
                query.set(name, of_table(clause, rows))
        return self._limited(query, node)

    def _limited(self, query: exp.Select, node: exp.Select) -> exp.Select:
        for name in ("limit", "offset", "distinct"):
            if node.args.get(name) is not None:
                query.set(name, node.args[name].copy())
        return query

    def _finished(self, relation: Dense, projections, tail) -> exp.Select:
        """Leave order, limit, distinct rows and windows to DuckDB, of no more rows than matter."""
        node = self._node
        relation, changes = self._pruned(relation, projections, tail)
        formulas = {name: exchanged(x, changes) for name, x in projections.items()}
        clauses = {name: exchanged(x, changes) for name, x in tail.items() if name != "having"}
        names = set().union(*(leaves(x) for x in (*formulas.values(), *clauses.values())))
        base = self._lowering.rows(relation, {name: column(name) for name in names})
        rows = base.args["from_"].this.name
        chosen = [exp.alias_(of_table(x, rows), name, quoted=True) for name, x in formulas.items()]
        query = exp.select(*chosen).from_(exp.to_table(rows))
        query.set("where", base.args.get("where"))
        for name, clause in clauses.items():
            query.set(name, of_table(clause, rows))
        query = self._limited(query, node)
        if query.args.get("distinct") is None and (
            query.args.get("order") or node.args.get("limit")
        ):
            query = query.order_by(exp.column("__row", table=rows, quoted=True), append=True)
        return query

    def _pruned(self, relation: Dense, projections, tail) -> Any:
        """Read only the rows that can be among the first."""
        node = self._node
        try:
            if "qualify" in tail:
                return self._ranked(relation, tail["qualify"].this)
            limit = node.args.get("limit")
            if (
                limit is None or _is_share(limit) or node.args.get("distinct") is not None
                or any(x.find(exp.Window) for x in projections.values())
            ):  # fmt: skip
                return relation, {}
            count = constant(limit.expression)
            offset = node.args.get("offset")
            more = 0 if offset is None else constant(offset.expression)
            if not isinstance(count, int) or not isinstance(more, int):
                return relation, {}
            terms = tail["order"].expressions if "order" in tail else []
            return self._first(relation, terms, count + more)
        except Unlowerable as reason:
            note = f"its order is left to DuckDB: {reason}"
            return dataclasses.replace(relation, notes=(*relation.notes, note)), {}

    def _first(self, relation: Dense, terms: Sequence[Any], count: int) -> Any:
        numbers = [only_leaf(term.this) for term in terms]
        walks = [relation.number(dim) for dim in ("step", "position") if dim in relation.dims]
        plain = [n for n in numbers if n is not None and n in relation.keys]
        down = {bool(term.args.get("desc")) for term in terms}
        small = all(
            len(relation.known(dim)) == 1
            for dim in relation.dims if dim not in ("step", "position")
        )  # fmt: skip
        if plain and len(plain) == len(numbers):
            epochs = {n for n, k in relation.keys.items() if k.domain == "step"}
            mine = [n for n in numbers if n in walks or n not in epochs]
            if (
                mine[: len(walks)] == walks and len(down) == 1 and small and walks
                and relation.walk == "step" and not relation.masks and not relation.residual
                and relation.chosen is None and not relation.kept
            ):  # fmt: skip
                return self._taken(relation, count, down == {True}), {}
            return relation, {}
        if not terms:
            return relation, {}
        first, *others = terms
        smallest = not first.args.get("desc")
        settled = self._lowering.settled(relation)
        if others:
            wanted = [settled.number(d) for d in ("step", "state", "position", "tensor", "weight")]
            follow = [only_leaf(term.this) for term in others]
            known = [n for n in wanted if n is not None]
            if follow != known[: len(follow)] or any(t.args.get("desc") for t in others):
                raise Unlowerable(
                    "ties are told apart by other columns than the keys in their order"
                )
            paths = [part.path for part in settled.whole]
            if settled.number("tensor") in follow and paths != sorted(paths):
                raise Unlowerable("tensors are not in the order of their names")
        return settled.top(first.this, count, smallest, settled.dims)

    def _taken(self, relation: Dense, count: int, last: bool) -> Dense:
        anchor, options = relation.taken or (
            int(relation.entries["step"].max(initial=-1)) + 1, {"before": True, "inclusive": False}
        )  # fmt: skip
        options = {**options, "last" if last else "first": count}
        return dataclasses.replace(relation, taken=(anchor, options))

    def _ranked(self, relation: Dense, condition: exp.Expr) -> Any:
        """Read only the rows of a rank that a condition admits."""
        parts = conjuncts(condition)
        found = [x for x in map(_limit_of_rank, parts) if x is not None]
        if len(parts) != 1 or len(found) != 1:
            raise Unlowerable("QUALIFY by something else than a rank")
        window, count = found[0]
        terms = window.args["order"].expressions if window.args.get("order") else []
        if len(terms) != 1 or not isinstance(window.this, exp.RowNumber):
            raise Unlowerable("a rank with ties, or by several columns: row_number() is lowered")
        parted = [only_leaf(x) or "" for x in window.args.get("partition_by") or []]
        kept = {relation.keys[n].domain for n in parted if n in relation.keys}
        if len(parted) != sum(n in relation.keys for n in parted):
            raise Unlowerable("ranks within groups of values")
        if "tensor" in kept and "weight" in relation.dims and "weight" not in kept:
            raise Unlowerable("ranks within tensors")
        kept -= {"tensor"} if "weight" in kept else set()
        if not all(relation.keys[n].is_number() for n in parted):
            raise Unlowerable("ranks within groups of keys")
        over = [dim for dim in relation.dims if dim not in kept]
        settled = self._lowering.settled(relation)
        return settled.top(terms[0].this, count, not terms[0].args.get("desc"), over)

    # ---- subqueries within

    def _values(self, formula: exp.Expr) -> exp.Expr:
        """Put answers in the place of subqueries of a formula."""
        lowering = self._lowering
        formula = formula.copy()
        for query in list(formula.find_all(exp.Query)):
            if query.find_ancestor(exp.Query) is not None and inside(query, formula):
                continue
            if _correlated(query):
                raise Unlowerable("a correlated subquery")
            holder = query.parent if isinstance(query.parent, exp.Subquery) else query
            holder = query if isinstance(query, exp.Subquery) else holder
            scalar = not isinstance(holder.parent, exp.In | exp.Exists | exp.Any | exp.All)
            inner = _smallest(query) if scalar else query
            found = lowering.query(inner.copy(), self._environment)
            if scalar and isinstance(found, Dense) and not found.dims and not found.masks:
                (one,) = found.columns.values()
                self._answers.append(found)
                self._put(holder, formula, enclosed(one))
                continue
            rest = lowering.rest(found)
            if scalar:
                value = literal(lowering.value(rest))
                formula = self._put(holder, formula, value)
            elif isinstance(holder.parent, exp.Exists):
                raise Unlowerable("EXISTS")
            else:
                name = lowering.forced(rest)
                table = exp.select("*").from_(exp.to_table(name))
                query.replace(table) if not isinstance(query, exp.Subquery) else query.set(
                    "this", table
                )
        return formula

    def _put(self, holder, formula, value):
        if holder is formula:
            return value
        holder.replace(value)
        return formula

    def _answered(self, relation: Dense) -> Dense:
        """Return a relation that knows the answers of subqueries."""
        for other in self._answers:
            relation = dataclasses.replace(
                relation,
                values={**relation.values, **other.values},
                missing=relation.missing | other.missing,
            )
        return relation

    def _nested(self, node: exp.Expr) -> None:
        """Lower the subqueries of a statement that DuckDB runs."""
        for query in list(node.find_all(exp.Select, exp.SetOperation)):
            if query is node or query.find_ancestor(exp.Select, exp.SetOperation) is not node:
                continue
            if isinstance(query.parent, exp.From | exp.Join) or isinstance(
                query.parent.parent if query.parent else None, exp.From | exp.Join
            ):
                continue  # sources have been lowered
            found = self._lowering.query(query.copy(), self._environment)
            query.replace(self._lowering.rest(found))

    # ---- what is left to DuckDB

    def _set_conditions(self, pool: Sequence[exp.Expr], joins: Sequence[exp.Join]) -> None:
        node = self._node
        for join in joins:
            join.set("on", None)
            if not join.args.get("kind"):
                join.set("kind", "CROSS")
        node.set("where", exp.Where(this=exp.and_(*pool)) if pool else None)

    def _fallback(self, dense, places, joins, pool, inner, reason: str) -> exp.Select:
        """Read the rows of each table that meet the conditions on it alone."""
        node = self._node
        for holder, key in places:
            alias = holder.args[key].alias_or_name
            if alias not in dense:
                continue
            relation = dense[alias]
            relation = dataclasses.replace(relation, notes=(*relation.notes, reason))
            self._columns = {alias: relation.columns}
            wanted = {x.name.lower() for x in node.find_all(exp.Column) if x.table == alias}
            columns = {n: f for n, f in relation.columns.items() if n.lower() in wanted}
            if inner and not relation.windows:
                for part in pool:
                    tables = {x.table for x in part.find_all(exp.Column)}
                    if tables == {alias} and part.find(exp.Query) is None:
                        relation = self._lowering.filtered(relation, self._resolve(part))
            if not columns:
                columns = dict(list(relation.columns.items())[:1])
            query = self._lowering.rows(relation, columns)
            holder.set(key, exp.Subquery(this=query, alias=exp.TableAlias(
                this=exp.to_identifier(alias))))  # fmt: skip
        if inner:
            self._set_conditions(pool, joins)
        self._nested(node)
        return node


def _chooses_rows(inner: exp.Select) -> bool:
    """Whether a condition means something else within a subquery than outside of it."""
    group = inner.args.get("group")
    return (
        any(inner.args.get(x) for x in ("limit", "offset", "with_"))
        or (group is not None and _has_sets(group))
        or (group is None and inner.args.get("having") is not None)
    )


def _has_sets(group: exp.Expr) -> bool:
    """Whether rows are grouped several times over."""
    named = any(group.args.get(x) for x in ("rollup", "cube", "grouping_sets", "totals"))
    return named or group.find(exp.Rollup, exp.Cube, exp.GroupingSets) is not None


def _is_inner(join: exp.Join) -> bool:
    return join.side == "" and join.kind.upper() in ("", "INNER", "CROSS") and not join.method


def _calls(formula: exp.Expr) -> list[exp.Expr]:
    """Return the aggregates of a formula, with their filters, windows left out."""
    found: list[exp.Expr] = []

    def visit(node: Any) -> None:
        if isinstance(node, exp.Query):
            return
        if isinstance(node, exp.Window):
            for child in node.this.iter_expressions():
                visit(child)
            for child in (*(node.args.get("partition_by") or []), node.args.get("order")):
                if child is not None:
                    visit(child)
            return
        if isinstance(node, exp.Filter) or isinstance(node, exp.AggFunc):
            found.append(node)
            return
        for child in node.iter_expressions():
            visit(child)

    visit(formula)
    return found


def _limit_of_rank(part: exp.Expr) -> tuple[exp.Window, int] | None:
    """Return the window and the number of `row_number() OVER (...) <= number`, or None."""
    if type(part) not in (*MIRRORED, exp.EQ):
        return None
    left, right, kind = part.this, part.expression, type(part)
    while isinstance(left, exp.Paren):
        left = left.this
    while isinstance(right, exp.Paren):
        right = right.this
    if isinstance(right, exp.Window):
        left, right, kind = right, left, MIRRORED.get(kind, exp.EQ)
    number = constant(right)
    if not isinstance(left, exp.Window) or not isinstance(left.this, _RANKS):
        return None
    if not isinstance(number, int | float) or kind in (exp.GT, exp.GTE):
        return None
    if kind is exp.EQ:
        return (left, int(number)) if number == int(number) else None
    return left, math.ceil(number) - 1 if kind is exp.LT else math.floor(number)


def _rejects_null(part: exp.Expr, alias: str, windows: set[str]) -> bool:
    """Whether a condition does not hold where a neighbour is missing."""
    if isinstance(part, exp.Not) and isinstance(part.this, exp.Is):
        inner = part.this
        return isinstance(inner.expression, exp.Null) and _reaches(inner.this, alias, windows)
    return _reaches(part, alias, windows)


def _reaches(formula: exp.Expr, alias: str, windows: set[str]) -> bool:
    """Whether a formula is NULL where a neighbour is missing."""
    columns = [x for x in spoiling(formula) if isinstance(x, exp.Column)]
    return any(x.table == alias and x.name in windows for x in columns)


def _correlated(query: exp.Expr) -> bool:
    """Whether a subquery looks at a table outside of it."""
    own = {x.alias_or_name for x in query.find_all(exp.Table, exp.Subquery, exp.CTE)}
    own |= {x.name for x in query.find_all(exp.TableAlias)}
    return any(x.table and x.table not in own for x in query.find_all(exp.Column))


def _is_share(limit: exp.Expr) -> bool:
    """Whether a limit is no number of rows: a percentage, or one that keeps ties."""
    return limit.args.get("limit_options") is not None


def _smallest(query: Any) -> Any:
    """Return `min` or `max` in the place of the first row in an order, where a value is wanted."""
    inner = query.this if isinstance(query, exp.Subquery) else query
    if not isinstance(inner, exp.Select) or len(inner.expressions) != 1:
        return query
    order, limit = inner.args.get("order"), inner.args.get("limit")
    chosen = inner.expressions[0].unalias()
    if (
        order is None or limit is None or _is_share(limit) or constant(limit.expression) != 1
        or len(order.expressions) != 1 or inner.args.get("offset") or inner.args.get("group")
        or inner.args.get("having") or inner.args.get("qualify") or chosen.find(exp.AggFunc)
    ):  # fmt: skip
        return query
    term = order.expressions[0]
    named = isinstance(term.this, exp.Column) and term.this.name == inner.expressions[0].alias
    if term.this != chosen and not (named and not term.this.table):
        return query
    inner = inner.copy()
    kind = exp.Max if term.args.get("desc") else exp.Min
    inner.set("expressions", [exp.alias_(kind(this=chosen.copy()), "value")])
    inner.set("order", None)
    inner.set("limit", None)
    return inner


def named(query: exp.Expr, names: Sequence[str]) -> exp.Expr:
    """Give the columns of a query other names."""
    query = query.copy()
    if names and isinstance(query, exp.Select):
        chosen = [
            exp.alias_(x.unalias(), names[i], quoted=True) if i < len(names) else x
            for i, x in enumerate(query.expressions)
        ]
        query.set("expressions", chosen)
    return query

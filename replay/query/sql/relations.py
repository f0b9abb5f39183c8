"""A relation whose rows are the entries of expressions: what a table of a run is before a replay.

A `Dense` relation has a row for each combination of its dimensions. Its columns are formulas of
SQL over *leaves*: keys, which the log knows (step, epoch, sample, tensor, weight, ...), and values,
which are expressions. Conditions on keys choose what is scanned; conditions on values become
masks; what remains is left to DuckDB, with the rows that are read.

Imported only where SQL is asked, as sqlglot, pyarrow and duckdb are an extra.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from sqlglot import exp

from replay.query.expressions import Expression
from replay.query.nodes import At, Lag, Part, Take, narrow, restrict
from replay.query.sql.formulas import (
    Formula,
    Unlowerable,
    column,
    leaf,
    literal,
    only_leaf,
    replaced,
    repr_of,
)

WALKS = ("step", "state")
RANKED = frozenset(("step", "state", "position", "sample", "tensor", "group", "weight"))


class Key(NamedTuple):
    """A column that is known before anything is replayed.

    Attributes:
        domain: what it is a function of: a dimension, `sample` or `tensor`.
        entries: the numbers for which it is known, ascending; None for the number itself.
        column: its values there.
    """

    domain: str
    entries: np.ndarray | None = None
    column: Any = None

    def is_number(self, domain: str = "") -> bool:
        """Whether this is the number of an entry itself, of a dimension if that is given."""
        return self.entries is None and domain in ("", self.domain)


class Counted(NamedTuple):
    """An array that is known before anything is replayed, such as a count of rows."""

    dims: tuple[str, ...]
    array: np.ndarray


class Places(NamedTuple):
    """Where the largest entries stand, or how large they are: a list for each row.

    Attributes:
        ranking: a `top_k`.
        relation: whose rows are ranked.
        key: the leaf of the relation that is told of each entry; empty for the entry itself.
        single: whether only the first is told, and not as a list.
    """

    ranking: Expression
    relation: "Dense"
    key: str
    single: bool

    def column(self, answer: Any, dims: Sequence[str], shape: Any) -> pa.Array:
        """Return the lists, for all entries of dimensions."""
        values, fields, own = ranking(answer)
        lead = [dim for dim in own if dim != "rank"]
        order = [own.index(dim) for dim in (*lead, "rank")]
        k = values.shape[own.index("rank")]
        flat = values.transpose(order).reshape(-1)
        plan: Any = self.ranking.plan
        there = flat != (math.inf if plan.options["smallest"] else -math.inf)
        if self.key:
            domain = self.relation.keys[self.key].domain
            at = self.relation.place(fields, domain, lambda x: x.transpose(order).reshape(-1))
            at = np.where(there, at, self.relation.known(domain)[0])
            told = self.relation.read(self.key, domain, at)
        else:
            told = pa.array(_plain(flat))
        told = told if isinstance(told, pa.Array) else pa.array(np.asarray(told))
        cells = np.arange(len(flat)).reshape(-1, k)
        sizes = tuple(values.shape[own.index(dim)] for dim in lead)
        rows = _spread(lead, np.arange(len(cells)).reshape(sizes), dims, shape)
        if self.single:
            first = cells[rows, 0]
            return told.take(pa.array(np.where(there[first], first, 0), mask=~there[first]))
        there = there.reshape(-1, k)[rows]
        offsets = np.concatenate([[0], np.cumsum(there.sum(1))])
        flat_cells = cells[rows][there]
        chosen = told.take(pa.array(flat_cells))
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), chosen)


@dataclasses.dataclass(frozen=True)
class Dense:
    """A row for each entry of some dimensions.

    Attributes:
        title: the tables that it comes from, for messages.
        home: the run whose log tells samples and epochs.
        dims: the dimensions.
        entries: the numbers that each of them, and `sample`, runs over, ascending; those of
            `weight` count through all tensors.
        whole: all tensors, of which `weight` chooses some.
        keys: leaf -> what it stands for.
        values: leaf -> expression, or an array that is known, or where a ranking stands.
        missing: leaves that are NULL where they are below zero.
        columns: name -> formula.
        masks: conditions that a row meets, as expressions.
        residual: conditions that DuckDB is left with.
        chosen: samples that occurrences are limited to.
        kept: dimension -> the only entries that have rows, where the scan could not be limited.
        taken: how occurrences are taken: an anchor, and the options of `before` and `after`.
        ranked: a ranking whose entries are the only rows that matter, how many they are, and the
            leaf that stands for what is ranked.
        notes: what was not lowered, and why.
        names: what the entries of `group` are called in answers.
        there: which entries have a row, where that is not all of them.
    """

    title: str
    home: Any
    dims: tuple[str, ...]
    entries: Mapping[str, np.ndarray]
    whole: tuple[Part, ...]
    keys: Mapping[str, Key]
    values: Mapping[str, "Expression | Counted | Places"]
    columns: Mapping[str, exp.Expr]
    missing: frozenset[str] = frozenset()
    masks: tuple[Expression, ...] = ()
    residual: tuple[exp.Expr, ...] = ()
    chosen: np.ndarray | None = None
    kept: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    taken: tuple[Any, dict[str, Any]] | None = None
    ranked: tuple[Expression, int, str] | None = None
    notes: tuple[str, ...] = ()
    names: tuple[Any, ...] = ()
    there: Counted | None = None

    # ---- what it is made of

    @property
    def walk(self) -> str:
        """The dimension of steps or states, or nothing."""
        return next((dim for dim in self.dims if dim in WALKS), "")

    @property
    def expressions(self) -> list[Expression]:
        """All expressions of values and masks."""
        found = [x for x in self.values.values() if isinstance(x, Expression)]
        return [*found, *self.masks]

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """The number of the first weight of each tensor, and the number of all."""
        return np.cumsum([0, *(math.prod(part.shape) for part in self.whole)])

    @property
    def rows(self) -> int:
        """How many rows there are at most."""
        if self.ranked is not None:
            _, k, _ = self.ranked
            left = [dim for dim in self.dims if dim not in self._ranked_over()]
            return k * math.prod(len(self.entries[dim]) for dim in left)
        if self.taken is not None:
            counts = [self.taken[1].get(name) for name in ("last", "first")]
            count = next((x for x in counts if x is not None), math.inf)
            steps = [dim for dim in self.dims if dim in ("step", "position")]
            count = min(count, math.prod(len(self.entries[dim]) for dim in steps))
            rest = [dim for dim in self.dims if dim not in ("step", "position")]
            return int(count) * math.prod(len(self.entries[dim]) for dim in rest)
        kept = {dim: len(self.kept.get(dim, self.entries[dim])) for dim in self.dims}
        found = math.prod(kept.values())
        if self.chosen is not None and "position" in kept:
            share = len(self.chosen) / max(len(self.entries["sample"]), 1)
            found = math.ceil(found * min(share * 2, 1.0))
        return found

    def read_one_by_one(self, wanted: set[str]) -> int:
        """Return how many entries have to be collected for some leaves."""
        found = self.rows
        if self.ranked is not None:
            whole = dataclasses.replace(self, ranked=None)
            for name in wanted - {self.ranked[2]}:
                value = self.values.get(name)
                if isinstance(value, Expression):
                    sizes = [len(self.entries[dim]) for dim in value.dims]
                    found = max(found, min(whole.rows, math.prod(sizes)))
        return found

    def number(self, domain: str) -> str | None:
        """Return the leaf that is the number of a dimension itself."""
        return next((n for n, k in self.keys.items() if k.is_number(domain)), None)

    def tensor_of(self, weights: np.ndarray) -> np.ndarray:
        """Return the number of the tensor of weights."""
        return np.searchsorted(self.offsets, weights, side="right") - 1

    # ---- columns that are known

    def domain(self, names: Iterable[str]) -> str | None:
        """Return the one dimension that leaves are functions of, or None."""
        if not all(name in self.keys for name in names):
            return None
        domains = {self.keys[name].domain for name in names}
        if domains == {"tensor", "weight"}:
            return "weight"
        return domains.pop() if len(domains) == 1 else None

    def known(self, domain: str) -> np.ndarray:
        """Return the entries of a dimension, of `sample` or of `tensor`."""
        if domain == "sample" and self.chosen is not None:
            return self.chosen
        if domain in self.kept:
            return self.kept[domain]
        if domain == "tensor" and domain not in self.entries:
            return np.unique(self.tensor_of(self.entries["weight"]))
        return self.entries[domain]

    def read(self, name: str, domain: str, at: np.ndarray) -> Any:
        """Return the values of a key for some entries, as an array of pyarrow or numpy."""
        key = self.keys[name]
        if key.domain == "tensor" and domain == "weight":
            at = self.tensor_of(at)
        if key.entries is None:
            if key.domain == "weight":
                return at - self.offsets[self.tensor_of(at)]
            if key.domain == "tensor":
                names = pa.array([part.path for part in self.whole], pa.string())
                return names.take(pa.array(at))
            return at
        places = np.searchsorted(key.entries, at)
        return key.column.take(pa.array(places))

    def table(self, domain: str, names: Iterable[str]) -> pa.Table:
        """Return keys as a table with a row for each entry of a dimension, `__at` besides."""
        at = self.known(domain)
        columns = {name: self.read(name, domain, at) for name in sorted(names)}
        return pa.table({"__at": at, **columns})

    # ---- choosing

    def changed(self, change: Any) -> "Dense":
        """Return the same with every expression changed."""
        wrap = lambda x: Expression(change(x.plan), x.source)  # noqa: E731
        values = {
            name: wrap(x) if isinstance(x, Expression) else x for name, x in self.values.items()
        }
        return dataclasses.replace(self, values=values, masks=tuple(map(wrap, self.masks)))

    def only(self, domain: str, at: np.ndarray) -> "Dense":
        """Return the rows of some entries of a dimension; `at` is ascending."""
        if len(at) == len(self.known(domain)):
            return self
        shaped = any(isinstance(x, Counted | Places) for x in self.values.values())
        if shaped or self.there is not None:
            if domain == "tensor" and "weight" in self.dims:
                weights = self.known("weight")
                domain, at = "weight", weights[np.isin(self.tensor_of(weights), at)]
            return dataclasses.replace(self, kept={**self.kept, domain: at})
        if domain in WALKS:
            found = self.changed(
                lambda plan: restrict(plan, domain, at) if domain in plan.dims else plan
            )
            return dataclasses.replace(found, entries={**self.entries, domain: at})
        if domain == "tensor" and "weight" in self.dims:
            weights = self.entries["weight"]
            return self.only("weight", weights[np.isin(self.tensor_of(weights), at)])
        if domain == "weight":
            return self._weights(at)
        if domain == "sample" and "position" in self.dims:
            return dataclasses.replace(self, chosen=at)
        return dataclasses.replace(self, kept={**self.kept, domain: at})

    def _weights(self, at: np.ndarray) -> "Dense":
        parts = []
        for number in np.unique(self.tensor_of(at)).tolist():
            first, last = self.offsets[number : number + 2].tolist()
            mine = at[(at >= first) & (at < last)] - first
            part = self.whole[number]
            whole = len(mine) == last - first
            parts.append(part if whole else Part(part.path, part.shape, tuple(mine.tolist())))
        found = self
        if parts:
            found = self.changed(
                lambda plan: narrow(plan, lambda _: tuple(parts)) if "weight" in plan.dims else plan
            )
        return dataclasses.replace(found, entries={**self.entries, "weight": at})

    @property
    def windows(self) -> list[exp.Window]:
        """The windows in the formulas of columns."""
        return [x for formula in self.columns.values() for x in formula.find_all(exp.Window)]

    @property
    def empty(self) -> bool:
        """Whether some dimension has no entry."""
        return any(not len(self.known(dim)) for dim in self.dims) or (
            self.chosen is not None and not len(self.chosen)
        )

    # ---- formulas as expressions

    def expression(self, formula: exp.Expr) -> Any:
        """Return a formula as an expression, or a number.

        Raises:
            Unlowerable: it is none.
        """
        return Formula(self).of(formula)

    def condition(self, formula: exp.Expr) -> Expression:
        """Return a condition as an expression."""
        found = Formula(self).condition(formula)
        if not isinstance(found, Expression):
            raise Unlowerable(f"{formula.sql('duckdb')} is a constant")
        return found

    @property
    def mask(self) -> Expression | None:
        """All masks as one."""
        return functools.reduce(lambda a, b: a & b, self.masks) if self.masks else None

    # ---- neighbouring states and steps

    def beside(self, offset: int) -> tuple["Dense", dict[str, exp.Expr]]:
        """Return states as seen from a step: those before it (0) or after it (1).

        Returns:
            The relation, and the formulas that take the place of numbers of states.
        """
        at = self.entries["state"]
        steps = np.intersect1d(at, at - 1)
        dims = tuple("step" if dim == "state" else dim for dim in self.dims)
        keys, changes = {}, {}
        for name, key in self.keys.items():
            if key.domain != "state":
                keys[name] = key
            elif key.entries is None:
                own = leaf()
                keys[own] = Key("step")
                changes[name] = _plus(column(own), offset)
            else:
                keys[name] = Key("step", key.entries - offset, key.column)
        entries = {k: v for k, v in self.entries.items() if k != "state"}
        found = self.changed(lambda plan: At(plan, offset) if "state" in plan.dims else plan)
        found = dataclasses.replace(
            found,
            dims=dims,
            keys=keys,
            entries={**entries, "step": steps},
            columns={name: replaced(x, changes) for name, x in self.columns.items()},
        )
        return found, changes

    def neighbours(self, windows: Sequence[exp.Window]) -> tuple["Dense", dict[str, Any]]:
        """Return rows that know their neighbours in the place of windows `lag` and `lead`.

        Rows without a neighbour are left out: the caller has made sure that no answer has them.

        Returns:
            The relation, and the formula that takes the place of each leaf and window.

        Raises:
            Unlowerable: the windows are others, or rows are missing between.
        """
        kinds = {type(window.this) for window in windows}
        if len(kinds) != 1 or self.masks or self.residual or self.kept or self.chosen is not None:
            raise Unlowerable("a window over rows that were filtered")
        lead = kinds == {exp.Lead}
        at = self.entries[self.walk]
        names: set[str] = set()
        for window in windows:
            names |= self._neighbour(window)
        if self.walk == "step":
            if lead:
                raise Unlowerable("lead over steps")
            there = at[1:]
            old = {n: leaf() for n in names}
            values = {
                **{n: x for n, x in self.values.items()},
                **{old[n]: Expression(Lag(self.values[n].plan), self.values[n].source)  # type: ignore
                   for n in names},
            }  # fmt: skip
            entries = {**self.entries, "step": there}
            found = dataclasses.replace(self, values=values, entries=entries)
            found = found.changed(
                lambda plan: restrict(plan, "step", there) if "step" in plan.dims else plan
            )
            return found, {repr_of(w): column(old[only_leaf(w.this.this) or ""]) for w in windows}
        if len(at) > 1 and (np.diff(at) != 1).any():
            raise Unlowerable("neighbours of states that are not consecutive")
        here, changes = self.beside(0 if lead else 1)
        there, _ = self.beside(1 if lead else 0)
        other = {name: leaf() for name in names}
        values = {**here.values, **{other[name]: there.values[name] for name in names}}
        own = {repr_of(w): column(other[only_leaf(w.this.this) or ""]) for w in windows}
        return dataclasses.replace(here, values=values), {**changes, **own}

    def _neighbour(self, window: exp.Window) -> set[str]:
        function, order = window.this, window.args.get("order")
        offset = function.args.get("offset")
        name = only_leaf(function.this)
        terms = order.expressions if order is not None else []
        if (
            name is None
            or not isinstance(self.values.get(name), Expression)
            or (offset is not None and offset.sql() != "1")
            or function.args.get("default") is not None
            or window.args.get("spec") is not None
            or len(terms) != 1
            or terms[0].args.get("desc")
            or only_leaf(terms[0].this) != self.number(self.walk)
        ):
            raise Unlowerable("a window other than lag(value) OVER (ORDER BY step or state)")
        parted = {only_leaf(x) for x in window.args.get("partition_by") or []}
        needed = {self.number(dim) for dim in self.dims
                  if dim != self.walk and len(self.known(dim)) > 1}  # fmt: skip
        if "weight" in self.dims and len(self.known("tensor")) > 1:
            needed.add(self.number("tensor"))
        if not needed <= parted:
            raise Unlowerable("a window that mixes weights: PARTITION BY tensor, weight")
        return {name}

    # ---- pruning

    def _ranked_over(self) -> tuple[str, ...]:
        assert self.ranked is not None
        plan: Any = self.ranked[0].plan
        return plan.over

    def top(
        self, formula: exp.Expr, k: int, smallest: bool, over: Sequence[str]
    ) -> tuple["Dense", dict[str, exp.Expr]]:
        """Return only the rows that rank first along some dimensions.

        Returns:
            The relation, and the leaf that takes the place of the formula.

        Raises:
            Unlowerable: the ranks cannot be told on the device.
        """
        placed = any(isinstance(x, Places) for x in self.values.values())
        cut = self.residual or self.kept or self.taken or self.there is not None
        if cut or placed or not over or k < 1:
            raise Unlowerable("a ranking of rows that were filtered afterwards")
        while isinstance(formula, exp.Paren):
            formula = formula.this
        if not set(over) <= RANKED:
            raise Unlowerable(f"a ranking over {' and '.join(over)}")
        value = self.expression(formula)
        if not isinstance(value, Expression) or not set(over) <= set(value.dims):
            raise Unlowerable("a ranking by what is the same in all rows")
        if math.prod(len(self.known(dim)) for dim in over) <= k:
            return self, {}
        own = leaf()
        values = {**self.values, own: value}
        value = self.of_samples(value)
        if self.mask is not None:
            value = value.where(self.mask, math.inf if smallest else -math.inf)
        ranking = value.top_k(k, tuple(over), smallest=smallest)
        found = dataclasses.replace(self, values=values, ranked=(ranking, k, own))
        return found, {repr_of(formula): column(own)}

    def of_samples(self, value: Expression) -> Expression:
        """Limit an expression to the chosen samples."""
        if self.chosen is None:
            return value
        if not {"step", "position"} <= set(value.dims):
            raise Unlowerable("samples are chosen after their steps were reduced")
        return value.sel(sample=self.chosen.tolist())

    # ---- reading

    def questions(self, wanted: set[str]) -> dict[str, Expression]:
        """Return what has to be answered for some leaves, by name."""
        if self.empty:
            return {}
        found: dict[str, Expression] = {}
        for name in sorted(wanted):
            value = self.values.get(name)
            if isinstance(value, Expression):
                found[name] = value
            elif isinstance(value, Places):
                found[name] = value.ranking
        if self.mask is not None:
            found["__mask"] = self.mask
        if {"step", "position"} <= set(self.dims):
            at = self.entries["step"]
            samples = self.home.samples
            found["__sample"] = Expression(restrict(samples.plan, "step", at), samples.source)
        if self.ranked is not None:
            found["__rank"] = self.ranked[0]
            found.pop(self.ranked[2], None)  # what is ranked comes with its rank
            found.pop("__mask", None)
        if self.taken is not None:
            anchor, options = self.taken
            options = dict(options)
            before = options.pop("before")
            base = found["__sample"] if "__sample" in found else next(iter(found.values()))
            first = (base.before if before else base.after)(anchor, **options)
            plan: Any = first.plan
            assert isinstance(plan, Take)
            for name, value in found.items():
                if not value.dims:
                    continue
                if "step" not in value.dims:
                    raise Unlowerable("rows before a step that have no step")
                own = plan if value is base else dataclasses.replace(
                    plan, child=value.plan, of=base.plan)  # fmt: skip
                source = first.source
                source = source if source is value.source else source.joint(value.source)
                found[name] = Expression(own, source)
            if not found:
                raise Unlowerable("nothing to take")
        return found

    def rows_of(self, wanted: set[str], answers: Mapping[str, Any]) -> pa.Table:
        """Return the rows as a table of leaves, `__row` numbering them.

        Args:
            wanted: the leaves.
            answers: of `questions`, by name.
        """
        if self.empty:
            return self._nothing(wanted)
        if self.ranked is not None:
            return self._rows(wanted, *self._at_ranks(wanted, answers))
        if self.taken is not None:
            return self._rows(wanted, *self._at_anchor(wanted, answers))
        lists = [self.entries[dim] for dim in self.dims]
        grid = np.meshgrid(*lists, indexing="ij") if lists else []
        at = {dim: grid[i].reshape(-1) for i, dim in enumerate(self.dims)}
        shape = tuple(len(x) for x in lists)
        data = {}
        for name, answer in answers.items():
            value = self.values.get(name)
            if isinstance(value, Places):
                data[name] = value.column(answer, self.dims, shape)
                continue
            dims, array = decoded(answer)
            data[name] = _spread(dims, array, self.dims, shape)
        for name in wanted:
            value = self.values.get(name)
            if isinstance(value, Counted):
                data[name] = _spread(value.dims, value.array, self.dims, shape)
        if self.there is not None:
            data["__there"] = _spread(self.there.dims, self.there.array, self.dims, shape)
        return self._rows(wanted, at, data, math.prod(shape))

    def _rows(self, wanted, at, data, count) -> pa.Table:
        keep = np.ones(count, bool)
        if "__sample" in data:
            at["sample"] = np.asarray(data["__sample"]).astype(np.int64)
            keep &= at["sample"] >= 0
            if self.chosen is not None:
                keep &= np.isin(at["sample"], self.chosen)
        if "__there" in data:
            keep &= data["__there"]
        if "__mask" in data:
            keep &= np.asarray(data["__mask"]).astype(bool)
        for dim, only in self.kept.items():
            keep &= np.isin(at[dim], only)
        if "weight" in at and "tensor" not in at:
            at["tensor"] = self.tensor_of(at["weight"])
        columns: dict[str, Any] = {"__row": np.arange(count)[keep]}
        for name in sorted(wanted):
            if name in self.keys:
                domain = self.keys[name].domain
                columns[name] = self.read(name, domain, at[domain][keep])
            elif isinstance(data[name], pa.Array):
                columns[name] = data[name].filter(pa.array(keep))
            else:
                array = _plain(np.asarray(data[name])[keep])
                absent = array < 0 if name in self.missing else None
                columns[name] = pa.array(array, mask=absent)
        return pa.table(columns)

    def _nothing(self, wanted: set[str]) -> pa.Table:
        columns: dict[str, Any] = {"__row": np.zeros(0, np.int64)}
        for name in sorted(wanted):
            if name in self.keys:
                text = self.keys[name].domain == "tensor" and self.keys[name].entries is None
                given = self.keys[name].column
                kind = pa.string() if text else pa.int64() if given is None else given.type
                columns[name] = pa.array([], kind)
            else:
                columns[name] = pa.array([], pa.float32())
        return pa.table(columns)

    def _at_ranks(self, wanted, answers):
        assert self.ranked is not None
        over = self._ranked_over()
        values, fields, dims = ranking(answers["__rank"])
        left = [dim for dim in self.dims if dim not in over]
        # The ranks stand last but for the weights; put them behind all that is left.
        order = [dims.index(dim) for dim in (*left, "rank")]
        shape = tuple(values.shape[i] for i in order)
        lists = [self.entries[dim] for dim in left]
        grid = np.meshgrid(*lists, np.arange(shape[-1]), indexing="ij")
        at = {dim: grid[i].reshape(-1) for i, dim in enumerate(left)}
        plan: Any = self.ranked[0].plan
        there = values.transpose(order).reshape(-1) != (
            math.inf if plan.options["smallest"] else -math.inf
        )
        for dim in over:
            at[dim] = self.place(fields, dim, lambda x: x.transpose(order).reshape(-1))
        at = {dim: x[there] for dim, x in at.items()}
        data = {}
        for name in wanted:
            value = self.values.get(name)
            if name == self.ranked[2]:
                data[name] = values.transpose(order).reshape(-1)[there]
            elif isinstance(value, Expression):
                own, array = decoded(answers[name])
                data[name] = self._gathered(own, array, at)
            elif isinstance(value, Counted):
                data[name] = self._gathered(value.dims, value.array, at)
        if "__sample" in answers:
            data["__sample"] = self._gathered(*decoded(answers["__sample"]), at)
        return at, data, int(there.sum())

    def place(self, fields: Mapping[str, np.ndarray], domain: str, flat: Any) -> np.ndarray:
        """Return the numbers of a dimension from what a ranking tells; those of nobody differ."""
        if domain in ("weight", "tensor") and domain not in self.dims or domain == "weight":
            paths = {part.path: number for number, part in enumerate(self.whole)}
            tensors = [paths.get(str(x), 0) for x in flat(fields["tensor"])]
            number = np.asarray(tensors, np.int64)
            if domain == "tensor":
                return number
            return self.offsets[number] + np.maximum(flat(fields["weight"]), 0)
        if domain == "group":
            numbers = {name: number for number, name in enumerate(self.names)}
            told = flat(fields["group"]).tolist()
            return np.asarray([numbers.get(name, 0) for name in told], np.int64)
        return np.maximum(np.asarray(flat(fields[domain]), np.int64), 0)

    def _gathered(self, dims, array, at):
        places = tuple(np.searchsorted(self.entries[dim], at[dim]) for dim in dims)
        return array[places] if dims else np.broadcast_to(array, len(next(iter(at.values()))))

    def _at_anchor(self, wanted, answers):
        name = "__sample" if "__sample" in answers else next(iter(answers))
        answer = answers[name]
        steps = np.asarray(answer["step"].values, np.int64)
        rest = [dim for dim in self.dims if dim not in ("step", "position")]
        lists = [self.entries[dim] for dim in rest]
        grid = np.meshgrid(np.arange(len(steps)), *lists, indexing="ij")
        rows = grid[0].reshape(-1)
        at = {dim: grid[i + 1].reshape(-1) for i, dim in enumerate(rest)}
        at["step"] = steps[rows]
        if "position" in self.dims:
            if "position" in answer.coords:
                at["position"] = np.asarray(answer["position"].values, np.int64)[rows]
            else:
                at["position"] = np.zeros(len(rows), np.int64)
        dims = ("occurrence", *rest)
        shape = (len(steps), *(len(x) for x in lists))
        data = {}
        for name, answer in answers.items():
            own, array = decoded(answer)
            data[name] = _spread(own, array, dims, shape)
        for name in wanted:
            value = self.values.get(name)
            if isinstance(value, Counted):
                data[name] = self._gathered(value.dims, value.array, at)
        return at, data, len(rows)


def _spread(dims: Sequence[str], array: np.ndarray, wanted: Sequence[str], shape: Any) -> Any:
    """Return an array with all dimensions, as one column."""
    order = [list(dims).index(dim) for dim in wanted if dim in dims]
    array = np.asarray(array).transpose(order)
    sizes = [size if dim in dims else 1 for dim, size in zip(wanted, shape, strict=True)]
    return np.broadcast_to(array.reshape(sizes), shape).reshape(-1)


def _plain(array: np.ndarray) -> np.ndarray:
    """Return an array of a type that Arrow has."""
    if array.dtype.kind in "fiub" and array.dtype.isbuiltin == 1 and array.dtype != np.float16:
        return array
    return array.astype(np.float32)


def decoded(answer: Any) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the dimensions and the values of an answer, its weights on one axis."""
    if "value" in answer.data_vars and "tensor" not in answer["value"].attrs:
        return tuple(map(str, answer["value"].dims)), answer["value"].values
    arrays, lead = [], ()
    for array in answer.data_vars.values():
        if "field" in array.attrs:
            continue
        own = [d for d in array.dims if str(d).startswith(f"{array.attrs['tensor']}:")]
        lead = tuple(str(d) for d in array.dims if d not in own)
        sizes = [array.sizes[dim] for dim in own]
        arrays.append(array.values.reshape(*array.shape[: len(lead)], math.prod(sizes)))
    return (*lead, "weight"), np.concatenate(arrays, -1)


def ranking(answer: Any) -> tuple[np.ndarray, dict[str, np.ndarray], list[str]]:
    """Return the values of a ranking, where they stand, and the dimensions of both."""
    dims, values = decoded(answer)
    if "value" in answer.data_vars and "tensor" not in answer["value"].attrs:
        fields = {str(name): x.values for name, x in answer.coords.items() if x.dims == tuple(dims)}
        if "rank" not in dims:
            raise Unlowerable("a ranking without ranks")
        return values, fields, list(dims)
    gathered: dict[str, list[np.ndarray]] = {}
    for array in answer.data_vars.values():
        name = array.attrs.get("field")
        if name is not None:
            own = [d for d in array.dims if str(d).startswith(f"{array.attrs['tensor']}:")]
            shape = (*array.shape[: array.ndim - len(own)], math.prod(array.sizes[d] for d in own))
            gathered.setdefault(name, []).append(array.values.reshape(shape))
    return values, {name: np.concatenate(x, -1) for name, x in gathered.items()}, list(dims)


def _plus(formula: exp.Expr, number: int) -> exp.Expr:
    return exp.Paren(this=exp.Add(this=formula, expression=literal(number))) if number else formula


def nothing(relation: Dense) -> Dense:
    """Return no row of a relation."""
    if not relation.dims:
        raise Unlowerable("a condition that never holds")
    return relation.only(relation.dims[0], np.zeros(0, np.int64))

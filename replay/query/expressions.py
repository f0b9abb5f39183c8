"""What a researcher writes: lazy, immutable expressions over the named dimensions of a run.

NaN and infinity: sums, means, norms, minima and maxima hand NaN on; `top_k` ranks NaN before all
numbers; `hist` counts NaN above the last edge; `count` leaves NaN out; comparisons with NaN are
false, so that an explosion is asked for as `~(abs(g) <= limit)` where NaN counts as one.
"""

import dataclasses
import fnmatch
import html
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from replay.errors import QueryError
from replay.query.clusters import cluster
from replay.query.nodes import (
    RAGGED,
    Among,
    At,
    Group,
    Lag,
    Map,
    Node,
    Part,
    Pick,
    Reduce,
    Rename,
    Take,
    check_parts,
    narrow,
    restrict,
)

FUNCTIONS = frozenset(
    "abs absolute add subtract multiply divide true_divide floor_divide remainder mod power "
    "float_power negative positive sign square sqrt cbrt exp exp2 expm1 log log2 log10 log1p "
    "sin cos tan tanh arctan arctan2 sinh cosh minimum maximum fmin fmax hypot reciprocal rint "
    "floor ceil trunc isnan isinf isfinite signbit logaddexp clip where "
    "less less_equal greater greater_equal equal not_equal logical_and logical_or logical_xor "
    "logical_not bitwise_and bitwise_or bitwise_xor invert".split()
)


class Source(Protocol):
    """What an expression asks: the runs that its scans name."""

    def labels(self, by: Any, others: int) -> Group:
        """Return the groups of a dimension's name, of labels, or raise."""
        ...

    def epochs(self, wanted: Sequence[int]) -> np.ndarray:
        """Return the steps of epochs."""
        ...

    def batches(self) -> int:
        """Return the batch size."""
        ...

    def joint(self, other: Any) -> Any:
        """Return a source that knows the runs of both."""
        ...

    @property
    def compute(self) -> Callable[..., list[Any]]:
        """Answers expressions."""
        ...

    @property
    def explain(self) -> Callable[..., str]:
        """Tells what answers take."""
        ...


def _operator(name: str, *, swapped: bool = False) -> Callable[["Expression", Any], "Expression"]:
    def apply(self: "Expression", other: Any) -> "Expression":
        return self._map(name, *((other, self) if swapped else (self, other)))

    return apply


class Expression:
    """A question about every step of a run; nothing is computed before `compute()`.

    Made by the quantities of a run (`run.grads`, `run.weights["Dense_0/kernel", 3, 7]`, ...).
    NumPy's functions of elements apply to it: `np.sqrt(run.grads)`.

    Attributes:
        plan: the logical plan.
        source: whom to ask.
    """

    def __init__(self, plan: Node, source: Source):
        self.plan, self.source = plan, source

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of its dimensions."""
        return self.plan.dims

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors that its weights belong to."""
        return tuple(part.path for part in self.plan.parts)

    # ---- choosing

    def sel(
        self,
        *,
        step: Any = None,
        state: Any = None,
        epoch: Any = None,
        tensor: Any = None,
        weight: Any = None,
        sample: Any = None,
        **entries: int,
    ) -> "Expression":
        """Choose by label.

        Args:
            step: a step, a list of them, or a slice (the stop not included).
            state: likewise, of states.
            epoch: an epoch, or several: their steps.
            tensor: paths of tensors; a path with `*` chooses all that match.
            weight: flat indices within the one tensor that is chosen.
            sample: sample ids: all other occurrences count as absent (false, NaN or left out).
            **entries: an entry of `rank`, `group`, `bin` or `quantile`, by number.

        Raises:
            QueryError: there is no such thing; what exists is named.
        """
        plan = self.plan
        if epoch is not None:
            wanted = [epoch] if isinstance(epoch, numbers.Integral) else list(epoch)
            self._has("step", "epoch")
            plan = restrict(plan, "step", self.source.epochs(wanted))  # type: ignore[arg-type]
        for dim, chosen in (("step", step), ("state", state)):
            if chosen is not None:
                self._has(dim, dim)
                plan = restrict(plan, dim, _positions(chosen, plan.steps, dim))
        if tensor is not None:
            self._has("weight", "tensor")
            plan = narrow(plan, lambda parts: _tensors(parts, tensor))
        if weight is not None:
            self._has("weight", "weight")
            plan = narrow(plan, lambda parts: _weights(parts, weight))
        found = Expression(plan, self.source)
        if sample is not None:
            found = found._of_samples(sample)
        for dim, index in entries.items():
            found._has(dim, dim)
            count = _entries(found.plan, dim, self.source)
            if count is not None and not -count <= index < count:
                raise QueryError(
                    f"there is no {dim} {index}",
                    why=f"there are {count}: 0 to {count - 1}",
                    fix="choose among them",
                )
            place = int(index) if count is None else int(index) % count
            found = Expression(Pick(found.plan, dim, place), self.source)
        return found

    def __getitem__(self, key: Any) -> "Expression":
        """Choose a tensor, and by further indices or slices weights of it."""
        path, *index = key if isinstance(key, tuple) else (key,)
        if not isinstance(path, str):
            raise QueryError(
                f"{path!r} is no tensor",
                why="a weight is named by the path of its tensor and its index",
                fix=f"one of {', '.join(self.tensors[:8])}; steps are chosen by sel(step=...)",
            )
        found = self.sel(tensor=path)
        if not index:
            return found
        (part,) = found.plan.parts
        return found.sel(weight=_flat(part, index))

    def where(self, condition: "Expression", other: float = math.nan) -> "Expression":
        """Put `other` where a condition does not hold."""
        return self._map("where", condition, self, other)

    def before(
        self,
        anchor: Any,
        *,
        last: int | None = None,
        first: int | None = None,
        inclusive: bool = False,
    ) -> "Expression":
        """Return what stands before a step: a number, or a question such as `...first("step")`.

        Args:
            anchor: the step.
            last: only so many, those nearest to it.
            first: only so many, from the beginning.
            inclusive: with what belongs to the step itself.
        """
        return self._take(anchor, last, first, before=True, inclusive=inclusive)

    def after(
        self,
        anchor: Any,
        *,
        last: int | None = None,
        first: int | None = None,
        inclusive: bool = False,
    ) -> "Expression":
        """Return what stands after a step; otherwise as `before`."""
        return self._take(anchor, last, first, before=False, inclusive=inclusive)

    def join(self, **others: "Expression") -> "Joined":
        """Put other quantities beside what was taken, for the same steps and positions."""
        return Joined({"sample": self, **others})

    # ---- elements

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        if method != "__call__" or options or ufunc.__name__ not in FUNCTIONS:
            return NotImplemented
        return self._map(ufunc.__name__, *inputs)

    def clip(self, low: float, high: float) -> "Expression":
        """Bound the elements."""
        return self._map("clip", self, low, high)

    def __abs__(self) -> "Expression":
        return self._map("abs", self)

    def __neg__(self) -> "Expression":
        return self._map("negative", self)

    def __invert__(self) -> "Expression":
        return self._map("logical_not", self)

    def __bool__(self) -> bool:
        raise QueryError(
            "an expression is neither true nor false before it is computed",
            why="it stands for a value at every step",
            fix="combine conditions by & | ~, or ask for (...).any().compute()",
        )

    __add__ = _operator("add")
    __radd__ = _operator("add", swapped=True)
    __sub__ = _operator("subtract")
    __rsub__ = _operator("subtract", swapped=True)
    __mul__ = _operator("multiply")
    __rmul__ = _operator("multiply", swapped=True)
    __truediv__ = _operator("divide")
    __rtruediv__ = _operator("divide", swapped=True)
    __mod__ = _operator("remainder")
    __rmod__ = _operator("remainder", swapped=True)
    __floordiv__ = _operator("floor_divide")
    __rfloordiv__ = _operator("floor_divide", swapped=True)
    __pow__ = _operator("power")
    __rpow__ = _operator("power", swapped=True)
    __and__ = _operator("logical_and")
    __rand__ = _operator("logical_and", swapped=True)
    __or__ = _operator("logical_or")
    __ror__ = _operator("logical_or", swapped=True)
    __xor__ = _operator("logical_xor")
    __rxor__ = _operator("logical_xor", swapped=True)
    __lt__ = _operator("less")
    __le__ = _operator("less_equal")
    __gt__ = _operator("greater")
    __ge__ = _operator("greater_equal")
    __eq__ = _operator("equal")  # type: ignore[assignment]
    __ne__ = _operator("not_equal")  # type: ignore[assignment]
    __hash__ = object.__hash__

    def diff(self, dim: str) -> "Expression":
        """Return differences of neighbours: of states, as a value of each step; or of steps."""
        self._has(dim, dim)
        if dim == "state":
            return self._wrap(Map("subtract", (At(self.plan, 1), At(self.plan, 0))))
        if dim != "step":
            raise self._no_such("diff", dim, "differences are taken along steps or states")
        return self._wrap(Map("subtract", (self.plan, Lag(self.plan))))

    def crosses(self, value: float) -> "Expression":
        """Tell for each step whether it takes this across a value, or onto it, from elsewhere."""
        self._has("state", "crosses")
        before, after = (self._wrap(At(self.plan, offset)) for offset in (0, 1))
        sides = [self._map("sign", self._map("subtract", x, value)) for x in (before, after)]
        elsewhere = self._map("not_equal", before, value)
        return self._map("logical_and", elsewhere, self._map("not_equal", *sides))

    # ---- reductions

    def sum(self, dim: Any = None) -> "Expression":
        """Add up."""
        return self._reduce("sum", dim)

    def mean(self, dim: Any = None) -> "Expression":
        """Return the mean of all elements."""
        return self._reduce("mean", dim)

    def count(self, dim: Any = None) -> "Expression":
        """Count the elements that are not NaN; how often a condition holds is its `sum`."""
        return self._reduce("count", dim)

    def var(self, dim: Any = None, *, ddof: int = 0) -> "Expression":
        """Return the variance, its divisor `n - ddof`."""
        return self._reduce("var", dim, ddof=ddof)

    def std(self, dim: Any = None, *, ddof: int = 0) -> "Expression":
        """Return the standard deviation, with the divisor `n - ddof` of the variance."""
        return np.sqrt(self.var(dim, ddof=ddof))  # type: ignore[return-value]

    def min(self, dim: Any = None) -> "Expression":
        """Return the smallest; NaN if there is one."""
        return self._reduce("min", dim)

    def max(self, dim: Any = None) -> "Expression":
        """Return the largest; NaN if there is one."""
        return self._reduce("max", dim)

    def any(self, dim: Any = None) -> "Expression":
        """Tell whether any is true."""
        return self._reduce("any", dim)

    def all(self, dim: Any = None) -> "Expression":
        """Tell whether all are true."""
        return self._reduce("all", dim)

    def norm(self, dim: Any = None) -> "Expression":
        """Return the Euclidean norm."""
        return self._reduce("norm", dim)

    def dot(self, other: "Expression", dim: Any = None) -> "Expression":
        """Return the dot product with another quantity, element by element."""
        return self._map("multiply", self, other).sum(dim)

    def first(self, dim: str) -> "Expression":
        """Return the first step (or state) at which this is true; -1 if it never is."""
        return self._edge("first", dim)

    def last(self, dim: str) -> "Expression":
        """Return the last step (or state) at which this is true; -1 if it never is."""
        return self._edge("last", dim)

    def top_k(self, k: int, dim: Any = None, *, smallest: bool = False) -> "Expression":
        """Return the `k` largest, or smallest, and where they are.

        Of equal ones the earlier comes first: by step, then position, then weight. Attributed
        updates whose samples cancel (`condition` above 1e3) are left out.
        """
        if k < 1:
            raise QueryError(
                f"the {k} largest are asked for", why="a ranking has entries", fix="1 or more"
            )
        return self._reduce("top_k", dim, k=int(k), smallest=smallest)

    def argmax(self, dim: Any = None) -> "Expression":
        """Return the largest and where it is."""
        return self.top_k(1, dim)

    def hist(self, edges: Sequence[float], dim: Any = None) -> "Expression":
        """Count between edges: below the first, between neighbours, from the last on."""
        edges = tuple(float(edge) for edge in edges)
        if not edges or any(a >= b for a, b in zip(edges, edges[1:], strict=False)):
            raise QueryError(
                f"edges {list(edges)[:6]} do not rise",
                why="a count belongs to one bin",
                fix="ascending numbers, such as [2.0**e for e in range(-20, 4)]",
            )
        return self._reduce("hist", dim, edges=edges)

    def quantile(self, q: float | Sequence[float], dim: Any = None) -> "Expression":
        """Return quantiles: exact within a step; over steps from counts of bfloat16 values.

        The latter are within 1 part in 128 of the exact one.
        """
        many: tuple[Any, ...] = (q,) if isinstance(q, numbers.Real | str) else tuple(q)  # type: ignore
        if not all(isinstance(x, numbers.Real) and 0 <= float(x) <= 1 for x in many):
            raise QueryError(
                f"quantiles {list(many)}",
                why="a share lies between 0 and 1, and stands before the dimension",
                fix="such as quantile(0.5, 'weight')",
            )
        found = self._reduce("quantile", dim, q=tuple(map(float, many)))
        if isinstance(q, numbers.Real):
            return self._wrap(Pick(found.plan, "quantile", 0))
        return found

    def groupby(self, by: Any) -> "GroupBy":
        """Keep groups apart in the next reduction.

        Args:
            by: `tensor`, `unit` (the last axis of each tensor), `epoch`, `sample`, or labels: one
                for each sample of the data set, in its order.
        """
        others = next((scan.samples for scan in self.plan.scans() if scan.source), 0)
        return GroupBy(self, self.source.labels(by, others))

    def by(self, name: str) -> "Expression":
        """Add up by `tensor`, `unit`, `epoch` or `sample`."""
        return self.groupby(name).sum()

    def coarsen(self, step: int) -> "GroupBy":
        """Keep windows of so many steps apart in the next reduction, counted from step 0."""
        if step < 1:
            raise QueryError(f"windows of {step} steps", why="a window has steps", fix="1 or more")
        return GroupBy(self, Group("window", size=int(step)))

    def rename(self, **names: str) -> "Expression":
        """Give dimensions of an answer other names: `rename(rank="place")`."""
        plan = self.plan
        for old, new in names.items():
            self._has(old, old)
            if new in plan.dims or old in RAGGED:
                raise self._no_such("rename", new, "two dimensions of one name, or a ragged one")
            plan = Rename(plan, old, new)
        return self._wrap(plan)

    # ---- answers

    def compute(self, **options: Any) -> Any:
        """Replay what is needed and return a `Result`, an `xarray.Dataset`.

        Args:
            **options: `progress`, `memory` (bytes), `executor`, `exact`, `strategy`,
                `index`; see `replay.compute`.
        """
        return self.source.compute(self, **options)[0]

    def explain(self, **options: Any) -> str:
        """Tell what an answer takes: steps replayed, how, seconds, bytes. Nothing is executed."""
        return self.source.explain(self, **options)

    def plot(self, **options: Any) -> Any:
        """Compute, and draw the answer."""
        return self.compute(**options).plot()

    def cluster(self, k: int, *, windows: int = 16, seed: int = 0) -> Any:
        """Group weights by how they moved: k-means of their standardised histories.

        Args:
            k: how many clusters.
            windows: into how many spans of steps a history is summed.
            seed: of k-means.

        Returns:
            A `Result`: for each tensor the cluster of each weight, and `centres`, the mean history
            of each cluster (standardised, `[cluster, window]`).
        """
        return cluster(self, k, windows=windows, seed=seed)

    def __repr__(self) -> str:
        return "\n".join([f"Expression({', '.join(self.dims)})", *self.plan.lines("  ")])

    def _repr_html_(self) -> str:
        head, *rest = repr(self).splitlines()
        return f"<b>{html.escape(head)}</b><pre>{html.escape(chr(10).join(rest))}</pre>"

    # ---- within

    def _wrap(self, plan: Node) -> "Expression":
        return Expression(plan, self.source)

    def _map(self, function: str, *arguments: Any) -> "Expression":
        source, plans = self.source, []
        for argument in arguments:
            if isinstance(argument, Expression):
                plans.append(argument.plan)
                source = _joint(source, argument.source)
            elif isinstance(argument, bool | int | float | np.number | np.bool_):
                plans.append(argument.item() if isinstance(argument, np.generic) else argument)
            else:
                raise QueryError(
                    f"{type(argument).__name__} stands in an expression",
                    why="an expression combines quantities of runs and numbers",
                    fix="arrays come in by run.map(...)",
                )
        walked = {plan.walked for plan in plans if isinstance(plan, Node)} - {""}
        if len(walked) > 1:
            raise QueryError(
                "values of steps and of states are combined",
                why="step t leads from state t to state t+1: which of them is meant?",
                fix="weights.diff('state') and crosses(...) are values of steps",
            )
        check_parts(plans)
        return Expression(Map(function, tuple(plans)), source)

    def _reduce(self, how: str, dim: Any, by: Group | None = None, **settings: Any) -> "Expression":
        if dim is None:
            over = self.dims
            if by is not None and by.kind not in ("epoch", "window"):
                over = tuple(d for d in self.dims if d in _taken(by, self.dims))
            elif by is not None:
                over = tuple(d for d in self.dims if d in by.over)
        else:
            over = (dim,) if isinstance(dim, str) else tuple(dim)
        for name in over:
            self._has(name, name)
        if by is not None and not set(by.over) & set(over):
            raise QueryError(
                f"groups by {by} of a {how} over {' and '.join(over) or 'nothing'}",
                why=f"they part {' or '.join(by.over)}",
                fix=f"reduce over one of {', '.join(by.over)} as well; there are "
                f"{', '.join(self.dims)}",
            )
        settings_ = tuple(sorted(settings.items()))
        over = tuple(dim for dim in self.dims if dim in over)
        return self._wrap(Reduce(self.plan, how, over, settings_, by))

    def _edge(self, how: str, dim: str) -> "Expression":
        self._has(dim, how)
        if dim not in ("step", "state"):
            raise self._no_such(how, dim, "what comes first is asked of steps or states")
        return self._reduce(how, dim)

    def _take(self, anchor, last, first, *, before, inclusive) -> "Expression":
        self._has("step", "before and after")
        if last is not None and first is not None:
            raise QueryError(
                "both the first and the last are asked for",
                why="they may be the same ones",
                fix="two questions",
            )
        source = self.source
        if isinstance(anchor, Expression):
            if anchor.dims == ("weight",) and sum(part.size for part in anchor.plan.parts) == 1:
                anchor = anchor.max("weight")  # of the one weight that is chosen
            if anchor.dims:
                raise QueryError(
                    f"the anchor has dimensions {', '.join(anchor.dims)}",
                    why="an anchor is one step",
                    fix="reduce it: (...).first('step')",
                )
            source, anchor = _joint(source, anchor.source), anchor.plan
        near = before if first is None and last is None else last is not None
        count = last if last is not None else first
        plan = Take(self.plan, anchor, count, near, before, inclusive)
        return Expression(plan, source)

    def _of_samples(self, wanted: Any) -> "Expression":
        wanted = [wanted] if isinstance(wanted, numbers.Integral) else list(wanted)
        self._has("position", "sample")
        self._has("step", "sample")
        return self._wrap(Among(self.plan, tuple(sorted({int(sample) for sample in wanted}))))

    def _has(self, dim: str, what: str) -> None:
        if dim not in self.dims:
            raise self._no_such(what, dim, f"the expression has {', '.join(self.dims) or 'none'}")

    def _no_such(self, what: str, dim: str, why: str) -> QueryError:
        return QueryError(
            f"there is no dimension {dim!r} for {what}",
            why=why,
            fix=f"one of {', '.join(self.dims)}" if self.dims else "it is a single number",
        )


class GroupBy:
    """Groups that the next reduction keeps apart."""

    def __init__(self, expression: Expression, group: Group):
        if not set(group.over) & set(expression.dims):
            raise QueryError(
                f"groups by {group} of values over {', '.join(expression.dims) or 'nothing'}",
                why=f"they part {' or '.join(group.over)}",
                fix="group something that has that dimension",
            )
        own = {"position", "step"} & set(expression.dims)
        if group.kind in ("labels", "sample") and own == {"position"}:
            raise QueryError(
                f"groups by {group} are told apart after their steps were reduced",
                why="a position holds another sample at each step",
                fix="group first, and reduce steps with it or later",
            )
        self._expression, self._group = expression, group

    def __getattr__(self, name: str) -> Callable[..., Expression]:
        known = "sum mean count var std min max any all norm first last top_k hist quantile".split()
        if name not in known:
            raise AttributeError(f"groups have {', '.join(known)}, not {name!r}")
        return getattr(_Grouped(self._expression, self._group), name)

    def __repr__(self) -> str:
        return f"groups by {self._group} of {self._expression!r}"


class _Grouped(Expression):
    """An expression whose next reduction keeps groups apart."""

    def __init__(self, expression: Expression, group: Group):
        super().__init__(expression.plan, expression.source)
        self._group = group

    def _reduce(self, how: str, dim: Any, by: Group | None = None, **settings: Any) -> Expression:
        if how in ("first", "last") and isinstance(dim, str):
            dim = (dim, *(set(self._group.over) & set(self.dims) - {dim}))
        return super()._reduce(how, dim, self._group, **settings)


class Joined:
    """Quantities at the same steps and positions, side by side."""

    def __init__(self, parts: Mapping[str, Expression]):
        self.parts = dict(parts)
        taken = self.parts["sample"].plan
        if not isinstance(taken, Take):
            raise QueryError(
                "there is nothing to join to",
                why="columns are put beside occurrences that were taken",
                fix="run.samples.before(step, last=64).join(share=...)",
            )
        for name, other in self.parts.items():
            if isinstance(other.plan, Take):
                continue
            if "step" not in other.dims:
                raise QueryError(
                    f"{name} has no steps", why="it is looked up by them", fix="join such as has"
                )
            plan = dataclasses.replace(taken, child=other.plan, of=taken.child)
            self.parts[name] = Expression(plan, _joint(self.parts["sample"].source, other.source))

    def compute(self, **options: Any) -> Any:
        """Replay what is needed and return a `Result` with a variable for each part."""
        source = next(iter(self.parts.values())).source
        found = source.compute(*self.parts.values(), **options)
        return type(found[0]).beside(dict(zip(self.parts, found, strict=True)))

    def explain(self, **options: Any) -> str:
        """Tell what an answer takes."""
        return next(iter(self.parts.values())).source.explain(*self.parts.values(), **options)

    def __repr__(self) -> str:
        return "\n".join(f"{name} = {part!r}" for name, part in self.parts.items())


def _joint(first: Any, second: Any) -> Any:
    """Return a source that knows the runs of both."""
    return first if first is second else first.joint(second)


def _taken(group: Group, dims: tuple[str, ...]) -> set[str]:
    """Return what a reduction by groups goes over, where it is not told."""
    if group.kind in ("labels", "sample"):
        return {"step", "position", "sample"}
    return set(group.over) & set(dims)


def _positions(chosen: Any, known: np.ndarray, dim: str) -> np.ndarray:
    """Return the chosen steps or states; negative ones count from the end of those there are."""
    if isinstance(chosen, slice):
        last = int(known[-1]) + 1 if len(known) else 0
        wanted = np.arange(*chosen.indices(last))
        return np.intersect1d(known, wanted)
    single = isinstance(chosen, numbers.Integral)
    wanted = np.asarray([chosen] if single else list(chosen), np.int64)
    last = int(known[-1]) + 1 if len(known) else 0
    wanted = np.where(wanted < 0, wanted + last, wanted)
    missing = sorted(set(wanted.tolist()) - set(known.tolist()))
    if missing:
        span = f"{known[0]} to {known[-1]}" if len(known) else "none"
        raise QueryError(
            f"there is no {dim} {missing[0]}",
            why=f"there are {span} ({len(known):,} of them)",
            fix=f"choose among them, or by a slice: sel({dim}=slice(a, b))",
        )
    return np.unique(wanted)


def _entries(node: Node, dim: str, source: Source) -> int | None:
    """Return how many entries a dimension has, where the plan tells."""
    if dim == "position":
        return source.batches()
    if isinstance(node, Reduce):
        added = {"top_k": "rank", "hist": "bin", "quantile": "quantile"}.get(node.how)
        if dim == added:
            options = node.options
            return {"rank": options.get("k"), "bin": len(options.get("edges", ())) + 1}.get(
                dim, len(options.get("q", ()))
            )
        if node.by is not None and node.by.dim == dim and node.by.kind in ("labels", "sample"):
            return node.by.count
    found = (_entries(child, dim, source) for child in node.children if dim in child.dims)
    return next(found, None)


def _tensors(parts: tuple[Part, ...], wanted: Any) -> tuple[Part, ...]:
    patterns = [wanted] if isinstance(wanted, str) else list(wanted)
    names = [part.path for part in parts]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise QueryError(
                f"there is no tensor {pattern!r}",
                why="a tensor is named by its path",
                fix=f"one of {', '.join(names[:12])}",
            )
    return tuple(p for p in parts if any(fnmatch.fnmatch(p.path, x) for x in patterns))


def _weights(parts: tuple[Part, ...], wanted: Any) -> tuple[Part, ...]:
    if len(parts) != 1 or parts[0].indices is not None:
        raise QueryError(
            f"weights of {len(parts)} tensors are chosen by flat index",
            why="a flat index counts within one tensor",
            fix="choose the tensor first: sel(tensor=...), or x['Dense_0/kernel', 3, 7]",
        )
    (part,) = parts
    if isinstance(wanted, slice):
        wanted = range(*wanted.indices(part.size))
    indices: list[int] = [wanted] if isinstance(wanted, numbers.Integral) else list(wanted)  # type: ignore
    outside = [i for i in indices if not -part.size <= i < part.size]
    if outside:
        raise QueryError(
            f"{part.path} has no weight {outside[0]}",
            why=f"it has {part.size:,}, of shape {list(part.shape)}",
            fix="a flat index below that",
        )
    return (Part(part.path, part.shape, tuple(int(i) % part.size for i in indices)),)


def _flat(part: Part, index: Sequence[Any]) -> Any:
    """Return flat indices of what NumPy's indexing would choose."""
    places = np.arange(part.size).reshape(part.shape)
    try:
        return np.ravel(places[tuple(index)]).tolist()
    except IndexError as error:
        raise QueryError(
            f"{part.path} has no weight {list(index)}",
            why=f"its shape is {list(part.shape)}",
            fix="indices or slices within it, one for each axis or fewer",
        ) from error

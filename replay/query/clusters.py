"""Groups of weights that moved alike."""

from typing import Any

import numpy as np

from replay.errors import QueryError


def cluster(expression: Any, k: int, *, windows: int, seed: int) -> Any:
    """Group weights by k-means of their standardised, coarsened histories.

    Args:
        expression: a value of each step and weight, such as `run.updates`.
        k: how many clusters.
        windows: into how many spans of steps a history is summed.
        seed: of k-means.

    Raises:
        QueryError: it has other dimensions, or scikit-learn is missing.
    """
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError as error:
        raise QueryError(
            "scikit-learn is not installed",
            why="k-means is its own",
            fix="pip install 'jax-replay[demo]'",
        ) from error
    if expression.dims != ("step", "weight"):
        raise QueryError(
            f"clusters of {', '.join(expression.dims) or 'a number'}",
            why="a weight has a history of a number at each step",
            fix="run.updates.cluster(8), run.grads.cluster(8)",
        )
    count = len(expression.plan.steps)
    size = max(1, -(-count // windows))
    histories = expression.coarsen(step=size).sum("step").compute()
    names = [part.path for part in expression.plan.parts]
    flat = {name: histories[name].values.reshape(histories.sizes["window"], -1).T for name in names}
    rows = np.concatenate(list(flat.values()))
    scale = np.nan_to_num(rows).std(axis=1, keepdims=True)
    still = scale[:, 0] == 0
    rows = np.nan_to_num((rows - rows.mean(axis=1, keepdims=True)) / np.where(scale == 0, 1, scale))
    moving = int((~still).sum())
    if moving < k:
        raise QueryError(
            f"{k} clusters of {moving} weights that move", why="there are fewer", fix="a smaller k"
        )
    found = MiniBatchKMeans(k, random_state=seed, n_init="auto").fit(rows[~still])
    labels = np.full(len(rows), -1, np.int32)
    labels[~still] = found.labels_
    ends = np.cumsum([len(part) for part in flat.values()])[:-1]
    variables = {}
    for name, mine in zip(names, np.split(labels, ends), strict=True):
        shape = histories[name].shape[1:]
        variables[name] = (histories[name].dims[1:], mine.reshape(shape), {"tensor": name})
    variables["centres"] = (("cluster", "window"), found.cluster_centers_)
    attributes = {**histories.attrs, "windows": f"{size} steps each", "still": "-1: never moved"}
    sizes = np.bincount(labels[~still], minlength=k)
    coordinates = {"cluster": np.arange(k), "size": ("cluster", sizes)}
    return type(histories).of(variables, coordinates, attributes)

"""A statement of SQL means what DuckDB would have made of all rows, and reads only what it must."""

import dataclasses
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
import tiny
from jax.ad_checkpoint import checkpoint_name
from test_query import close, separate, truth, values
from tiny import compile_once  # noqa: F401  # the fixture is there for who imports it

import replay
from replay import QueryError, cli
from replay import plan as planning
from replay.query.sql import session as front
from replay.query.sql.lowering import Lowering

pa = pytest.importorskip("pyarrow")

LABELS = {"sample": np.arange(tiny.SAMPLES), "label": np.arange(tiny.SAMPLES) % 3}


@pytest.fixture(autouse=True, scope="module")
def nothing_remembered(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.record(tmp_path_factory.mktemp("sql") / "run")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return tiny.record(tmp_path_factory.mktemp("sql") / "other", order=tiny.ORDER.reversed(0))


@pytest.fixture(scope="module")
def settings(run, other):
    return {
        "tables": {"labels": LABELS},
        "runs": {"a": run, "b": other},
        "sources": {"test": tiny.DATA},
    }


# ------------------------------------------------------------------- the statements of the design

FIVE = (
    "SELECT tensor, weight, arg_max(sample, abs(value), 10) FROM sample_grads WHERE epoch = 3 "
    "GROUP BY ALL;",
    "SELECT tensor, weight, sum(abs(value)) AS path FROM updates GROUP BY ALL "
    "ORDER BY path DESC LIMIT 1000;",
    "SELECT x.state, avg(x.value) AS a, avg(y.value) AS b FROM a.test.sample_losses x "
    "JOIN b.test.sample_losses y USING (state, sample) WHERE state = 5000 GROUP BY ALL;",
    """WITH f AS (SELECT step, avg(CASE WHEN abs(value) > 1024 THEN 1.0 ELSE 0.0 END) p FROM grads GROUP BY step)
SELECT * FROM samples WHERE step < (SELECT min(step) FROM f WHERE p > 0.10) ORDER BY step DESC, position DESC LIMIT 64;
""",  # noqa: E501
    """WITH w AS (SELECT state, value, lag(value) OVER (ORDER BY state) prev FROM weights WHERE tensor = 'Dense_0/kernel' AND weight = 1234),
     hit AS (SELECT min(state) - 1 AS t FROM w WHERE prev <> 0 AND sign(value) <> sign(prev))
SELECT s.step, s.sample, u.value FROM samples s JOIN sample_updates u USING (step, position), hit
WHERE s.step <= hit.t AND u.tensor = 'Dense_0/kernel' AND u.weight = 1234 ORDER BY s.step DESC, s.position DESC LIMIT 100;
""",  # noqa: E501
)  # fmt: skip

OUTLIER = int(tiny.ORDER.bind(tiny.SAMPLES)[:][2, 1])  # seen first in step 2


def dense(params, example, key):
    layer = params["Dense_0"]
    hidden = jnp.tanh(example["x"] @ layer["kernel"] + layer["bias"])
    return (hidden.mean() - example["y"]) ** 2


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A run with a tensor `Dense_0/kernel`, whose gradients explode at step 2; and its truth."""
    random = np.random.Generator(np.random.Philox(7))
    kernel = random.normal(size=(20, 64)).astype(np.float32) * np.float32(0.1)
    kernel.reshape(-1)[1234] = -1e-5
    weights = {"Dense_0": {"kernel": kernel, "bias": np.zeros(64, np.float32)}}
    x = random.normal(size=(tiny.SAMPLES, 20)).astype(np.float32)
    y = np.zeros(tiny.SAMPLES, np.float32)
    x[OUTLIER], y[OUTLIER] = np.float32(0.5), 1e6
    data, optimizer = {"x": x, "y": y}, optax.sgd(1e-6, momentum=0.5)
    program = replay.Program(weights, dense, optimizer, name="dense")
    run = tiny.record(tmp_path_factory.mktemp("sql") / "dense", program, data)
    ids = tiny.ORDER.bind(tiny.SAMPLES)[:]
    weights = jax.tree.map(jnp.asarray, weights)
    expected = truth(
        lambda key: (weights, ()), separate(dense), optimizer, data, ids, tiny.KEY, everywhere=True
    )
    return run, expected, data


def test_which_samples_changed_each_weight_most(known):
    run, expected, _ = known
    found = run.sql(FIVE[0])
    each = np.abs(expected.sample_grads[12:16].reshape(16, -1))
    ids = expected.ids[12:16].reshape(-1)
    place = {name: expected.part(name).start for name in expected.sizes}
    asked = abs(run.sample_grads.sel(epoch=3)).top_k(10, dim=("step", "position")).compute()
    same = {
        name: asked[f"{name}.sample"].values.reshape(10, -1) for name in ("Dense_0/kernel",
                                                                         "Dense_0/bias")
    }  # fmt: skip
    assert len(found) == each.shape[1]
    for tensor, weight, samples in found.rows:
        assert samples == same[tensor][:, weight].tolist()
        column = each[:, place[tensor] + weight]
        told = column[[int(np.flatnonzero(ids == sample)[0]) for sample in samples]]
        close(told, -np.sort(-column)[:10], scale=each.max())
    assert found.attrs["grade"] == "BITWISE"


def test_which_weights_changed_most(known):
    run, expected, _ = known
    found = run.sql(FIVE[1])
    path = np.abs(expected.updates).sum(0)
    asked = abs(run.updates).sum("step").top_k(1000, dim="weight").compute()
    assert [row[2] for row in found.rows] == asked["value"].values.tolist()
    assert [row[0] for row in found.rows] == asked["tensor"].values.tolist()
    assert [row[1] for row in found.rows] == asked["weight"].values.tolist()
    close([row[2] for row in found.rows], -np.sort(-path)[:1000])
    assert "top_k over weight, k 1000" in found.attrs["plan"]


def test_two_runs_are_compared_on_the_same_samples(known, tmp_path):
    run, expected, data = known
    again = replay.open(run.path)
    settings = {"runs": {"a": run, "b": again}, "sources": {"test": data}}
    assert run.sql(FIVE[2], **settings).rows == []  # there is no state 5000
    ((state, a, b),) = run.sql(FIVE[2].replace("5000", "20"), **settings).rows
    asked = run.on(data).sample_losses.sel(state=20).mean().compute().item()
    assert (state, a, b) == (20, asked, asked)
    close(a, expected.others[20].mean())


def test_the_last_samples_before_an_explosion(known):
    run, expected, _ = known
    share = (np.abs(expected.grads) > 1024).mean(1)
    step = int(np.argmax(share > 0.10))
    assert step == 2
    found = run.sql(FIVE[3])
    wanted = [
        (t, 0, position, int(expected.ids[t, position]))
        for t in range(step - 1, -1, -1) for position in range(3, -1, -1)
    ]  # fmt: skip
    assert found.rows == wanted
    boom = ((abs(run.grads) > 1024).mean("weight") > 0.10).first("step")
    asked = run.samples.before(boom, last=64).compute()
    assert [row[3] for row in found.rows] == asked["value"].values.tolist()[::-1]


def test_the_samples_that_led_a_weight_across_zero(known):
    run, expected, _ = known
    series = expected.weights[:, expected.part("Dense_0/kernel")][:, 1234]
    side = np.sign(series)
    step = int(np.argmax((side[:-1] != 0) & (side[1:] != side[:-1])))
    assert step == 2
    found = run.sql(FIVE[4])
    w, share = run.weights["Dense_0/kernel"], run.sample_updates["Dense_0/kernel"]
    hit = w.sel(weight=1234).crosses(0.0).first("step")
    joined = run.samples.before(hit, last=100, inclusive=True).join(share=share.sel(weight=1234))
    asked = joined.compute()
    assert [row[0] for row in found.rows] == asked["step"].values.tolist()[::-1]
    assert [row[1] for row in found.rows] == asked["sample"].values.tolist()[::-1]
    assert [row[2] for row in found.rows] == asked["share"].values.tolist()[::-1]
    column = expected.shares[: step + 1, :, expected.part("Dense_0/kernel").start + 1234]
    close([row[2] for row in found.rows], column.reshape(-1)[::-1])
    assert "D(g)" in found.attrs["rule"]


# ---------------------------------------------------------------------------------- paraphrases

# The first of each kind is the statement of the design, for a smaller run.
SMALL = (
    FIVE[0],
    FIVE[1].replace("1000", "5"),
    FIVE[2].replace("5000", "20"),
    FIVE[3].replace("1024", "1.5"),
    FIVE[4].replace("Dense_0/kernel", "hidden").replace("1234", "4"),
)


def reductions(run, text, settings):
    """Return what a statement replays, anchors only within what they are anchors of."""
    session = run._session(
        front, settings["tables"], settings["runs"], settings["sources"], 10**6, {}
    )
    expressions, (rest, _) = front.questions_of(session, text)
    assert rest is not None
    nodes = {planning.canonical(x.plan) for x in expressions}
    anchors = {planning.canonical(t.anchor) for n in nodes for t in planning.takes(n)}
    return {plain(node) for node in nodes - anchors if any(map(planning.replayed, [node]))
            or planning.takes(node)}  # fmt: skip


def plain(node):
    """Leave out that a single state is reduced as well."""
    single = getattr(node, "over", ())[:1] == ("state",) and len(node.child.steps) == 1
    return dataclasses.replace(node, over=node.over[1:]) if single else node


PARAPHRASES = {
    0: (
        (
            "SELECT g.tensor, g.weight, arg_max(g.sample, abs(g.value), 10) AS who FROM "
            "sample_grads AS g WHERE g.epoch = 3 GROUP BY g.tensor, g.weight"
        ),
        (
            "SELECT tensor, weight, max_by(sample, abs(value), 10) FROM sample_grads WHERE epoch "
            "= 3 GROUP BY 1, 2"
        ),
        (
            "SELECT weight, tensor, arg_max(sample, abs(value), 10) w FROM sample_grads WHERE "
            "epoch IN (3) GROUP BY tensor, weight ORDER BY tensor, weight"
        ),
        (
            "WITH e AS (SELECT * FROM sample_grads WHERE epoch = 3) SELECT tensor, weight, "
            "arg_max(sample, abs(value), 10) FROM e GROUP BY ALL"
        ),
        (
            "WITH e AS (SELECT tensor, weight, sample, abs(value) AS size, epoch FROM "
            "sample_grads), f AS (SELECT * FROM e WHERE epoch = 3) SELECT tensor, weight, "
            "arg_max(sample, size, 10) FROM f GROUP BY ALL"
        ),
        (
            "SELECT tensor, weight, arg_max(sample, size, 10) FROM (SELECT *, abs(value) AS size "
            "FROM sample_grads) WHERE epoch BETWEEN 3 AND 3 GROUP BY ALL"
        ),
        (
            "SELECT tensor, weight, arg_max(sample, abs(value), 10) FROM sample_grads WHERE step "
            ">= 12 AND step < 16 GROUP BY ALL"
        ),
        (
            "SELECT tensor, weight, arg_max(sample, abs(value), 10) FROM sample_grads WHERE step "
            "BETWEEN 12 AND 15 GROUP BY ALL"
        ),
        (
            "SELECT tensor, weight, arg_max(sample, abs(value), 10) FROM sample_grads WHERE NOT "
            "epoch <> 3 GROUP BY ALL"
        ),
        (
            "SELECT tensor, weight, sample, step, position, abs(value) AS v FROM sample_grads "
            "WHERE epoch = 3 QUALIFY row_number() OVER (PARTITION BY tensor, weight ORDER BY "
            "abs(value) DESC) <= 10"
        ),
        (
            "SELECT * FROM (SELECT tensor, weight, sample, row_number() OVER (PARTITION BY "
            "tensor, weight ORDER BY abs(value) DESC) AS r FROM sample_grads WHERE epoch = 3) "
            "WHERE r <= 10"
        ),
        (
            "WITH r AS (SELECT tensor, weight, sample, row_number() OVER (PARTITION BY tensor, "
            "weight ORDER BY abs(value) DESC) AS place FROM sample_grads WHERE epoch = 3) SELECT "
            "tensor, weight, sample FROM r WHERE place < 11"
        ),
        (
            "SELECT tensor, weight, sample, row_number() OVER (PARTITION BY weight, tensor ORDER "
            "BY abs(value) DESC) AS place FROM sample_grads WHERE 3 = epoch QUALIFY 10 >= place"
        ),
        (
            "SELECT tensor, weight, max(abs(value), 10) AS sizes FROM sample_grads WHERE epoch = "
            "3 GROUP BY ALL"
        ),
    ),
    1: (
        (
            "SELECT tensor, weight, sum(abs(value)) AS path FROM updates GROUP BY tensor, weight "
            "ORDER BY path DESC LIMIT 5"
        ),
        (
            "SELECT tensor, weight, sum(abs(value)) AS path FROM updates GROUP BY ALL ORDER BY "
            "sum(abs(value)) DESC LIMIT 5"
        ),
        (
            "SELECT tensor, weight, sum(abs(value)) FROM updates GROUP BY 1, 2 ORDER BY 3 DESC "
            "LIMIT 5"
        ),
        (
            "SELECT u.tensor, u.weight, sum(abs(u.value)) path FROM updates u GROUP BY ALL ORDER "
            "BY path DESC NULLS LAST LIMIT 5"
        ),
        (
            "WITH p AS (SELECT tensor, weight, sum(abs(value)) AS path FROM updates GROUP BY "
            "ALL) SELECT * FROM p ORDER BY path DESC LIMIT 5"
        ),
        (
            "SELECT * FROM (SELECT tensor, weight, sum(abs(value)) AS path FROM updates GROUP BY "
            "ALL) ORDER BY path DESC LIMIT 5"
        ),
        (
            "WITH moved AS (SELECT tensor, weight, abs(value) AS size FROM updates), p AS "
            "(SELECT tensor, weight, sum(size) AS path FROM moved GROUP BY tensor, weight) "
            "SELECT tensor, weight, path FROM p ORDER BY path DESC LIMIT 5"
        ),
        (
            "SELECT tensor, weight, sum(size) AS path FROM (SELECT *, abs(value) AS size FROM "
            "updates) AS x GROUP BY ALL ORDER BY path DESC LIMIT 5"
        ),
        (
            "SELECT tensor, weight, sum(abs(value)) AS path FROM updates GROUP BY ALL ORDER BY "
            "path DESC LIMIT 3 OFFSET 2"
        ),
        (
            "SELECT path, weight, tensor FROM (SELECT sum(abs(value)) AS path, tensor, weight "
            "FROM updates GROUP BY weight, tensor) ORDER BY 1 DESC LIMIT 5"
        ),
        (
            "SELECT tensor, weight, sum(abs(value)) AS path FROM updates WHERE step >= 0 GROUP "
            "BY ALL ORDER BY path DESC LIMIT 5"
        ),
        (
            "SELECT tensor, weight, sum(abs(value)) FILTER (WHERE step >= 0) AS path FROM "
            "updates GROUP BY ALL ORDER BY path DESC LIMIT 5"
        ),
        (
            "SELECT tensor, weight, sum(abs(value)) AS path FROM updates GROUP BY ALL QUALIFY "
            "row_number() OVER (ORDER BY path DESC) <= 5"
        ),
        (
            "SELECT Tensor, WEIGHT, SUM(ABS(Value)) AS Path FROM Updates GROUP BY ALL ORDER BY "
            "PATH DESC LIMIT 5"
        ),
    ),
    2: (
        (
            "SELECT x.state, avg(x.value), avg(y.value) FROM a.test.sample_losses x, "
            "b.test.sample_losses y WHERE x.state = y.state AND x.sample = y.sample AND x.state "
            "= 20 GROUP BY x.state"
        ),
        (
            "SELECT x.state, avg(x.value) AS a, avg(y.value) AS b FROM a.test.sample_losses x "
            "JOIN b.test.sample_losses y ON x.state = y.state AND x.sample = y.sample WHERE "
            "y.state = 20 GROUP BY ALL"
        ),
        (
            "SELECT avg(x.value) AS a, avg(y.value) AS b FROM a.test.sample_losses x JOIN "
            "b.test.sample_losses y USING (sample, state) WHERE state = 20"
        ),
        (
            "WITH x AS (SELECT * FROM a.test.sample_losses WHERE state = 20), y AS (SELECT * "
            "FROM b.test.sample_losses WHERE state = 20) SELECT state, avg(x.value) AS a, "
            "avg(y.value) AS b FROM x JOIN y USING (state, sample) GROUP BY ALL"
        ),
        (
            "WITH x AS (SELECT state, avg(value) AS v FROM a.test.sample_losses GROUP BY state), "
            "y AS (SELECT state, avg(value) AS v FROM b.test.sample_losses GROUP BY state) "
            "SELECT x.state, x.v AS a, y.v AS b FROM x JOIN y USING (state) WHERE x.state = 20 "
            "AND y.state = 20"
        ),
        (
            "SELECT (SELECT avg(value) FROM a.test.sample_losses WHERE state = 20) AS a, (SELECT "
            "avg(value) FROM b.test.sample_losses WHERE state = 20) AS b"
        ),
        (
            "SELECT avg(value) FROM a.test.sample_losses WHERE state = 20 UNION ALL SELECT "
            "avg(value) FROM b.test.sample_losses WHERE state = 20"
        ),
        (
            "SELECT state, mean(x.value) AS a, mean(y.value) AS b FROM a.test.sample_losses x "
            "INNER JOIN b.test.sample_losses y USING (state, sample) GROUP BY state HAVING state "
            "= 20"
        ),
        (
            "SELECT x.state, avg(x.value) FILTER (WHERE x.state = 20), avg(y.value) FROM "
            "a.test.sample_losses x JOIN b.test.sample_losses y USING (state, sample) WHERE "
            "state IN (20) GROUP BY ALL"
        ),
        (
            "SELECT * FROM (SELECT x.state AS s, avg(x.value) AS a, avg(y.value) AS b FROM "
            "a.test.sample_losses x JOIN b.test.sample_losses y USING (state, sample) GROUP BY "
            "ALL) WHERE s = 20"
        ),
    ),
    3: (
        (
            "SELECT * FROM samples WHERE step < (SELECT min(step) FROM (SELECT step, avg(CASE "
            "WHEN abs(value) > 1.5 THEN 1.0 ELSE 0.0 END) p FROM grads GROUP BY step) f WHERE p "
            "> 0.10) ORDER BY step DESC, position DESC LIMIT 64"
        ),
        (
            "WITH f AS (SELECT step, avg((abs(value) > 1.5)::INT) p FROM grads GROUP BY step) "
            "SELECT * FROM samples WHERE step < (SELECT min(step) FROM f WHERE p > 0.10) ORDER "
            "BY step DESC, position DESC LIMIT 64"
        ),
        (
            "WITH f AS (SELECT step, avg(CAST(abs(value) > 1.5 AS DOUBLE)) p FROM grads GROUP BY "
            "step) SELECT * FROM samples WHERE (SELECT min(step) FROM f WHERE p > 0.10) > step "
            "ORDER BY step DESC, position DESC LIMIT 64"
        ),
        (
            "WITH f AS (SELECT step FROM grads GROUP BY step HAVING avg(CASE WHEN abs(value) > "
            "1.5 THEN 1.0 ELSE 0.0 END) > 0.10) SELECT * FROM samples WHERE step < (SELECT "
            "min(step) FROM f) ORDER BY step DESC, position DESC LIMIT 64"
        ),
        (
            "WITH f AS (SELECT step, avg(if(abs(value) > 1.5, 1, 0)) p FROM grads GROUP BY "
            "step), t AS (SELECT min(step) AS boom FROM f WHERE p > 0.10) SELECT s.* FROM "
            "samples s, t WHERE s.step < t.boom ORDER BY s.step DESC, s.position DESC LIMIT 64"
        ),
        (
            "WITH f AS (SELECT step, avg(CASE WHEN abs(value) > 1.5 THEN 1.0 ELSE 0.0 END) p "
            "FROM grads GROUP BY step), t AS (SELECT min(step) AS boom FROM f WHERE p > 0.10) "
            "SELECT s.step, s.epoch, s.position, s.sample FROM samples s CROSS JOIN t WHERE "
            "s.step + 1 <= boom ORDER BY s.step DESC, s.position DESC LIMIT 64"
        ),
        (
            "WITH f AS (SELECT step, avg(CASE WHEN abs(value) > 1.5 THEN 1.0 ELSE 0.0 END) p "
            "FROM grads GROUP BY step) SELECT * FROM samples JOIN (SELECT min(step) AS boom FROM "
            "f WHERE p > 0.10) t ON step < t.boom ORDER BY step DESC, position DESC LIMIT 64"
        ),
        (
            "WITH f AS (SELECT step, avg(CASE WHEN abs(value) > 1.5 THEN 1.0 ELSE 0.0 END) p "
            "FROM grads GROUP BY step) SELECT * FROM samples WHERE step < (SELECT min(step) "
            "FILTER (WHERE p > 0.10) FROM f) ORDER BY step DESC, position DESC LIMIT 64"
        ),
        (
            "WITH f AS (SELECT step, avg(CASE WHEN abs(value) > 1.5 THEN 1.0 ELSE 0.0 END) p "
            "FROM grads GROUP BY step) SELECT * FROM samples WHERE step < (SELECT min(CASE WHEN "
            "p > 0.10 THEN step END) FROM f) ORDER BY step DESC, position DESC LIMIT 64"
        ),
        (
            "WITH f AS (SELECT step, avg(CASE WHEN abs(value) > 1.5 THEN 1.0 ELSE 0.0 END) p "
            "FROM grads GROUP BY step) SELECT * FROM samples WHERE step < (SELECT step FROM f "
            "WHERE p > 0.10 ORDER BY step LIMIT 1) ORDER BY step DESC, position DESC LIMIT 64"
        ),
        (
            "WITH f AS (SELECT step, avg(CASE WHEN abs(value) > 1.5 THEN 1.0 ELSE 0.0 END) AS p "
            "FROM grads GROUP BY ALL) SELECT * FROM samples WHERE step <= (SELECT min(step) - 1 "
            "FROM f WHERE p > 0.10) ORDER BY epoch DESC, step DESC, position DESC LIMIT 64"
        ),
        (
            "WITH big AS (SELECT step, abs(value) > 1.5 AS loud FROM grads), f AS (SELECT step, "
            "avg(CASE WHEN loud THEN 1.0 ELSE 0.0 END) p FROM big GROUP BY step) SELECT * FROM "
            "samples WHERE step < (SELECT min(step) FROM f WHERE p > 0.10) ORDER BY step DESC, "
            "position DESC LIMIT 64"
        ),
    ),
    4: (
        (
            "WITH w AS (SELECT state, value, lag(value) OVER (ORDER BY state) prev FROM weights "
            "WHERE tensor = 'hidden' AND weight = 4), hit AS (SELECT min(state) - 1 AS t FROM w "
            "WHERE prev <> 0 AND sign(value) <> sign(prev)) SELECT s.step, s.sample, u.value "
            "FROM hit, samples s JOIN sample_updates u USING (step, position) WHERE s.step <= "
            "hit.t AND u.tensor = 'hidden' AND u.weight = 4 ORDER BY s.step DESC, s.position "
            "DESC LIMIT 100"
        ),
        (
            "WITH w AS (SELECT tensor, weight, state, value, lag(value) OVER (PARTITION BY "
            "tensor, weight ORDER BY state) prev FROM weights WHERE tensor = 'hidden' AND weight "
            "= 4), hit AS (SELECT min(state) - 1 AS t FROM w WHERE prev <> 0 AND sign(value) <> "
            "sign(prev)) SELECT u.step, u.sample, u.value FROM sample_updates u, hit WHERE "
            "u.step <= hit.t AND u.tensor = 'hidden' AND u.weight = 4 ORDER BY u.step DESC, "
            "u.position DESC LIMIT 100"
        ),
        (
            "WITH w AS (SELECT state, value, lag(value, 1) OVER (ORDER BY state) prev FROM "
            "weights WHERE weight = 4 AND tensor = 'hidden') SELECT s.step, s.sample, u.value "
            "FROM samples s JOIN sample_updates u ON s.step = u.step AND s.position = u.position "
            "WHERE s.step < (SELECT min(state) FROM w WHERE prev <> 0 AND sign(value) <> "
            "sign(prev)) AND u.tensor = 'hidden' AND u.weight = 4 ORDER BY s.step DESC, "
            "s.position DESC LIMIT 100"
        ),
        (
            "WITH w AS (SELECT state AS t, value, lead(value) OVER (ORDER BY state) AS next FROM "
            "weights WHERE tensor = 'hidden' AND weight = 4), hit AS (SELECT min(t) AS t FROM w "
            "WHERE value <> 0 AND sign(next) <> sign(value)) SELECT s.step, s.sample, u.value "
            "FROM samples s JOIN sample_updates u USING (step, position), hit WHERE s.step <= "
            "hit.t AND u.tensor = 'hidden' AND u.weight = 4 ORDER BY s.step DESC, s.position "
            "DESC LIMIT 100"
        ),
        (
            "WITH hit AS (SELECT min(b.state) - 1 AS t FROM weights a JOIN weights b ON b.state "
            "= a.state + 1 AND a.tensor = b.tensor AND a.weight = b.weight WHERE a.tensor = "
            "'hidden' AND a.weight = 4 AND a.value <> 0 AND sign(b.value) <> sign(a.value)) "
            "SELECT s.step, s.sample, u.value FROM samples s JOIN sample_updates u USING (step, "
            "position), hit WHERE s.step <= hit.t AND u.tensor = 'hidden' AND u.weight = 4 ORDER "
            "BY s.step DESC, s.position DESC LIMIT 100"
        ),
        (
            "SELECT s.step, s.sample, u.value FROM samples s JOIN sample_updates u USING (step, "
            "position), (SELECT min(state) - 1 AS t FROM (SELECT state, value, lag(value) OVER "
            "(ORDER BY state) prev FROM weights WHERE tensor = 'hidden' AND weight = 4) w WHERE "
            "prev <> 0 AND sign(value) <> sign(prev)) hit WHERE s.step <= hit.t AND u.tensor = "
            "'hidden' AND u.weight = 4 ORDER BY s.step DESC, s.position DESC LIMIT 100"
        ),
        (
            "WITH w AS (SELECT tensor, weight, state, value, lag(value) OVER (PARTITION BY "
            "tensor, weight ORDER BY state) prev FROM weights), hit AS (SELECT min(state) - 1 AS "
            "t FROM w WHERE tensor = 'hidden' AND weight = 4 AND prev <> 0 AND sign(value) <> "
            "sign(prev)) SELECT s.step, s.sample, u.value FROM samples s JOIN sample_updates u "
            "USING (step, position), hit WHERE s.step <= hit.t AND u.tensor = 'hidden' AND "
            "u.weight = 4 ORDER BY s.step DESC, s.position DESC LIMIT 100"
        ),
        (
            "WITH w AS (SELECT state, value, lag(value) OVER (ORDER BY state) prev FROM weights "
            "WHERE tensor = 'hidden' AND weight = 4), hit AS (SELECT min(state) AS t FROM w "
            "WHERE prev <> 0 AND sign(value) <> sign(prev)) SELECT s.step, s.sample, u.value "
            "FROM (SELECT * FROM sample_updates WHERE tensor = 'hidden' AND weight = 4) u JOIN "
            "samples s USING (step, position), hit WHERE s.step < hit.t ORDER BY s.step DESC, "
            "s.position DESC LIMIT 100"
        ),
        (
            "WITH w AS (SELECT state, value, lag(value) OVER (ORDER BY state) prev FROM weights "
            "WHERE tensor = 'hidden' AND weight = 4), hit AS (SELECT min(state) - 1 AS t FROM w "
            "WHERE prev <> 0 AND sign(value) <> sign(prev)) SELECT s.step, s.sample, u.value "
            "FROM samples s JOIN sample_updates u USING (step, position, sample), hit WHERE "
            "s.step <= hit.t AND u.tensor = 'hidden' AND u.weight = 4 ORDER BY s.step DESC, "
            "s.position DESC LIMIT 100"
        ),
    ),
}


@pytest.mark.parametrize(
    ("kind", "text"), [(kind, text) for kind, texts in PARAPHRASES.items() for text in texts]
)
def test_another_way_to_say_it_is_the_same_plan(run, settings, kind, text):
    assert reductions(run, text, settings) == reductions(run, SMALL[kind], settings)


def test_there_are_enough_paraphrases():
    assert sum(map(len, PARAPHRASES.values())) >= 50


# ------------------------------------------------------------- the same as of all rows, in DuckDB

QUICK = (
    (
        "SELECT label, avg(value), count(*) FROM sample_losses JOIN (SELECT * FROM labels WHERE "
        "sample < 7) k USING (sample) GROUP BY label"
    ),
    (
        "SELECT label, count(*) FROM sample_losses JOIN (SELECT * FROM labels UNION ALL SELECT * "
        "FROM labels) k USING (sample) GROUP BY label"
    ),
    (
        "SELECT step, sample, value FROM sample_losses WHERE value < 0.3 AND sample < 9 ORDER BY "
        "value DESC LIMIT 4"
    ),
    (
        "SELECT step, arg_max(sample, value) FILTER (WHERE value < 1), arg_max(label, value, 2) "
        "FROM sample_losses JOIN labels USING (sample) GROUP BY step ORDER BY 1"
    ),
    "SELECT tensor, min(step) FROM grads WHERE abs(value) > 0.7 GROUP BY tensor",
    "SELECT epoch, sum(value) FILTER (WHERE tensor = 'out') FROM grads GROUP BY epoch ORDER BY 1",
    "SELECT count(*), min(step), max(step) FROM grads WHERE epoch IN (1,2)",
    "SELECT label, avg(value) FROM sample_losses JOIN labels USING (sample) GROUP BY label",
    (
        "SELECT step, count(*) FILTER (WHERE value > 0) AS pos, sum(value) FILTER (WHERE value < "
        "-100) AS none FROM grads GROUP BY step ORDER BY step"
    ),
    (
        "SELECT step % 3 AS w, avg(value), max(value), count(*) FROM sample_losses GROUP BY w "
        "ORDER BY w"
    ),
    "SELECT * FROM samples WHERE step > 5 ORDER BY step, position LIMIT 6 OFFSET 2",
    (
        "SELECT s.step, loss, max(abs(value)) AS m FROM grads g JOIN steps s USING (step) WHERE "
        "loss > 1.5 GROUP BY ALL ORDER BY 1"
    ),
    "SELECT DISTINCT epoch, step FROM samples ORDER BY 2",
    (
        "SELECT b.state, sum(abs(b.value - a.value)) FROM weights a JOIN weights b ON b.state = "
        "a.state + 1 AND a.tensor = b.tensor AND a.weight = b.weight GROUP BY b.state ORDER BY 1"
    ),
    (
        "SELECT step, sample, value FROM sample_losses WHERE value > (SELECT avg(value) FROM "
        "sample_losses) ORDER BY step, position"
    ),
    (
        "SELECT step, arg_max(sample, value), arg_min(sample, value), max(value, 2), "
        "arg_max(position, value, 2) FROM sample_losses GROUP BY step ORDER BY step"
    ),
    (
        "SELECT * FROM (SELECT step, avg(value) a FROM sample_losses GROUP BY step) UNION ALL "
        "SELECT step, max(value) FROM sample_losses GROUP BY step ORDER BY 1, 2"
    ),
    (
        "SELECT epoch, count(*) FROM samples s WHERE EXISTS (SELECT 1 FROM labels l WHERE "
        "l.sample = s.sample AND l.label = 2) GROUP BY epoch ORDER BY 1"
    ),
    (
        "SELECT step, position, value FROM sample_losses WHERE position < 2 AND epoch = 0 ORDER "
        "BY ALL"
    ),
    (
        "SELECT coalesce(label, -1) AS l, count(*) FROM samples LEFT JOIN (SELECT * FROM labels "
        "WHERE label > 0) k ON samples.sample = k.sample GROUP BY l ORDER BY l"
    ),
    "SELECT tensor, sum(value) FROM grads WHERE step = 999 GROUP BY tensor",
    (
        "WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r WHERE n < 3) SELECT "
        "r.n, s.sample FROM r JOIN samples s ON s.step = r.n ORDER BY 1, position"
    ),
)

# Where NULL, rows that are left out, or DISTINCT could be mistaken for something else.
CORNERS = (
    "SELECT DISTINCT value FROM sample_losses",
    "SELECT count(*) FROM (SELECT DISTINCT abs(value) > 1 FROM grads)",
    "SELECT count(*) FROM sample_losses WHERE value::BOOLEAN",
    "SELECT sum(CASE WHEN value > 1e9 THEN value ELSE 0 END) FROM sample_losses WHERE value > 0",
    (
        "SELECT step % 3 AS m, min(value) FILTER (WHERE value > 1e9), avg(value) FILTER (WHERE "
        "value > 1e9) FROM sample_losses GROUP BY m ORDER BY m"
    ),
    "SELECT count(NULL) FROM samples",
    (
        "SELECT label, count(*) FILTER (WHERE step < 2), count(*) FILTER (WHERE step >= 22) FROM "
        "samples JOIN labels USING (sample) GROUP BY label"
    ),
    "SELECT approx_count_distinct(value) FILTER (WHERE step < 0) FROM grads",
    (
        "SELECT count(nullif(value, 0)), count(CASE WHEN value > 0 THEN NULL END), "
        "count(abs(value) + 1), count(nullif(value > 0, true)) FROM grads"
    ),
    (
        "SELECT count(*) FROM (SELECT step FROM samples ORDER BY step, position OFFSET 10) "
        "WHERE step > 5"
    ),
    (
        "SELECT * FROM (SELECT step, sum(value) s FROM sample_losses GROUP BY ROLLUP "
        "(step)) WHERE step = 3"
    ),
    (
        "SELECT epoch, position, count(*) FROM sample_losses GROUP BY GROUPING SETS "
        "((epoch), (position))"
    ),
    (
        "WITH w AS (SELECT state, tensor, weight, value, lag(value) OVER (PARTITION BY "
        "tensor, weight ORDER BY state) AS p FROM weights) SELECT state, sum(abs(p)) FROM w "
        "GROUP BY state ORDER BY state"
    ),
    (
        "WITH w AS (SELECT state, tensor, weight, value, lag(value) OVER (PARTITION BY "
        "tensor, weight ORDER BY state) AS p FROM weights) SELECT count(*) FROM w WHERE "
        "greatest(p, 0) >= 0"
    ),
    "SELECT step, position FROM samples ORDER BY step, position LIMIT 10%",
    (
        "SELECT count(*), sum(a.value) FROM sample_losses a JOIN sample_losses b ON a.step "
        "= b.step AND a.position = b.position AND a.sample = b.position"
    ),
    (
        "SELECT count(*), sum(a.value) FROM sample_losses a JOIN sample_losses b ON a.step "
        "= b.step AND a.position = b.position AND a.step = b.step + 1"
    ),
    "SELECT count(*) FROM (SELECT entropy(value) FROM sample_losses)",
    "SELECT min(step) FILTER (WHERE step > 1000), count() FROM samples",
    (
        "SELECT sum(CASE WHEN tensor = 'none' THEN value ELSE 0 END), sum(value) FILTER "
        "(WHERE tensor = 'none'), count(*) FILTER (WHERE tensor = 'none' AND value > 0), "
        "min(step) FILTER (WHERE tensor = 'none') FROM grads"
    ),
)

MORE_CORNERS = (
    (
        "SELECT count(*) FILTER (WHERE value), sum(CASE WHEN value THEN 1 ELSE 0 END), "
        "sum(CAST(CAST(value AS BOOLEAN) AS INT)), count(*) FILTER (WHERE NOT value AND 1) "
        "FROM sample_losses"
    ),
    (
        "SELECT step, bool_or(value::BOOLEAN), count_if(value > 1 AND value) FROM "
        "sample_losses GROUP BY step ORDER BY step"
    ),
    (
        "SELECT count(*) FROM (SELECT step, bool_or(value > 1.5) AS hit FROM sample_losses "
        "GROUP BY step) WHERE hit"
    ),
    (
        "SELECT sum(CASE WHEN CASE WHEN value > 0 THEN value < 1 ELSE value < -1 END THEN "
        "value END) FROM grads"
    ),
    "SELECT max(value > 1) FROM sample_losses WHERE value > 0.5",
    "SELECT sum(CASE WHEN value > 1e9 THEN value ELSE 0 END) FROM grads WHERE value > 0",
    (
        "SELECT epoch, sum(CASE WHEN value > 1e9 THEN value ELSE 0 END) FILTER (WHERE value "
        "> 0.5) FROM grads GROUP BY epoch ORDER BY 1"
    ),
    (
        "SELECT step % 3 AS m, min(value) FILTER (WHERE value > 1.5), sum(value) FILTER "
        "(WHERE value > 1.5), avg(value) FILTER (WHERE value > 1.5), bool_or(value > 2) "
        "FILTER (WHERE value > 1.5) FROM sample_losses GROUP BY m ORDER BY m"
    ),
    (
        "SELECT step % 3 AS m, sum(CASE WHEN tensor = 'none' THEN value ELSE 0 END), "
        "sum(value) FILTER (WHERE tensor = 'none'), sum(CASE WHEN tensor = 'none' THEN "
        "value ELSE 0 END) FILTER (WHERE value > 1e9) FROM grads GROUP BY m ORDER BY m"
    ),
    (
        "SELECT epoch, sum(value) FILTER (WHERE sample = 999), count(*) FILTER (WHERE "
        "sample = 999), sum(CASE WHEN sample = 999 THEN value ELSE 0 END) FROM "
        "sample_losses GROUP BY epoch ORDER BY 1"
    ),
    "SELECT DISTINCT 1 FROM grads WHERE value > 1e9",
    "SELECT count(try_cast(tensor AS INT)) FROM grads",
    "SELECT step, sum(value) s FROM sample_losses WHERE step < 3 GROUP BY ROLLUP (step)",
    (
        "SELECT count(*) FROM (SELECT coalesce(value - lag(value) OVER (PARTITION BY "
        "tensor, weight ORDER BY state), 0) AS d FROM weights) WHERE d >= 0"
    ),
    (
        "WITH w AS (SELECT state, tensor, weight, value, lag(value) OVER (PARTITION BY "
        "tensor, weight ORDER BY state) AS p FROM weights) SELECT sum(abs(p)) FROM w HAVING "
        "count(*) > 490"
    ),
    (
        "WITH w AS (SELECT state, tensor, weight, value, lag(value) OVER (PARTITION BY "
        "tensor, weight ORDER BY state) AS p FROM weights) SELECT tensor, weight, max(p) "
        "FROM w WHERE value > 0.99 GROUP BY tensor, weight"
    ),
    "SELECT value FROM sample_losses ORDER BY value DESC LIMIT 10%",
    (
        "SELECT a.step, a.sample, b.value FROM sample_losses a JOIN sample_losses b ON "
        "a.step = b.step AND a.position = b.position AND a.epoch = b.step ORDER BY 1, 2"
    ),
    (
        "SELECT g.step, avg(w.value * g.value) FROM grads g JOIN weights w ON g.step = "
        "w.state AND g.tensor = w.tensor AND g.weight = w.weight AND g.step = w.weight "
        "GROUP BY g.step ORDER BY 1"
    ),
    (
        "SELECT tensor, mean(value), product(value), geomean(abs(value)), list(weight) FROM "
        "weights WHERE state = 1 GROUP BY tensor ORDER BY 1"
    ),
)

MORE = (
    (
        "SELECT sum(CASE WHEN value > 1e9 THEN value ELSE 0 END), avg(CASE WHEN value > 0 THEN "
        "value END), avg(CASE WHEN value > 0 THEN value ELSE 0 END) FROM grads"
    ),
    (
        "SELECT epoch, tensor, sum(abs(value)), count(*), avg(value) FROM grads GROUP BY epoch, "
        "tensor"
    ),
    (
        "SELECT tensor, weight, sum(abs(value)) p, sum(value) net FROM updates GROUP BY ALL "
        "ORDER BY p DESC LIMIT 4"
    ),
    (
        "SELECT tensor || '!' AS t, weight % 2 AS odd, sum(value) FROM grads GROUP BY ALL ORDER "
        "BY ALL"
    ),
    (
        "SELECT tensor, max(abs(d)) FROM (SELECT tensor, weight, state, value - lag(value) OVER "
        "(PARTITION BY tensor, weight ORDER BY state) AS d FROM weights) GROUP BY tensor"
    ),
    (
        "WITH top AS (SELECT tensor, weight, sum(abs(value)) AS p FROM updates GROUP BY ALL "
        "ORDER BY p DESC LIMIT 3) SELECT state, w.tensor, w.weight, w.value FROM weights w JOIN "
        "top USING (tensor, weight) WHERE state % 8 = 0 ORDER BY 1,2,3"
    ),
    (
        "SELECT u.step, sqrt(sum(u.value * u.value)) AS norm, sum(u.value * g.value) AS dot FROM "
        "updates u JOIN grads g USING (step, tensor, weight) GROUP BY u.step ORDER BY 1"
    ),
    (
        "SELECT tensor, weight, label, sum(abs(value)) AS s FROM sample_updates JOIN labels "
        "USING (sample) WHERE epoch = 3 GROUP BY ALL QUALIFY row_number() OVER (PARTITION BY "
        "tensor, weight ORDER BY s DESC) <= 2"
    ),
    (
        "SELECT label, step, sum(abs(value)) FROM sample_grads JOIN labels USING (sample) WHERE "
        "value > 0 AND epoch = 1 GROUP BY ALL ORDER BY 1, 2"
    ),
    (
        "SELECT label, avg(value) AS m FROM sample_losses JOIN labels USING (sample) WHERE value "
        "> 0.5 GROUP BY label HAVING count(*) > 3 ORDER BY m DESC LIMIT 2"
    ),
    (
        "SELECT avg(m) FROM (SELECT step, avg(value) AS m FROM sample_losses GROUP BY step) "
        "WHERE step > 4"
    ),
    (
        "SELECT a.step, a.m, b.n FROM (SELECT step, avg(value) AS m FROM sample_losses GROUP BY "
        "step) a JOIN (SELECT step, max(abs(value)) AS n FROM grads GROUP BY step) b USING "
        "(step) ORDER BY 1"
    ),
    (
        "SELECT * FROM (SELECT tensor, epoch, sum(value) AS s FROM grads GROUP BY ALL) WHERE "
        "tensor = 'out' AND epoch > 2 ORDER BY 2"
    ),
    (
        "SELECT step, position, value FROM sample_losses WHERE sample IN (3, 5) ORDER BY value "
        "LIMIT 5"
    ),
    "SELECT epoch, count(*) FROM sample_losses WHERE value > 0.5 GROUP BY epoch ORDER BY 1",
    "SELECT tensor, weight, min(step) FROM grads WHERE abs(value) > 0.7 GROUP BY ALL ORDER BY ALL",
    "SELECT DISTINCT sample FROM samples WHERE step < 4 ORDER BY 1 LIMIT 5",
    "SELECT max(step), min(step) FROM sample_losses WHERE value > 3",
    "SELECT count(*), sum(value), avg(value), min(value) FROM grads WHERE value > 1e9",
    "SELECT count(*) FILTER (WHERE value > 1e9), sum(value) FILTER (WHERE value > 1e9) FROM grads",
    (
        "SELECT sum(CASE WHEN step < 4 THEN 1 ELSE 0 END), sum(CASE WHEN step < 4 THEN value "
        "ELSE 0 END) FROM grads"
    ),
    "SELECT epoch, sum(value) FILTER (WHERE step % 2 = 0) FROM grads GROUP BY epoch ORDER BY 1",
    "SELECT step, sum(value) FROM grads WHERE step % 2 = 0 OR epoch = 1 GROUP BY step ORDER BY 1",
    "SELECT step, sum(value) FROM grads WHERE step = 3 OR value > 0.5 GROUP BY step ORDER BY 1",
    (
        "SELECT w.state, l.loss, w.value FROM weights w JOIN steps l ON w.state = l.step WHERE "
        "w.tensor = 'out' AND w.weight = 2 ORDER BY 1"
    ),
    (
        "SELECT tensor, stddev(value), variance(value), stddev_pop(value) FROM weights WHERE "
        "state = 3 GROUP BY tensor ORDER BY 1"
    ),
    "SELECT step, median(value) FROM grads GROUP BY step ORDER BY 1",
    (
        "SELECT sample, arg_max(step, value), max(value) FROM sample_losses GROUP BY sample "
        "ORDER BY 1"
    ),
    (
        "SELECT label, tensor, sum(value), avg(value) FROM sample_grads JOIN labels USING "
        "(sample) WHERE epoch = 0 GROUP BY ALL ORDER BY ALL"
    ),
    (
        "SELECT label, epoch, avg(value) FROM sample_losses JOIN labels USING (sample) GROUP BY "
        "ALL ORDER BY 1, 2"
    ),
    (
        "SELECT s.step, s.sample, u.value FROM samples s JOIN sample_updates u USING (step, "
        "sample) WHERE u.tensor = 'out' AND u.weight = 0 AND s.step < 3 ORDER BY ALL"
    ),
    (
        "SELECT state, max(abs(a.value - b.value)) FROM a.weights a JOIN b.weights b USING "
        "(state, tensor, weight) WHERE tensor = 'out' GROUP BY state ORDER BY 1"
    ),
    (
        "SELECT step, epoch, sum(value) AS s FROM updates GROUP BY step, epoch HAVING s > 0 "
        "ORDER BY step"
    ),
    (
        "SELECT tensor, weight FROM updates GROUP BY tensor, weight HAVING sum(abs(value)) > 1.5 "
        "ORDER BY ALL"
    ),
    (
        "SELECT count(*) FROM (SELECT tensor, weight FROM updates GROUP BY tensor, weight HAVING "
        "sum(abs(value)) > 1.5)"
    ),
    "SELECT max(p) FROM (SELECT tensor, weight, sum(abs(value)) AS p FROM updates GROUP BY ALL)",
    (
        "SELECT tensor, arg_max(weight, p, 2) FROM (SELECT tensor, weight, sum(abs(value)) AS p "
        "FROM updates GROUP BY ALL) GROUP BY tensor ORDER BY 1"
    ),
    (
        "SELECT arg_max(tensor, p) FROM (SELECT tensor, weight, sum(abs(value)) AS p FROM "
        "updates GROUP BY ALL)"
    ),
    (
        "SELECT x.step, y.step AS next, x.m - y.m FROM (SELECT step, avg(value) m FROM "
        "sample_losses GROUP BY step) x JOIN (SELECT step, avg(value) m FROM sample_losses GROUP "
        "BY step) y ON y.step = x.step + 1 ORDER BY 1"
    ),
    (
        "SELECT step, value, lag(value) OVER (ORDER BY step) FROM grads WHERE tensor = 'out' AND "
        "weight = 1 ORDER BY step"
    ),
    (
        "SELECT step, value - lag(value) OVER (ORDER BY step) AS d FROM grads WHERE tensor = "
        "'out' AND weight = 1 QUALIFY d > 0 ORDER BY step"
    ),
    (
        "SELECT tensor, weight, count(*) FROM (SELECT tensor, weight, state, value, lag(value) "
        "OVER (PARTITION BY tensor, weight ORDER BY state) AS p FROM weights) WHERE sign(p) <> "
        "sign(value) AND p <> 0 GROUP BY ALL ORDER BY ALL"
    ),
    (
        "SELECT s.epoch, avg(l.value) FROM samples s JOIN sample_losses l USING (step, position) "
        "GROUP BY s.epoch ORDER BY 1"
    ),
    "SELECT count(*) FROM sample_losses WHERE step >= (SELECT max(step) - 2 FROM samples)",
    (
        "SELECT avg(value) FROM sample_losses WHERE step = (SELECT arg_max(step, m) FROM (SELECT "
        "step, avg(value) m FROM sample_losses GROUP BY step))"
    ),
    "SELECT position, sum(value) FROM sample_losses WHERE step < 5 GROUP BY position ORDER BY 1",
    "SELECT upper(tensor) AS t, round(sum(value), 1) FROM grads GROUP BY t ORDER BY t",
    (
        "SELECT tensor, approx_quantile(weight, 0.5) FROM weights WHERE state = 0 GROUP BY "
        "tensor ORDER BY 1"
    ),
    (
        "SELECT s.step, l.label, count(*) AS n FROM samples s LEFT JOIN labels l ON l.sample = "
        "s.sample WHERE l.label = 1 GROUP BY ALL ORDER BY 1"
    ),
    (
        "SELECT * FROM steps s JOIN (SELECT step, max(value) AS worst FROM sample_losses GROUP "
        "BY step) m USING (step) ORDER BY worst DESC LIMIT 3"
    ),
    "SELECT step FROM samples INTERSECT SELECT step FROM steps WHERE loss > 2 ORDER BY 1",
    (
        "SELECT state, value FROM weights WHERE tensor LIKE 'o%' AND weight IN (SELECT "
        "min(weight) FROM weights) AND state < 4 ORDER BY 1"
    ),
    "SELECT 100 * avg(CAST(abs(value) > 0.5 AS INT)) AS percent FROM grads",
    (
        "SELECT epoch, label, tensor, max(abs(value)) FROM sample_grads JOIN labels USING "
        "(sample) GROUP BY ALL ORDER BY ALL LIMIT 9"
    ),
    (
        "SELECT step, count(*) AS n FROM grads WHERE value IS NOT NULL GROUP BY step ORDER BY "
        "step LIMIT 3"
    ),
    "SELECT sample, step FROM samples ORDER BY sample, step LIMIT 5",
    (
        "SELECT step, sample FROM samples WHERE step BETWEEN (SELECT min(step) FROM steps WHERE "
        "loss < 1) AND 5 ORDER BY ALL"
    ),
    "SELECT count(*) FROM sample_grads",
    "SELECT tensor, count(*) AS n, sum(value) FROM updates GROUP BY tensor",
    (
        "SELECT epoch, avg(value), var_pop(value), stddev_samp(value) FROM sample_losses GROUP "
        "BY epoch"
    ),
    (
        "SELECT sample, avg(value) AS m, count(*) FROM sample_losses GROUP BY sample ORDER BY m "
        "DESC LIMIT 3"
    ),
    (
        "SELECT l.label, tensor, sum(abs(u.value)) FROM sample_updates u JOIN labels l ON "
        "l.sample = u.sample WHERE epoch = 3 GROUP BY ALL"
    ),
    (
        "SELECT tensor, weight, arg_max(label, s, 2) FROM (SELECT tensor, weight, label, "
        "sum(abs(value)) AS s FROM sample_updates JOIN labels USING (sample) WHERE epoch = 3 "
        "GROUP BY ALL) GROUP BY ALL"
    ),
    (
        "SELECT step, sum(value*value) FROM grads GROUP BY step HAVING sum(value*value) > 3 "
        "ORDER BY step"
    ),
    "SELECT step // 6 AS w, avg(value) FROM sample_losses GROUP BY w ORDER BY w",
    "SELECT sum(CASE WHEN value > 0 THEN value ELSE 0 END) FROM grads WHERE tensor = 'out'",
    "SELECT min(value), max(value), avg(value) FROM weights WHERE state = 24",
    "SELECT * FROM weights WHERE tensor = 'out' AND state BETWEEN 3 AND 5",
    "SELECT tensor, weight, value FROM weights WHERE state = 24 ORDER BY abs(value) DESC LIMIT 5",
    "SELECT step, tensor, weight, value FROM grads ORDER BY value LIMIT 7",
    "SELECT * FROM samples ORDER BY step DESC, position DESC LIMIT 10",
    "SELECT * FROM steps WHERE loss > 1.5 ORDER BY step",
    "SELECT sample, count(*) FROM samples GROUP BY sample ORDER BY 1",
    "SELECT DISTINCT tensor FROM grads ORDER BY 1",
    (
        "SELECT g.step, avg(w.value * g.value) FROM grads g JOIN weights w ON g.step = w.state "
        "AND g.tensor = w.tensor AND g.weight = w.weight GROUP BY g.step ORDER BY 1"
    ),
    (
        "SELECT state, sqrt(sum((x.value - y.value) * (x.value - y.value))) AS d FROM a.weights "
        "x JOIN b.weights y USING (state, tensor, weight) GROUP BY state ORDER BY state"
    ),
    (
        "SELECT sample, avg(value) FROM sample_losses WHERE sample IN (SELECT sample FROM labels "
        "WHERE label = 1) GROUP BY sample ORDER BY 1"
    ),
    (
        "SELECT step, avg(value) OVER (ORDER BY step ROWS 3 PRECEDING) AS m FROM (SELECT step, "
        "avg(value) AS value FROM sample_losses GROUP BY step) ORDER BY step"
    ),
    (
        "SELECT step, tensor, weight, value, row_number() OVER (PARTITION BY step ORDER BY "
        "abs(value) DESC) AS r FROM grads QUALIFY r <= 2 ORDER BY step, r"
    ),
    (
        "SELECT tensor, median(value), quantile_cont(value, 0.25) FROM weights WHERE state = 4 "
        "GROUP BY tensor"
    ),
    (
        "SELECT step, bool_or(value > 1.5), bool_and(abs(value) < 2), max(position) FROM "
        "sample_losses GROUP BY step ORDER BY step"
    ),
    "SELECT count(DISTINCT sample) FROM samples WHERE epoch < 2",
    "SELECT state, avg(value) FROM test.sample_losses GROUP BY state ORDER BY state",
    (
        "SELECT sample, value FROM test.sample_losses WHERE state = 24 AND value > 1 ORDER BY "
        "value DESC"
    ),
    (
        "SELECT label, state, avg(value) FROM test.sample_losses JOIN labels USING (sample) "
        "WHERE state IN (0, 24) GROUP BY ALL ORDER BY 1, 2"
    ),
    (
        "SELECT step FROM (SELECT step, avg(CASE WHEN abs(value) > 0.3 THEN 1.0 ELSE 0.0 END) p "
        "FROM grads GROUP BY step) WHERE p > 0.3 ORDER BY step LIMIT 1"
    ),
    (
        "SELECT s.sample, o.sample FROM a.samples s JOIN b.samples o USING (step, position) "
        "WHERE step = 3 ORDER BY position"
    ),
    "SELECT tensor, weights, shape FROM tensors ORDER BY tensor",
    (
        "SELECT avg(value) FROM sample_losses WHERE step < (SELECT min(step) FROM grads WHERE "
        "abs(value) > 0.9)"
    ),
    (
        "SELECT max(step) FROM (SELECT step, max(abs(value)) AS m FROM grads GROUP BY step) "
        "WHERE m > 0.9"
    ),
    (
        "SELECT epoch, sample, sum(value) FROM sample_grads WHERE tensor = 'out' GROUP BY epoch, "
        "sample ORDER BY 1, 2"
    ),
    (
        "SELECT step, label, sum(value) FROM sample_losses JOIN labels USING (sample) GROUP BY "
        "ALL ORDER BY 1,2"
    ),
    (
        "SELECT step, position, sample, sqrt(sum(value * value)) AS norm FROM sample_grads GROUP "
        "BY ALL ORDER BY norm DESC LIMIT 5"
    ),
    "SELECT count(*) FROM grads WHERE value > 0.5 AND step > 3",
    "SELECT step, count(*) FROM grads WHERE abs(value) > 0.5 GROUP BY step ORDER BY step",
    "SELECT avg(value) FROM grads WHERE step = 999",
    "SELECT 1 + 1 AS two",
    (
        "SELECT u.sample, sum(u.value) FROM sample_updates u WHERE u.tensor = 'out' AND u.weight "
        "= 3 GROUP BY u.sample ORDER BY 2 LIMIT 3"
    ),
    (
        "SELECT s.step, s.position, u.value, l.label FROM samples s JOIN sample_updates u USING "
        "(step, position) JOIN labels l ON l.sample = s.sample WHERE u.tensor='out' AND "
        "u.weight=1 AND s.epoch=2 ORDER BY ALL"
    ),
    "SELECT weight, sum(value) FROM grads GROUP BY weight ORDER BY weight",
    "SELECT step, sum(value) AS s FROM carried_updates GROUP BY step ORDER BY s LIMIT 3",
    "SELECT position, avg(value) FROM sample_losses GROUP BY position ORDER BY position",
    (
        "SELECT CASE WHEN label = 0 THEN 'zero' ELSE 'other' END AS kind, avg(value) FROM "
        "sample_losses JOIN labels USING (sample) GROUP BY kind ORDER BY kind"
    ),
)


@pytest.fixture(scope="module")
def everything():
    """Return tables of all rows, by name, read once."""
    return {}


def of_all_rows(run, text, settings, everything):
    """Read every table that a statement names, whole, and let DuckDB alone answer."""
    session = run._session(
        front, settings["tables"], settings["runs"], settings["sources"], 10**6, {}
    )
    node = session.prepared(text, None)
    for name, reference in session.references.items():
        if session.relation(name) is None:
            continue
        title = reference.title
        if title not in everything:
            everything[title] = run.sql(f"SELECT * FROM {title}", **settings).to_arrow()
        session._small(name, everything[title])
    rest = Lowering(session.relation, session.query, 10**6, None).statement(node)
    return front.Table(session.query(rest), {}).rows


def alike(found, wanted):
    if isinstance(found, list | tuple) and isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(alike, found, wanted))
    if isinstance(found, float) and isinstance(wanted, int | float):
        if math.isnan(found) or math.isnan(wanted):
            return math.isnan(found) and math.isnan(wanted)
        return math.isclose(found, wanted, rel_tol=2e-5, abs_tol=1e-6)
    return found == wanted


def in_order(row):
    """Sort by what is no float first: of floats that are nearly equal either may come first."""
    floats = [(math.isnan(x), x) for x in row if isinstance(x, float)]
    return [str(x) for x in row if not isinstance(x, float)], floats


def check(run, text, settings, everything):
    found = run.sql(text, **settings).rows
    wanted = of_all_rows(run, text, settings, everything)
    if "ORDER BY" not in text.rpartition(")")[2]:
        found, wanted = sorted(found, key=in_order), sorted(wanted, key=in_order)
    assert alike(found, wanted)


@pytest.mark.parametrize("text", [*QUICK, *CORNERS])
def test_a_statement_means_what_duckdb_makes_of_all_rows(run, settings, everything, text):
    check(run, text, settings, everything)


@pytest.mark.full
@pytest.mark.parametrize("text", [*MORE, *MORE_CORNERS, *SMALL])
def test_more_statements_mean_what_duckdb_makes_of_all_rows(run, settings, everything, text):
    check(run, text, settings, everything)


@pytest.mark.full
@pytest.mark.parametrize("text", [text for texts in PARAPHRASES.values() for text in texts])
def test_paraphrases_mean_what_duckdb_makes_of_all_rows(run, settings, everything, text):
    check(run, text, settings, everything)


PADDED = (
    "SELECT epoch, count(*), avg(value) FROM sample_losses GROUP BY epoch ORDER BY 1",
    "SELECT position, count(*), avg(value) FROM sample_losses GROUP BY position ORDER BY 1",
    "SELECT label, count(*), avg(value) FROM sample_losses JOIN labels USING (sample) "
    "GROUP BY label ORDER BY 1",
    "SELECT step, arg_max(sample, value, 4), arg_min(label, value) FROM sample_losses "
    "JOIN labels USING (sample) GROUP BY step ORDER BY 1",
    "SELECT * FROM samples ORDER BY step DESC, position DESC LIMIT 7",
)


def test_padding_has_no_rows(tmp_path):
    data = {name: rows[:14] for name, rows in tiny.DATA.items()}
    order = replay.Order.shuffled(batch_size=4, epochs=2, seed=2, pad=True)
    run = tiny.record(tmp_path / "padded", data=data, order=order)
    labels = {name: column[:14] for name, column in LABELS.items()}
    settings, known = {"tables": {"labels": labels}, "runs": {}, "sources": {}}, {}
    assert run.sql("SELECT count(*) FROM samples").item() == 28
    for text in PADDED:
        check(run, text, settings, known)


TAGGED = (
    "SELECT unit, avg(abs(value)) FROM activations('hidden') GROUP BY unit ORDER BY 1",
    "SELECT x.unit, max(value) FROM activations('hidden') x WHERE epoch = 1 GROUP BY x.unit "
    "ORDER BY 2 DESC LIMIT 2",
    "SELECT label, unit, avg(value) FROM activations('hidden') JOIN labels USING (sample) "
    "GROUP BY ALL ORDER BY ALL",
    "SELECT state, unit, avg(value) FROM a.test.activations('hidden') WHERE state % 12 = 0 "
    "GROUP BY ALL ORDER BY ALL",
)


def test_activations_are_tables_by_the_name_that_the_loss_gave_them(tmp_path):
    def loss(params, example, key):
        hidden = checkpoint_name(jnp.tanh(example["x"] @ params["hidden"]), "hidden")
        return (hidden @ params["out"] - example["y"]) ** 2

    run = tiny.record(tmp_path / "tagged", tiny.program(loss))
    tables = {"labels": LABELS}
    settings = {"tables": tables, "runs": {"a": run}, "sources": {"test": tiny.DATA}}
    known = {}
    for text in TAGGED:
        check(run, text, settings, known)


# ---------------------------------------------------------------------------- NaN and infinity


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    """A run whose losses overflow: infinity and NaN in the gradients from some step on."""
    program = tiny.program(rate=1e4)
    order = replay.Order.shuffled(batch_size=4, epochs=2, seed=1)
    with pytest.warns(RuntimeWarning, match="recording goes on"):
        return tiny.record(tmp_path_factory.mktemp("sql") / "nan", program, order=order)


def test_comparisons_with_nan_are_false_however_they_are_answered(diverged):
    grads = np.concatenate([
        values(diverged.grads.compute())
    ])  # fmt: skip
    assert np.isnan(grads).any()
    large = int((np.abs(grads) > 1000).sum())
    lowered = diverged.sql("SELECT count(*) FROM grads WHERE abs(value) > 1000")
    assert "sum over step and weight" in lowered.attrs["plan"] and lowered.item() == large
    by_rows = diverged.sql(
        "SELECT count(DISTINCT (step, tensor, weight)) FROM grads WHERE abs(value) > 1000"
    )
    assert by_rows.item() == large
    in_duckdb = diverged.sql(
        "SELECT sum(CASE WHEN big THEN 1 ELSE 0 END) FROM (SELECT abs(v) > 1000 AS big FROM "
        "(SELECT value AS v, row_number() OVER () AS r FROM grads))"
    )
    assert in_duckdb.item() == large


def test_extremes_hand_nan_on_and_rankings_put_it_first(diverged):
    assert math.isnan(diverged.sql("SELECT min(value) FROM grads").item())
    assert math.isnan(diverged.sql("SELECT max(value) FROM grads").item())
    assert math.isnan(
        diverged.sql("SELECT min(value) FROM (SELECT DISTINCT value FROM grads)").item()
    )
    assert diverged.sql("SELECT count(*) FROM (SELECT DISTINCT value FROM grads) HAVING "
                        "max(value) > 3").rows == []  # fmt: skip
    for order in ("", " DESC"):
        lowered = diverged.sql(f"SELECT value FROM grads ORDER BY value{order} LIMIT 3")
        assert "top_k" in lowered.attrs["plan"]
        rows = diverged.sql(
            f"SELECT value FROM (SELECT DISTINCT value FROM grads) ORDER BY 1{order}"
        )
        assert math.isnan(lowered.rows[0][0]) and math.isnan(rows.rows[0][0])


@pytest.mark.parametrize("how", ["min", pytest.param("max", marks=pytest.mark.full)])
def test_extremes_of_some_rows_hand_on_the_nan_of_those_rows(diverged, how):
    rows = "(SELECT DISTINCT step, value FROM grads)"
    first = diverged.sql(f"SELECT min(step) FROM {rows} WHERE isnan(value)").item()
    for condition, spoiled in ((f"step < {first}", False), (f"step <= {first}", True)):
        asked = f"SELECT {how}(value) FILTER (WHERE {condition}) FROM "
        lowered, by_rows = (diverged.sql(asked + table) for table in ("grads", rows))
        assert f"{how} over" in lowered.attrs["plan"] and f"{how} over" not in by_rows.attrs["plan"]
        assert math.isnan(lowered.item()) == math.isnan(by_rows.item()) == spoiled
        assert spoiled or lowered.item() == by_rows.item()
    over = diverged.sql(
        f"SELECT step, {how}(value) OVER (PARTITION BY step) AS m FROM {rows} ORDER BY step"
    )
    apart = {step: math.isnan(m) for step, m in over.rows}
    assert apart[first] and not any(apart[step] for step in range(first))


# ------------------------------------------------------------- parameters, names, limits, refusals


def test_parameters_are_values_by_place_or_by_name(run):
    by_place = run.sql("SELECT count(*) FROM samples WHERE epoch = ? AND sample < ?",
                       parameters=[2, 5]).item()  # fmt: skip
    named = {"epoch": 2, "limit": 5}
    by_name = run.sql(
        "SELECT count(*) FROM samples WHERE epoch = $epoch AND sample < $limit", parameters=named
    ).item()
    assert by_place == by_name == 5
    several = run.sql("SELECT count(*) FROM samples WHERE sample = ANY($1)", parameters=[[1, 2]])
    assert several.item() == 12


def test_a_name_is_a_value_and_never_text_of_the_statement(run):
    name = "hidden' OR tensor = 'out"
    found = run.sql("SELECT count(*) FROM weights WHERE tensor = $1", parameters=[name])
    assert found.item() == 0


def test_tensors_with_names_of_sql_are_only_names(tmp_path):
    name = "x'; DROP TABLE weights; --"

    def loss(params, example, key):
        return jnp.sum(params[name]) * example["y"]

    program = replay.Program({name: np.ones(2, np.float32)}, loss, optax.sgd(0.1))
    order = replay.Order.sequential(batch_size=4, epochs=1)
    run = tiny.record(tmp_path / "run", program, order=order)
    found = run.sql("SELECT tensor, count(*) AS n FROM weights GROUP BY tensor")
    assert found.rows == [(name, 10)]
    assert run.sql("SELECT count(*) FROM weights WHERE tensor = $1", parameters=[name]).item() == 10


REFUSED = {
    "SELECT * FROM nothing": "there is no table 'nothing' in line 1",
    "SELECT *\nFROM updates,\n c.updates": "there is no table 'c.updates' in line 3",
    "SELECT step,\n valu FROM grads": "there is no column 'valu' in line 2",
    "SELECT g.sample FROM grads g": "there is no column 'sample' in line 1",
    "SELECT * FROM activations('none')": "cannot answer for activations",
    "SELECT 1; SELECT 2": "2 statements",
    "": "0 statements",
    "SELECT FROM WHERE": "the statement cannot be parsed",
    "DROP TABLE weights": "a statement of DROP",
    "INSERT INTO weights VALUES (1)": "a statement of INSERT",
    "CREATE TABLE x AS SELECT 1": "a statement of CREATE",
    "COPY (SELECT 1) TO 'x.csv'": "a statement of COPY",
    "ATTACH 'x.db'": "a statement of ATTACH",
    "INSTALL httpfs": "a statement of",
    "LOAD httpfs": "a statement of",
    "SET threads = 1": "a statement of SET",
    "SELECT * FROM read_csv('/etc/passwd')": "there is no table",
    "SELECT * FROM read_text('/etc/passwd')": "there is no table",
    "SELECT * FROM '/etc/passwd'": "there is no table '/etc/passwd'",
    "SELECT * FROM glob('/*')": "there is no table",
    "SELECT * FROM LABELS_OF_PYTHON": "there is no table 'LABELS_OF_PYTHON'",
    "SELECT count(*) FROM samples WHERE step = ?": "the parameter 1 has no value",
    "SELECT step, sum(value) FROM grads": "DuckDB refuses the statement",
    "SELECT count(*) FROM samples USING SAMPLE 10": "rows are chosen at random",
    "SELECT count(*) FROM samples TABLESAMPLE 10%": "rows are chosen at random",
}

LABELS_OF_PYTHON = LABELS


@pytest.mark.parametrize("text", REFUSED)
def test_what_has_no_meaning_is_refused_with_advice(run, text):
    with pytest.raises(QueryError) as caught:
        run.sql(text)
    assert REFUSED[text] in caught.value.what
    assert caught.value.why and caught.value.fix


def test_unknown_names_tell_those_that_exist(run):
    with pytest.raises(QueryError) as caught:
        run.sql("SELECT value FROM sample_grad")
    assert "sample_grads" in caught.value.fix
    with pytest.raises(QueryError) as caught:
        run.sql("SELECT label FROM sample_grads")
    assert "sample_grads has step, epoch, position, sample, tensor, weight, value" in str(
        caught.value
    )


def test_the_database_reaches_no_file_and_cannot_be_unlocked():
    with front._database() as database:
        for text in (
            "SELECT * FROM read_csv('/etc/passwd')",
            "COPY (SELECT 1) TO '/tmp/never.csv'",
            "ATTACH '/tmp/never.db'",
            "INSTALL httpfs",
            "LOAD httpfs",
            "SET enable_external_access = true",
            "SET lock_configuration = false",
            "SELECT * FROM LABELS",
        ):
            with pytest.raises(front.duckdb.Error):
                database.execute(text)


def test_what_would_read_too_many_rows_is_refused_before_anything_is_replayed(run, monkeypatch):
    monkeypatch.setattr(type(run.asking), "compute", lambda *a, **o: pytest.fail("replayed"))
    with pytest.raises(QueryError) as caught:
        run.sql("SELECT * FROM sample_grads", limit_rows=1000)
    assert caught.value.what == "1,920 rows of sample_grads would be read one by one"
    assert "limit_rows" in caught.value.fix
    with pytest.raises(QueryError) as caught:
        run.sql("SELECT tensor, list(value) FROM grads GROUP BY tensor", limit_rows=100)
    assert "has no counterpart on the device" in caught.value.why
    with pytest.raises(QueryError) as caught:
        run.sql("SELECT median(value) FROM grads", limit_rows=100)
    assert "approx_quantile" in caught.value.why


def test_what_is_ranked_on_the_device_is_not_read(run):
    found = run.sql(
        "SELECT tensor, weight, sum(abs(value)) AS path FROM updates GROUP BY ALL "
        "ORDER BY path DESC LIMIT 3", limit_rows=3,
    )  # fmt: skip
    assert len(found) == 3
    with pytest.raises(QueryError, match="20 rows"):
        run.sql("SELECT tensor, weight, sum(abs(value)) FROM updates GROUP BY ALL", limit_rows=3)


def test_a_missing_extra_is_told_with_the_command_that_installs_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "replay.query.sql.session", None)
    monkeypatch.delattr("replay.query.sql.session")
    with pytest.raises(QueryError) as caught:
        run.sql("SELECT 1")
    assert "pip install 'jax-replay[sql]'" in caught.value.fix


def test_an_anchor_that_never_happens_gives_no_rows(run):
    found = run.sql(
        "SELECT * FROM samples WHERE step < (SELECT min(step) FROM grads WHERE value > 1e30) "
        "ORDER BY step DESC, position DESC LIMIT 5"
    )
    assert found.rows == [] and found.columns == ["step", "epoch", "position", "sample"]
    assert run.sql("SELECT min(step) FROM grads WHERE value > 1e30").rows == [(None,)]


def test_explaining_replays_nothing(run, monkeypatch):
    monkeypatch.setattr(type(run.asking), "compute", lambda *a, **o: pytest.fail("replayed"))
    told = run.explain_sql(SMALL[3])
    assert "take last 64 before the step that is found" in told
    assert "mean over weight" in told
    assert "replay up to 24 steps" in told and "then DuckDB runs" in told
    log = run.explain_sql("SELECT step, loss FROM steps")
    assert "nothing is asked of a run but what its log tells" in log


@pytest.mark.parametrize("name", ["cache", "index"])
def test_what_is_explained_is_what_would_be_asked(run, monkeypatch, name):
    given = {}
    monkeypatch.setattr(type(run.asking), "explain", lambda *a, **o: given.update(o) or "")
    run.explain_sql("SELECT max(value) FROM grads", **{name: False})
    assert given == {name: False}


def test_the_steps_of_all_replays_are_told(run):
    chosen = "SELECT DISTINCT CASE WHEN value > 0 THEN 23 ELSE 0 END AS state FROM sample_losses"
    first = run.sql(chosen)
    assert first.rows == [(23,)]
    second = run.sql("SELECT value FROM weights WHERE state = 23")
    both = run.sql(f"SELECT value FROM weights JOIN ({chosen}) USING (state)")
    assert both.rows == second.rows and second.attrs["steps"] > 0
    assert both.attrs["steps"] == first.attrs["steps"] + second.attrs["steps"]


# ------------------------------------------------------------------------------------- interchange


def test_arrow_pandas_and_polars_read_the_answer(run):
    polars = pytest.importorskip("polars")
    found = run.sql("SELECT step, tensor, avg(value) AS mean FROM grads GROUP BY ALL ORDER BY 1, 2")
    assert found.to_arrow().column_names == found.columns == ["step", "tensor", "mean"]
    assert found.df()["tensor"].tolist()[:2] == ["hidden", "out"]
    frame = polars.DataFrame(found)
    assert frame.shape == (48, 3) and frame["mean"].to_list() == found.df()["mean"].tolist()
    again = run.sql("SELECT sum(mean) FROM t", tables={"t": frame}).item()
    assert again == run.sql("SELECT sum(mean) FROM t", tables={"t": found.df()}).item()
    assert again == run.sql("SELECT sum(mean) FROM t", tables={"t": found}).item()
    with pytest.raises(QueryError, match="the table 't' is a int"):
        run.sql("SELECT * FROM t", tables={"t": 3})


def test_an_answer_is_printed_and_escaped(run):
    found = run.sql("SELECT '<b>' AS \"<i>\", NULL AS nothing, count(*) AS Samples FROM samples")
    assert found.columns == ["<i>", "nothing", "Samples"]
    assert repr(found).splitlines()[1].split() == ["<b>", "NULL", "96"]
    assert "<i>" not in found._repr_html_() and "&lt;b&gt;" in found._repr_html_()
    assert found.attrs["grade"] == "LOGGED" and "remaining" in found.attrs
    with pytest.raises(QueryError, match="no single value"):
        found.item()


# --------------------------------------------------------------------------------- command line


def replay_sql(capsys, *words):
    code = cli.main(list(words))
    return code, capsys.readouterr()


def test_the_command_line_prints_a_table_or_csv_or_json(run, capsys):
    text = "SELECT tensor, count(*) AS n FROM weights WHERE state = 0 GROUP BY tensor ORDER BY n"
    code, printed = replay_sql(capsys, "sql", run.path, text)
    assert code == 0 and "hidden   15" in printed.out and "2 rows; 0 steps" in printed.out
    _, printed = replay_sql(capsys, "sql", run.path, text, "--csv")
    assert printed.out == "tensor,n\nout,5\nhidden,15\n"
    _, printed = replay_sql(capsys, "sql", run.path, text, "--json")
    assert [json.loads(line) for line in printed.out.splitlines()] == [
        {"tensor": "out", "n": 5},
        {"tensor": "hidden", "n": 15},
    ]


def test_the_command_line_takes_other_runs_and_tables_and_writes_parquet(
    run, other, capsys, tmp_path
):
    (tmp_path / "labels.csv").write_text("sample,label\n0,a\n1,b\n2,a\n")
    text = (
        "SELECT label, count(*) AS n FROM b.samples JOIN labels USING (sample) "
        "GROUP BY label ORDER BY label"
    )
    named = ["--run", f"b={other.path}", "--table", f"labels={tmp_path / 'labels.csv'}"]
    out = tmp_path / "rows.parquet"
    code, printed = replay_sql(capsys, "sql", run.path, text, *named, "--parquet", str(out))
    assert code == 0 and "2 rows are in" in printed.out
    assert run.sql("SELECT * FROM t", tables={"t": pd.read_parquet(out)}).rows == [
        ("a", 12),
        ("b", 6),
    ]


def test_the_command_line_explains_and_refuses(run, capsys):
    text = "SELECT step, max(abs(value)) FROM grads GROUP BY step"
    for words in (["explain", run.path, text], ["sql", run.path, text, "--explain"]):
        code, printed = replay_sql(capsys, *words)
        assert code == 0 and "max over weight" in printed.out and "replay 24 steps" in printed.out
    code, printed = replay_sql(capsys, "sql", run.path, "SELECT * FROM nothing")
    assert code == 2 and "there is no table 'nothing'" in printed.err
    code, printed = replay_sql(capsys, "sql", run.path, text, "--table", "labels")
    assert code == 2 and "NAME=VALUE" in printed.err

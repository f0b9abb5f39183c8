"""SQL about recorded runs; an extra, imported only where it is asked for.

`session` knows names, limits and the database, `answers` what it returns, `nan` what DuckDB has to
be told of NaN; `lowering` takes statements apart, `select` one `SELECT`, `aggregates` its groups;
`relations` are what tables of runs are before a replay, `formulas` what stands in their columns.
"""

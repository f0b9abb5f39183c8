"""The statistics of experiments/bench_record.py, and that its loops train the same model."""

import dataclasses
import math

import numpy as np
import pytest

from experiments import bench_record as bench

SETTINGS = bench.Settings(resamples=500)


def test_a_median_lies_in_its_interval_which_narrows_with_more_measurements():
    noise = np.random.default_rng(0).normal(1.0, 0.1, 400)
    few, many = bench.median(noise[:20], SETTINGS), bench.median(noise, SETTINGS)
    assert few.low < few.value < few.high
    assert many.high - many.low < 0.5 * (few.high - few.low)
    assert many.low < 1.0 < many.high


def test_a_median_is_the_same_at_every_call():
    values = [1.0, 1.1, 1.3, 0.9, 1.2]
    assert bench.median(values, SETTINGS) == bench.median(values, SETTINGS)


def test_one_disturbed_block_does_not_move_a_median():
    assert bench.median([1.0] * 29 + [50.0], SETTINGS) == (1.0, 1.0, 1.0)


def test_a_target_is_missed_where_only_the_upper_end_exceeds_it():
    estimate = bench.Estimate(1.05, 1.0, 1.11)
    assert bench.Figure("ratio", estimate, limit=1.10).met is False
    assert bench.Figure("ratio", estimate, limit=1.11).met is True
    assert bench.Figure("ratio", estimate).met is None


def test_a_figure_prints_its_interval_and_its_verdict():
    figure = bench.Figure("2 ms step: step / jit", bench.Estimate(1.05, 1.0, 1.11), limit=1.1)
    assert str(figure).split() == "2 ms step: step / jit 1.05 [1, 1.11] <= 1.1 NOT MET".split()
    assert str(bench.Figure("log", bench.counted(12.0), "bytes")).split() == ["log", "12", "bytes"]


def test_a_stall_is_what_exceeds_the_steps_before_the_checkpoint():
    seconds = np.array([[2.0, 2.0, 3.0, 2.5, 2.0], [4.0, 4.0, 4.0, 4.0, 5.0]])
    found = bench.stalls(seconds, at=2)
    assert {name: extra.tolist() for name, extra in found.items()} == {
        "": [1.0, 0.0],
        " and next step": [1.5, 0.0],
        " and 2 steps": [1.5, 1.0],
    }


def test_a_permutation_carries_fewer_bits_an_entry_than_free_ids_do():
    assert bench.permutation_bits(3) == pytest.approx(math.log2(6) / 3, rel=1e-12)
    # Stirling: log2(N!) / N is log2(N) - log2(e), and a little more.
    assert 15.167 < bench.permutation_bits(100_000) < math.log2(100_000) - 1.44


def test_the_quick_settings_measure_every_section_of_the_full_ones():
    quick = SETTINGS.quick()
    assert quick.cases.keys() == SETTINGS.cases.keys()
    for case in quick.cases.values():
        assert case.rounds
        if {"scan", "block"} & set(case.loops):
            # They run in chunks and take whole ones, also up to the middle of an interval.
            assert case.block % quick.chunk == 0
            assert case.interval // 2 % quick.chunk == 0


@pytest.mark.full
def test_all_loops_train_the_same_model_on_the_same_samples(tmp_path):
    case = bench.Case("mlp", (8,), 16, 8, interval=64, block=64, rounds=1)
    losses = {}
    for name in ("jit", "scan", "step", "block", "orbax"):
        with bench.open_loop(name, case, SETTINGS, tmp_path) as loop:
            loop.advance(128)
            loop.wait()
            losses[name] = loop.loss()
    assert losses["jit"] < 2.2  # from ln 10
    assert losses["orbax"] == losses["jit"]
    # They are compiled differently, which may round differently in each step.
    for name in ("scan", "step", "block"):
        assert losses[name] == pytest.approx(losses["jit"], rel=1e-3)


@pytest.mark.full
def test_the_transformer_draws_the_same_dropout_in_every_loop(tmp_path):
    case = bench.Case("transformer", (8,), 4, 8, interval=64, block=64, rounds=1)
    losses = {}
    for name in ("jit", "step"):
        with bench.open_loop(name, case, SETTINGS, tmp_path) as loop:
            loop.advance(3)
            losses[name] = loop.loss()
    assert losses["step"] == pytest.approx(losses["jit"], rel=1e-4)


def test_a_case_cannot_be_changed_while_it_is_measured():
    with pytest.raises(dataclasses.FrozenInstanceError):
        bench.CASES["2 ms"].batch = 1  # type: ignore[misc]

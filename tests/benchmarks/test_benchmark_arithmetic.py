"""The benchmark's own arithmetic and table; the measurement itself is `make bench`."""

from __future__ import annotations

import pytest

from engine.measure.results import RequestRecord
from tests.benchmarks import cpu_vs_transformers as bench


def test_both_engines_are_timed_by_the_same_arithmetic():
    # two requests of three tokens at 10.5, 10.6, 10.8 s, submitted at 10.0 s
    theirs = bench._figures(10.0, [[10.5, 10.6, 10.8]] * 2, 100)
    request = RequestRecord(0, 0.0, 128, 3, 0, 500.0, 150.0, 800.0, [100.0, 200.0], "length", 0, 0, 0)
    ours = bench._figures(0.0, [bench._moments(request)] * 2, 100)
    assert theirs.output_tokens_s == pytest.approx(6 / 0.8)
    assert theirs.decode_tokens_s == pytest.approx(4 / 0.3)
    assert theirs.ttft_ms == pytest.approx(500.0)
    assert (ours.output_tokens_s, ours.decode_tokens_s, ours.ttft_ms) == pytest.approx(
        (theirs.output_tokens_s, theirs.decode_tokens_s, theirs.ttft_ms)
    )


def test_every_cell_of_ours_has_a_partner_in_the_same_dtype_and_batch():
    cells = bench.cells()
    assert len(set(cells)) == len(cells)
    for cell in cells:
        assert bench.Cell(bench.THEIRS, cell.dtype, "model", cell.batch) in cells


def test_the_table_shows_medians_spread_and_the_ratio():
    values = {}
    for cell in bench.cells():
        speed = 30.0 if cell.engine == bench.OURS else 20.0
        values[cell] = [bench.Figures(speed + noise, 2 * speed, 100.0, 10) for noise in (-0.3, 0.0, 0.3)]
    document = bench._document(values, {}, 3, 64)
    table = bench.markdown(document).splitlines()
    assert len(table) == 4 + len(bench.cells())
    ours = next(line for line in table if line.startswith("| headroom | bfloat16 | int4 | 8 "))
    assert "30.0 (29.7–30.3)" in ours
    assert "1.50 (1.48–1.52)" in ours
    assert "*" not in ours


def test_a_disturbed_measurement_is_marked_in_the_table():
    quiet, busy = bench.Figures(20.0, 40.0, 100.0, 10, 0.02), bench.Figures(20.0, 40.0, 100.0, 10, 0.5)
    values = {cell: [busy if cell.batch == 8 else quiet] for cell in bench.cells()}
    table = bench.markdown(bench._document(values, {}, 1, 64)).splitlines()
    marked = [line for line in table if line.endswith("* |")]
    assert len(marked) == len(bench.cells()) // len(bench.BATCHES)
    assert "not a fair figure" in table[-1]


def test_a_measurement_is_repeated_while_others_disturb_it_and_the_result_does_not_decide(monkeypatch):
    shares = iter([0.5, 0.2, 0.3])
    speeds = iter([9.0, 5.0, 7.0])
    monkeypatch.setattr(bench.OtherLoad, "share", lambda self: next(shares))
    kept = bench.measure_undisturbed(lambda: bench.Figures(next(speeds), 1.0, 1.0, 1), float("inf"))
    assert (kept.output_tokens_s, kept.others_share) == (5.0, 0.2)  # the least disturbed, not the fastest
    shares, speeds = iter([0.05]), iter([3.0])
    assert (
        bench.measure_undisturbed(lambda: bench.Figures(next(speeds), 1.0, 1.0, 1), float("inf")).others_share == 0.05
    )


def test_work_of_another_process_is_seen_as_load_of_others():
    import subprocess
    import sys

    load = bench.OtherLoad()
    subprocess.run(
        [sys.executable, "-c", "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass"]
    )
    assert load.share() > 0.05

"""The comparison with TRL runs, and both of its sides learn."""

import re

import pytest

from tests.test_readme_and_examples import ROOT, run


@pytest.mark.slow
def test_learning_side_by_side(tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("matplotlib")
    out = run([ROOT / "examples/benchmarks/learning.py", "--seeds", 2, "--completions", 1536], tmp_path)
    assert "no --model given: the stories are left out" in out and "## Stories" not in out
    report = (tmp_path / "outputs/benchmarks/learning.md").read_text()
    assert "6 rollouts of 256 completions, 8 to a prompt" in report and "2 seeds" in report
    rows = {name: cells for name, *cells in re.findall(r"\| ([^|]+) \| ([\d.]+) ± [\d.]+ \| ([\d.]+) ± [\d.]+ \|", report)}
    before = float(re.search(r"held-out accuracy \(([\d.]+) before\)", report)[1])
    for side in (0, 1):
        assert float(rows["reward, last quarter"][side]) > float(rows["reward, first quarter"][side]) + 0.05
        assert float(rows[f"held-out accuracy ({before} before)"][side]) > before + 0.1
    assert (tmp_path / "outputs/benchmarks/learning.png").stat().st_size > 10_000

"""The comparisons with TRL run, both of their sides learn, and the tables say what was measured."""

import json
import re
from itertools import count

import pytest

from tests.test_readme_and_examples import ROOT, run

BENCHMARKS = ROOT / "examples/benchmarks"
TINY = {"vocabulary": 64, "hidden": 32, "layers": 2, "heads": 2, "intermediate": 64}


@pytest.fixture
def parts(monkeypatch):
    """The folder from which `speed_parts` is imported, here and in what a test starts."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def work(folder, **changes):
    from speed_parts.work import Work, build

    build(str(folder), **TINY, positions=64)
    shape = {"prompt": 6, "group": 2, "new_tokens": 8, "problems": 2, "passes": 1} | changes
    return Work(str(folder), TINY["vocabulary"], **shape, device="cpu", dtype="float32", threads=1)


@pytest.mark.slow
def test_learning_side_by_side(tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("matplotlib")
    out = run([BENCHMARKS / "learning.py", "--seeds", 2, "--completions", 1536], tmp_path)
    assert "--model is not set: skipping the stories task" in out and "## Stories" not in out
    report = (tmp_path / "outputs/benchmarks/learning.md").read_text()
    assert "6 rollouts of 256 completions, 8 per prompt" in report and "2 seeds" in report
    rows = {name: cells for name, *cells in re.findall(r"\| ([^|]+) \| ([\d.]+) ± [\d.]+ \| ([\d.]+) ± [\d.]+ \|", report)}
    before = float(re.search(r"held-out accuracy \(([\d.]+) before\)", report)[1])
    for side in (0, 1):
        assert float(rows["reward, last quarter"][side]) > float(rows["reward, first quarter"][side]) + 0.05
        assert float(rows[f"held-out accuracy ({before} before)"][side]) > before + 0.1
    assert (tmp_path / "outputs/benchmarks/learning.png").stat().st_size > 10_000


@pytest.mark.slow
def test_speed_side_by_side(tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("matplotlib")
    shape = ["--prompts", 6, "--groups", 4, "--new-tokens", 8, "--problems", 3, "--passes", 3, "--repeats", 2]
    out = run([BENCHMARKS / "speed.py", *shape, *(x for name, value in TINY.items() for x in (f"--{name}", value))], tmp_path)
    numbers = json.loads((tmp_path / "outputs/benchmarks/speed.json").read_text())
    (same,) = numbers["checks"]
    assert same["loss_here"] == pytest.approx(same["loss_trl"], rel=1e-4, abs=1e-6) and abs(same["loss_here"]) > 1e-5
    assert same["gradient"] < 1e-4 and same["log_probs"] < 1e-4
    series = {(s["job"], s["side"]): s for s in numbers["series"]}
    assert series.keys() == {("rollout", "here"), ("rollout", "generate"), ("step", "here"), ("step", "TRL")}
    for (job, _), measured in series.items():
        assert measured["tokens"] == 3 * 4 * 8 and measured["died"] is None and len(measured["seconds"]) == 2
        assert measured["peak"] > measured["before"] > 10**8  # torch alone takes more
        for turn in measured["seconds"]:
            has = {phase for phase, seconds in turn.items() if seconds > 0}
            assert has == ({"generate", "other"} if job == "rollout" else set(turn))
            assert turn["other"] < 0.5 * sum(turn.values())
    assert "| 6 | 4 | here |" in out and "| 6 | 4 | TRL |" in out
    assert (tmp_path / "outputs/benchmarks/speed.png").stat().st_size > 10_000

    (tmp_path / "other.json").write_text(json.dumps({**numbers, "settings": {**numbers["settings"], "problems": 2}}))
    again = [BENCHMARKS / "speed.py", "--out", "again", "--numbers", "outputs/benchmarks/speed.json"]
    assert run(again, tmp_path).split("saved")[0] == "\n" + out[out.index("# Speed") :].split("saved")[0]
    with pytest.raises(AssertionError, match="settings of all files must be equal"):
        run([*again, "other.json"], tmp_path)


@pytest.mark.slow
def test_nothing_is_timed_where_the_losses_differ(parts, tmp_path, monkeypatch, capfd):
    pytest.importorskip("trl")
    from speed_parts import check

    monkeypatch.setattr("sys.argv", ["check", work(tmp_path).to_argument()])
    trainer_of = check.grpo_trainer

    def with_another_beta(*arguments):
        trainer = trainer_of(*arguments)
        trainer.beta *= 1.5
        return trainer

    monkeypatch.setattr(check, "grpo_trainer", with_another_beta)
    with pytest.raises(SystemExit, match=r"the loss is -?[\d.e-]+ here and -?[\d.e-]+ in TRL: they differ by more than"):
        check.compare(check.work_of_this_process(), str(tmp_path / "outputs"))


def test_a_side_that_does_less_work_is_refused(parts, tmp_path):
    import torch
    from speed_parts.worker import GENERATE, Worker
    from transformers import AutoModelForCausalLM

    task = work(tmp_path, new_tokens=32)
    sound = Worker(GENERATE, task)
    sound.ready()
    sound.turn(series := sound.series("rollout"), counts=True)
    sound.close()
    assert series.tokens == 2 * 2 * 32 and len(series.seconds) == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.get_input_embeddings().weight[-1, 0] = 1.0  # the end token is now likelier than others
    model.save_pretrained(tmp_path)
    short = Worker(GENERATE, task)
    short.ready()
    with pytest.raises(SystemExit, match=r"a rollout of generate has \d+ response tokens; expected 128"):
        short.turn(short.series("rollout"), counts=True)
    short.close()


def test_every_moment_of_a_turn_belongs_to_the_innermost_phase(parts, monkeypatch):
    from speed_parts.line import Phases

    class Step:
        def update(self):
            clock()
            self.generate()
            return "done"

        def generate(self):
            clock()
            clock()

    ticks = count()
    clock = lambda: next(ticks)  # noqa: E731 - a second passes with every look at it
    monkeypatch.setattr("time.perf_counter", clock)
    phases, step = Phases("cpu"), Step()
    phases.time(step, "update", "update")
    phases.time(step, "generate", "generate")
    phases.begin()
    clock()
    assert step.update() == "done"
    phases.end()
    # Looks at the clock: begin 0, then 1, into update 2, in it 3, into generate 4, in it 5 and 6, out of it 7, out 8, end 9.
    assert phases.seconds == {"generate": 3, "reward": 0, "reference": 0, "update": 2 + 1, "other": 2 + 1}
    assert 0 <= min(phases.cpu_seconds.values()) <= sum(phases.cpu_seconds.values()) < 1  # no CPU seconds passed


def test_speed_is_told_in_medians_and_their_ratios(parts):
    from speed_parts.tables import Results, report
    from speed_parts.worker import Series

    def step(side, group, seconds, peak, died=None, cpu_share=1 / 2):
        wall = [{"generate": s / 4, "reward": 0.0, "reference": 0.0, "update": s * 3 / 4, "other": 0.0} for s in seconds]
        cpu = [{phase: s * cpu_share for phase, s in turn.items()} for turn in wall]
        return Series("step", side, 1024, group, 1, 8 * group, 2**20, peak * 2**20, wall, cpu, died)

    found = [
        step("here", 4, [2.0, 9.0, 1.0], 100),  # median 2
        step("here", 16, [4.0, 3.0, 5.0], 200, cpu_share=3 / 4),  # median 4
        step("TRL", 4, [8.0, 8.0, 0.5], 400),  # median 8
        step("TRL", 16, [], 300, died=9),
        Series("rollout", "here", 16, 8, 1, 1000, 0, 2**20, [{"generate": 0.5}], [{"generate": 0.25}]),
        Series("rollout", "generate", 16, 8, 1, 1000, 0, 2**21, [{"generate": 2.0}], [{"generate": 1.5}]),
    ]
    text = report("A title.", [], Results(found))
    assert "| 16 | 8 | 2000 | 500 | 4.00 | 6.00 | 1 | 2 |" in text  # 1000 tokens in 0.5 s and in 2 s
    assert "| 1024 | 4 | 1 | 2.00 | 8.00 | 4.00 | 4.00 | 100 | 400 | 0.25 | 1 | 1 |" in text
    assert "| 1024 | 16 | 1 | 4.00 | - | - | - | 200 | - | - | 1 | - |" in text
    assert "| 1024 | 4 | TRL | 2.00 (1.00) | 0.00 (0.00) | 0.00 (0.00) | 6.00 (3.00) | 0.00 (0.00) | 8.00 (4.00) |" in text
    # From 2 s at G = 4 to 4 s at G = 16: 4 / (4 * 2) of proportional, and (4 - 2) / (3 * 2) of what would be added.
    assert "| 1024 | here | 4: 2.00 (1.00), 16: 4.00 (3.00) | 4 to 16 | 0.50 (0.75) | 0.33 (0.67) |" in text
    assert "| 1024 | TRL |" not in text[text.index("## Growth") :]
    assert "The step of TRL at prompt 1024, group 16 was killed by signal 9 after 0 timed repetitions" in text


def test_turns_are_measured(tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("matplotlib")
    shape = ["--turns", "--prompts", 6, "--groups", 2, "--problems", 2, "--repeats", 1, "--warm-ups", 0]
    run([BENCHMARKS / "speed.py", *shape, *(x for name, value in TINY.items() for x in (f"--{name}", value))], tmp_path)
    report = (tmp_path / "outputs/benchmarks/turns.md").read_text()
    passes = {name: int(count) for name, count in re.findall(r"^\| ([^|]+) \| [\d.]+ \| (\d+) \|", report, re.MULTILINE)}
    assert passes["8 turns of 16 tokens, observations of 16"] == 1 + 8 * 15 + 7
    assert (
        passes["6 turns, one of 64 tokens and the others of 1"] <= 80 and passes["the same in lockstep"] == 4 * 64 + 2
    )  # of 4 rows
    assert (tmp_path / "outputs/benchmarks/turns.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_gpu_script_runs_on_a_cpu(tmp_path):
    """Every stage on small shapes: its checks raise where log-probs, gradients or a resumed run differ."""
    pytest.importorskip("matplotlib")
    out = run([BENCHMARKS / "gpu.py", "--small", "--skip", "compile"], tmp_path)
    results = json.loads((tmp_path / "outputs/benchmarks/gpu.json").read_text())
    assert not any("error" in result for result in results.values() if isinstance(result, dict)), out
    assert {name.split(",")[0] for name in results} == {
        *("card", "versions", "ceilings", "log-probs", "gradients", "resume", "learning", "precisions"),
        *("decoding", "update", "GRPO step"),
    }
    assert "not a GPU" in results["card"] and results["resume"]["resumed"] == 0
    (decoding,) = (result for name, result in results.items() if name.startswith("decoding"))
    assert decoding.keys() == {"limit", "default", "generate"}
    report = (tmp_path / "outputs/benchmarks/gpu.md").read_text()
    assert "| sampling, default |" in report and "times `generate`" in report and "| split, bf16 |" in report
    assert (tmp_path / "outputs/benchmarks/gpu.png").stat().st_size > 5_000


def test_the_limits_of_a_gpu(parts):
    """Of a model small enough to count by hand: one layer, width 4, 2 heads, 1 key-value head, 10 tokens."""
    pytest.importorskip("matplotlib")
    from gpu import Shape

    shape = Shape("", 4, 1, 2, 1, 8, vocabulary=10, prompt=3, new_tokens=2, group=2, problems=1)
    assert shape.body == 2 * 16 + 2 * 8 + 3 * 32 and shape.head == 40
    pairs = 3 * 3 / 2 + 2 * (2 * 3 + 2 * 2 / 2)
    assert shape.pairs() == pairs
    assert shape.update_operations() == 6 * 144 * (3 + 4) + 6 * 40 * 4 + 12 * 4 * pairs
    weights, kv, logits = 2 * 184, 2 * 2 * 2 * (3 + 2 * 1), 2 * 2 * 2 * 10
    assert shape.decoding_limit(1.0, 1e9) == pytest.approx(weights + kv + logits)
    operations = 2 * 2 * 184 + 4 * 4 * 2 * (3 + 1)
    assert shape.decoding_limit(1e9, 1.0) == pytest.approx(operations, abs=1e-3)

"""Benchmark time and memory of rollouts and GRPO steps against other libraries.

Rollouts are compared with transformers' `generate`, GRPO steps with TRL.

    pip install -c constraints.txt -e ".[extra,bench]"
    python examples/benchmarks/speed.py

The model is a Llama with 7.3 million random weights. It generates G responses of 128 tokens for each of 8 prompts. A GRPO step
samples the responses, computes rewards and reference log-probs, and updates all weights once with the GRPO loss and a KL term
(settings: `sides.py`). The probability of the end token is 0 in this model, so all responses have the same length. The tokens
of every repetition are counted; an unexpected number is an error.

First, advantages, loss and gradient of both implementations are compared on the same tokens, for every shape. If they differ
by more than 1e-4, nothing is timed. Then each implementation (side) runs in a separate process. The processes alternate
(A B A B), so that other load on the machine affects both. The first repetition of each is a warm-up. Time is assigned to the
innermost running phase (generate, reward, reference, update), or to "other"; the phases sum up to the whole repetition. Peak
memory is that of the process, including imports. The memory before the first repetition is reported, too.

The script writes a table, a figure and the numbers to `outputs/benchmarks` after each shape. The files in this folder are from
three runs: prompts of 16 and of 256 tokens with groups of 8, and prompts of 1024 tokens with groups of 4 and 16
(`--sides here`). `--numbers speed.json` writes table and figure from one or more files of stored numbers, without measuring.

`--turns` measures episodes of several turns instead, here only, for the first prompt length and group size: what the cache
between turns saves, and what turns cost. It writes `turns.md` and `turns.png`.

TRL uses one forward pass per update. This package uses the default of the device: several small passes on a CPU, which are
faster and need less memory. `--passes 4` splits the update into at least four passes on both sides.
"""

import argparse
import json
import platform
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

try:
    from speed_parts.figure import draw
except ImportError as error:
    raise SystemExit(f"this example needs TRL and matplotlib ({error}): pip install trl datasets matplotlib") from error
from speed_parts.tables import Results, report
from speed_parts.turns import draw_turns, measure_turns, report_turns
from speed_parts.work import BETA, Work, build
from speed_parts.worker import SIDES, Series, measure

Numbers = dict[str, Any]  # content of speed.json: settings, title, checks, series
SETTINGS = ("new_tokens", "problems", "vocabulary", "hidden", "layers", "heads", "intermediate", "threads", "device", "dtype")


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = parser.add_argument_group("shape")
    shape.add_argument(
        "--prompts", type=int, nargs="+", default=[16, 256, 1024], help="prompt lengths in tokens (default 16 256 1024)"
    )
    shape.add_argument(
        "--groups", type=int, nargs="+", default=[4, 8, 16], help="group sizes: responses per prompt (default 4 8 16)"
    )
    shape.add_argument("--new-tokens", type=int, default=128, help="response length in tokens (default 128)")
    shape.add_argument("--problems", type=int, default=8, help="prompts per rollout (default 8)")
    shape.add_argument(
        "--passes", type=int, default=1, help="minimum number of forward passes per update, on both sides (default 1)"
    )
    model = parser.add_argument_group("model")
    for name, default in (("vocabulary", 4096), ("hidden", 256), ("layers", 6), ("heads", 4), ("intermediate", 1024)):
        model.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="implementations to time (default all)")
    parser.add_argument("--repeats", type=int, default=3, help="timed repetitions (default 3)")
    parser.add_argument("--warm-ups", type=int, default=1, help="repetitions before them that are not timed (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; small models are faster with one (default 1)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device (default %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="dtype of computations; bfloat16 uses autocast (default float32)",
    )
    parser.add_argument("--turns", action="store_true", help="measure episodes of several turns instead")
    parser.add_argument(
        "--numbers",
        type=Path,
        nargs="+",
        help="speed.json files of earlier runs: write table and figure from them, without measuring",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/benchmarks"), help="output folder for table, figure and numbers"
    )
    arguments = parser.parse_args()
    if arguments.problems % arguments.passes:
        parser.error(f"--passes {arguments.passes} must divide --problems {arguments.problems}, because groups are not split")
    return arguments


def write(numbers: Numbers, folder: Path) -> str:
    """Write table, figure and numbers; return the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "speed.json").write_text(json.dumps(numbers, indent=1))
    results = Results([Series(**series) for series in numbers["series"]])
    text = report(numbers["title"], numbers["checks"], results)
    (folder / "speed.md").write_text(text)
    if results.shapes("step"):
        draw(results, folder / "speed.png")
    return text


def title(arguments: argparse.Namespace, parameters: int) -> str:
    """Describe versions, machine, model and shape of the measurement."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "torch"))
    place = f"{arguments.threads} CPU thread{'s' * (arguments.threads > 1)} ({platform.machine()})"
    if arguments.device.startswith("cuda"):
        place = torch.cuda.get_device_name(arguments.device)
    return (
        f"{versions}; {place}, {arguments.dtype}. A Llama of {parameters / 1e6:.1f} million parameters, {arguments.problems} "
        f"prompts, {arguments.new_tokens} new tokens, KL coefficient {BETA:g}. "
        f"Times are medians of {arguments.repeats} repetitions; the sides alternate. Speedups are ratios of medians. "
        "CPU time is the more stable measure if other programs run on the machine."
    )


def run(arguments: argparse.Namespace, folder: str) -> str:
    """Compare and time all shapes; return the report."""
    sizes = (arguments.hidden, arguments.layers, arguments.heads, arguments.intermediate)
    positions = max(2048, max(arguments.prompts) + arguments.new_tokens)
    numbers: Numbers = {"title": title(arguments, build(folder, arguments.vocabulary, *sizes, positions))}
    numbers |= {"settings": {name: getattr(arguments, name) for name in SETTINGS}, "checks": [], "series": []}
    text = ""
    for prompt in arguments.prompts:
        for group in arguments.groups:
            shape = (prompt, group, arguments.new_tokens, arguments.problems, arguments.passes)
            work = Work(folder, arguments.vocabulary, *shape, arguments.device, arguments.dtype, arguments.threads)
            found, results = measure(work, arguments.sides, arguments.repeats, arguments.warm_ups)
            if found is not None:
                numbers["checks"].append({"prompt": prompt, "group": group, **found})
                losses = f"{found['loss_here']:.7f} here, {found['loss_trl']:.7f} in TRL"
                print(f"prompt {prompt}, group {group}: loss {losses}", flush=True)
            for series in results:
                numbers["series"].append(asdict(series))
                taken = f"{series.turn:.2f} s" if series.seconds else f"killed by signal {series.died}"
                print(f"prompt {prompt}, group {group}: {series.job}, {series.side}: {taken}", flush=True)
            text = write(numbers, arguments.out)
    return text


def run_turns(arguments: argparse.Namespace, folder: str) -> str:
    """Time episodes of several turns; write table and figure; return the table."""
    sizes = (arguments.hidden, arguments.layers, arguments.heads, arguments.intermediate)
    parameters = build(folder, arguments.vocabulary, *sizes, 2048)
    shape = (arguments.prompts[0], arguments.groups[0], arguments.new_tokens, arguments.problems, arguments.passes)
    work = Work(folder, arguments.vocabulary, *shape, "cpu", "float32", arguments.threads)
    torch.set_num_threads(arguments.threads)
    cases = measure_turns(work, arguments.repeats, arguments.warm_ups)
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    place = f"{arguments.threads} CPU thread{'s' * (arguments.threads > 1)} ({platform.machine()})"
    about = (
        f"{versions}; {place}, float32. A Llama of {parameters / 1e6:.1f} million parameters, {work.problems} prompts of "
        f"{work.prompt} tokens, groups of {work.group}. Medians of {arguments.repeats} repetitions, in turns."
    )
    text = report_turns(about, cases)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "turns.md").write_text(text)
    draw_turns(cases, arguments.out / "turns.png")
    return text


def joined(files: list[Path]) -> Numbers:
    """Join the numbers of several runs.

    If two runs have measured the same series, the later file is used.

    Raises:
        SystemExit: If settings differ, or if one shape was measured with different numbers of passes.
    """
    runs = [json.loads(file.read_text()) for file in files]
    for run, file in zip(runs, files, strict=True):
        if run["settings"] != runs[0]["settings"]:
            raise SystemExit(
                f"--numbers: settings of all files must be equal; got {run['settings']} in {file} and "
                f"{runs[0]['settings']} in {files[0]}"
            )
    checks = {(c["prompt"], c["group"]): c for run in runs for c in run["checks"]}
    series = {(s["job"], s["side"], s["prompt"], s["group"]): s for run in runs for s in run["series"]}
    passes: dict[tuple[int, int], int] = {}
    for measured in series.values():
        shape, mine = (measured["prompt"], measured["group"]), measured["passes"]
        if passes.setdefault(shape, mine) != mine:
            raise SystemExit(
                f"--numbers: passes must be equal for (prompt, group)={shape}; got {passes[shape]} and {mine}. "
                "Measure the shape again with one value of --passes."
            )
    joined_titles = "\n\n".join(dict.fromkeys(run["title"] for run in runs))
    found = {"checks": list(checks.values()), "series": list(series.values())}
    return {"title": joined_titles, "settings": runs[0]["settings"], **found}


def main() -> None:
    """Parse the command line, measure and report."""
    arguments = parse()
    if arguments.turns:
        with tempfile.TemporaryDirectory() as folder:
            print(f"\n{run_turns(arguments, folder)}\nsaved turns.md and turns.png in {arguments.out}")
        return
    if arguments.numbers is not None:
        text = write(joined(arguments.numbers), arguments.out)
    else:
        with tempfile.TemporaryDirectory() as folder:
            text = run(arguments, folder)
    print(f"\n{text}\nsaved speed.md, speed.png and speed.json in {arguments.out}")


if __name__ == "__main__":
    main()

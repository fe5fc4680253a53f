"""Rollouts here and by transformers' `generate`, whole GRPO steps here and by TRL: how long they take, and how much memory.

    pip install -c constraints.txt -e ".[extra,bench]"
    python examples/benchmarks/speed.py

A Llama of 7.3 million random weights answers 8 prompts with G responses of 128 tokens each; a step samples them, pays a reward,
asks a reference and updates all weights once, with GRPO's loss and a KL (settings: `sides.py`). The end token's probability is
0 in this model, so that all responses have the same length; every turn's tokens are counted, and another number is an error.

First the two sides of a step are compared, for every shape: advantages, loss and gradient on the same tokens agree to 1e-4, or
nothing is timed. Then each side is a process of its own, and the processes take turns, A B A B, so that what else the machine
does falls on both; the first turn of each does not count. A moment of a turn belongs to the phase whose function is being run
(generate, reward, reference, update) or to "other", and the phases of a turn sum up to all of it. Peak memory is that of the
side's process, imports and all; what it had before its first turn stands beside it.

A table, a figure and the numbers are left in `outputs/benchmarks` after each shape; those in this folder are of three runs:
prompts of 16 and of 256 tokens with groups of 8, and 1024 with 4 and 16, `--sides here`. `--numbers speed.json` writes both
again without measuring, from several runs' files if there are more.
An update is one forward pass in TRL, and here as many as are the default on the device (on a CPU several small ones, which are
faster and take less memory). `--passes 4` cuts it into four at least, on both sides.
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
from speed_parts.work import BETA, Work, build
from speed_parts.worker import SIDES, Series, measure

Numbers = dict[str, Any]  # what is written to speed.json: settings, title, checks, series
SETTINGS = ("new_tokens", "problems", "vocabulary", "hidden", "layers", "heads", "intermediate", "threads", "device", "dtype")


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = parser.add_argument_group("the work")
    shape.add_argument("--prompts", type=int, nargs="+", default=[16, 256, 1024], help="tokens of a prompt")
    shape.add_argument("--groups", type=int, nargs="+", default=[4, 8, 16], help="responses to a prompt")
    shape.add_argument("--new-tokens", type=int, default=128, help="tokens of a response")
    shape.add_argument("--problems", type=int, default=8, help="prompts in a rollout")
    shape.add_argument("--passes", type=int, default=1, help="forward passes to an update at least, on both sides")
    model = parser.add_argument_group("the model")
    for name, default in (("vocabulary", 4096), ("hidden", 256), ("layers", 6), ("heads", 4), ("intermediate", 1024)):
        model.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="whom to time")
    parser.add_argument("--repeats", type=int, default=3, help="turns that count")
    parser.add_argument("--warm-ups", type=int, default=1, help="turns before them")
    parser.add_argument("--threads", type=int, default=1, help="of torch; small models are faster on one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16 is autocast")
    parser.add_argument("--numbers", type=Path, nargs="+", help="files of other runs, to be written out again")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="folder for table, figure and numbers")
    arguments = parser.parse_args()
    if arguments.problems % arguments.passes:
        parser.error(f"--passes {arguments.passes} must divide --problems {arguments.problems}: groups stay together")
    return arguments


def write(numbers: Numbers, folder: Path) -> str:
    """Leave table, figure and numbers; the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "speed.json").write_text(json.dumps(numbers, indent=1))
    results = Results([Series(**series) for series in numbers["series"]])
    text = report(numbers["title"], numbers["checks"], results)
    (folder / "speed.md").write_text(text)
    if results.shapes("step"):
        draw(results, folder / "speed.png")
    return text


def title(arguments: argparse.Namespace, parameters: int) -> str:
    """Return what was measured, and how."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "torch"))
    place = f"{arguments.threads} CPU thread{'s' * (arguments.threads > 1)} ({platform.machine()})"
    if arguments.device.startswith("cuda"):
        place = torch.cuda.get_device_name(arguments.device)
    return (
        f"{versions}; {place}, {arguments.dtype}. A Llama of {parameters / 1e6:.1f} million parameters, {arguments.problems} "
        f"prompts, {arguments.new_tokens} new tokens, KL coefficient {BETA:g}. "
        f"Medians of {arguments.repeats} turns, taken alternately, and ratios of medians; where other programs share the "
        "machine, CPU time is the steadier measure."
    )


def run(arguments: argparse.Namespace, folder: str) -> str:
    """Compare and time all shapes; the report."""
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
                print(f"prompt {prompt}, group {group}: the loss is {losses}", flush=True)
            for series in results:
                numbers["series"].append(asdict(series))
                taken = f"{series.turn:.2f} s" if series.seconds else f"ended by signal {series.died}"
                print(f"prompt {prompt}, group {group}: a {series.job} of {series.side} takes {taken}", flush=True)
            text = write(numbers, arguments.out)
    return text


def joined(files: list[Path]) -> Numbers:
    """Return the numbers of several runs; where two have measured the same, the later one's count.

    Raises:
        SystemExit: If they have not measured the same kind of work, or a shape with different passes.
    """
    runs = [json.loads(file.read_text()) for file in files]
    for run, file in zip(runs, files, strict=True):
        if run["settings"] != runs[0]["settings"]:
            raise SystemExit(f"{file} is of {run['settings']}, but {files[0]} of {runs[0]['settings']}: they cannot be joined")
    checks = {(c["prompt"], c["group"]): c for run in runs for c in run["checks"]}
    series = {(s["job"], s["side"], s["prompt"], s["group"]): s for run in runs for s in run["series"]}
    passes: dict[tuple[int, int], int] = {}
    for measured in series.values():
        shape, mine = (measured["prompt"], measured["group"]), measured["passes"]
        if passes.setdefault(shape, mine) != mine:
            raise SystemExit(f"prompt and group {shape} were measured with {passes[shape]} and {mine} passes to an update")
    joined_titles = "\n\n".join(dict.fromkeys(run["title"] for run in runs))
    found = {"checks": list(checks.values()), "series": list(series.values())}
    return {"title": joined_titles, "settings": runs[0]["settings"], **found}


def main() -> None:
    """Parse the command line, measure, report."""
    arguments = parse()
    if arguments.numbers is not None:
        text = write(joined(arguments.numbers), arguments.out)
    else:
        with tempfile.TemporaryDirectory() as folder:
            text = run(arguments, folder)
    print(f"\n{text}\nsaved speed.md, speed.png and speed.json in {arguments.out}")


if __name__ == "__main__":
    main()

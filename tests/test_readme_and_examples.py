"""The README's code, its command lines' scripts and the examples run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(arguments, folder):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::DeprecationWarning:llm_env", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_readmes_first_code_runs_by_itself(tmp_path):
    short = BLOCKS[0].replace("total_timesteps=20_000", "total_timesteps=2_000")
    assert short != BLOCKS[0]
    (tmp_path / "script.py").write_text(short)
    assert re.fullmatch(r"\['\d+', '\d+'\]\n", run(["script.py"], tmp_path))
    assert (tmp_path / "adder.zip").exists() and list(tmp_path.glob("runs/GRPO_1/events*"))


@pytest.mark.filterwarnings("error::DeprecationWarning:llm_env")
@pytest.mark.parametrize("block", BLOCKS[1:], ids=[block.splitlines()[-1][:40] for block in BLOCKS[1:]])
def test_the_readmes_other_code_runs(block, tmp_path, monkeypatch):
    assert re.search(r"^import llm_env$", block, re.MULTILINE)  # in this process the ids are registered anyhow
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


def test_the_first_ten_lines_are_ten():
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 10


def test_the_readme_is_short_and_names_what_is_there():
    assert len((ROOT / "README.md").read_bytes()) <= 8192
    for path in {*re.findall(r"examples/\w+\.\w+", README), *re.findall(r"\]\(([^)#]+)\)", README)}:
        assert path.startswith("https://") or (ROOT / path).exists(), path
    commands = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)
    assert len(commands) == 2 and all("-c constraints.txt" in command for command in commands)


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_addition_examples(name, tmp_path):
    out = run([ROOT / "examples" / f"train_{name}.py", "--timesteps", 3000], tmp_path)
    before, after = map(float, re.search(r"held-out accuracy: ([\d.]+) before, ([\d.]+) after", out).groups())
    assert after > before
    assert (tmp_path / f"outputs/{name}_addition/agent.zip").exists() and list(tmp_path.glob(f"runs/{name.upper()}_1/events*"))
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / f"outputs/{name}_addition/model")


def test_the_pupil_can_be_made_again(tmp_path):
    out = run([ROOT / "examples/pretrain_pupil.py", "--out", tmp_path / "pupil", "--steps", 2], tmp_path)
    assert out == ""
    from transformers import AutoTokenizer

    import llm_env

    made, packaged = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "pupil", llm_env.PUPIL))
    assert made.get_vocab() == packaged.get_vocab()


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "timesteps"), [("grpo", 100_000), ("ppo", 30_000)])
def test_stories_get_dogs(algorithm, timesteps, stories, tmp_path):
    script = ROOT / "examples/train_stories.py"
    out = run([script, stories, "--algorithm", algorithm, "--timesteps", timesteps], tmp_path)
    before, after = map(int, re.findall(r"(\d+) of 64 stories have a dog", out))
    assert before < 16 and after > 2 * before + 8
    assert len(re.findall(r" \| '", out)) + len(re.findall(r' \| "', out)) == 8  # four stories before, four after

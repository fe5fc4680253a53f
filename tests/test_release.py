"""The wheel and the sdist: what is in them, and that the installed wheel trains, answers and is typed."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import llm_env

ROOT = Path(llm_env.__file__).parents[1]
FILES = [
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "SECURITY.md",
]
FOLDERS = ["llm_env", "agents", "tests", "examples", "docs"]
SMOKE = """
import gymnasium as gym
import llm_env
from agents import GRPO
assert {site!r} in llm_env.__file__, llm_env.__file__
env = gym.make("llm_env:llm_env/Addition-v0")
agent = GRPO(llm_env.PUPIL, env, group_size=8, n_envs=16, seed=0)
agent.learn(total_timesteps=100)
agent.save("adder")
texts = GRPO.load("adder", env=env).generate(["12+34="], deterministic=True)
assert len(texts) == 1 and texts[0].isdigit(), texts
print(llm_env.__version__, agent.num_timesteps >= 100)
"""
TYPED = """
import llm_env
from agents import GRPO
reveal_type(GRPO)
reveal_type(llm_env.RewardModel)
reveal_type(llm_env.reference.AdaptiveKLController)
reveal_type(llm_env.check_reward("llm_env/Addition-v0").passed)
llm_env.Nothing
"""
NEXT_TO_CODE = ("llm_env/py.typed", "agents/py.typed", "llm_env/pupil/config.json", "llm_env/pupil/model.safetensors")


def run(command, folder, **environment):
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([str(part) for part in command], cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The paths of a wheel and an sdist. They are built from a copy: setuptools leaves files beside the source."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "runs", "outputs", "data"))
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source], source)
    [wheel], [sdist] = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The Python of an environment with the wheel; it sees the packages of this one, but not this checkout."""
    venv = tmp_path_factory.mktemp("installed") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", venv], venv.parent)
    [site] = venv.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    python = venv / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", "--force-reinstall"]
    run([*pip, built[0]], venv.parent)
    return python


def sources(names):
    return {name for name in names if name.endswith(".py")}


def in_the_checkout():
    return sources(
        str(path.relative_to(ROOT).as_posix()) for name in ("llm_env", "agents") for path in (ROOT / name).rglob("*.py")
    )


def test_the_version_is_the_same_everywhere(built):
    version = llm_env.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert [path.name for path in built] == [f"llm_env-{version}-py3-none-any.whl", f"llm_env-{version}.tar.gz"]
    [citation] = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    [released] = re.findall(r"^date-released: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    headings = re.findall(r"^## \[(.+?)\](?: - (.+))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == ("Unreleased", "") and headings[1] == (version, released) and citation == version


def test_the_wheel_has_both_packages_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        about = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
        scripts = wheel.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert sources(names) == in_the_checkout()
    assert names >= set(NEXT_TO_CODE)
    assert {name.split("/")[0] for name in names} == {"llm_env", "agents", f"llm_env-{llm_env.__version__}.dist-info"}
    assert "llm-env = agents.command_line:main" in scripts
    assert "License-Expression: MIT" in about and "Requires-Python: >=3.10" in about


def test_the_sdist_has_the_packages_and_the_texts_but_no_tests(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert sources(names) - {"setup.py"} == in_the_checkout()
    assert names >= {*NEXT_TO_CODE, *FILES}
    assert not [name for name in names if name.startswith(("tests", "examples", "docs", ".ci"))]


def test_what_the_packages_import_without_a_guard_is_a_dependency():
    """Every third-party package that a module imports at its top is required, so that no extra is needed to import it."""
    imported = set()
    for path in in_the_checkout() - {"agents/engines/vllm/worker.py"}:  # which vLLM alone imports
        for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    third = imported - set(sys.stdlib_module_names) - {"llm_env", "agents"}
    project = (ROOT / "pyproject.toml").read_text()
    [block] = re.findall(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    required = {name.replace("-", "_") for name in re.findall(r'"([A-Za-z0-9-]+)', block)}
    assert third <= required, third - required


@pytest.mark.slow
def test_the_installed_wheel_trains_and_answers(installed, tmp_path):
    (tmp_path / "script.py").write_text(SMOKE.format(site=str(installed.parents[1])))
    assert run([installed, "script.py"], tmp_path) == f"{llm_env.__version__} True\n"
    assert (tmp_path / "adder.zip").exists()


@pytest.mark.slow
def test_the_installed_script_is_the_module(installed, tmp_path):
    script = run([installed.parent / "llm-env", "--help"], tmp_path)
    assert script.startswith("usage: llm-env ") and script == run([installed, "-m", "llm_env", "--help"], tmp_path)
    assert run([installed.parent / "llm-env", "--version"], tmp_path) == f"llm-env {llm_env.__version__}\n"


@pytest.mark.slow
def test_type_checkers_see_names_that_are_imported_late(installed, tmp_path):
    (tmp_path / "script.py").write_text(TYPED)
    skipped = "[mypy-torch.*,transformers.*,stable_baselines3.*]\nfollow_imports = skip\n"
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nfollow_imports = silent\n{skipped}")
    command = [sys.executable, "-m", "mypy", "--python-executable", installed, "script.py"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=600)
    lines = [line.partition(": ")[2] for line in done.stdout.splitlines() if line.startswith("script.py")]
    assert len(lines) == 5, done.stdout + done.stderr
    assert "agents.grpo.GRPO" in lines[0] and "RewardModel" in lines[1] and "Any" not in lines[1].split("->")[-1]
    assert "AdaptiveKLController" in lines[2] and lines[3] == 'note: Revealed type is "bool"'
    assert 'Module has no attribute "Nothing"' in lines[4]

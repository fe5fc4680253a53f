"""What an import brings along: heavy libraries are imported when they are needed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import agents
import llm_env

ROOT = Path(llm_env.__file__).parents[1]
FRAMEWORKS = ["torch", "transformers", "tokenizers", "stable_baselines3", "tensorboard", "sympy"]
LATE = ["transformers", "tokenizers", "huggingface_hub", "peft", "accelerate", "safetensors", "sympy", "jinja2"]
TORCH_LATE = ["torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.distributed.tensor"]


def python(code):
    """Run code in a new process; return its output."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def modules_after(code):
    return set(python(f"{code}\nimport sys\nprint(*sys.modules)"))


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        ("import llm_env", [*FRAMEWORKS, "matplotlib", "agents"]),
        ("import gymnasium, llm_env; gymnasium.spec('llm_env/Addition-v0')", FRAMEWORKS),
        ("from llm_env.rewards import exact_match, numeric_answer", FRAMEWORKS),
        ("from llm_env.tools import calculator", FRAMEWORKS),
        ("import llm_env.adapters", FRAMEWORKS),
        ("import agents", FRAMEWORKS),
        ("from agents import GRPO", [*LATE, *TORCH_LATE, "agents.ppo", "agents.diagnostics", "agents.engines.vllm"]),
        ("from agents import PPO, REINFORCE, TextVecEnv, TimeLimit", [*LATE, *TORCH_LATE]),
    ],
)
def test_heavy_libraries_are_imported_when_they_are_needed(code, forbidden):
    assert not modules_after(code) & set(forbidden)


def test_the_agents_import_nothing_of_tensorboard_but_what_stable_baselines3_does():
    of_sb3 = modules_after("import torch, stable_baselines3")
    assert "torch.utils.tensorboard" in of_sb3  # its logger's doing; once it is gone, tensorboard belongs into LATE
    more = modules_after("from agents import GRPO") - of_sb3
    assert not [name for name in more if name.startswith(("tensorboard", "torch.utils.tensorboard"))]


@pytest.mark.parametrize("package", [llm_env, agents])
def test_late_names_are_those_that_type_checkers_see(package):
    """The imports under TYPE_CHECKING name the same modules as the table of `lazy_names`."""
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    [table] = [node for node in ast.walk(block) if isinstance(node, ast.Dict)]
    submodules = {name for name, module in seen.items() if module == package.__name__}
    assert ast.literal_eval(table) == {name: module for name, module in seen.items() if name not in submodules}
    for name in package.__all__:
        assert getattr(package, name).__name__ == name if name != "PUPIL" else getattr(package, name)
        assert name in dir(package)
    for name in submodules:
        assert getattr(package, name).__name__ == f"{package.__name__}.{name}"


def test_submodules_need_no_import_statement():
    assert python("import llm_env; print(llm_env.reference.AdaptiveKLController.__name__)") == ["AdaptiveKLController"]
    assert python("import llm_env; print(llm_env.RewardModel.__module__)") == ["llm_env.rewards.reward_models"]
    assert python("import agents; print(agents.losses.kl_k3.__name__, agents.GRPO.__name__)") == ["kl_k3", "GRPO"]


@pytest.mark.parametrize("package", [llm_env, agents])
def test_an_unknown_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'Nothing'"):
        package.Nothing  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        exec(f"from {package.__name__} import Nothing")
    assert not hasattr(package, "_private")


def test_names_that_come_late_are_pickled():
    code = "import pickle, agents; print(pickle.loads(pickle.dumps(agents.GRPO)) is agents.GRPO)"
    assert python(code) == ["True"]

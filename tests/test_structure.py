"""The packages' structure: no import circles between modules or folders, and few files lie flat."""

import ast
import sys
from pathlib import Path

import pytest
import torch

import agents
import llm_env
from agents import GRPO, PPO, REINFORCE
from agents.training.trainer import Trainer


def modules_of(root):
    """The modules below the folder of a package by their full names; a package is its `__init__.py`."""
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imported_by(path, name, modules):
    """The modules of the package that a file imports anywhere: within functions and under TYPE_CHECKING as well."""
    found = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found.update(full if (full := f"{base}.{alias.name}") in modules else base for alias in node.names)
    return {module for module in found if module in modules and module != name}


def circles(edges):
    """The sets of nodes that reach each other, as sorted lists; `edges` are sets by node."""
    reached = {node: set(targets) for node, targets in edges.items()}
    for middle in edges:  # Warshall's closure
        for targets in reached.values():
            if middle in targets:
                targets |= reached[middle]
    together = {frozenset(other for other in reached[node] if node in reached[other]) for node in edges}
    return sorted(sorted(circle) for circle in together if circle)


def folder_of(module):
    """The subpackage right below the package in which a module lies, or the flat module itself."""
    return ".".join(module.split(".")[:2])


def import_circles(root):
    """The circles of imports between the modules of a package, and those between its folders and flat modules."""
    modules = modules_of(root)
    edges = {name: imported_by(path, name, modules) for name, path in modules.items()}
    folders = {folder_of(name): set() for name in modules}
    for name, imported in edges.items():
        folders[folder_of(name)] |= {folder_of(other) for other in imported} - {folder_of(name)}
    return circles(edges), circles(folders)


def root_of(package):
    return Path(package.__file__).parent


def test_circles_are_found(tmp_path):
    root = tmp_path / "pack"
    for name, text in {
        "__init__.py": "from pack.b import x",
        "a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pack import b",
        "b.py": "def f():\n    import pack.a",
        "c.py": "from . import d\nimport os",
        "d.py": "from pack.one.p import x",
        "one/__init__.py": "",
        "one/p.py": "from ..two.q import x",
        "two/__init__.py": "",
        "two/q.py": "",
        "two/r.py": "from pack.one.p import x",
    }.items():
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_text(text)
    assert import_circles(root) == ([["pack.a", "pack.b"]], [["pack.a", "pack.b"], ["pack.one", "pack.two"]])


@pytest.mark.parametrize("package", [llm_env, agents])
def test_nothing_is_imported_in_a_circle(package):
    assert import_circles(root_of(package)) == ([], [])


def test_llm_env_knows_nothing_of_the_agents():
    """But for `python -m llm_env`: the command line is the top floor, and nothing imports it."""
    both = modules_of(root_of(llm_env)) | modules_of(root_of(agents))
    edges = {name: imported_by(path, name, both) for name, path in both.items()}
    upward = {name for name, imported in edges.items() if name.startswith("llm_env") and any(map(is_of_agents, imported))}
    assert upward == {"llm_env.__main__"} and edges["llm_env.__main__"] == {"agents.command_line"}
    importers = {name for name, imported in edges.items() if imported & {"llm_env.__main__", "agents.command_line"}}
    assert importers == {"llm_env.__main__"}


def is_of_agents(module):
    return module.split(".")[0] == "agents"


def test_few_files_lie_flat_in_agents():
    assert len(list(root_of(agents).glob("*.py"))) <= 20


ALGORITHMS = {"agents", "agents.base", "agents.grpo", "agents.ppo", "agents.reinforce"}  # the agents, and who exports them
ALGORITHMS |= {"agents.command_line"}  # and the floor above them


def names_in(annotation):
    """The identifiers of an annotation, also of one that is written as a string."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from names_in(ast.parse(node.value, mode="eval"))
        elif isinstance(node, (ast.Name, ast.Attribute)):
            yield node.id if isinstance(node, ast.Name) else node.attr


def test_no_component_knows_the_agent():
    """Outside of the agents and the diagnostics nothing imports `LanguageAgent`, annotates it, or takes an `agent`."""
    for module, path in modules_of(root_of(agents)).items():
        if module in ALGORITHMS or module.startswith("agents.diagnostics"):
            continue
        assert "agents.base" not in imported_by(path, module, modules_of(root_of(agents))), module
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.arg):
                assert node.arg != "agent", f"{module}, line {node.lineno}"
                assert node.annotation is None or "LanguageAgent" not in set(names_in(node.annotation)), module


# --- the way from `learn` to the arithmetic ------------------------------------------------------------------------------


def frames_between(innermost, outermost):
    """The functions on the stack from the innermost frame to the one that runs `outermost`, both included."""
    names, frame = [], innermost
    while frame is not None:
        names.append(frame.f_code.co_qualname if hasattr(frame.f_code, "co_qualname") else frame.f_code.co_name)
        if frame.f_code is outermost.__code__:
            return names
        frame = frame.f_back
    raise AssertionError(f"{outermost} is not on the stack: {names}")


def spy_on(monkeypatch, function, outermost):
    """Note the frames from who calls a function of torch to `outermost`, each time the way is another one."""
    ways, original = set(), getattr(torch, function)

    def spy(*args, **kwargs):
        ways.add(tuple(frames_between(sys._getframe(1), outermost)))
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, function, spy)
    return ways


@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_five_frames_from_train_to_the_minimum(kind, monkeypatch):
    agent = kind(llm_env.PUPIL, "llm_env/Addition-v0", n_envs=16, batch_size=8, seed=0)
    ways = spy_on(monkeypatch, "minimum", Trainer.train)
    agent.learn(1)
    assert ways and max(map(len, ways)) <= 5, ways
    assert all(way[0] == "clipped_terms" for way in ways)


@pytest.mark.parametrize("kind", [GRPO, PPO, REINFORCE])
def test_eight_frames_from_learn_to_a_sampled_token(kind, monkeypatch):
    """The last of them looks a uniform random number up in the running sums of the probabilities."""
    agent = kind(llm_env.PUPIL, "llm_env/Addition-v0", n_envs=16, seed=0)
    ways = spy_on(monkeypatch, "searchsorted", kind.learn.__wrapped__)
    agent.learn(1)
    assert ways and max(map(len, ways)) <= 8, ways

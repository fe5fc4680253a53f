"""The manual: its code runs, its links and names exist, and its tables are complete."""

import importlib.util
import inspect
import re

import pytest

import agents
from llm_env.keywords import OTHER_NAMES
from llm_env.rules import Rules
from tests.test_readme_and_examples import ROOT

DOCS = ROOT / "docs"
PAGES = {path.stem: path.read_text() for path in sorted(DOCS.glob("*.md"))}
BLOCK = re.compile(r"(?:<!-- needs: (\w+) -->\n)?```python\n(.*?)```", re.DOTALL)
WITH_CODE = [name for name, text in PAGES.items() if BLOCK.search(text)]


@pytest.mark.filterwarnings("error::DeprecationWarning:llm_env")
@pytest.mark.parametrize("name", WITH_CODE)
def test_the_code_of_a_page_runs(name, tmp_path, monkeypatch):
    """In order, in one namespace. A block after `<!-- needs: package -->` runs where the package is installed."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for number, (package, code) in enumerate(BLOCK.findall(PAGES[name]), 1):
        if not package or importlib.util.find_spec(package):
            exec(compile(code, f"docs/{name}.md, block {number}", "exec"), namespace)


@pytest.mark.parametrize("name", PAGES)
def test_links_of_a_page_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (DOCS / path).resolve() if path else DOCS / f"{name}.md"
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, target


def test_every_page_is_in_the_table_of_contents():
    listed = set(re.findall(r"^(\w+)$", PAGES["index"], re.MULTILINE))
    assert listed == set(PAGES) - {"index"}


def test_examples_and_functions_that_are_named_exist():
    for text in PAGES.values():
        for path in re.findall(r"(?:examples|tests|agents|llm_env)/[\w/]+\.(?:py|md|png)", text):
            assert (ROOT / path).exists(), path
    named = re.findall(r"`(advantages|losses|LanguagePolicy|REINFORCE)\.(\w+)`", PAGES["algorithms"])
    assert len(named) > 15
    for owner, name in named:
        assert callable(getattr(getattr(agents, owner), name)), name


def test_published_methods_are_those_of_the_docstring():
    rows = [line.strip() for line in inspect.getdoc(agents.GRPO).splitlines() if line.strip().startswith("|")]
    assert len(rows) > 10 and "\n".join(rows) in PAGES["algorithms"]


# --- coming from TRL and SB3 ----------------------------------------------------------------------------------------------


def parameters(function):
    return set(inspect.signature(function).parameters)


AGENT = parameters(agents.base.LanguageAgent.__init__)
OURS = {
    "GRPO": parameters(agents.GRPO.__init__) | AGENT,
    "PPO": parameters(agents.PPO.__init__) | AGENT,
    "env": parameters(Rules.__init__),
    "learn": parameters(agents.GRPO.learn),
}


def rows_of(page, title):
    """The table under a heading: the name of the other library, and ours."""
    section = PAGES[page].split(f"\n## {title}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize(
    "page, title",
    [("coming_from_trl", "GRPOConfig"), ("coming_from_trl", "PPOConfig"), ("coming_from_sb3", "Arguments of PPO")],
)
def test_arguments_in_the_tables_exist(page, title):
    rows = rows_of(page, title)
    assert len(rows) > 10
    known = set().union(*OURS.values()) | {"optimizer_class", "optimizer_kwargs", "tokenizer", "peft_config", "env_kwargs"}
    for _, ours, *_ in rows:
        for name in re.findall(r"`(\w+)=", ours):
            assert name in known, (name, ours)


def test_all_arguments_of_trls_config_are_in_the_table():
    trl = pytest.importorskip("trl")
    import dataclasses

    from transformers import TrainingArguments

    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    fields = {field.name for field in dataclasses.fields(trl.GRPOConfig)} - inherited
    listed = {name for theirs, *_ in rows_of("coming_from_trl", "GRPOConfig") for name in re.findall(r"`(\w+)`", theirs)}
    assert fields - listed == set()


def test_all_arguments_of_sb3s_ppo_are_in_the_table():
    from stable_baselines3 import PPO

    listed = {name for theirs, *_ in rows_of("coming_from_sb3", "Arguments of PPO") for name in re.findall(r"`(\w+)`", theirs)}
    assert parameters(PPO.__init__) - {"self", "_init_setup_model"} - listed == set()


def test_the_tables_agree_with_the_suggestions_of_error_messages():
    """A name that a constructor suggests for one of TRL's is also the one in the table."""
    table = {
        name: ours for theirs, ours, *_ in rows_of("coming_from_trl", "GRPOConfig") for name in re.findall(r"`(\w+)`", theirs)
    }
    checked = 0
    for ours, others in OTHER_NAMES.items():
        for other in others:
            if re.fullmatch(r"\w+", ours) and other in table:
                assert f"`{ours}=" in table[other], (other, ours, table[other])
                checked += 1
    assert checked > 8

"""The commands of `llm-env`: what they print and return, and how they refuse what they cannot use."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import llm_env
from agents import GRPO, PPO
from agents.command_line import EXAMPLES, main, make_env, value_of
from tests.conftest import make_tokenizer

ROOT = Path(llm_env.__file__).parents[1]
USERS = '''
import llm_env


class Echo:
    """Pays 1 for the digit that it shows; the digit is the seed's last one."""

    def __init__(self, pays=1.0):
        self.pays = pays

    def reset(self, *, seed=None):
        self.digit = str(seed % 10)
        return self.digit + "=", {}

    def step(self, action):
        return "", self.pays * (action == self.digit), True, False, {"is_success": action == self.digit}


class Forgetful(Echo):
    def reset(self, *, seed=None):
        self.calls = getattr(self, "calls", 0) + 1
        return str(self.calls % 10) + "=", {}


def made(tokenizer, digit="7"):
    return llm_env.TextGenerationEnv([f"{digit}="], length, tokenizer, max_new_tokens=2)


def echo(pays):
    return Echo(pays)


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def unsteady(completions, **kwargs):
    unsteady.calls = getattr(unsteady, "calls", 0) + 1
    return [float(unsteady.calls)] * len(completions)


env = llm_env.TextGenerationEnv(["2+3="], length, llm_env.PUPIL, max_new_tokens=2)
nothing = None
'''
ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in [(2, 3), (9, 4), (11, 5), (30, 8)]]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "users.py").write_text(USERS)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("users", None)


def refused(capsys, *words):
    """Run a command that must fail; return the last line on stderr (transformers shows there how it loads weights)."""
    assert main(words) == 2
    shown = capsys.readouterr().err
    error = shown.splitlines()[-1]
    assert "Traceback" not in shown and error.startswith(f"llm-env {words[0]}: "), shown
    assert error.endswith(" (--debug shows the traceback)"), shown
    return error


# --- help --------------------------------------------------------------------------------------------------------------


def run(*words, folder=ROOT, module="llm_env"):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_help_needs_no_torch():
    code = "import sys, agents.command_line as c\ntry:\n    c.main(['--help'])\nexcept SystemExit as end:\n    print(end)"
    code += "\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    *_, status, modules = done.stdout.splitlines()
    assert status == "0" and not {"torch", "transformers", "stable_baselines3"} & set(modules.split())


def test_every_command_has_help_with_examples(capsys):
    for command, examples in EXAMPLES.items():
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        shown = capsys.readouterr().out
        assert end.value.code == 0 and examples.strip() in shown
        assert all(line.split()[:2] == ["llm-env", command] for line in examples.strip().splitlines())
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"llm-env {llm_env.__version__}\n")


@pytest.mark.parametrize(
    "words", [[], ["train"], ["fly", "addition"], ["train", "addition", "--foo", "3"], ["sample", "x", "-n", "z"]]
)
def test_argparse_refuses_what_is_no_command(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and capsys.readouterr().err.startswith("usage: llm-env")


def test_options_may_stand_before_and_between_arguments(folder, capsys):
    words = ["check-reward", "-n", "3", "addition", "env.largest=3", "--seed", "1", "env.split=None"]
    assert main(words) == 0
    assert capsys.readouterr().out.endswith("=> passed\n")


# --- checks ------------------------------------------------------------------------------------------------------------


def test_check_reward(folder, capsys):
    assert main(["check-reward", "addition", "-n", "8"]) == 0
    assert capsys.readouterr().out.endswith("=> passed\n")
    assert main(["check-reward", "rows.jsonl", "--reward", "exact_match"]) == 0
    capsys.readouterr()
    assert main(["check-reward", "rows.jsonl", "--reward", "users:unsteady"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^equal score when called again +FAILED", out, re.MULTILINE) and out.endswith("=> FAILED\n")


def test_check_env(folder, capsys):
    assert main(["check-env", "users.py:Echo", "--action", "1", "--action", "2", "-n", "4"]) == 0
    assert capsys.readouterr().out.endswith("=> passed\n")
    assert main(["check-env", "users:Forgetful", "-n", "2"]) == 1
    assert re.search(r"^same seed, same start +FAILED", capsys.readouterr().out, re.MULTILINE)
    assert main(["check-env", "FrozenLake-v1", "env.is_slippery=False", "-n", "2", "--action", "left"]) == 0


# --- tasks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["addition", "Addition", "llm_env/Addition-v0", "llm_env:llm_env/Addition-v0"])
def test_a_task_by_its_names(name):
    env = make_env(name, {"largest": 3, "split": None}, llm_env.PUPIL)
    assert len(env.unwrapped.rules.prompts) == 16  # a and b from 0 to 3


def test_a_task_of_ones_own(folder):
    env = make_env("users.py:Echo", {"num_tasks": 3}, llm_env.PUPIL)
    assert env.reset(options={"index": 2})[1] == {} and len(env.rules.prompts) == 3 and env.rules.text_env is not None
    env = make_env("users:echo", {"pays": 2.0}, llm_env.PUPIL)
    env.reset(options={"index": 3})
    three, end = env.rules.tokenizer.convert_tokens_to_ids(["3", "<eos>"])
    assert [env.step(three)[1], *env.step(end)[1:3]] == [0.0, 2.0, True]
    env = make_env("users:made", {"digit": "4"}, llm_env.PUPIL)
    assert env.rules.prompts.texts[0] == "4=" and env.rules.tokenizer.name_or_path == llm_env.PUPIL
    assert make_env("users:env", {}, None) is sys.modules["users"].env
    env = make_env("rows.jsonl", {"max_new_tokens": 3}, llm_env.PUPIL, ["exact_match", "users:length"])
    assert env.rules.rewards.names == ["exact_match", "length"] and env.rules.max_new_tokens == 3


def test_the_task_gets_the_models_tokenizer(tmp_path):
    reward = lambda completions: [0.0]  # noqa: E731
    make_tokenizer("abc").save_pretrained(tmp_path / "model")
    env = make_env("continuation", {"prompts": ["a"], "reward": reward}, str(tmp_path / "model"))
    assert env.unwrapped.rules.tokenizer.get_vocab().keys() >= {"a", "b", "c"}
    env = make_env("continuation", {"prompts": ["1"], "reward": reward, "tokenizer": llm_env.PUPIL}, str(tmp_path / "model"))
    assert "9" in env.unwrapped.rules.tokenizer.get_vocab()


def test_values():
    words = {"3": 3, "1e-3": 0.001, "-2": -2, "True": True, "None": None, "[1,'a']": [1, "a"], "{'a': 1}": {"a": 1}}
    assert {word: value_of(word) for word in words} == words
    for word in ("token", "a/b", "true", "1+1", "./x", "", "print(1)"):
        assert value_of(word) == word


# --- bad arguments -----------------------------------------------------------------------------------------------------

BAD = {
    "task": (["sample", "additon"], "there is no task 'additon'; did you mean addition?"),
    "no task": (["sample", "zzz"], "give one of addition, continuation, countdown, gsm8k"),
    "file": (["train", "none.jsonl", "--reward", "exact_match"], "there is no file 'none.jsonl'"),
    "no reward": (["train", "rows.jsonl"], "rows.jsonl has prompts but no reward; add --reward"),
    "reward": (["check-reward", "addition", "--reward", "exactmatch"], "there is no reward 'exactmatch'; give module:name"),
    "module": (["check-env", "nowhere.near:Echo"], "there is no module 'nowhere.near'; for a file give its path"),
    "path": (["check-env", "nowhere/near.py:Echo"], "there is no file 'nowhere/near.py'"),
    "name": (["check-env", "users.py:Eco"], "users.py has no 'Eco'; did you mean Echo?"),
    "not an env": (["sample", "users.py:nothing"], "users.py:nothing is a NoneType; give a text environment's class"),
    "an env with arguments": (["sample", "users.py:env", "env.stop=x"], "is an env already, which takes no stop"),
    "a task to check-env": (["check-env", "addition"], "use llm-env check-reward"),
    "model": (["sample", "addition", "--model", "./nowhere"], "there is no such folder"),
    "checkpoint": (["evaluate", "addition", "--model", "no.zip"], "there is no checkpoint 'no.zip'"),
    "checkpoint to train": (["train", "addition", "--model", "no.zip"], "is the name of an agent's checkpoint"),
    "keyword": (["train", "addition", "groupsize=3"], "GRPO() has no argument 'groupsize'; did you mean group_size?"),
    "TRL's keyword": (["train", "addition", "num_generations=3"], "it is called group_size here"),
    "keyword of the env": (["train", "addition", "max_new_tokens=3"], "max_new_tokens is an argument of the env"),
    "value": (["train", "addition", "group_size=3", "n_envs=8"], "group_size=3 must divide n_envs=8; try n_envs=9"),
    "word": (["train", "addition", "fast"], "'fast' must be name=value for the agent, or env.name=value for the task"),
    "twice": (["train", "addition", "n_envs=8", "n_envs=16"], "n_envs is given twice"),
    "option": (["train", "addition", "seed=3"], "'seed=3': use --seed"),
    "agent": (
        ["check-reward", "addition", "largest=3"],
        "check-reward has no agent; for an argument of the task write env.largest=3",
    ),
    "number": (["sample", "addition", "-n", "0"], "n=0 must be at least 1"),
    "target": (["train", "addition", "--save", "."], "--save . is a folder; give the name of a file in it"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_get_the_apis_message(case, folder, capsys):
    words, message = BAD[case]
    assert message in refused(capsys, *words)
    assert not list(folder.glob("*.zip"))


def test_debug_shows_the_traceback(folder):
    with pytest.raises(TypeError, match="did you mean group_size"):
        main(["train", "addition", "groupsize=3", "--debug"])
    done = run("train", "addition", "groupsize=3", folder=folder)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""


def test_errors_of_a_users_file_are_not_hidden(folder):
    (folder / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        main(["check-env", "broken.py:Echo"])
    (folder / "needs.py").write_text("import no_such_package\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        main(["check-env", "needs:Echo", "--debug"])


def test_the_manuals_commands_run(folder, capsys):
    """Those of the manual, in order, with short trainings and small checks."""
    page = (ROOT / "docs" / "command_line.md").read_text()
    commands = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 10 and all(command.startswith("llm-env ") for command in commands)
    (folder / "games.py").write_text(USERS.replace("Echo", "GuessNumber"))
    (folder / "rewards.py").write_text("def short(completions, **kwargs):\n    return [-len(c) / 8 for c in completions]\n")
    (folder / "questions.jsonl").write_text((folder / "rows.jsonl").read_text())
    shutil.copytree(llm_env.PUPIL, folder / "model")
    for command in commands:
        words = re.sub(r"--timesteps \d+", "", command).replace("n_envs=256", "n_envs=16").split()[1:]
        short = {"train": ["--timesteps", "10"], "evaluate": ["-n", "4"]}.get(words[0], ["-n", "2"])
        assert main([*words, *short]) == 0, (command, capsys.readouterr())
    error = re.search(r"\$ llm-env (.*)\n(llm-env train: .*)\n", page)
    assert refused(capsys, *error[1].split()) == error[2]


# --- training and evaluation -------------------------------------------------------------------------------------------


def test_train_evaluate_and_sample(folder, capsys):
    options = ["--timesteps", "100", "--seed", "3", "--save", "made/adder", "--tensorboard", "runs", "--quiet"]
    assert main(["train", "addition", *options, "group_size=4", "n_envs=8", "learning_rate=1e-4", "env.largest=9"]) == 0
    assert capsys.readouterr().out == f"saved {Path('made/adder.zip')}\n"
    assert list(folder.glob("runs/GRPO_1/events*"))

    env = make_env("addition", {"largest": 9}, llm_env.PUPIL)  # the same in Python
    agent = GRPO(llm_env.PUPIL, env, group_size=4, n_envs=8, learning_rate=1e-4, seed=3).learn(100)
    saved = GRPO.load("made/adder.zip")
    assert all((a == b).all() for a, b in zip(agent.policy.parameters(), saved.policy.parameters(), strict=True))

    assert main(["evaluate", "addition", "--model", "made/adder.zip", "-n", "20", "env.largest=9"]) == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    means = agent.evaluate(env, n_prompts=20)
    assert shown == {name: f"{value:.4g}" for name, value in means.items()}

    assert main(["sample", "addition", "--model", "made/adder.zip", "-n", "2", "--greedy", "env.largest=9"]) == 0
    first, second, mean = re.split(r"^--- .*\n", capsys.readouterr().out.replace("mean return: ", "\n"), flags=re.MULTILINE)[1:]
    prompts = env.unwrapped.rules.prompts.texts[:2]
    answers = agent.generate(prompts, deterministic=True)
    scores = [float(eval(prompt[:-1]) == int(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
    assert [first, second] == [
        f"{prompt}{answer}\nreturn: {score:g}\n" for prompt, answer, score in zip(prompts, answers, scores, strict=True)
    ]
    assert float(mean) == sum(scores) / 2


def test_train_shows_a_bar_and_samples(folder, capsys):
    assert (
        main(["train", "rows.jsonl", "--reward", "exact_match", "--timesteps", "10", "n_envs=8", "env.max_new_tokens=3"]) == 0
    )
    shown = capsys.readouterr().out
    assert "reward/exact_match" in shown and "completion" in shown and "100%" in shown  # the logs, the samples, the bar
    assert not list(folder.glob("*.zip"))


def test_ppo_on_a_users_text_env(folder, capsys):
    turn = ["env.max_new_tokens=2", "env.max_turns=1"]
    words = ["train", "users.py:Echo", "--algorithm", "ppo", "--timesteps", "20", "--save", "echo.zip", "--quiet"]
    assert main([*words, "n_envs=8", "gae_level=turn", *turn, "env.num_tasks=10"]) == 0
    assert PPO.load("echo.zip").gae_level == "turn"
    capsys.readouterr()
    assert main(["sample", "users.py:Echo", "--model", "echo.zip", "-n", "1", "env.first_seed=5", *turn]) == 0
    assert "env:    '5='" in capsys.readouterr().out
    assert main(["evaluate", "users.py:Echo", "--model", "echo.zip", "--sampled", "--repeats", "2", "-n", "3", *turn]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} >= {"reward", "turns", "reward_stderr"}


def test_without_rich_training_goes_on_without_a_bar(folder, capsys, monkeypatch):
    monkeypatch.setattr("agents.command_line.importlib.util.find_spec", lambda name: None)
    assert main(["train", "addition", "--timesteps", "10", "n_envs=8"]) == 0
    assert capsys.readouterr().err.count("no progress bar: it needs pip install 'llm-env[extra]'") == 1


def test_an_interrupt_saves_nothing(folder, capsys, monkeypatch):
    (folder / "adder.zip").write_bytes(b"an older file")

    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("agents.base.LanguageAgent.train", interrupted)
    assert main(["train", "addition", "--timesteps", "10", "--save", "adder", "--quiet", "n_envs=8"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "llm-env train: interrupted; nothing was saved"
    assert (folder / "adder.zip").read_bytes() == b"an older file" and not list(folder.glob("*.tmp*"))


@pytest.mark.slow
def test_ctrl_c_stops_the_process(folder):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = ["train", "addition", "--timesteps", str(10**9), "--save", "adder", "n_envs=16"]
    command = [sys.executable, "-u", "-m", "llm_env", *words]
    with open("out.txt", "w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            while "n_updates" not in Path("out.txt").read_text():  # it trains
                assert process.poll() is None, Path("out.txt").read_text()
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=300) == 130
        finally:
            process.kill()
    shown = Path("out.txt").read_text()
    assert shown.rstrip().endswith("llm-env train: interrupted; nothing was saved") and "Traceback" not in shown
    assert {path.name for path in folder.iterdir()} <= {"users.py", "rows.jsonl", "out.txt", "__pycache__"}

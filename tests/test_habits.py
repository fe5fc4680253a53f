"""What users of SB3 and TRL try in their first hour."""

import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.monitor import Monitor
from transformers import AutoModelForCausalLM, AutoTokenizer

import llm_env
from agents import GRPO, PPO, REINFORCE, TextVecEnv, TimeLimit
from tests.conftest import make_model, make_tokenizer, refused
from tests.probes import make_env

ROOT = Path(__file__).parents[1]
ENV = "llm_env/Addition-v0"
TOKENIZER = make_tokenizer("abcdefgh")


def make_agent(kind=GRPO, env=None, **kwargs):
    env = make_env(TOKENIZER) if env is None else env
    return kind(make_model("llama", len(TOKENIZER)), env, **{"n_envs": 16, "seed": 0, **kwargs})


# --- keywords --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "hint"),
    [
        (GRPO, "num_generations", "it is called group_size here"),
        (GRPO, "beta", "it is called kl_coef here"),
        (GRPO, "epsilon_high", "it is called clip_range_high here"),
        (GRPO, "loss_type", "it is called aggregation here"),
        (GRPO, "per_device_train_batch_size", "it is called micro_batch_size here"),
        (PPO, "lr", "it is called learning_rate here"),
        (PPO, "n_steps", "it is called n_envs here"),
        (PPO, "lam", "it is called gae_lambda here"),
        (PPO, "kl_coef", "kl_coef is an argument of the env"),
        (PPO, "beta", "kl_coef is an argument of the env"),
        (PPO, "group_size", "group_size is an argument of GRPO"),
        (REINFORCE, "clip_range", "clip_range is an argument of"),
        (GRPO, "max_completion_length", "max_new_tokens is an argument of the env"),
        (GRPO, "reward_funcs", "reward is an argument of the env"),
        (GRPO, "total_timesteps", "total_timesteps is an argument of learn"),
        (GRPO, "groupsize", "did you mean group_size?"),
        (GRPO, "processing_class", "it is called policy_kwargs={'tokenizer': ...} here"),
        (REINFORCE, "xyzzy", "it has "),
    ],
)
def test_an_unknown_keyword_is_refused_by_the_class_that_was_called(kind, name, hint):
    message = re.escape(f"{kind.__name__}() has no argument {name!r}; {hint}")
    refused(kind, llm_env.PUPIL, ENV, **{name: 1}, error=TypeError, match=f"^{message}")


def test_a_class_of_ones_own_may_have_keywords_of_its_own():
    class Mine(GRPO):
        def __init__(self, *args, mine=1, **kwargs):
            self.mine, self.more = mine, kwargs.pop("more", 0)
            super().__init__(*args, **kwargs)

    agent = make_agent(Mine, mine=2, more=3)
    assert (agent.mine, agent.more) == (2, 3)


# --- tokenizers of model objects -------------------------------------------------------------------------------------


def test_the_tokenizer_of_a_model_object_is_looked_up(tmp_path):
    make_model("llama", len(TOKENIZER)).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    other = make_tokenizer("hgfedcba")  # as many tokens, with other ids
    refused(GRPO, model, make_env(other), n_envs=16, error=ValueError, match="is not the model's")
    assert GRPO(model, make_env(TOKENIZER), n_envs=16).n_envs == 16
    more = AutoTokenizer.from_pretrained(tmp_path)
    more.add_tokens(["+", "-"])  # the usual way to new tokens
    model.resize_token_embeddings(len(more))
    assert GRPO(model, make_env(more), n_envs=16).n_envs == 16


def test_a_real_model_under_another_tokenizer(stories):
    model = AutoModelForCausalLM.from_pretrained(stories)
    refused(GRPO, model, ENV, n_envs=16, error=ValueError, match=r"99 tokens\) is not the model's \(512 tokens\)")
    model.name_or_path = model.config._name_or_path = ""
    with pytest.warns(UserWarning, match="it is not known which tokenizer") as caught:
        GRPO(model, ENV, n_envs=16)
    assert caught[0].filename == __file__  # the user's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GRPO(llm_env.PUPIL, ENV, n_envs=16)


# --- generate, repr, load --------------------------------------------------------------------------------------------


def test_generate_takes_what_others_take():
    agent = GRPO(llm_env.PUPIL, ENV, n_envs=16, seed=0)
    prompts = ["12+34=", "1+1="]
    assert agent.generate(prompts, deterministic=True, n=2) == [
        [text] * 2 for text in agent.generate(prompts, deterministic=True)
    ]
    texts = agent.generate(prompts, n=50, temperature=5.0, max_new_tokens=3)
    assert [len(group) for group in texts] == [50, 50] and len(set(texts[0])) > 20  # a temperature at which all is possible
    cold = agent.generate(prompts, n=50, temperature=0.01)
    assert all(len(set(group)) == 1 for group in cold)
    stopped = agent.generate(prompts, n=50, temperature=5.0, max_new_tokens=20, stop=["3", "7"])
    for text in (text for group in stopped for text in group):
        assert not set("37") & set(text[:-1])
    assert any(text.endswith(("3", "7")) for group in stopped for text in group)
    refused(agent.generate, prompts, n=0, error=ValueError, match="n=0 must be")
    refused(agent.generate, prompts, temperature=0.0, error=ValueError, match="temperature=0.0 must be positive")


def test_an_agent_says_what_it_is():
    agent = make_agent(GRPO, group_size=4, kl_coef=0.0, clip_range=0.1, learning_rate=1e-3)
    agent.learn(1)
    name, model, env, settings, trained = repr(agent).splitlines()
    assert name == "GRPO" and str(agent) == repr(agent)
    total = sum(parameter.numel() for parameter in agent.policy.parameters())
    assert model == f"  model: LlamaForCausalLM, {total:,} of {total:,} parameters trained, on cpu"
    assert env.startswith("  env: ") and "n_envs=16" in env
    assert settings == "  settings: learning_rate=0.001, seed=0, group_size=4, clip_range=0.1"
    assert trained == f"  trained: {agent.num_timesteps:,} timesteps, 1 optimizer steps"
    assert len(repr(PPO(llm_env.PUPIL)).splitlines()) == 5


@pytest.mark.parametrize(("kind", "n_envs"), [(GRPO, 32), (GRPO, 8), (PPO, 48), (REINFORCE, 3)])
def test_a_checkpoint_goes_on_with_another_number_of_episodes(kind, n_envs, tmp_path):
    group = {"group_size": 4} if kind is GRPO else {}
    agent = make_agent(kind, **group)
    agent.learn(1)
    agent.save(tmp_path / "agent")
    again = kind.load(tmp_path / "agent", env=make_env(TOKENIZER), n_envs=n_envs)
    done = again.num_timesteps
    rollout = again.sample_rollout()
    assert again.n_envs == len(rollout) == n_envs and again.num_timesteps == done > 0
    again.learn(1, reset_num_timesteps=False)
    assert again.num_timesteps > done
    if kind is GRPO:
        refused(GRPO.load, tmp_path / "agent", env=make_env(TOKENIZER), n_envs=18, error=ValueError, match="try n_envs=20")


def test_a_gpu_that_is_not_there_is_told_of():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.warns(UserWarning, match="device='cuda', but torch finds no GPU; computing on cpu") as caught:
        agent = make_agent(device="cuda")
    assert agent.device.type == "cpu" and caught[0].filename == __file__


# --- SB3's and Gymnasium's ways in -----------------------------------------------------------------------------------


def test_sb3_makes_envs_from_their_ids():
    from stable_baselines3 import PPO as SB3PPO
    from stable_baselines3.common.env_util import make_vec_env

    assert make_vec_env(ENV, n_envs=4).num_envs == 4
    agent = SB3PPO("MultiInputPolicy", ENV, n_steps=8, batch_size=8)
    agent.learn(16)
    assert agent.num_timesteps == 16
    with pytest.raises(TypeError, match="render_mode='rgb_array' must be None or one of"):
        gym.make(ENV, render_mode="rgb_array")


@pytest.fixture
def own_task():
    def make(render_mode=None):
        return llm_env.TextGenerationEnv(
            ["1+1="], lambda completions: [0.0] * len(completions), llm_env.PUPIL, max_new_tokens=3
        )

    gym.register("mine/Task-v0", entry_point=make)
    yield "mine/Task-v0"
    del gym.registry["mine/Task-v0"]


def test_a_vector_env_of_ones_own_task(own_task):
    agent = GRPO(llm_env.PUPIL, gym.make_vec(own_task, num_envs=8), group_size=4)
    assert agent.n_envs == 8 and agent.env.venv.num_envs == 8
    agent.learn(1)
    assert agent._n_updates == 1
    refused(
        lambda: GRPO(llm_env.PUPIL, gym.make_vec(own_task, num_envs=8, vectorization_mode="async")),
        error=TypeError,
        match="register the id with vector_entry_point=",
    )
    wrapped = gym.make_vec(own_task, num_envs=8, wrappers=[lambda env: gym.wrappers.TransformReward(env, float)])
    refused(GRPO, llm_env.PUPIL, wrapped, error=TypeError, match="has the wrappers TransformReward")
    refused(GRPO, llm_env.PUPIL, gym.make_vec("CartPole-v1", num_envs=2), error=TypeError, match="holds no text envs")


def test_a_text_vec_env_of_a_single_env(own_task):
    vec_env = TextVecEnv(gym.make(own_task))
    assert vec_env.num_envs == 1 and vec_env.reset()["input_ids"].shape[0] == 1
    wrapped = gym.wrappers.TransformReward(gym.make(own_task), float)
    for bad in (wrapped, gym.make("CartPole-v1"), "mine/Task-v0"):
        refused(TextVecEnv, bad, error=TypeError, match="TextVecEnv takes a TextGenerationVectorEnv or")


def test_an_eval_callback_makes_no_warnings():
    agent = GRPO(llm_env.PUPIL, ENV, n_envs=16, group_size=4, seed=0)
    callback = EvalCallback(Monitor(gym.make(ENV)), n_eval_episodes=2, eval_freq=2, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        agent.learn(100, callback)
    assert callback.last_mean_reward >= 0


# --- progress and time -----------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass with every look."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_time_limit_ends_within_a_rollout_that_does_not_count(wrapped):
    def env():
        made = make_env(TOKENIZER, max_new_tokens=8)
        return gym.wrappers.TransformReward(made, float) if wrapped else made

    whole, agent = (make_agent(GRPO, env(), group_size=4, learning_rate=1e-2) for _ in range(2))
    whole.learn(300)
    first = make_agent(GRPO, env(), group_size=4, learning_rate=1e-2).learn(1)
    steps = []
    limit = TimeLimit(3.5, Clock())  # the training starts at 1, so that the fourth look is beyond 4.5
    limit.should_stop = lambda original=limit.should_stop: steps.append(agent.num_timesteps) or original()
    agent.learn(300, limit)
    assert len(steps) == 4 and agent.num_timesteps in (0, first.num_timesteps) and agent._n_updates <= 1
    agent.learn(whole.num_timesteps - agent.num_timesteps, reset_num_timesteps=False)
    assert all(torch.equal(a, b) for a, b in zip(agent.policy.parameters(), whole.policy.parameters(), strict=True))
    refused(TimeLimit, 0, error=ValueError, match="seconds=0 must be positive")


def test_a_callback_of_ones_own_may_stop_a_rollout():
    class Stop(BaseCallback):
        asked = 0

        def _on_step(self):
            return True

        def should_stop(self):
            self.asked += 1
            return self.asked == 5

    agent, callback = make_agent(group_size=4), Stop()
    agent.learn(1000, [callback])
    assert callback.asked == 5
    agent.learn(50, reset_num_timesteps=False)
    assert agent._n_updates > 0


def test_the_progress_bar_moves_while_sampling_and_counts_every_token_once(monkeypatch):
    shown = []

    class Bar:
        def __init__(self, total):
            self.total = total

        def update(self, count):
            shown.append(count)

        def refresh(self):
            pass

        close = refresh

    monkeypatch.setattr("stable_baselines3.common.callbacks.tqdm", Bar)
    seen = []

    def reward(completions):
        seen.append(sum(shown))
        return [0.0] * len(completions)

    agent = make_agent(GRPO, make_env(TOKENIZER, reward), group_size=4)
    agent.learn(150, progress_bar=True, callback=lambda given, variables: True)
    assert seen[0] > 0 and seen == sorted(seen)  # before the first rollout was counted
    rows = agent.env.num_envs
    assert agent.num_timesteps - rows < sum(shown) <= agent.num_timesteps + rows and min(shown) >= 0


# --- names of an env's arguments, and types ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_completion_length", "it is called max_new_tokens here"),
        ("reward_funcs", "it is called reward here"),
        ("beta", "it is called kl_coef here"),
        ("ref_model", "it is called reference here"),
        ("group_size", "group_size is an argument of the agent"),
        ("lr", "learning_rate is an argument of the agent"),
        ("max_new_token", "did you mean max_new_tokens?"),
    ],
)
def test_an_unknown_keyword_of_an_env(name, hint):
    arguments = (["a"], lambda completions: [0.0] * len(completions), llm_env.PUPIL)
    for kind, more in ((llm_env.TextGenerationEnv, ()), (llm_env.TextGenerationVectorEnv, (2,))):
        message = re.escape(f"{kind.__name__}() has no argument {name!r}; {hint}")
        refused(kind, *more, *arguments, **{name: 1}, error=TypeError, match=f"^{message}")
    with pytest.raises(TypeError, match=re.escape(f"has no argument {name!r}; {hint}")):
        gym.make(ENV, **{name: 1})


SCRIPT = """\
import llm_env
from agents import GRPO, PPO, REINFORCE
from llm_env.tasks.addition import addition
from llm_env.tasks.gsm8k import gsm8k

env = llm_env.TextGenerationEnv(["a"], lambda completions: [0.0], llm_env.PUPIL, max_new_tokens=4, kl_coef=0.1)
wrong_env = llm_env.TextGenerationEnv(["a"], lambda completions: [0.0], llm_env.PUPIL, max_new_token=4)
agent = GRPO(llm_env.PUPIL, env, group_size=4, n_envs=8, temperature=1.0, engine=None)
wrong_agent = GRPO(llm_env.PUPIL, env, n_env=8)
wrong_type = PPO(llm_env.PUPIL, env, n_envs="8")
other = REINFORCE(llm_env.PUPIL, env, n_epochs=2, mask_truncated=True).learn(10)
task = llm_env.TextGenerationEnv(**addition(max_new_tokens=8, reward=lambda completions: [0.0]))
wrong_task = addition(max_new_token=8)
wrong_value = gsm8k("train.jsonl", max_new_tokens="8")
"""
WRONG = {
    7: 'Unexpected keyword argument "max_new_token"',
    9: 'Unexpected keyword argument "n_env"',
    10: 'Argument "n_envs" to "PPO" has incompatible type "str"',
    13: 'Unexpected keyword argument "max_new_token"',
    14: 'has incompatible type "str"',
}


def test_mypy_finds_a_misspelt_keyword_from_outside(tmp_path):
    """The packages are typed (`py.typed`), as a wheel installs them and as `pip install -e` does."""
    source = tmp_path / "source"
    for name in ("llm_env", "agents"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (tmp_path / "script.py").write_text(SCRIPT)
    # Skip large packages that the script does not use: mypy is then three times faster.
    skipped = "[mypy-torch.*,transformers.*]\nfollow_imports = skip\n"
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nfollow_imports = silent\n{skipped}")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    (folder,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (folder / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    pip = [sys.executable, "-m", "pip", "--python", python]
    for install in ([], ["-e"]):
        subprocess.run([*pip, "install", "-q", "--no-deps", "--no-build-isolation", *install, str(source)], check=True)
        command = [sys.executable, "-m", "mypy", "--python-executable", python, "script.py"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        subprocess.run([*pip, "uninstall", "-q", "-y", "llm-env"], check=True)
        lines = [line.split(":", 3) for line in done.stdout.splitlines()]
        errors = {int(line[1]): line[3] for line in lines if line[0] == "script.py" and line[2] == " error"}
        assert list(errors) == list(WRONG), done.stdout + done.stderr
        assert all(text in errors[line] for line, text in WRONG.items()), done.stdout

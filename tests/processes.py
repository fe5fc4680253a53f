"""Runs of several processes over gloo: `launch` starts `python -m tests.processes <run> <folder>` in each."""

import os
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from gymnasium.wrappers import TransformReward
from peft import LoraConfig
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.monitor import Monitor
from transformers import LlamaForCausalLM

from agents import GRPO, PPO, REINFORCE
from agents.distributed import communicator
from agents.distributed.fsdp import full_params
from agents.validation import check_processes
from llm_env import TextGenerationEnv
from tests.conftest import make_model, make_tokenizer
from tests.probes import make_env
from tests.text_envs import Letters

ROOT = Path(__file__).parents[1]
TOKENIZER = make_tokenizer("abcdefgh")
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
KINDS = {
    "GRPO": (GRPO, {"group_size": 4, "kl_coef": 0.1, "micro_batch_size": 4}),  # more passes in some processes than in others
    "GRPO with an adapter": (GRPO, {"group_size": 4, "kl_coef": 0.1, "learning_rate": 0.3}),
    "PPO": (PPO, {"batch_size": 19, "n_epochs": 2}),  # the last episode is one process's
    "PPO with a critic of its own": (PPO, {"batch_size": 10, "n_epochs": 1, "separate_critic": True}),
    "PPO with an adapter and a critic": (PPO, {"batch_size": 10, "separate_critic": True, "learning_rate": 0.1}),
    "PPO, one step an epoch": (PPO, {"n_epochs": 2}),  # old log-probs are computed twice, and summed over the processes once
    "PPO on turns": (PPO, {"gae_level": "turn", "batch_size": 10, "n_epochs": 2}),
    "GRPO on turns": (GRPO, {"group_size": 4, "kl_coef": 0.1, "ratio_level": "turn"}),
    "REINFORCE by tokens": (REINFORCE, {"batch_size": 7}),
    "REINFORCE": (REINFORCE, {"batch_size": 10, "n_epochs": 2, "gradient_checkpointing": True}),
}


def launch(run, folder, count, **environment):
    """Start `count` processes, as a launcher does, but that nobody ends the others where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    command = [sys.executable, "-m", "tests.processes", run, str(folder)]
    started = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for rank in range(count)
    ]
    try:
        printed = [process.communicate(timeout=180)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, printed, strict=True)]


def letters(completions, **kwargs):
    return [c.count("a") + 0.3 * len(c) for c in completions]


def make_text_env(kind="GRPO", reward=letters, **kwargs):
    shaping = {"kl_coef": 0.05} if KINDS[kind][0] is PPO else {}
    kwargs.setdefault("reference", "base" if "adapter" in kind else make_model("llama", len(TOKENIZER), seed=1, scale=2.0))
    if "on turns" in kind:
        limits = {"max_prompt_tokens": 4, "max_new_tokens": 3, "max_turns": 3, "max_observation_tokens": 4}
        return TextGenerationEnv.from_text_env(Letters, TOKENIZER, **limits, **shaping, **kwargs)
    env = make_env(TOKENIZER, reward, tuple("abcdef"), **shaping, **kwargs)
    return TransformReward(env, float) if "by tokens" in kind else env


def make_agent(kind="GRPO", env=None, optimizer=torch.optim.SGD, **kwargs):
    """20 episodes a rollout: 5 groups, so that neither 2 nor 3 processes have equal parts."""
    algorithm, settings = KINDS[kind]
    model = make_model("llama", len(TOKENIZER), scale=2.0, tie_word_embeddings=kind == "REINFORCE")
    settings = {"n_envs": 20, "seed": 0, "learning_rate": 1e-2, **settings, **kwargs}
    env = make_text_env(kind) if env is None else env
    adapter = {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if "adapter" in kind else {}
    return algorithm(model, env, policy_kwargs={"optimizer_class": optimizer, **adapter}, **settings)


def learned(agent, tokens=150, **kwargs):
    """The texts of all rollouts, and the weights, after learning on."""
    texts, original = [], type(agent).train

    def noted(self, rollout):
        texts.append([info["completion"] for info in rollout.infos])
        original(self, rollout)

    with mock.patch.object(type(agent), "train", noted):
        agent.learn(tokens, reset_num_timesteps=False, **kwargs)
    weights = {name: value.clone() for name, value in agent.get_parameters()["policy"].items()}
    return {"texts": texts, "weights": weights, "tokens": agent.num_timesteps}


def write(found, folder):
    torch.save(found, folder / f"{os.environ.get('RANK', 0)}.pt")


def equal(folder):
    """Every algorithm, and a file from the middle of a run."""
    found = {kind: learned(make_agent(kind)) for kind in KINDS}
    agent = make_agent(optimizer=torch.optim.AdamW)
    found["before"] = learned(agent)
    agent.save(folder / "agent")
    agent.policy.save_pretrained(folder / "model")
    found["after"] = learned(agent)
    found["report"] = agent.evaluate(make_text_env())
    write(found, folder)


def resume(folder):
    """The second half of `equal`, from its files by these processes and by one."""
    write({name: learned(GRPO.load(folder / name, env=make_text_env())) for name in ("agent", "of_one")}, folder)


def together(folder):
    """Callbacks, logs, a record, rewards through a wrapper; one process draws for itself, and the seed is nobody's."""
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)  # the models differ, and are made the same
    model = LlamaForCausalLM(make_model("llama", len(TOKENIZER)).config)
    env = make_env(TOKENIZER, letters, ("a",), max_new_tokens=8, record=folder / "record.jsonl")
    agent = GRPO(model, env, group_size=4, n_envs=16, learning_rate=1e-2, tensorboard_log=str(folder / "runs"), verbose=1)
    evaluation = EvalCallback(
        Monitor(make_text_env()), eval_freq=8, deterministic=False, log_path=folder, best_model_save_path=folder
    )
    found = {"native": learned(agent, 300, callback=[evaluation, CheckpointCallback(9, folder / "checkpoints")])}
    found["best"] = evaluation.best_mean_reward
    if rank == 1 and not agent.communicator.sharded:
        agent.generate(["ab"])
    found["after a draw"] = learned(agent, 200)
    env = make_env(TOKENIZER, letters, ("a",), max_new_tokens=8)
    agent.set_env(TransformReward(env, lambda reward: 2 * reward))
    found["token clock"] = learned(agent, 100)
    write(found, folder)


def fault(folder):
    """A reward fails in the second process, and is slow in it; what was begun is drawn again."""
    rank, calls = int(os.environ["RANK"]), []

    def reward(completions, **kwargs):
        calls.append(len(completions))
        if rank == 1 and len(calls) == 2:
            raise OSError("the judge is out for lunch")
        if rank == 1:
            time.sleep(1.0)
        return letters(completions)

    agent = make_agent(env=make_text_env(reward=reward), preflight=False)
    found = {}
    try:
        agent.learn(150)
    except (ValueError, RuntimeError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    before, begun = len(calls), time.monotonic()
    found |= learned(agent, 150 - agent.num_timesteps)
    found["seconds a rollout"] = (time.monotonic() - begun) / (len(calls) - before)
    found["calls"] = calls
    write(found, folder)


class Told(BaseCallback):
    """Does `act` at its second call, and at the third evaluates, which all do together, where there is an `exam`."""

    def __init__(self, act, exam=True):
        super().__init__()
        self.act, self.exam = act, exam

    def _on_step(self):
        if self.n_calls == 3 and self.exam:
            self.model.evaluate(make_text_env())
        return self.act() if self.n_calls == 2 else True


class Stops(BaseCallback):
    """Asks to stop at a decoding step."""

    def __init__(self, asked_until):
        super().__init__()
        self.left = asked_until

    def _on_step(self):
        return True

    def should_stop(self):
        self.left -= 1
        return self.left <= 0


def told(folder):
    """One process is told to stop; its callback fails; an update fails; one evaluates alone."""
    rank = int(os.environ["RANK"])

    def fail(error):
        raise error

    def said(call):
        try:
            call()
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    agent = make_agent()
    agent.learn(150, callback=Told(lambda: rank == 1))
    found = {"stopped at": agent.num_timesteps}
    agent.learn(150, callback=Stops(asked_until=3 if rank == 1 else 10**9))
    found["stopped while sampling"] = agent.num_timesteps, agent._n_updates
    for exam in (False, True):
        callback = Told(lambda: rank == 1 or fail(OSError("the disk is full")), exam)
        found[f"error, exam {exam}"] = said(lambda callback=callback: agent.learn(150, callback=callback))
    found |= learned(agent)
    with mock.patch.object(GRPO, "loss", lambda *args: fail(MemoryError("no room"))) if rank == 1 else nullcontext():
        found["in the update"] = said(lambda: agent.learn(10, reset_num_timesteps=False))
    found["in the end"] = learned(agent, 30)
    found["apart"] = said(lambda: agent.evaluate(make_text_env()) if rank == 0 else agent.learn(10))
    write(found, folder)


def death(folder):
    """The second process is killed in the third rollout."""
    calls = []

    def reward(completions, **kwargs):
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 3:
            os._exit(7)
        return letters(completions)

    agent = make_agent(env=make_text_env(reward=reward), optimizer=torch.optim.AdamW)
    agent.learn(300, callback=CheckpointCallback(1, folder / "checkpoints"))


def mixed(folder):
    """The launcher's mixed precision."""
    found = {}
    for kind in ("GRPO", "PPO"):
        agent = make_agent(kind)
        before = agent.policy.evaluate_actions([[3, 4]] * 2, [[4, 5, 6]] * 2)
        found[kind] = {"before": before, "bf16": agent.bf16, **learned(agent)}
    agent = make_agent("GRPO with an adapter")
    exam = Monitor(make_text_env(reference=agent.rules.reference))  # which asks the base, whole for that long
    agent.learn(10, callback=EvalCallback(exam, eval_freq=2, n_eval_episodes=2, verbose=0))
    policy = agent.policy
    base = list(policy.adapter.base.parameters())
    with full_params(policy):
        gathered = list(policy.adapter.base.parameters())
    found["base"] = [parameter.device.type for parameter in base], {parameter.dtype for parameter in gathered}
    write(found, folder)


def refused(folder):
    """What a launcher's configuration may ask for and does not get."""
    model = make_model("llama", len(TOKENIZER))
    for call in (
        make_agent,
        lambda: GRPO(model, make_text_env(), optimizer="adamw_8bit"),
        lambda: GRPO(model, make_text_env(), optimizer="paged_adamw_8bit"),
        lambda: check_processes(4, 4, communicator.get_communicator().size),
    ):
        try:
            call()
        except ValueError as error:
            print(f"ValueError: {error}")


def apart(folder):
    """The main process saves, and the other goes on."""
    agent = make_agent()
    if os.environ["RANK"] == "0":
        agent.save(folder / "agent")
    agent.learn(100)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](Path(sys.argv[2]))

"""Compare the weights and logs of some short trainings between a commit and the working tree.

    python tests/same_weights.py BEFORE     # a commit; runs it and the working tree in turn, and compares
    python tests/same_weights.py            # prints what the working tree makes

A change of structure alone must give the same weights, bit for bit, for the same seed. The script uses nothing of the project
but what the README documents, so that it runs on both sides. Configurations that one side refuses are reported as such.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHARACTERS = "abcdefgh"
SKIPPED = ("time/", "rollout/samples")  # log values that differ from run to run, and text
SEED, STEPS = 3, 400


def make_tokenizer():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<eos>", "<pad>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def make_model(family="llama", seed=0):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    common = {"vocab_size": len(CHARACTERS) + 3, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **common))
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **common))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    return model


def letters(completions, **kwargs):
    return [c.count("a") + 0.3 * len(c) for c in completions]


def steps(completion_ids, **kwargs):
    return [[(i, 0.5 if token == 3 else -0.1) for i, token in enumerate(ids) if token in (3, 4)] for ids in completion_ids]


def make_env(reward=letters, **kwargs):
    import llm_env

    prompts = ["a", "abc", "bcdefg", "h", "gh", "fed"]
    return llm_env.TextGenerationEnv(
        prompts, reward, make_tokenizer(), **{"max_new_tokens": 8, "max_prompt_tokens": 8, **kwargs}
    )


def configurations():
    """Name: algorithm, its arguments, and a function that makes the env."""
    from gymnasium.wrappers import TransformReward
    from peft import LoraConfig

    from agents import GRPO, PPO, REINFORCE
    from llm_env.reference import AdaptiveKLController

    def env():
        return make_env()

    def with_reference(**kwargs):
        return lambda: make_env(reference=make_model(seed=1), **kwargs)

    lora = {"policy_kwargs": {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}}
    group = {"group_size": 4}
    return {
        "GRPO": (GRPO, group, env),
        "GRPO on GPT-2": (GRPO, {**group, "family": "gpt2"}, env),
        "GRPO, KL in the loss": (GRPO, {**group, "kl_coef": 0.1}, with_reference()),
        "GRPO, process supervision": (GRPO, {**group, "supervision": "process"}, lambda: make_env(steps)),
        "GRPO, resampling": (
            GRPO,
            {**group, "max_resamples": 2},
            lambda: make_env(lambda completions: [float("a" in c) for c in completions]),
        ),
        "GRPO, minibatches and epochs": (GRPO, {**group, "n_epochs": 3, "batch_size": 8, "micro_batch_size": 4}, env),
        "GRPO, moving reference": (GRPO, {**group, "kl_coef": 0.1, "reference_every": 2}, with_reference()),
        "GRPO, constraints and ends": (GRPO, group, lambda: make_env(stop="ab", min_new_tokens=2, allowed_tokens=[0, 3, 4, 5])),
        "GRPO, LoRA": (GRPO, {**group, **lora, "kl_coef": 0.1}, lambda: make_env(reference="base")),
        "GRPO, overlap": (GRPO, {**group, "overlap": True}, env),
        "PPO": (PPO, {"batch_size": 8}, env),
        "PPO, separate critic": (PPO, {"separate_critic": True, "batch_size": 8}, env),
        "PPO, adaptive KL in the reward": (PPO, {}, with_reference(kl_coef=AdaptiveKLController(0.1, 1.0, 100))),
        "PPO, token clock": (PPO, {"n_epochs": 2}, lambda: TransformReward(make_env(), float)),
        "REINFORCE": (REINFORCE, {"baseline": None}, env),
        "REINFORCE, running mean": (REINFORCE, {"baseline": "running_mean"}, env),
        "REINFORCE, leave one out": (REINFORCE, {"baseline": "leave_one_out", "group_size": 4}, env),
        "REINFORCE, critic": (REINFORCE, {"baseline": "value"}, env),
    }


def digest_of(agent):
    """SHA-256 of all weights by name; with an adapter of those that the merged model has."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*agent.policy.weights(), *agent.policy.state_dict().items()], key=lambda item: item[0]):
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def logging_to(entries):
    from stable_baselines3.common.logger import KVWriter, Logger

    class Writer(KVWriter):
        def write(self, values, excluded, step=0):
            entries.append({key: value for key, value in values.items() if not key.startswith(SKIPPED)})

        def close(self):
            pass

    return Logger(None, [Writer()])


def train(name, resume=False):
    """A hash of the weights and one of the log values of a configuration; with `resume` saved and loaded half way."""
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    algorithm, arguments, env = configurations()[name]
    arguments = dict(arguments)
    model, entries = make_model(arguments.pop("family", "llama")), []
    settings = {"n_envs": 16, "learning_rate": 3e-3, "seed": SEED, "preflight": False}
    agent = algorithm(model, env(), **settings, **arguments)
    agent.set_logger(logging_to(entries))
    agent.learn(STEPS // 2 if resume else STEPS)
    if resume:
        with tempfile.TemporaryDirectory() as folder:
            agent.save(f"{folder}/agent")
            base = {"policy": make_model()} if "peft_config" in arguments.get("policy_kwargs", {}) else {}
            agent = algorithm.load(f"{folder}/agent", env=env(), **base)
        agent.set_logger(logging_to(entries))
        agent.learn(STEPS // 2, reset_num_timesteps=False)
    logs = hashlib.sha256(json.dumps(entries, sort_keys=True, default=float).encode()).hexdigest()[:16]
    return {"weights": digest_of(agent), "logs": logs, "rollouts": len(entries)}


def train_in_two_processes(name):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, __file__, "--one", name]
    started = [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    results = [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in started]
    assert results[0]["weights"] == results[1]["weights"], "the processes hold different weights"
    return results[0]


def run_all():
    """Results by configuration, of the packages that are imported, and where those lie."""
    import agents

    results: dict = {"folder": str(Path(agents.__file__).parents[1])}
    jobs = [(name, train, (name,)) for name in configurations()]
    jobs += [
        (f"{name}, saved and resumed", train, (name, True)) for name in ("GRPO, minibatches and epochs", "PPO", "GRPO, LoRA")
    ]
    jobs += [(f"{name}, two processes", train_in_two_processes, (name,)) for name in ("GRPO", "PPO")]
    for name, job, given in jobs:
        try:
            results[name] = job(*given)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"[:200]}
        print(f"{name:45} {results[name]}", file=sys.stderr, flush=True)
    return results


def results_of(tree):
    """`run_all` of the packages in a folder, in a process that imports them from there."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--json"], env=environment, cwd=tree, stdout=subprocess.PIPE, text=True, check=True
    )
    results = json.loads(done.stdout.splitlines()[-1])
    assert Path(results.pop("folder")).samefile(tree), "the packages were imported from elsewhere"
    return results


def compare(commit):
    """Whether a commit and the working tree give the same results; prints those that differ."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        before, after = results_of(folder), results_of(ROOT)
    differing = [name for name in after if before.get(name) != after[name]]
    for name in differing:
        print(f"{name}: {before.get(name)} before, {after[name]} now")
    print(f"{len(after) - len(differing)} of {len(after)} configurations give the same weights and logs as {commit}")
    return not differing


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(train(sys.argv[2])))
    elif sys.argv[1:] in (["--json"], []):
        print(json.dumps(run_all()))
    else:
        sys.exit(0 if compare(sys.argv[1]) else 1)

"""An answer ends at every end token of the model, in the env, in sampling, in constraints and in engines."""

import copy
import json

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.vec_env import DummyVecEnv
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from agents import GRPO, TextVecEnv
from agents.engines.base import DecodingSpec
from agents.engines.vllm.engine import extend, sampling_settings
from agents.policy import LanguagePolicy
from llm_env import TextGenerationEnv, TextGenerationVectorEnv
from llm_env.end_tokens import end_tokens_beside, end_tokens_of_model
from tests.chats import BOS, END, EOS, SPIDER, ids_of, make_chat_tokenizer

CHATS = [{"prompt": SPIDER}]
X, Y = ids_of("xy")


def length(completions, **kwargs):
    return [float(len(c if isinstance(c, str) else c[0]["content"])) for c in completions]


def tiny(tokenizer, eos=None, **config):
    """A model of random weights; `eos` is what its generation config says, if anything was set."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes, **config))
    if eos is not None:
        model.generation_config.eos_token_id = eos
    return model


def saved(tokenizer, folder, eos):
    """A folder with a model and its tokenizer."""
    tiny(tokenizer, eos).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make(tokenizer, prompts=CHATS, **kwargs):
    return TextGenerationEnv(prompts, length, tokenizer, **{"max_new_tokens": 12, **kwargs})


def test_the_files_beside_a_tokenizer_name_the_end_tokens(tmp_path):
    path = saved(make_chat_tokenizer(), tmp_path, [EOS, END])
    for tokenizer in (path, AutoTokenizer.from_pretrained(path)):
        assert make(tokenizer).rules.eos_ids == {EOS, END}
    env = make(path)
    for end in (EOS, END):
        env.reset(seed=0)
        assert env.step(X)[2:4] == (False, False)
        _, reward, terminated, truncated, info = env.step(end)
        assert (reward, terminated, truncated, info["completion"]) == (1.0, True, False, "x")


def test_one_number_in_the_file_is_an_end_token_beside_the_tokenizers(tmp_path):
    path = saved(make_chat_tokenizer(), tmp_path, END)
    assert make(path).rules.eos_ids == {EOS, END} and make(path).rules.eos_id == EOS


def test_a_default_that_nobody_set_ends_nothing(tmp_path):
    tokenizer = make_chat_tokenizer()
    model = tiny(tokenizer)
    assert model.generation_config.eos_token_id == BOS  # the class's default, 2, happens to be this tokenizer's <bos>
    assert end_tokens_of_model(model.generation_config, model.config, tokenizer) == []
    assert make(saved(tokenizer, tmp_path, None)).rules.eos_ids == {EOS}


def test_a_default_that_the_tokenizer_has_an_end_token_for_counts(tmp_path):
    """As `</s>` is of Mistral 7B and Llama 2, where the tokenizer's end token was changed for a chat template."""
    tokenizer = make_chat_tokenizer(eos="<|im_end|>")
    tokenizer.bos_token = None
    assert make(saved(tokenizer, tmp_path, None)).rules.eos_ids == {BOS, END}
    env = make(tokenizer)
    GRPO(tiny(tokenizer), env, group_size=4, n_envs=4, policy_kwargs={"tokenizer": tokenizer})
    assert env.rules.eos_ids == {BOS, END}


@pytest.mark.parametrize("eos", [END, [EOS, END]])
def test_a_config_alone_says_it_too(eos, tmp_path):
    tokenizer = make_chat_tokenizer()
    path = saved(tokenizer, tmp_path, None)
    tiny(tokenizer, eos_token_id=eos).config.save_pretrained(path)
    (tmp_path / "generation_config.json").unlink()
    assert set(end_tokens_beside(path, tokenizer)) == {END} | ({EOS} if isinstance(eos, list) else set())
    assert make(path).rules.eos_ids == {EOS, END}


def test_ids_beyond_the_vocabulary_are_no_actions(tmp_path):
    path = saved(make_chat_tokenizer(), tmp_path, [END, 5000])
    assert make(path).rules.eos_ids == {EOS, END}


def test_end_tokens_may_be_given(tmp_path):
    path = saved(make_chat_tokenizer(), tmp_path, [EOS, END])
    assert make(path, eos_token_ids=END).rules.eos_ids == {END}
    env = make(make_chat_tokenizer(), eos_token_ids=[END, X])
    env.reset(seed=0)
    assert env.step(EOS)[2] is False and env.step(X)[2] is True  # the tokenizer's own is an action like others then


@pytest.mark.parametrize("value", [[], [-1], [10**6], "<eos>", [0.5], [True], {"a": 1}, [[0]]])
def test_what_is_no_token_id_is_refused(value):
    with pytest.raises(ValueError, match=r"eos_token_ids=.*must be a token id or a list of them, from 0 to 260"):
        make(make_chat_tokenizer(), eos_token_ids=value)


def test_an_env_made_of_objects_takes_over_the_models_end_tokens():
    tokenizer = make_chat_tokenizer()
    arguments = {"group_size": 4, "n_envs": 4, "seed": 0, "policy_kwargs": {"tokenizer": tokenizer}}
    env, exam = make(tokenizer, min_new_tokens=1, stop="zz"), make(tokenizer)
    assert env.rules.eos_ids == exam.rules.eos_ids == {EOS}
    agent = GRPO(tiny(tokenizer, [EOS, END]), env, **arguments)
    assert env.rules.eos_ids == agent.policy.eos_ids == {EOS, END}
    env.reset(seed=0)
    assert np.flatnonzero(~env.action_masks()).tolist() == [EOS, END]
    env.step(X)
    assert env.step(END)[2] is True
    agent.evaluate(exam)
    assert exam.rules.eos_ids == {EOS, END}
    said = make(tokenizer, eos_token_ids=EOS)
    agent = GRPO(tiny(tokenizer, [EOS, END]), said, **arguments)
    assert said.rules.eos_ids == agent.policy.eos_ids == {EOS}  # said, and so it is meant


def test_a_tokenizer_with_another_end_token_needs_no_other_vocabulary():
    agent_side, env_side = make_chat_tokenizer(), make_chat_tokenizer(eos="<|im_end|>")
    env = make(env_side)
    GRPO(tiny(agent_side), env, group_size=4, n_envs=4, policy_kwargs={"tokenizer": agent_side})
    assert env.rules.eos_ids == {EOS, END}


def test_envs_of_one_process_are_all_told():
    tokenizer = make_chat_tokenizer()
    venv = DummyVecEnv([lambda: make(make_chat_tokenizer(), max_new_tokens=2) for _ in range(2)])
    with pytest.warns(UserWarning, match="token by token"):
        agent = GRPO(tiny(tokenizer, [EOS, END]), venv, group_size=2, policy_kwargs={"tokenizer": tokenizer}, preflight=False)
    assert [rules.eos_ids for rules in venv.get_attr("rules")] == [{EOS, END}] * 2
    agent.learn(4)


def test_an_eval_callback_ends_where_training_does():
    tokenizer = make_chat_tokenizer()
    env, exam = make(tokenizer), make(tokenizer)
    agent = GRPO(tiny(tokenizer, END), env, group_size=4, n_envs=4, seed=0, policy_kwargs={"tokenizer": tokenizer})
    agent.learn(4, callback=EvalCallback(TextVecEnv(exam.vectorize(2)), n_eval_episodes=2, eval_freq=1, verbose=0))
    assert exam.rules.eos_ids == {EOS, END}


class Elsewhere(TextVecEnv):
    """Rows in other processes, as far as their rules go: copies are handed out."""

    def get_attr(self, name, indices=None):
        return copy.deepcopy(super().get_attr(name, indices))


def test_envs_elsewhere_that_do_not_know_are_refused_with_the_remedy():
    tokenizer = make_chat_tokenizer()
    arguments = {"group_size": 4, "n_envs": 4, "policy_kwargs": {"tokenizer": tokenizer}}
    with pytest.raises(ValueError, match=r"ends answers with \['<\|im_end\|>'\].*eos_token_ids=\[0, 4\]"):
        GRPO(tiny(tokenizer, [EOS, END]), Elsewhere(make(tokenizer).vectorize(4)), **arguments)
    GRPO(tiny(tokenizer, [EOS, END]), Elsewhere(make(tokenizer, eos_token_ids=[EOS, END]).vectorize(4)), **arguments)


def test_sampling_ends_at_each_of_them(tmp_path):
    path = saved(make_chat_tokenizer(), tmp_path, [EOS, END])
    env = make(path, allowed_tokens=[EOS, END, X, Y], max_new_tokens=20)
    agent = GRPO(path, env, group_size=64, n_envs=64, seed=0)
    prompt = env.rules.prompts.ids[0].tolist()
    drawn, _ = agent.engine.generate([prompt], 64, DecodingSpec(env.rules, agent.sampler(), env.rules.max_new_tokens))
    alone, _ = LanguagePolicy(path).sample([prompt], 64, 80, generator=torch.Generator().manual_seed(0))
    for responses in (drawn, alone):
        assert not any({EOS, END} & set(response[:-1]) for response in responses)
        assert any(response[-1] in (EOS, END) for response in responses)
    assert {response[-1] for response in drawn} >= {EOS, END}
    assert any(len(response) == 20 for response in drawn) or all(response[-1] in (EOS, END) for response in drawn)


def test_a_rollout_counts_them_as_ends(tmp_path):
    path = saved(make_chat_tokenizer(), tmp_path, [EOS, END])
    rules = make(path, allowed_tokens=[END, X], missing_eos_penalty=7.0, max_new_tokens=3).rules
    venv = TextGenerationVectorEnv.from_rules(rules, 2)
    venv.reset(seed=0)
    outcome = venv.step_responses([[X, END], [X, X, X]])
    assert outcome.terminated.tolist() == [True, False] and outcome.truncated.tolist() == [False, True]
    assert [info["reward/missing_eos"] for info in outcome.infos] == [0.0, -7.0]
    venv.reset(seed=0)
    with pytest.raises(ValueError, match=r"has 1 tokens after its end at token 0 \(4\)"):
        venv.step_responses([[END, X], [X, END]])


def test_min_new_tokens_holds_all_of_them_back(tmp_path):
    path = saved(make_chat_tokenizer(), tmp_path, [EOS, END])
    env = make(path, min_new_tokens=2)
    env.reset(seed=0)
    assert np.flatnonzero(~env.action_masks()).tolist() == [EOS, END]
    for _ in range(2):
        env.step(X)
    assert env.action_masks().all()
    with pytest.raises(ValueError, match="forbids the end token"):
        make(path, min_new_tokens=2, allowed_tokens=[EOS, END])


def test_engines_are_told_all_of_them(tmp_path):
    path = saved(make_chat_tokenizer(), tmp_path, [EOS, END])
    env = make(path, stop=["<bos>", "ab", "a<|im_start|>"])
    agent = GRPO(path, env, group_size=4, n_envs=4)
    settings = sampling_settings(env.rules, agent.sampler())
    assert settings["stop_token_ids"] == [EOS, BOS, END] and settings["stop"] == ["ab"]
    for end in (EOS, END, BOS):
        response, logps = [X], [-1.0]
        assert extend(response, logps, [Y, end, X], [-1.0] * 3, env.rules, 12) and response == [X, Y, end]


def test_the_audit_reports_a_turn_that_ends_nothing(caplog):
    tokenizer = make_chat_tokenizer()

    def row(**kwargs):
        prompts = kwargs.pop("prompts", CHATS)
        env = make(tokenizer, prompts, **kwargs)
        agent = GRPO(tiny(tokenizer), env, group_size=4, n_envs=8, policy_kwargs={"tokenizer": tokenizer}, preflight=False)
        return agent.audit(n=8, quiet=True)["end of a turn"]

    found = row()
    assert found.result == "FAILED" and "eos_token_ids=[0, 4]" in found.detail and "'<|im_end|>'" in found.detail
    assert "the chat template closes a turn with '<|im_end|>'" in caplog.text
    caplog.clear()
    assert row(eos_token_ids=[0, 4]).result == "passed"
    assert row(stop="<|im_end|>").result == "passed"
    assert row(prompts=["text"]).result == "not applicable"
    assert "closes a turn" not in caplog.text


@pytest.mark.parametrize(
    ("added", "template", "remedy"),
    [
        ("<|end|>", "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}", "eos_token_ids=[0, 261]"),
        (None, "{% for m in messages %}{{ m.content }}</turn>\n{% endfor %}", "stop='</turn>'"),
        (None, "{% for m in messages %}{{ m.content }}={% endfor %}", ""),
        (None, "{{ bos_token }}hello", ""),  # writes no message at all
        (None, "{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}", ""),
    ],
)
def test_how_a_turn_may_be_closed(added, template, remedy, caplog):
    tokenizer = make_chat_tokenizer(template=template)
    if added:
        tokenizer.add_tokens([added])  # a token of its own, and not special
    problem = make(tokenizer).rules.endless_turn()
    assert remedy in problem and bool(problem) == bool(remedy)
    assert "closes a turn" not in caplog.text  # an agent may know more
    assert make(tokenizer, stop=added or "</turn>").rules.endless_turn() == ""


def test_a_template_without_an_opening_is_told(caplog):
    make(make_chat_tokenizer(template="{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"), eos_token_ids=[EOS, END])
    assert "ends with an end token: the chat template writes no opening" in caplog.text


def test_a_pushed_generation_config_is_read_as_it_is(tmp_path):
    """As Llama 3.1 has it: a list in a file that nobody derived from the config."""
    tokenizer = make_chat_tokenizer()
    path = saved(tokenizer, tmp_path, None)
    GenerationConfig(eos_token_id=[EOS, END]).save_pretrained(path)
    assert "_from_model_config" not in json.loads((tmp_path / "generation_config.json").read_text())
    assert make(path).rules.eos_ids == {EOS, END}

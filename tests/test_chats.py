"""Chats: prompts of messages, their token ids, and what reward functions get of them."""

import copy
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from stable_baselines3.common.logger import configure
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from agents import GRPO
from agents.policy.prompt_encoding import encode_prompts
from llm_env import PooledReward, RewardModel, TextGenerationEnv, TextGenerationVectorEnv, check_reward, rescore
from llm_env.rewards import exact_match, numeric_answer
from llm_env.tokenization import encode_texts
from tests.chats import CHATML, END, EOS, SPIDER, SPIDER_TEXT, ids_of, make_chat_tokenizer
from tests.conftest import refused

OPTIONS = (
    "{% for t in tools or [] %}[{{ t['name'] }}]{% endfor %}"
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% if enable_thinking is defined and not enable_thinking %}-{% endif %}{% endif %}"
)


def length(completions, **kwargs):
    return [float(len(c if isinstance(c, str) else c[0]["content"])) for c in completions]


def make(prompts, tokenizer=None, reward=length, **kwargs):
    defaults = {"max_new_tokens": 4, "max_prompt_tokens": 128, "eos_token_ids": [EOS, END]}
    return TextGenerationEnv(prompts, reward, tokenizer or make_chat_tokenizer(), **{**defaults, **kwargs})


def tiny(tokenizer, kind=LlamaForCausalLM, **config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = kind(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def text_of(row, tokenizer=None, **kwargs):
    return make([row], tokenizer, **kwargs).rules.prompts.texts[0]


# --- what reward functions get ------------------------------------------------------------------------------------------


def test_rewards_get_messages_for_chats_and_text_for_text():
    seen = {}

    def look(prompts, completions, completion_ids, answer):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, answer=answer)
        return [0.0] * len(prompts)

    env = make([{"prompt": SPIDER, "answer": "8"}, {"prompt": "How many?", "answer": "9"}], reward=look)
    venv = TextGenerationVectorEnv.from_rules(env.rules, 2)
    venv.reset(seed=0, options={"index": [0, 1]})
    outcome = venv.step_responses([[*ids_of("8"), END], [*ids_of("9"), EOS]])
    assert seen["prompts"] == [SPIDER, "How many?"]
    assert seen["completions"] == [[{"role": "assistant", "content": "8"}], "9"]
    assert seen["completion_ids"] == [[*ids_of("8"), END], [*ids_of("9"), EOS]] and seen["answer"] == ["8", "9"]
    # People read text.
    assert [info["prompt"] for info in outcome.infos] == [SPIDER_TEXT, "How many?"]
    assert [info["completion"] for info in outcome.infos] == ["8", "9"]


def test_a_function_may_change_what_it_is_given():
    def spoil(prompts, completions):
        prompts[0][0]["content"] = completions[0][0]["content"] = "spoilt"
        return [0.0]

    env = make([{"prompt": copy.deepcopy(SPIDER)}], reward=[spoil, length])
    env.reset(seed=0)
    env.step(ids_of("a")[0])
    assert env.step(END)[4]["reward/length"] == 1.0
    assert env.rules.prompts.messages[0] == SPIDER


def test_trl_rewards_run_unchanged():
    rewards = pytest.importorskip("trl.rewards")
    overlong, repetition = rewards.get_soft_overlong_punishment(60, 30), rewards.get_repetition_penalty_reward(2, -1.0)
    env = make([{"prompt": SPIDER}], reward=[rewards.think_format_reward, overlong, repetition], max_new_tokens=64)
    thought = "<think>\nIt has legs.\n</think>\n8"
    for text, thinks, late in ((thought, 1.0, 32 - 30), ("8", 0.0, 0), (thought[:20], 0.0, 0)):
        env.reset(seed=0)
        for token in [*ids_of(text), END]:
            *_, info = env.step(token)
        assert info["reward/think_format_reward"] == thinks
        assert info["reward/soft_overlong_punishment"] == pytest.approx(-late / 30)  # of a zone of 30 before 60 tokens


def test_what_trl_gives_by_name_is_given():
    seen = []

    def reward(completions, trainer_state, log_extra, log_metric, **kwargs):
        seen.append((trainer_state.global_step, trainer_state.max_steps, trainer_state.epoch, sorted(kwargs)))
        log_extra("shout", [c[0]["content"].upper() for c in completions])
        log_metric("chars", len(completions[0][0]["content"]))
        log_metric("chars", 5)
        return length(completions)

    env = make([{"prompt": SPIDER}], reward=reward)
    env.reset(seed=0)
    env.step(ids_of("x")[0])
    *_, info = env.step(END)
    assert seen == [(0, 1, 0.0, ["completion_ids", "prompts"])]
    assert (info["extra/shout"], info["metric/chars"]) == ("X", 3.0)


def test_trainer_state_moves_and_metrics_are_logged(tmp_path):
    steps = []

    def reward(completions, trainer_state, log_metric):
        steps.append((trainer_state.global_step, trainer_state.num_input_tokens_seen, trainer_state.epoch))
        log_metric("thing", 2.0)
        return length(completions)

    tokenizer = make_chat_tokenizer()
    env = make([{"prompt": SPIDER}], tokenizer, reward=reward, max_new_tokens=1)
    agent = GRPO(tiny(tokenizer), env, group_size=4, n_envs=4, policy_kwargs={"tokenizer": tokenizer}, preflight=False, seed=0)
    agent.learn(12)
    assert steps == [(0, 0, 0.0), (1, 4, 4 / 12), (2, 8, 8 / 12)]
    agent.set_logger(configure(str(tmp_path), ["json"]))
    agent.learn(4)
    agent.logger.close()
    assert json.loads((tmp_path / "progress.json").read_text().splitlines()[-1])["rollout/thing"] == 2.0


def test_what_cannot_be_given_is_refused():
    def pooled(completions, log_metric):
        return [0.0] * len(completions)

    def singular(prompt, completion):
        return 0.0

    with pytest.raises(ValueError, match="needs 'log_metric', which a PooledReward does not pass on"):
        make(["a"], reward=PooledReward(pooled))
    with pytest.raises(ValueError, match=r"needs \['prompt', 'completion'\].*name its parameters \['prompts', 'completions'\]"):
        make(["a"], reward=singular)

    def wrong(completions, log_extra):
        log_extra("x", [1, 2, 3])
        return [0.0] * len(completions)

    env = make(["a"], reward=wrong)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="3 values for 1 completions"):
        env.step(EOS)


def pooled_length(prompts, completions):
    assert all(isinstance(p, list) for p in prompts)
    return [float(len(c[0]["content"])) for c in completions]


@pytest.mark.parametrize("kwargs", [{}, {"cache_size": 8}, {"processes": True, "workers": 1}])
def test_chats_go_through_a_pool(kwargs):
    pool = PooledReward(pooled_length, **kwargs)
    env = make([{"prompt": SPIDER}], reward=pool)
    for _ in range(2):
        env.reset(seed=0)
        env.step(ids_of("a")[0])
        assert env.step(END)[1] == 1.0
    pool.close()


def test_records_hold_what_rewards_got_and_are_scored_again(tmp_path):
    path = tmp_path / "episodes.jsonl"
    env = make([{"prompt": SPIDER, "answer": 8}], record=path)
    env.reset(seed=0)
    env.step(ids_of("8")[0])
    env.step(END)
    (record,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert record["prompt"] == SPIDER and record["completion"] == [{"role": "assistant", "content": "8"}]

    def right(prompts, completions, answer):
        assert prompts == [SPIDER]
        return [float(c[0]["content"] == str(a)) for c, a in zip(completions, answer, strict=True)]

    assert rescore(path, right)[0]["score"] == 1.0


def test_check_reward_speaks_messages():
    def right(completions, answer):
        return [float(c[0]["content"] == a) for c, a in zip(completions, answer, strict=True)]

    env = make([{"prompt": SPIDER, "answer": "8"}, {"prompt": SPIDER, "answer": "6"}], reward=right)
    assert check_reward(env, quiet=True).passed


def test_functions_that_name_them_get_the_rendered_prompts():
    seen = []

    def look(completions, prompt_texts):
        seen.append(prompt_texts)
        return [0.0] * len(completions)

    env = make([{"prompt": SPIDER}, "text"], reward=[look, PooledReward(look)])
    for index, text in enumerate([SPIDER_TEXT, "text"]):
        env.reset(options={"index": index})
        env.step(EOS)
        assert seen[-2:] == [[text], [text]]


@pytest.mark.parametrize("text", [False, True])
def test_a_thought_that_the_chat_template_opens_is_no_answer(text):
    """As of DeepSeek-R1 and QwQ: the answer holds the closing tag only, if it comes to it."""
    opening = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    prompt = SPIDER_TEXT + "<think>\n" if text else SPIDER
    env = make(
        [{"prompt": prompt, "answer": "8"}],
        make_chat_tokenizer(template=opening),
        [numeric_answer, exact_match],
        max_new_tokens=32,
    )
    for said, paid in (("8", 0.0), ("9?</think>8", 2.0)):
        env.reset(seed=0)
        for token in [*ids_of(said), END]:
            _, reward, *_ = env.step(token)
        assert reward == paid


def test_an_environment_of_trl_is_told():
    def reward(completions, environments):
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match="needs 'environments', which TRL passes with its environment_factory"):
        make(["a"], reward=reward)


@pytest.mark.parametrize(
    ("messages", "error", "match"),
    [
        ([{"from": "human", "value": "How many?"}], ValueError, r"row 0: a message has the keys \['from', 'value'\].*'role'"),
        ([{"role": "user"}], ValueError, r"row 0: a message has the keys \['role'\]; it must have 'role' and 'content'"),
        ([{"role": 3, "content": "a"}], ValueError, "row 0: a message has the keys"),
        ([{"role": "user", "content": None}], ValueError, "row 0: a message has the keys"),
        (
            [*SPIDER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}],
            ValueError,
            "row 0: the last message, of the assistant, has no content to be continued",
        ),
    ],
)
def test_messages_that_say_nothing_are_refused(messages, error, match):
    refused(make, [{"prompt": messages}], error=error, match=match)


def test_tools_that_are_none_are_refused():
    refused(make, [{"prompt": SPIDER, "tools": "calculator"}], match="row 0: 'tools' is 'calculator', which is no JSON")
    refused(make, [{"prompt": SPIDER, "tools": {"name": "f"}}], error=TypeError, match="row 0: 'tools' is a dict; give a list")


# --- token ids ----------------------------------------------------------------------------------------------------------


BOS_CHAT = "{{ bos_token }}" + CHATML


def test_a_rendered_chat_has_one_bos():
    tokenizer = make_chat_tokenizer(template=BOS_CHAT, post="<bos> $A")
    expected = ids_of("<bos>" + SPIDER_TEXT)
    prompts = make([{"prompt": SPIDER}, "<bos>" + SPIDER_TEXT, SPIDER_TEXT, "ab"], tokenizer).rules.prompts
    assert [ids.tolist() for ids in prompts.ids] == [expected, expected, expected, ids_of("<bos>ab")]


@pytest.mark.parametrize(
    ("post", "text", "ids"),
    [
        ("$A <eos>", "ab", "ab"),
        ("<bos> $A <eos>", "ab", "<bos>ab"),
        ("<bos> $A <eos>", "<bos>ab", "<bos>ab"),
        ("<bos> <|im_start|> $A", "ab", "<bos><|im_start|>ab"),
        ("<bos> <|im_start|> $A", "<bos><|im_start|>ab", "<bos><|im_start|>ab"),
        ("<bos> $A", "<bos><bos>ab", "<bos><bos>ab"),
        ("<bos> $A", "", "<bos>"),
        ("<bos> $A <eos>", "", "<bos>"),
        ("$A", "ab<eos>", "ab<eos>"),  # what a text says itself stays
        ("$A <eos>", "ab<eos>", "ab<eos>"),
    ],
)
def test_special_tokens_come_once_and_none_ends_a_prompt(post, text, ids):
    tokenizer = make_chat_tokenizer(post=post)
    assert make([text], tokenizer).rules.prompts.ids[0].tolist() == ids_of(ids)


def test_whole_texts_keep_their_end():
    tokenizer = make_chat_tokenizer(post="<bos> $A <eos>")
    assert encode_texts(tokenizer, ["ab", "<bos>ab<eos>"], end=True) == [ids_of("<bos>ab<eos>")] * 2


def test_an_empty_prompt_of_a_tokenizer_that_only_ends_is_refused():
    with pytest.raises(ValueError, match="row 0 of the prompts is empty"):
        make([""], make_chat_tokenizer(post="$A <eos>"))


@pytest.mark.parametrize("template", [BOS_CHAT, CHATML])
def test_generate_uses_the_ids_of_training(template):
    tokenizer = make_chat_tokenizer(template=template, post="<bos> $A")
    env = make([{"prompt": SPIDER}, "ab"], tokenizer, max_new_tokens=8)
    agent = GRPO(tiny(tokenizer), env, group_size=4, n_envs=4, seed=0, policy_kwargs={"tokenizer": tokenizer})
    asked = []
    sample = agent.policy.sample
    agent.policy.sample = lambda contexts, *args, **kwargs: asked.append(contexts) or sample(contexts, *args, **kwargs)
    rules = env.rules
    agent.generate([SPIDER, {"prompt": SPIDER}, rules.prompts.texts[0], "ab"], deterministic=True)
    chat, text = (ids.tolist() for ids in rules.prompts.ids)
    assert asked == [[chat, chat, chat, text]]
    with pytest.raises(TypeError, match=r"prompt 0 is a dict, one message of a chat; give a list of chats, \[messages\]"):
        agent.generate(SPIDER)
    with pytest.raises(TypeError, match="prompt 1 is a int"):
        agent.generate(["a", 3])
    with pytest.raises(ValueError, match="prompt 0: 'messages' ends in an assistant's message"):
        agent.generate([{"messages": [*SPIDER, {"role": "assistant", "content": "8"}]}])


def test_generate_stops_where_training_does():
    tokenizer = make_chat_tokenizer()
    env = make([{"prompt": SPIDER}], tokenizer, max_new_tokens=50, allowed_tokens=[END, *ids_of("x")])
    agent = GRPO(tiny(tokenizer), env, group_size=4, n_envs=4, seed=0, policy_kwargs={"tokenizer": tokenizer})
    answers = agent.generate([SPIDER] * 16)
    assert {len(answer) for answer in answers} != {50} and all(set(answer) <= {"x"} for answer in answers)


# --- template options ---------------------------------------------------------------------------------------------------


def test_the_env_and_a_row_give_the_template_its_arguments():
    tokenizer = make_chat_tokenizer(template=OPTIONS)
    ask = [{"role": "user", "content": "q"}]
    row = {"prompt": ask}
    assert text_of(row, tokenizer) == "u:q;a:"
    assert text_of(row, tokenizer, chat_template_kwargs={"enable_thinking": False}) == "u:q;a:-"
    assert text_of({**row, "chat_template_kwargs": {"enable_thinking": False}}, tokenizer) == "u:q;a:-"
    both = {**row, "chat_template_kwargs": {"enable_thinking": True, "other": None}}
    assert text_of(both, tokenizer, chat_template_kwargs={"enable_thinking": False}) == "u:q;a:"
    tools = [{"type": "function", "name": "f"}]
    for given in (tools, json.dumps(tools)):
        assert text_of({**row, "tools": given}, tokenizer) == "[f]u:q;a:"
    for none in ([], None, ""):
        assert text_of({**row, "tools": none}, tokenizer) == "u:q;a:"


@pytest.mark.parametrize("kind", ["argument", "file", "name"])
def test_a_template_may_be_given(kind, tmp_path):
    tokenizer = make_chat_tokenizer()
    path = tmp_path / "t.jinja"
    path.write_text(OPTIONS)
    if kind == "name":
        tokenizer.chat_template = {"default": CHATML, "short": OPTIONS}
    given = {"argument": OPTIONS, "file": str(path), "name": "short"}[kind]
    assert text_of({"prompt": [{"role": "user", "content": "q"}]}, tokenizer, chat_template=given) == "u:q;a:"
    tokenizer.chat_template = None
    with pytest.raises(
        ValueError, match="row 0 holds chat messages, but the tokenizer has no chat template; set chat_template="
    ):
        make([{"prompt": SPIDER}], tokenizer)


def test_bad_template_arguments_are_refused(tmp_path):
    rows = [{"prompt": SPIDER}]
    for kwargs, error, match in (
        ({"chat_template": "nope"}, ValueError, "neither a template nor the name of one of the tokenizer's, which are"),
        ({"chat_template": str(tmp_path / "no.jinja")}, ValueError, "cannot be read"),
        ({"chat_template": 3}, TypeError, "chat_template is a int"),
        ({"chat_template_kwargs": [1]}, TypeError, "chat_template_kwargs is a list"),
        ({"chat_template_kwargs": {"tokenize": True}}, ValueError, "no variable of a template"),
    ):
        refused(make, rows, error=error, match=match, **kwargs)
    refused(
        make, [{"prompt": SPIDER, "chat_template_kwargs": 3}], error=TypeError, match="row 0: 'chat_template_kwargs' is a int"
    )


def test_a_prompt_that_ends_in_an_answer_is_continued():
    begun = [*SPIDER, {"role": "assistant", "content": "It has"}]
    text = "<|im_start|>user\nHow many legs has a spider?<|im_end|>\n<|im_start|>assistant\nIt has"
    assert text_of({"prompt": begun}) == text
    assert text_of({"messages": begun, "chat_template_kwargs": {"continue_final_message": True}}) == text
    assert text_of({"messages": begun}, chat_template_kwargs={"continue_final_message": True}) == text
    with pytest.raises(ValueError, match=r"row 0: 'messages' ends in an assistant's message.*drop that message.*as 'prompt'"):
        make([{"messages": begun}])
    assert text_of({"messages": SPIDER}) == SPIDER_TEXT


# --- what training used is exported ---------------------------------------------------------------------------------------


def test_the_template_of_training_is_exported(tmp_path):
    tokenizer = make_chat_tokenizer(template=None)
    env = make([{"prompt": [{"role": "user", "content": "q"}]}], tokenizer, chat_template=OPTIONS)
    assert tokenizer.chat_template is None  # somebody else's object
    agent = GRPO(tiny(tokenizer), env, group_size=4, n_envs=4, seed=0, policy_kwargs={"tokenizer": tokenizer}, preflight=False)
    agent.policy.save_pretrained(tmp_path / "direct")
    agent.save(tmp_path / "agent")
    GRPO.load(tmp_path / "agent", env=env).policy.save_pretrained(tmp_path / "loaded")
    GRPO.load(tmp_path / "agent").policy.save_pretrained(tmp_path / "alone")
    for name in ("direct", "loaded", "alone"):
        exported = AutoTokenizer.from_pretrained(tmp_path / name)
        assert exported.chat_template == OPTIONS, name
        ends = json.loads((tmp_path / name / "generation_config.json").read_text())["eos_token_id"]
        assert sorted(ends) == [EOS, END], name


def test_the_templates_arguments_of_training_are_saved(tmp_path):
    tokenizer = make_chat_tokenizer(template=OPTIONS)
    env = make([{"prompt": SPIDER}], tokenizer, chat_template_kwargs={"enable_thinking": False})
    agent = GRPO(tiny(tokenizer), env, group_size=4, n_envs=4, seed=0, policy_kwargs={"tokenizer": tokenizer}, preflight=False)
    agent.save(tmp_path / "agent")
    alone = GRPO.load(tmp_path / "agent")
    (ids,) = encode_prompts([SPIDER], alone.policy.prompt_format(), None)
    assert ids == env.rules.prompts.ids[0].tolist() == ids_of("u:How many legs has a spider?;a:-")
    alone.save(tmp_path / "again")
    assert GRPO.load(tmp_path / "again").policy.chat_template_kwargs == {"enable_thinking": False}


# --- reward models --------------------------------------------------------------------------------------------------------


def test_a_reward_model_renders_a_chat_once_with_one_bos():
    tokenizer = make_chat_tokenizer(template=BOS_CHAT, post="<bos> $A")
    classifier = tiny(tokenizer, LlamaForSequenceClassification, num_labels=1, pad_token_id=1)
    answer = [{"role": "assistant", "content": "8"}]
    chat = "<bos>" + SPIDER_TEXT + "8<|im_end|>\n"
    for template in (None, "chat"):
        model = RewardModel(classifier, tokenizer, template=template)
        assert model._encode([SPIDER], [answer]) == [ids_of(chat)]
        begun = [*SPIDER, {"role": "assistant", "content": "It has "}]
        parts = [*SPIDER, {"role": "assistant", "content": [{"type": "text", "text": "It has "}]}]
        assert model._encode([parts], [answer]) == model._encode([begun], [answer])
        assert model._encode([begun], [answer]) == [ids_of("<bos>" + SPIDER_TEXT + "It has 8<|im_end|>\n")]
    plain = RewardModel(classifier, tokenizer)
    assert plain._encode(["a", "<bos>a"], ["b", "b"]) == [ids_of("<bos>ab")] * 2
    env = make([{"prompt": SPIDER}, "a"], tokenizer, reward=plain)
    with torch.no_grad():
        expected = [classifier(input_ids=torch.tensor([ids_of(text)])).logits.item() for text in (chat, "<bos>a8")]
    for index, value in enumerate(expected):
        env.reset(options={"index": index})
        env.step(ids_of("8")[0])
        assert env.step(END)[1] == pytest.approx(value, abs=1e-5)


def test_a_reward_model_that_cannot_read_chats_says_so():
    tokenizer = make_chat_tokenizer()
    classifier = tiny(tokenizer, LlamaForSequenceClassification, num_labels=1, pad_token_id=1)
    answer = [{"role": "assistant", "content": "8"}]
    with pytest.raises(ValueError, match="is for prompts that are text, but these are chats"):
        RewardModel(classifier, tokenizer, template="{prompt} {completion}")([SPIDER], [answer])
    mine = RewardModel(
        classifier, tokenizer, template=lambda p, c: str(p) if isinstance(p, str) else p[0]["content"] + c[0]["content"]
    )
    assert mine._encode([SPIDER], [answer]) == [ids_of("How many legs has a spider?8")]
    with pytest.raises(ValueError, match="the prompt is a str and the completion a list; both must be text"):
        RewardModel(classifier, tokenizer)(["a"], [answer])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the reward model's tokenizer has no chat template"):
        RewardModel(classifier, tokenizer)([SPIDER], [answer])


# --- data sets ------------------------------------------------------------------------------------------------------------


def test_streams_and_splits_are_refused_with_the_remedy():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": SPIDER, "answer": "8"}])
    assert make(rows).rules.prompts.texts == [SPIDER_TEXT]
    with pytest.raises(TypeError, match=r"DatasetDict of the splits \['train'\]: pick one, prompts=dataset\['train'\]"):
        make(datasets.DatasetDict(train=rows))
    with pytest.raises(TypeError, match=r"IterableDataset, which has no length.*list\(itertools.islice\(dataset, 10_000\)\)"):
        make(rows.to_iterable_dataset())
    assert make(list(itertools.islice(rows.to_iterable_dataset(), 1))).rules.prompts.texts == [SPIDER_TEXT]
    with pytest.raises(TypeError, match=r"prompts is a generator, which has no length"):
        make(x for x in "ab")


# --- a name collision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("installed", [True, False])
def test_a_second_package_of_the_name_agents_is_told_once(installed, tmp_path):
    name = "openai_agents" if installed else "openai_other"
    (tmp_path / f"{name}-0.1.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 0.1\n"
    (tmp_path / f"{name}-0.1.dist-info" / "METADATA").write_text(metadata)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = "import llm_env, llm_env.rules, agents; import llm_env"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the distribution openai-agents is installed") == int(installed)

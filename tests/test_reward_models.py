"""Learned reward models against one text at a time by hand, and the two examples that train and use one."""

import copy
import json
import math
import re
import runpy

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import llm_env
from llm_env import RewardModel, TextGenerationEnv
from tests.conftest import make_tokenizer
from tests.test_readme_and_examples import ROOT, run

DECODERS = {
    "gpt2": (GPT2ForSequenceClassification, GPT2Config),
    "llama": (LlamaForSequenceClassification, LlamaConfig),
    "qwen2": (Qwen2ForSequenceClassification, Qwen2Config),
}
ENCODERS = {"bert": (BertForSequenceClassification, BertConfig), "roberta": (RobertaForSequenceClassification, RobertaConfig)}
PROMPTS = ["a", "abcdefgh", "12+3", "", "hgfe", "b<eos>", "c"]
COMPLETIONS = ["b", "8765", "=", "d", "ab<eos>", "<eos>", "<eos><eos>"]


def make_classifier(family, vocab_size, pad_token_id=None, num_labels=1, seed=0):
    """Random weights, large enough that texts score far apart."""
    torch.manual_seed(seed)
    kind, config = {**DECODERS, **ENCODERS}[family]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family in ("llama", "qwen2"):
        sizes["num_key_value_heads"] = 2
    ids = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": pad_token_id}
    length = {"n_positions" if family == "gpt2" else "max_position_embeddings": 32}
    model = kind(config(vocab_size=vocab_size, num_labels=num_labels, **sizes, **ids, **length))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
    return model.eval()


def by_hand(model, tokenizer, prompts, completions):
    """One text at a time: the hidden states, the place where the head reads, and the head's product."""
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = tokenizer.encode(prompt + completion)
        with torch.no_grad():
            hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0]
            if hasattr(model, "score"):
                skipped = model.config.pad_token_id
                last = max((i for i, token in enumerate(ids) if token != skipped), default=0)
                scores.append(float(hidden[last] @ model.score.weight[0]))
            else:
                bert = isinstance(model, BertForSequenceClassification)
                dense = model.bert.pooler.dense if bert else model.classifier.dense
                head = model.classifier if bert else model.classifier.out_proj
                scores.append(float(head.weight[0] @ torch.tanh(dense.weight @ hidden[0] + dense.bias) + head.bias[0]))
    return scores


TOKENIZERS = {
    "own pad": (lambda: make_tokenizer(), 1),
    "pad is eos": (lambda: _with_eos_as_pad(), 0),
    "no pad anywhere": (lambda: make_tokenizer(pad=False), None),
    "config knows none": (lambda: make_tokenizer(), None),
    "config knows another": (lambda: make_tokenizer(), 5),
    "config's is no token": (lambda: make_tokenizer(), -1),
}


def _with_eos_as_pad():
    tokenizer = make_tokenizer(pad=False)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.mark.parametrize("padding", TOKENIZERS)
@pytest.mark.parametrize("family", DECODERS)
def test_batched_scores_of_decoders_are_those_of_each_text_alone(family, padding):
    make, pad_token_id = TOKENIZERS[padding]
    tokenizer = make()
    model = make_classifier(family, len(tokenizer), None if pad_token_id == -1 else pad_token_id)
    model.config.pad_token_id = pad_token_id
    expected = by_hand(model, tokenizer, PROMPTS, COMPLETIONS)
    assert max(expected) - min(expected) > 0.1  # far more than the tolerance
    before = copy.deepcopy(model.config.to_dict())
    for batch_size in (1, 3, 64):
        score = RewardModel(model, tokenizer, batch_size=batch_size)
        assert score(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-4)
    assert model.config.to_dict() == before and score.model is model


@pytest.mark.parametrize("family", ENCODERS)
def test_batched_scores_of_encoders_are_those_of_each_text_alone(family):
    tokenizer = make_tokenizer()
    model = make_classifier(family, len(tokenizer), pad_token_id=1)
    expected = by_hand(model, tokenizer, PROMPTS, COMPLETIONS)
    assert RewardModel(model, tokenizer)(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-4)


def test_a_small_vocabulary_may_have_no_token_left_to_pad_with():
    tokenizer = make_tokenizer("ab", pad=False)  # <eos>, <unk>, a, b
    model = make_classifier("llama", 4)
    texts = ["aa", "a<eos>", "ab", "<unk>"]
    with pytest.raises(ValueError, match=r"end with each of the 4 tokens.*set batch_size=3"):
        RewardModel(model, tokenizer)([""] * 4, texts)
    expected = by_hand(model, tokenizer, [""] * 4, texts)
    assert RewardModel(model, tokenizer, batch_size=3)([""] * 4, texts) == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def adder():
    """A classifier whose scores are known to differ, with its tokenizer."""
    tokenizer = make_tokenizer()
    return make_classifier("llama", len(tokenizer), pad_token_id=1), tokenizer


def test_the_mode_is_put_back_and_dropout_is_off(adder):
    tokenizer = adder[1]
    model = make_classifier("gpt2", len(tokenizer), pad_token_id=1)  # GPT-2 has dropout
    expected = by_hand(model, tokenizer, PROMPTS, COMPLETIONS)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    score = RewardModel(model, tokenizer)
    assert score(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-4)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="has no tokens"):
        score(["", ""], ["a", ""])
    assert [module.training for module in model.modules()] == modes


def test_logits_carry_gradients_and_calls_do_not(adder):
    model, tokenizer = adder
    score = RewardModel(model, tokenizer, mean=1.0, std=2.0)
    logits = score.logits(PROMPTS, COMPLETIONS)
    assert logits.requires_grad and all(isinstance(value, float) for value in score(PROMPTS, COMPLETIONS))
    assert score(PROMPTS, COMPLETIONS) == pytest.approx([(v - 1.0) / 2.0 for v in logits.tolist()], abs=1e-4)
    assert score([], []) == []


def test_templates(adder):
    model, tokenizer = adder
    raw = RewardModel(model, tokenizer)

    def alone(text):
        return pytest.approx(raw([""], [text])[0], abs=1e-4)

    assert RewardModel(model, tokenizer, template="{completion}")(["abc"], ["12"])[0] == alone("12")
    assert RewardModel(model, tokenizer, template="h{prompt}={completion}g")(["abc"], ["12"])[0] == alone("habc=12g")
    assert RewardModel(model, tokenizer, template=lambda p, c: c + p)(["abc"], ["12"])[0] == alone("12abc")
    for prompt, completion in (("{completion}", "1"), ("{0}", "{prompt}"), ("{", "}{}")):
        assert raw([prompt], [completion])[0] == alone(prompt + completion)
    with pytest.raises(ValueError, match=r"has no \{completion\}"):
        RewardModel(model, tokenizer, template="{prompt}")
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        RewardModel(model, tokenizer, template="chat")
    chatty = make_tokenizer()
    chatty.chat_template = "{% for m in messages %}{{ m.role[0] }}={{ m.content }} {% endfor %}"
    assert RewardModel(model, chatty, template="chat")(["{b}"], ["12"])[0] == alone("u={b} a=12 ")


def test_special_tokens_are_the_tokenizers_and_a_chat_templates_its_own(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<eos> $A <eos>", special_tokens=[("<eos>", 0)])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    model = make_classifier("llama", len(tokenizer), pad_token_id=1)
    plain = make_tokenizer()
    (marked,) = by_hand(model, plain, ["<eos>ab"], ["12<eos>"])
    (bare,) = by_hand(model, plain, ["ab"], ["12"])
    assert RewardModel(model, tokenizer)(["ab"], ["12"]) == pytest.approx([marked], abs=1e-4)
    assert RewardModel(model, tokenizer, template="chat")(["ab"], ["12"]) == pytest.approx([bare], abs=1e-4)
    cut = {side: RewardModel(model, tokenizer, max_tokens=4, truncation=side) for side in ("left", "right")}
    for side, kept in (("left", "<eos>12<eos>"), ("right", "<eos>ab<eos>")):
        assert cut[side](["ab"], ["12"]) == pytest.approx(by_hand(model, plain, [""], [kept]), abs=1e-4)
    assert tokenizer.truncation_side == "right"  # of the user's own


def test_a_text_that_is_too_long_is_refused_or_cut_as_told(adder):
    model, tokenizer = adder
    with pytest.raises(ValueError, match=r"row 1: the text has 33 tokens.*max_tokens=32.*truncation='left'"):
        RewardModel(model, tokenizer)(["a", "a" * 30], ["b", "bcd"])
    assert len(RewardModel(model, tokenizer)(["a" * 30], ["bc"])) == 1
    for side, kept in (("left", "34"), ("right", "12")):
        score = RewardModel(model, tokenizer, max_tokens=2, truncation=side)
        assert score(["12"], ["34"]) == pytest.approx(by_hand(model, tokenizer, [""], [kept]), abs=1e-4)


def test_calibration_by_hand(adder):
    model, tokenizer = adder
    score = RewardModel(model, tokenizer, mean=3.0, std=7.0)
    raw = by_hand(model, tokenizer, PROMPTS, COMPLETIONS)
    mean = sum(raw) / len(raw)
    std = math.sqrt(sum((value - mean) ** 2 for value in raw) / len(raw))
    assert score.calibrate(PROMPTS, COMPLETIONS) is score
    assert (score.mean, score.std) == pytest.approx((mean, std), abs=1e-4)
    assert score(["a"], ["b"]) == pytest.approx([(raw[0] - mean) / std], abs=1e-4)
    with pytest.raises(ValueError, match=r"the 3 reference completions all score"):
        score.calibrate(["a", "a", "a"], ["b", "b", "b"])
    with pytest.raises(ValueError, match="two or more"):
        score.calibrate(["a"], ["b"])
    assert (score.mean, score.std) == pytest.approx((mean, std), abs=1e-4)  # a refusal changes nothing
    for bad in ({"std": 0.0}, {"std": -1.0}, {"mean": math.nan}, {"std": math.inf}):
        with pytest.raises(ValueError, match="must be finite"):
            RewardModel(model, tokenizer, **bad)


def test_several_labels_need_an_index():
    tokenizer = make_tokenizer()
    model = make_classifier("llama", len(tokenizer), pad_token_id=1, num_labels=3)
    model.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    with pytest.raises(ValueError, match=r"3 labels.*'good'.*index="):
        RewardModel(model, tokenizer)
    for index in (-1, 3):
        with pytest.raises(ValueError, match="out of range"):
            RewardModel(model, tokenizer, index=index)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode("ab")])).logits[0].tolist()
    assert RewardModel(model, tokenizer, index=2)(["a"], ["b"]) == pytest.approx([logits[2]], abs=1e-4)


def test_a_folder_is_loaded_with_its_tokenizer_and_type(adder, tmp_path):
    model, tokenizer = adder
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rounded = copy.deepcopy(model).to(torch.bfloat16).float()
    expected = by_hand(rounded, tokenizer, PROMPTS, COMPLETIONS)
    score = RewardModel(tmp_path)
    assert score.model.dtype == torch.bfloat16 and not any(p.requires_grad for p in score.model.parameters())
    score = RewardModel(str(tmp_path), dtype="float32", device="cpu")
    assert score.model.dtype == torch.float32
    assert score(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-4)


def test_another_type_is_a_copy(adder):
    model, tokenizer = adder
    half = RewardModel(model, tokenizer, dtype=torch.float64)
    assert half.model is not model and half.model.dtype == torch.float64 and model.dtype == torch.float32
    assert half(["a"], ["b"]) == pytest.approx(by_hand(model, tokenizer, ["a"], ["b"]), abs=1e-4)


def test_unusable_models_are_refused(adder, tmp_path):
    model, tokenizer = adder
    with pytest.raises(ValueError, match=r"no weights for \['score.weight'\].*would be random"):
        RewardModel(llm_env.PUPIL)
    with pytest.raises(TypeError, match=r"LlamaForCausalLM gives logits of shape \(1, 2, .*AutoModelForSequenceClassification"):
        RewardModel(LlamaForCausalLM(model.config), tokenizer)
    with pytest.raises(TypeError, match="LlamaModel gives no logits"):
        RewardModel(model.model, tokenizer)
    with pytest.raises(TypeError, match="model is a function"):
        RewardModel(lambda: None, tokenizer)
    with pytest.raises(ValueError, match="brings no tokenizer"):
        RewardModel(model)
    with pytest.raises(ValueError, match=r"vocabulary has 10 tokens, the tokenizer's"):
        RewardModel(make_classifier("llama", 10), tokenizer)
    for bad in ({"truncation": "middle"}, {"batch_size": 0}, {"max_tokens": -1}, {"dtype": "fp32"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            RewardModel(model, tokenizer, **bad)


def test_it_is_imported_when_asked_for(tmp_path):
    code = "import sys, llm_env; assert 'llm_env.rewards.reward_models' not in sys.modules; print(llm_env.RewardModel.__name__)"
    assert run(["-c", code], tmp_path) == "RewardModel\n"
    with pytest.raises(AttributeError, match="has no attribute 'RewardModels'"):
        llm_env.RewardModels  # noqa: B018


def test_in_an_env_it_is_one_component_by_its_name(adder):
    model, tokenizer = adder
    reward = [RewardModel(model, tokenizer), RewardModel(model, tokenizer, name="judge", template="{completion}")]
    env = TextGenerationEnv(["12+3="], reward, tokenizer, reward_weights=[1.0, 0.0], max_new_tokens=2)
    env.reset(seed=0)
    five = tokenizer.convert_tokens_to_ids("5")
    env.step(five)
    _, paid, _, _, info = env.step(tokenizer.eos_token_id)
    whole, answer = by_hand(model, tokenizer, ["12+3=", ""], ["5", "5"])
    assert (info["reward/reward_model"], info["reward/judge"], paid) == pytest.approx((whole, answer, whole), abs=1e-4)


def test_a_score_that_is_not_finite_is_refused_by_the_env(adder):
    model, tokenizer = copy.deepcopy(adder[0]), adder[1]
    with torch.no_grad():
        model.score.weight.fill_(math.nan)
    env = TextGenerationEnv(["a"], RewardModel(model, tokenizer), tokenizer, max_new_tokens=1)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="'reward_model' returned nan"):
        env.step(5)


# --- the examples -----------------------------------------------------------------------------------------------------


def test_the_reward_model_example_learns_the_pupils_pairs(tmp_path):
    out = run([ROOT / "examples/train_reward_model.py", "--pairs", 128, "--epochs", 2], tmp_path)
    assert float(re.search(r"([\d.]+) of 500 held out", out)[1]) > 0.6
    folder = tmp_path / "outputs/reward_model"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        alone = [float(model(**tokenizer(text, return_tensors="pt")).logits) for text in ("57+68=125", "57+68=15")]
    assert RewardModel(folder)(["57+68="] * 2, ["125", "15"]) == pytest.approx(alone, abs=1e-4)


def test_the_reward_model_example_takes_pairs_of_ones_own(tmp_path):
    pairs = [{"prompt": f"p{i}", "chosen": "yes" * (i % 3 + 1), "rejected": "no" * (i % 4 + 1)} for i in range(120)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    arguments = [ROOT / "examples/train_reward_model.py", "--data", "pairs.jsonl", "--out", "liker", "--epochs", 6]
    out = run(arguments, tmp_path)
    assert float(re.search(r"([\d.]+) of \d+ held out", out)[1]) > 0.9
    assert RewardModel(tmp_path / "liker")(["p", "p"], ["yes", "no"])[0] > RewardModel(tmp_path / "liker")(["p"], ["no"])[0]
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "a"}\n')
    with pytest.raises(ValueError, match=r"pairs.jsonl:1 has rejected=None"):
        runpy.run_path(str(ROOT / "examples/train_reward_model.py"))["read_pairs"](tmp_path / "pairs.jsonl")


def table_of(out):
    rows = re.findall(r"^(the pupil|without KL|with KL) +([-\d.]+) +([-\d.]+) +([-\d.]+)$", out, re.MULTILINE)
    return {name: tuple(map(float, values)) for name, *values in rows}


@pytest.mark.slow
def test_without_a_reference_the_policy_hacks_the_reward_model(tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["--timesteps", 16_000, "--learning-rate", 6e-4, "--logs", "logs"]
    table = table_of(run([ROOT / "examples/train_rlhf.py", *arguments], tmp_path))
    assert list(table) == ["the pupil", "without KL", "with KL"]
    (proxy, true, kl), hacked, kept = table["the pupil"], table["without KL"], table["with KL"]
    assert abs(proxy) < 0.4 and abs(true - 0.57) < 0.1 and abs(kl) < 0.05
    assert hacked[0] > kept[0] + 0.3 and kept[0] > proxy + 0.1  # the proxy believes that hacking is better
    assert hacked[1] < true - 0.1 and kept[1] > true + 0.1  # the truth is that it is worse
    assert hacked[2] > 5 * kept[2]  # 9 to 16 times in ten of eleven runs of four seeds, 4.7 in one
    assert (tmp_path / "outputs/rlhf/rlhf.png").read_bytes().startswith(b"\x89PNG")
    for folder in ("reward_model", "with_kl", "without_kl"):
        assert (tmp_path / "outputs/rlhf" / folder / "model.safetensors").exists()
    assert len(list(tmp_path.glob("logs/RLHF_*/events*"))) == 2

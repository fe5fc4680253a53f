"""What is not a causal language model is refused at once, as an object and as a path, as policy and as reference."""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from agents import GRPO, LanguagePolicy
from llm_env.lm.models import check_causal
from llm_env.reference import Reference
from tests.conftest import FAMILIES, make_model, make_tokenizer, refused
from tests.probes import make_env

TOKENIZER = make_tokenizer("abc")
V = len(TOKENIZER)
PLAIN = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
GPT2 = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 1}
T5 = {"vocab_size": V, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
BART = {
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **{"vocab_size": V, "d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
}
OTHERS = {
    "T5ForConditionalGeneration": T5,
    "T5EncoderModel": T5,
    "BartForConditionalGeneration": BART,
    "LlamaForSequenceClassification": PLAIN,
    "LlamaForTokenClassification": {**PLAIN, "num_labels": V},  # whose logits look like a language model's
    "LlamaForQuestionAnswering": PLAIN,
    "GPT2ForSequenceClassification": GPT2,  # its head would be tied to the embeddings, and none be missing
    "LlamaModel": PLAIN,
    "Qwen2Model": PLAIN,
    "BertForMaskedLM": PLAIN,
    "BertLMHeadModel": PLAIN,  # without is_decoder=True
    "BertModel": PLAIN,
    "CLIPVisionModel": {**PLAIN, "vocab_size": None},
}


def build(name):
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    return kind(kind.config_class(**{key: value for key, value in OTHERS[name].items() if value is not None})).eval()


@pytest.mark.parametrize("name", OTHERS)
def test_other_models(name, tmp_path):
    model, env = build(name), make_env(TOKENIZER)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    remedy = r"give a causal language model, as AutoModelForCausalLM.from_pretrained\(\.\.\.\)"
    for given in (model, str(tmp_path)):
        held = "BertLMHeadModel" if name == "BertForMaskedLM" and given is not model else name  # as it is loaded
        match = rf"policy.* {held}.*{remedy}"
        refused(LanguagePolicy, given, TOKENIZER, error=TypeError, match=match)
        refused(GRPO, given, env, group_size=2, n_envs=4, policy_kwargs={"tokenizer": TOKENIZER}, error=TypeError, match=match)
        for make in (Reference, lambda reference: make_env(TOKENIZER, reference=reference)):
            refused(make, given, error=TypeError, match=match.replace("policy", "reference"))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_is_tied_to_the_embeddings_is_there(family, tmp_path):
    """As in the files of GPT-2, which hold a GPT2Model."""
    model = make_model(family, V, tie_word_embeddings=True)
    model.base_model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    policy, ids = LanguagePolicy(str(tmp_path)), torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(policy.lm(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_looking_changes_nothing(family):
    """Neither modes nor random numbers, and no dropout is taken for a look at later tokens."""
    dropout = {"resid_pdrop": 0.5, "embd_pdrop": 0.5} if family == "gpt2" else {"attention_dropout": 0.5}
    model = make_model(family, V, **dropout).train()
    model.lm_head.eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    check_causal(model, "policy")
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounding_is_not_taken_for_a_look_at_later_tokens(dtype):
    for family in FAMILIES:
        check_causal(make_model(family, V).to(dtype), "policy")


def test_weights_that_are_not_finite_are_not_what_is_looked_at():
    model = make_model("llama", V)
    model.lm_head.weight.data[0] = float("nan")
    check_causal(model, "policy")


def test_more_embeddings_than_logits():
    """For the tokens of images, say, which nobody samples."""
    model = make_model("llama", V)
    model.model.embed_tokens = torch.nn.Embedding(V + 8, 32)
    check_causal(model, "policy")


def test_files_with_code_of_their_own_or_of_an_unknown_class(tmp_path):
    make_model("llama", V).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    path, file = str(tmp_path), tmp_path / "config.json"
    config = json.loads(file.read_text())
    code = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    for changes in ({"model_type": "x_llama", "auto_map": code}, {"auto_map": code}):
        file.write_text(json.dumps({**config, **changes}))
        for make in (LanguagePolicy, Reference):
            refused(make, path, error=ValueError, match=r"Python code.*AutoModelForCausalLM.from_pretrained\(.*trust_remote")
    # Code for what transformers has by now as well, as in the files of many models, is not needed.
    file.write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}}))
    assert type(LanguagePolicy(path).lm) is type(AutoModelForCausalLM.from_pretrained(path))
    file.write_text(json.dumps({**config, "architectures": ["Sharp"]}))
    with pytest.warns(UserWarning, match="a Sharp, which transformers does not know, and is loaded as a LlamaForCausalLM"):
        LanguagePolicy(path)

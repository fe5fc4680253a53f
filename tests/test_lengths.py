"""How many positions a model has, by any name and by its tables; and that every way in says so before a model fails."""

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from agents import GRPO, PPO, LanguagePolicy
from agents.engines.base import DecodingSpec, PolicyEngine
from llm_env.lm.positions import max_positions
from llm_env.reference import Reference
from tests.conftest import make_model, make_tokenizer, refused
from tests.probes import make_env

TOKENIZER = make_tokenizer("abc")
V, N = len(TOKENIZER), 32
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2}
PLAIN = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = {
    **{"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16},
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
}
# Class, arguments of its config, the limit, and whether a forward pass of more tokens fails.
MODELS = {
    "GPT2LMHeadModel": ({**GPT2, "n_positions": N}, N, True),
    "GPTJForCausalLM": ({**GPT2, "n_positions": N, "rotary_dim": 4}, N, True),
    "OpenAIGPTLMHeadModel": ({**GPT2, "n_positions": N}, N, True),
    "CTRLLMHeadModel": ({**GPT2, "n_positions": N, "dff": 16}, N, True),
    "MptForCausalLM": ({"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": N}, N, True),
    "OPTForCausalLM": (
        {**PLAIN, "ffn_dim": 16, "max_position_embeddings": N, "word_embed_proj_dim": 16},
        N,  # of a table of 34: the first two places belong to no token
        True,
    ),
    "BartForCausalLM": ({**DECODER, "max_position_embeddings": N}, N, True),
    "BioGptForCausalLM": ({**PLAIN, "intermediate_size": 16, "max_position_embeddings": N}, N, True),
    "WhisperForCausalLM": ({**DECODER, "max_target_positions": N}, N, True),
    "RobertaForCausalLM": (
        {**PLAIN, "intermediate_size": 16, "is_decoder": True, "max_position_embeddings": N, "pad_token_id": 1},
        N - 2,  # positions begin behind the padding's
        True,
    ),
    "LlamaForCausalLM": ({**PLAIN, "intermediate_size": 16, "max_position_embeddings": N}, N, False),
    "FalconForCausalLM": ({**PLAIN, "alibi": True, "max_position_embeddings": N}, N, False),
    "BloomForCausalLM": ({"hidden_size": 16, "n_layer": 2, "n_head": 2, "seq_length": N}, None, False),
    "RwkvForCausalLM": ({"hidden_size": 16, "num_hidden_layers": 2, "context_length": N}, None, False),
    "MambaForCausalLM": ({"hidden_size": 16, "num_hidden_layers": 2}, None, False),
}


def build(name):
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    return kind(kind.config_class(vocab_size=V, **MODELS[name][0])).eval()


@pytest.mark.parametrize("name", MODELS)
def test_positions_of_a_model(name):
    model = build(name)
    _, limit, hard = MODELS[name]
    assert max_positions(model) == limit
    if limit is not None:
        assert model(input_ids=torch.full((1, limit), 3)).logits.shape == (1, limit, V)
    if hard:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, N + 1), 3))
    else:
        model(input_ids=torch.full((1, N + 1), 3))


def test_composite_models_have_their_text_models_limit():
    """Not that of the images' patches, which have positions too."""
    text = {**PLAIN, "intermediate_size": 16, "vocab_size": V, "max_position_embeddings": N}
    vision = {**PLAIN, "intermediate_size": 16, "image_size": 28, "patch_size": 14}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text), vision_config=transformers.CLIPVisionConfig(**vision), image_token_id=2
    )
    model = transformers.LlavaForConditionalGeneration(config)
    assert max_positions(model) == N
    refused(GRPO, model, env_of(40), group_size=2, n_envs=4, error=ValueError, match="the model has 32")
    git = transformers.GitConfig(**text, vision_config={**vision, "num_hidden_layers": 1})
    assert max_positions(transformers.GitForCausalLM(git)) == N


class OwnConfig(PreTrainedConfig):
    model_type = "own"


class Own(PreTrainedModel):
    """A class of somebody's own, whose config says nothing of positions."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.tokens, self.position_embedding_table = torch.nn.Embedding(V, 8), torch.nn.Embedding(N, 8)
        self.relative_position_bias = torch.nn.Embedding(4, 8)
        self.head = torch.nn.Linear(8, V)
        self.post_init()

    def get_input_embeddings(self):
        return self.tokens

    def forward(self, input_ids, attention_mask=None):
        return CausalLMOutput(
            logits=self.head(self.tokens(input_ids) + self.position_embedding_table.weight[: input_ids.shape[1]])
        )


def test_a_table_tells_where_the_config_does_not():
    assert max_positions(Own(OwnConfig())) == N
    refused(LanguagePolicy(Own(OwnConfig()), TOKENIZER).log_probs, [[3] * 30], [[3] * 3], match="needs 33 positions")


@pytest.mark.parametrize(
    "name", ["max_position_embeddings", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx", "n_positions"]
)
def test_names_of_the_limit(name):
    model = Own(OwnConfig())
    model.position_embedding_table = torch.nn.Embedding(100, 8)
    assert max_positions(model) == 100
    setattr(model.config, name, N)
    assert max_positions(model) == N
    setattr(model.config, name, -1)  # as XLNet says that there is none
    assert max_positions(model) == 100


# --- every way in ------------------------------------------------------------------------------------------------------------


def env_of(prompt, new=8, **settings):
    return make_env(TOKENIZER, prompts=("a" * prompt,), max_new_tokens=new, max_prompt_tokens=64, **settings)


def agent_of(name="GPT2LMHeadModel", env=None, algorithm=GRPO, **settings):
    groups = {"group_size": 2} if algorithm is GRPO else {}
    return algorithm(
        build(name), env or env_of(10), n_envs=4, seed=0, policy_kwargs={"tokenizer": TOKENIZER}, **groups, **settings
    )


NEED = "and max_new_tokens=8 need 38 positions, the model has 32; lower max_new_tokens to 2 or shorten the prompts"


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "MptForCausalLM", "OPTForCausalLM", "LlamaForCausalLM"])
@pytest.mark.parametrize("algorithm", [GRPO, PPO])
def test_training_and_evaluation(name, algorithm):
    agent, long = agent_of(name, algorithm=algorithm), env_of(30)
    for call in (agent.evaluate, agent.learn, agent.set_env):
        refused(call, long, error=ValueError, match=NEED)
    refused(agent_of, name, long, algorithm, error=ValueError, match=NEED)
    assert agent.evaluate(env_of(24))["length"] >= 1  # 32 in all


def test_sampling_scoring_and_predicting():
    agent = agent_of()
    policy, rules = agent.policy, env_of(30).rules
    refused(policy.sample, [[3] * 30], 1, 8, error=ValueError, match=NEED)
    decoding = DecodingSpec(rules, agent.sampler(), rules.max_new_tokens)
    refused(PolicyEngine(policy).generate, [[3] * 30], 1, decoding, error=ValueError, match=NEED)
    refused(policy.sample, [[3], [3] * 30], 2, [8, 3], error=ValueError, match="max_new_tokens=3 need 33 positions")
    responses, _ = policy.sample([[3], [3] * 30], 2, [8, 2])  # each prompt has a limit of its own
    assert len(responses) == 4
    refused(policy.log_probs, [[3] * 30], [[3] * 3], error=ValueError, match="needs 33 positions, the model has 32; shorten it")
    refused(policy.evaluate_actions, [[3], [3] * 30], [[3], [3] * 3], error=ValueError, match="needs 33 positions")
    policy.log_probs([[3] * 30], [[3] * 2])
    refused(agent.generate, ["a" * 30], max_new_tokens=8, error=ValueError, match=NEED)
    refused(agent.generate, ["a" * 40], error=ValueError, match="need 48 positions, the model has 32; shorten the prompts$")
    ids = np.full((1, 33), 3)
    refused(agent.predict, {"input_ids": ids, "attention_mask": np.ones_like(ids)}, match="needs 33 positions")


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "MptForCausalLM"])
def test_a_reference_with_fewer_positions_than_the_policy(name):
    reference = Reference(build(name))
    for given in (build(name), reference):
        refused(env_of, 30, reference=given, error=ValueError, match="need 38 positions, the reference has 32; lower")
    env = env_of(24, reference=reference)
    agent = GRPO(make_model("llama", V), env, n_envs=4, group_size=2, kl_coef=0.1, seed=0)
    agent.learn(1)
    refused(reference.log_probs, [[3] * 30], [[3] * 3], error=ValueError, match="needs 33 positions, the reference has 32")


def test_the_observation_is_as_long_as_the_model_can_read():
    for name, length in (("MptForCausalLM", N), ("OPTForCausalLM", N), ("MambaForCausalLM", 1024)):
        assert LanguagePolicy(build(name)).observation_space["input_ids"].shape == (length,)

"""`save` and `load` are inverse for every model that trains, or say what is missing; and what lies beside weights stays."""

import base64
import io
import json
import shutil
import warnings
import zipfile

import cloudpickle
import numpy as np
import pytest
import stable_baselines3
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutput

from agents import GRPO, PPO, REINFORCE, LanguagePolicy
from tests.conftest import make_model, make_tokenizer, refused
from tests.probes import make_env
from tests.test_agents import TOKENIZER, same

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it

V = len(TOKENIZER)
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": V, "num_key_value_heads": 2, "max_position_embeddings": 64}
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
ASK = [{"role": "user", "content": "ab"}]


class Sharp(LlamaForCausalLM):
    """Another forward under the same config: from that alone a plain Llama would come back."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


class MyConfig(LlamaConfig):
    model_type = "my_llama"


class Mine(LlamaForCausalLM):
    """A config that transformers does not know."""

    config_class = MyConfig


class SameType(LlamaConfig):
    """A config under a name that transformers knows, with a default of its own, which config.json leaves out."""

    rms_norm_eps: float = 0.1


class Double(torch.nn.Module):
    """In the place of a norm, with its weights."""

    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight

    def forward(self, x):
        return 2 * x * self.weight


def replaced_module():
    model = LlamaForCausalLM(LlamaConfig(**TEXT))
    model.model.norm = Double(model.model.norm)
    return model


def replaced_forward():
    model = LlamaForCausalLM(LlamaConfig(**TEXT))
    norm = model.model.norm
    norm.forward = lambda x: 2 * x * norm.weight
    return model


def qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
    tokens = dict.fromkeys(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), V - 1)
    config = Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **tokens)
    return Qwen2VLForConditionalGeneration(config)


def llava():
    vision = CLIPVisionConfig(**{**SIZES, "num_hidden_layers": 1}, image_size=28, patch_size=14)
    config = LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=vision, image_token_id=V - 1)
    return LlavaForConditionalGeneration(config)


REMOTE = {
    "configuration_x.py": """
from transformers import LlamaConfig
class XConfig(LlamaConfig):
    model_type = "x_llama"
""",
    "modeling_x.py": """
from transformers import LlamaForCausalLM
from .configuration_x import XConfig
class XForCausalLM(LlamaForCausalLM):
    config_class = XConfig
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output
""",
}


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """A folder of a model whose code is in it."""
    folder = tmp_path_factory.mktemp("remote")
    LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    config |= {"model_type": "x_llama", "architectures": ["XForCausalLM"], "auto_map": code}
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in REMOTE.items():
        (folder / name).write_text(content)
    return str(folder)


MODELS = {
    "own class": lambda _: Sharp(LlamaConfig(**TEXT)),
    "own config": lambda _: Mine(MyConfig(**TEXT)),
    "own config of a known name": lambda _: LlamaForCausalLM(SameType(**TEXT)),
    "replaced module": lambda _: replaced_module(),
    "replaced forward": lambda _: replaced_forward(),
    "Qwen2-VL": lambda _: qwen2_vl(),
    "LLaVA": lambda _: llava(),
    "trust_remote_code": lambda path: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True),
}


def agent_of(model, algorithm=GRPO, env=None, **settings):
    settings = {"n_envs": 4, "learning_rate": 1e-2, "seed": 0, "preflight": False, **settings}
    groups = {"group_size": 4} if issubclass(algorithm, GRPO) else {}
    kwargs = {"policy_kwargs": {"tokenizer": TOKENIZER}} if env is None else {}
    return algorithm(model, make_env(TOKENIZER) if env is None else env, **settings, **groups, **kwargs)


def logp_of(policy):
    with torch.no_grad():
        return torch.cat(policy.log_probs([[3, 4], [5]], [[6, 7, 0], [4]]))


@pytest.mark.parametrize("case", MODELS)
def test_models_that_no_config_rebuilds(case, remote, tmp_path):
    torch.manual_seed(0)
    agent = agent_of(MODELS[case](remote)).learn(8)
    with pytest.warns(UserWarning, match=r"does not rebuild this .*load\(path, policy=<model>\)") as told:
        for _ in range(2):
            agent.save(tmp_path / "agent")
    assert len([warning for warning in told if "rebuild" in str(warning.message)]) == 1  # once
    refused(GRPO.load, tmp_path / "agent", error=ValueError, match=r"load\(path, policy=<")
    again = GRPO.load(tmp_path / "agent", policy=MODELS[case](remote), env=make_env(TOKENIZER))
    assert torch.equal(logp_of(again.policy), logp_of(agent.policy))
    agent.learn(8, reset_num_timesteps=False)
    again.learn(8, reset_num_timesteps=False)
    assert same(again.policy.state_dict().values(), agent.policy.state_dict().values())
    plain = LlamaForCausalLM(LlamaConfig(**TEXT))
    refused(GRPO.load, tmp_path / "agent", policy=plain, error=ValueError, match="Llama")


class NanoConfig(PretrainedConfig):
    model_type = "nano"

    def __init__(self, vocab_size=V, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size = vocab_size


class Nano(PreTrainedModel):
    """The least that is a causal language model: ids alone come in, and logits out; no GenerationMixin."""

    config_class = NanoConfig

    def __init__(self, config):
        super().__init__(config)
        self.wte, self.head = torch.nn.Embedding(config.vocab_size, 16), torch.nn.Linear(16, config.vocab_size)
        self.rnn = torch.nn.GRU(16, 16, batch_first=True)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def forward(self, input_ids, labels=None):
        return CausalLMOutput(logits=self.head(self.rnn(self.wte(input_ids))[0]))


class NanoWithMask(Nano):
    def forward(self, input_ids, attention_mask=None, **kwargs):
        return super().forward(input_ids)


@pytest.mark.parametrize("kind", [Nano, NanoWithMask])
def test_a_class_of_ones_own_without_generate_or_masks(kind, tmp_path):
    torch.manual_seed(0)
    env = make_env(TOKENIZER, prompts=("a", "bcd"), max_prompt_tokens=3)
    agent = agent_of(kind(NanoConfig()), env=env).learn(40)
    prompts, responses = [[3], [4], [5, 6, 7, 8]], [[6, 7, 0], [4], [3, 3]]

    def plain(policy):
        with torch.no_grad():
            rows = [policy.lm(torch.tensor([p + r])).logits[0].log_softmax(-1) for p, r in zip(prompts, responses, strict=True)]
        pairs = zip(rows, prompts, responses, strict=True)
        return torch.cat([row[len(p) - 1 : -1].gather(1, torch.tensor(r)[:, None])[:, 0] for row, p, r in pairs])

    torch.testing.assert_close(torch.cat(agent.policy.log_probs(prompts, responses)).detach(), plain(agent.policy))
    prompts = [prompt for prompt in prompts for _ in range(2)]
    responses, sampled = agent.policy.sample([[3], [4], [5, 6, 7, 8]], 2, 5)
    torch.testing.assert_close(torch.as_tensor(np.concatenate(sampled)), plain(agent.policy), atol=1e-5, rtol=0)
    ids, mask = np.array([[3, 0, 0], [5, 6, 7]]), np.array([[1, 0, 0], [1, 1, 1]], np.int8)
    likeliest = [agent.policy.lm(torch.tensor([row])).logits[0, -1, :V].argmax().item() for row in ([3], [5, 6, 7])]
    assert agent.predict({"input_ids": ids, "attention_mask": mask}, deterministic=True)[0].tolist() == likeliest
    with pytest.warns(UserWarning, match="does not rebuild this"):
        agent.save(tmp_path / "agent")
    agent.policy.save_pretrained(tmp_path / "out")
    again = GRPO.load(
        tmp_path / "agent", policy=kind(NanoConfig()), env=make_env(TOKENIZER, prompts=("a", "bcd"), max_prompt_tokens=3)
    )
    assert torch.equal(logp_of(again.policy), logp_of(agent.policy))
    for settings in ({}, {"separate_critic": True}):
        refused(agent_of, kind(NanoConfig()), PPO, **settings, error=TypeError, match=f"{kind.__name__} gives no hidden states")


def test_a_plain_model_needs_none_and_takes_one(tmp_path):
    agent = agent_of(LlamaForCausalLM(LlamaConfig(**TEXT))).learn(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent.save(tmp_path / "agent")
    LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(tmp_path / "path")
    TOKENIZER.save_pretrained(tmp_path / "path")
    for policy in (None, LlamaForCausalLM(LlamaConfig(**TEXT)), str(tmp_path / "path")):
        assert torch.equal(logp_of(GRPO.load(tmp_path / "agent", policy=policy).policy), logp_of(agent.policy))


def test_another_model_is_refused_by_name(tmp_path):
    agent_of(LlamaForCausalLM(LlamaConfig(**TEXT))).save(tmp_path / "agent")
    rope = {"rope_type": "default", "rope_theta": 5e5}
    others = {
        "Sharp": Sharp(LlamaConfig(**TEXT)),
        "model_type='llama', .* has 'gpt2'": make_model("gpt2", V),
        "model_type='llama', .* has 'qwen2'": make_model("qwen2", V),
        "intermediate_size=32, .* has 48": LlamaForCausalLM(LlamaConfig(**{**TEXT, "intermediate_size": 48})),
        "rope_theta=10000.0, .* has 500000.0": LlamaForCausalLM(LlamaConfig(**TEXT, rope_parameters=rope)),
        "rms_norm_eps=1e-06, .* has 0.01": LlamaForCausalLM(LlamaConfig(**TEXT, rms_norm_eps=1e-2)),
    }
    for match, model in others.items():
        refused(GRPO.load, tmp_path / "agent", policy=model, error=ValueError, match=match)
    refused(GRPO.load, tmp_path / "agent", policy=LanguagePolicy(others["Sharp"]), error=TypeError, match="LanguagePolicy")
    refused(GRPO.load, tmp_path / "agent", policy=3, error=TypeError, match="the model given to load is a int")
    refused(GRPO.load, tmp_path / "agent", policy=others["Sharp"].model, error=TypeError, match="no language-model head")


def test_an_adapters_base_is_not_taken_for_another(tmp_path):
    """The files of an own class, by whose path transformers loads a plain Llama with the very same weights."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    Sharp(LlamaConfig(**TEXT)).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    env = make_env(TOKENIZER)
    kwargs = {"peft_config": peft.LoraConfig(r=2, target_modules=["q_proj"]), "tokenizer": TOKENIZER}
    agent = GRPO(Sharp.from_pretrained(base), env, group_size=4, n_envs=4, seed=0, policy_kwargs=kwargs)
    with pytest.warns(UserWarning, match="does not rebuild this .*Sharp"):
        agent.save(tmp_path / "agent")
    refused(
        GRPO.load, tmp_path / "agent", policy=LlamaForCausalLM.from_pretrained(base), match="Sharp, but the model here is a"
    )
    again = GRPO.load(tmp_path / "agent", policy=Sharp.from_pretrained(base))
    assert torch.equal(logp_of(again.policy), logp_of(agent.policy))


def test_code_is_exported_with_the_model(remote, tmp_path):
    policy = agent_of(MODELS["trust_remote_code"](remote)).learn(8).policy
    policy.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_text() for name in REMOTE} == REMOTE
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(logp_of(LanguagePolicy(model, TOKENIZER)), logp_of(policy))


# --- the algorithm -----------------------------------------------------------------------------------------------------------


class MyGRPO(GRPO):
    pass


ALGORITHMS = [GRPO, PPO, REINFORCE, MyGRPO]


@pytest.mark.parametrize("wrote", ALGORITHMS, ids=lambda kind: kind.__name__)
def test_the_algorithm_of_a_file(wrote, tmp_path):
    agent = agent_of(make_model("llama", V), wrote)
    file = io.BytesIO()
    agent.save(file)
    agent.save(tmp_path / "agent")
    for reads in ALGORITHMS:
        for source in (tmp_path / "agent", file):
            if issubclass(reads, wrote) or issubclass(wrote, reads):
                assert type(reads.load(source)) is reads
            else:
                message = rf"saved by {wrote.__name__}, not by {reads.__name__}; load it with {wrote.__name__}.load"
                refused(reads.load, source, error=ValueError, match=message)
                refused(agent_of(make_model("llama", V), reads).set_parameters, source, error=ValueError, match=message)


def as_of_0_1(path):
    """Take away what version 0.1 did not write."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    data = json.loads(parts["data"])
    del data["_algorithm"]
    policy = cloudpickle.loads(base64.b64decode(data["_policy_data"][":serialized:"]))
    policy["model"] = {name: content for name, content in policy["model"].items() if "/" not in name}
    del policy["model"]["policy.json"], policy["model"]["generation_config.json"]
    data["_policy_data"][":serialized:"] = base64.b64encode(cloudpickle.dumps(policy)).decode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**parts, "data": json.dumps(data)}.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("algorithm", [GRPO, PPO])
def test_files_of_version_0_1(algorithm, tmp_path):
    settings = {"separate_critic": True} if algorithm is PPO else {}
    agent = agent_of(make_model("llama", V), algorithm, **settings).learn(8)
    agent.save(tmp_path / "agent")
    as_of_0_1(tmp_path / "agent.zip")
    for policy in (None, make_model("llama", V, seed=1)):
        again = algorithm.load(tmp_path / "agent", policy=policy)
        assert same(again.policy.state_dict().values(), agent.policy.state_dict().values())
        assert all(p.requires_grad for p in again.policy.parameters()) and again.policy.tokenizer is not None
    if algorithm is GRPO:
        refused(PPO.load, tmp_path / "agent", error=ValueError, match="value_head.* with the algorithm that saved it")


# --- beside the weights ------------------------------------------------------------------------------------------------------


def chat_tokenizer(template=CHAT):
    tokenizer = make_tokenizer("abcdefgh")
    tokenizer.chat_template = template
    return tokenizer


def exported(policy, folder):
    """The generation config and the chat templates that another program reads."""
    shutil.rmtree(folder, ignore_errors=True)
    policy.save_pretrained(folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config = model.generation_config
    return (config.eos_token_id, config.temperature, config.do_sample), tokenizer.chat_template


@pytest.mark.parametrize("by", ["path", "object"])
def test_the_generation_config(by, tmp_path):
    model = make_model("llama", V)
    model.generation_config.update(eos_token_id=[0, 4], temperature=0.6, do_sample=True)
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    env = make_env(TOKENIZER, eos_token_ids=[0, 4])
    agent = GRPO(str(tmp_path / "model") if by == "path" else model, env, group_size=4, n_envs=4, seed=0).learn(4)
    for _ in range(2):  # a file of a file
        agent.save(tmp_path / "agent")
        agent = GRPO.load(tmp_path / "agent")
        assert exported(agent.policy, tmp_path / "out")[0] == ([0, 4], 0.6, True)
    again = GRPO.load(tmp_path / "agent", policy=make_model("llama", V))
    assert exported(again.policy, tmp_path / "out")[0] == ([0, 4], 0.6, True)


def test_a_published_generation_config_that_transformers_warns_of(tmp_path):
    """As Llama 2's was: a temperature without sampling."""
    model = make_model("llama", V)
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.9, "do_sample": False, "eos_token_id": 0}))
    agent_of(str(tmp_path / "model")).save(tmp_path / "agent")
    again = GRPO.load(tmp_path / "agent")
    assert again.policy.lm.generation_config.temperature == 0.9
    assert exported(again.policy, tmp_path / "out")[0] == (0, 0.9, False)


def test_an_adapters_generation_config_when_it_is_merged(tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model("llama", V)
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    agent = GRPO(
        str(tmp_path / "model"), make_env(TOKENIZER), group_size=4, n_envs=4, seed=0, policy_kwargs={"peft_config": config}
    )
    agent.policy.lm.generation_config.update(eos_token_id=[0, 4])
    agent.save(tmp_path / "agent")
    GRPO.load(tmp_path / "agent").policy.save_pretrained(tmp_path / "out", merge=True)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [0, 4]


NAMED = {"default": CHAT, "tool_use": "tools: " + CHAT}
TEMPLATES = {  # the policy's, the env's, and what training used: what is exported
    "the policy has none": (None, CHAT, CHAT),
    "the policy has another": ("other", CHAT, CHAT),
    "the env has none": (CHAT, None, CHAT),
    "the env has several": (None, NAMED, NAMED),
    "the policy has several": ({"default": "other", "tool_use": "tools"}, CHAT, {"default": CHAT, "tool_use": "tools"}),
    "both are the same": (NAMED, NAMED, NAMED),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_chat_templates(case, tmp_path):
    mine, theirs, used = TEMPLATES[case]
    model, tokenizer = str(tmp_path / "model"), chat_tokenizer(mine)
    make_model("llama", V).save_pretrained(model)
    tokenizer.save_pretrained(model)
    prompts = ("ab",) if theirs is None else ({"prompt": ASK},)
    env = make_env(chat_tokenizer(theirs), prompts=prompts)
    agent = GRPO(model, env, group_size=4, n_envs=4, seed=0)
    assert exported(agent.policy, tmp_path / "out")[1] == used
    agent.save(tmp_path / "agent")
    for again in (GRPO.load(tmp_path / "agent"), GRPO.load(tmp_path / "agent", env=env)):
        assert exported(again.policy, tmp_path / "out")[1] == used
    given = LanguagePolicy(make_model("llama", V), tokenizer)
    agent = GRPO(given, env, group_size=4, n_envs=4, seed=0)
    assert exported(agent.policy, tmp_path / "out")[1] == used
    assert tokenizer.chat_template == mine  # the user's own is left alone


def test_files_of_a_processor(tmp_path):
    """Of the model's folder, also where the policy is an object that was loaded from there."""
    contents = {"preprocessor_config.json": '{"image_processor_type": "X"}', "processor_config.json": '{"a": 1}'}
    for name, make in (("text", lambda: make_model("llama", V)), ("llava", llava)):
        folder = tmp_path / name
        make().save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
        for file, content in contents.items():
            (folder / file).write_text(content)
        model = str(folder) if name == "text" else LlavaForConditionalGeneration.from_pretrained(folder)
        agent = GRPO(model, make_env(TOKENIZER), group_size=4, n_envs=4, seed=0)
        agent.policy._told_of_class = True
        agent.save(tmp_path / "agent")
        again = GRPO.load(tmp_path / "agent", policy=None if name == "text" else make())
        for policy in (agent.policy, again.policy):
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            policy.save_pretrained(tmp_path / "out")
            assert {file: (tmp_path / "out" / file).read_text() for file in contents} == contents


def test_tokenizers_without_a_fast_form(tmp_path):
    tokenizer = ByT5Tokenizer()
    env = make_env(tokenizer, prompts=("ab",), max_prompt_tokens=4)
    model = make_model("llama", len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    agent = GRPO(model, env, group_size=4, n_envs=4, seed=0)
    agent.save(tmp_path / "agent")
    again = GRPO.load(tmp_path / "agent")
    assert type(again.policy.tokenizer) is ByT5Tokenizer and again.policy.tokenizer.get_vocab() == tokenizer.get_vocab()
    again.policy.save_pretrained(tmp_path / "out")
    assert type(AutoTokenizer.from_pretrained(tmp_path / "out")) is ByT5Tokenizer


class Loud(PreTrainedTokenizerFast):
    """Somebody's own: its files make another one."""

    def decode(self, *args, **kwargs):
        return super().decode(*args, **kwargs).upper()


def test_a_tokenizer_that_its_files_do_not_rebuild_is_the_envs(tmp_path):
    tokenizer = Loud(tokenizer_object=TOKENIZER.backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    env = make_env(tokenizer)
    GRPO(make_model("llama", V), env, group_size=4, n_envs=4, seed=0).save(tmp_path / "agent")
    with pytest.warns(UserWarning, match=r"the saved tokenizer, a .*Loud, cannot be rebuilt .*the policy uses the env.s"):
        alone, again = GRPO.load(tmp_path / "agent"), GRPO.load(tmp_path / "agent", env=env)
    assert alone.policy.tokenizer is None and again.policy.tokenizer is tokenizer
    refused(alone.generate, ["a"], match="the policy has no tokenizer")


# --- what is in no file -----------------------------------------------------------------------------------------------------


def hooked(model):
    model.lm_head.register_forward_hook(lambda module, inputs, outputs: 2 * outputs)


def reconfigured(model):
    """After it was made, so that its modules do not know; a model that is rebuilt from the config would."""
    model.config.rms_norm_eps = 0.5


def rescaled(model):
    for layer in model.model.layers:
        layer.self_attn.scaling *= 3


@pytest.mark.parametrize("change", [hooked, reconfigured, rescaled])
def test_a_model_that_comes_back_as_another_is_told(change, tmp_path):
    model = make_model("llama", V)
    change(model)
    agent = agent_of(model).learn(4)
    agent.save(tmp_path / "agent")
    with pytest.warns(
        UserWarning, match=r"computes other log-probs than the saved one, by up to .* load\(path, policy=<model>\)"
    ):
        again = GRPO.load(tmp_path / "agent")
    assert (logp_of(again.policy) - logp_of(agent.policy)).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_that_comes_back_as_it_was_is_not_spoken_of(family, tmp_path, recwarn):
    agent = agent_of(make_model(family, V)).learn(4)
    agent.save(tmp_path / "agent")
    again = GRPO.load(tmp_path / "agent")
    assert torch.equal(logp_of(again.policy), logp_of(agent.policy))
    assert not [warning for warning in recwarn if "log-probs" in str(warning.message)]


def test_what_is_no_agents_file_is_told_apart(tmp_path):
    agent = agent_of(make_model("llama", V))
    agent.policy.save_pretrained(tmp_path / "model")
    refused(GRPO.load, tmp_path / "model", match=r"is a folder, as save_pretrained writes it; make an agent of it: GRPO\(")
    agent.save(tmp_path / "agent")
    refused(
        GRPO.load,
        tmp_path / "agent",
        policy={"a": 1},
        error=TypeError,
        match="the model given to load is a dict; give a model, its path",
    )
    stable_baselines3.PPO("MlpPolicy", "CartPole-v1", n_steps=8, device="cpu").save(tmp_path / "sb3")
    refused(PPO.load, tmp_path / "sb3", match="was not saved by an agent of this package, but by Stable-Baselines3")

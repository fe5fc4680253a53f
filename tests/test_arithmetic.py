"""The page of arithmetic against tensors that are really there, and the table of memory."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from agents.sampling.shared_prefix import SharedDecoding

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def arithmetic():
    folder = str(ROOT / "examples/benchmarks")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("arithmetic")
    finally:
        sys.path.remove(folder)


FAMILIES = [(LlamaForCausalLM, LlamaConfig, False), (Qwen2ForCausalLM, Qwen2Config, True)]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def described(arithmetic, tied=False, biased=False, head=16):
    return arithmetic.Model("tiny", 64, 3, 4, 2, head, 160, 40, tied, biased)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "config", "biased"), FAMILIES)
def test_what_is_held_is_what_the_page_counts(kind, config, biased, tied, arithmetic):
    """Weights, gradients and the moments of AdamW, tensor by tensor."""
    lm = kind(config(vocab_size=40, tie_word_embeddings=tied, head_dim=16, **SIZES))
    held = arithmetic.Sharding("data parallel", 1).held(described(arithmetic, tied, biased))
    optimizer = torch.optim.AdamW(lm.parameters())
    lm(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    parameters = list(lm.parameters())
    moments = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
    assert held["weights"] == held["reference"] == sum(p.nbytes for p in parameters)
    assert held["gradients"] == sum(p.grad.nbytes for p in parameters)
    assert held["moments"] == sum(v.nbytes for v in moments)
    assert held["weights"] == 4 * sum(p.numel() for p in parameters)
    shard = arithmetic.Sharding("FSDP2", 8, sharded=True).held(described(arithmetic, tied, biased))
    assert {name: 8 * size for name, size in shard.items()} == held


def test_the_parameters_of_the_public_models(arithmetic):
    """As transformers builds them, without memory."""
    for model in arithmetic.MODELS:
        kind, config = (Qwen2ForCausalLM, Qwen2Config) if model.biased else (LlamaForCausalLM, LlamaConfig)
        sizes = {"hidden_size": model.hidden, "intermediate_size": model.intermediate, "num_hidden_layers": model.layers}
        heads = {"num_attention_heads": model.heads, "num_key_value_heads": model.kinds, "head_dim": model.size}
        with torch.device("meta"):
            lm = kind(config(vocab_size=model.vocabulary, tie_word_embeddings=model.tied, **sizes, **heads))
        assert sum(p.numel() for p in lm.parameters()) == model.parameters
        head = lm.get_output_embeddings().weight.numel()
        inside = (
            sum(p.numel() for p in lm.parameters()) - lm.get_input_embeddings().weight.numel() - (0 if model.tied else head)
        )
        assert model.multiplied == inside + head


def test_an_adapter_has_the_parameters_that_the_page_counts(arithmetic):
    peft = pytest.importorskip("peft")
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=40, head_dim=16, **SIZES))
    peft.get_peft_model(lm, peft.LoraConfig(r=5, target_modules="all-linear"))
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    assert described(arithmetic).adapter(5) == trained


@pytest.mark.parametrize(("bf16", "number"), [(False, 4), (True, 2)])
@pytest.mark.parametrize("new", [3, 64, 65, 129])
def test_the_cache_while_sampling_is_what_the_page_counts(new, bf16, number, arithmetic):
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=40, head_dim=16, **SIZES)).eval()
    decoding = SharedDecoding(lm, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        decoding.prefill([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
        for _ in range(new):
            decoding(torch.ones(6, dtype=torch.int64))
    tables = [*(table for pair in decoding.prompts.values() for table in pair), *decoding.response_kv.values()]
    assert {table.element_size() for table in tables} == {number}
    assert arithmetic.cache_bytes(described(arithmetic), 2, 5, 6, new, number) == sum(table.nbytes for table in tables)


def test_activations_are_about_what_the_page_counts(arithmetic):
    """What autograd keeps for the backward pass under bfloat16, weights and their casts aside, with all layers and with one."""
    kept = {}
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    for layers in (1, 3):
        lm = LlamaForCausalLM(LlamaConfig(vocab_size=40, head_dim=16, num_hidden_layers=layers, **sizes))
        weights = {p.numel() for p in lm.parameters()}
        tables = {}

        def keep(tensor, tables=tables, weights=weights):
            if tensor.numel() not in weights:
                tables[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
            lm.model(torch.arange(400)[None] % 40, use_cache=False)
        kept[layers] = sum(storage.nbytes() for storage in tables.values())
    model = described(arithmetic)
    layer = (kept[3] - kept[1]) / 2
    inputs = 400 * 4 * model.hidden * model.layers
    assert arithmetic.activation_bytes(model, 400) == pytest.approx(layer + inputs, rel=0.1)


def test_collectives_and_time_by_hand(arithmetic):
    """A ring of 8 moves 7/8 of the bytes, twice for a sum; 70 billion weights do not fit where they are gathered."""
    assert arithmetic.all_reduce(8e9, 8) == pytest.approx(2 * 7e9 / 360e9)
    assert arithmetic.all_gather(64e9, 64) == pytest.approx(63e9 / 320e9)
    tiny, whole = described(arithmetic), arithmetic.Sharding("data parallel", 8)
    n = tiny.parameters - 40 * 64
    positions = 8 * (512 + 8 * 1024)
    parts = arithmetic.seconds(tiny, whole)
    assert parts["update"] == pytest.approx(8 * n * positions / (0.4 * 989e12))
    assert parts["reference"] == pytest.approx(2 * n * positions / (0.4 * 989e12))
    assert parts["moving"] == pytest.approx(2 * 7 / 8 * 4 * tiny.parameters / 360e9)
    cached = 4 * 3 * 2 * 16 * (8 * 512 + 64 * 512)
    assert parts["decoding"] == pytest.approx(1024 * (2 * n + cached) / (0.6 * 3.35e12))
    sharded = arithmetic.seconds(tiny, arithmetic.Sharding("FSDP2", 8, sharded=True))
    assert sharded["moving"] == pytest.approx(7 / 8 * (2 + 2 + 8 * 8) * tiny.parameters / 360e9)
    large = arithmetic.MODELS[2]
    assert arithmetic.verdict(large, arithmetic.Sharding("FSDP2", 64, sharded=True)) == "update yes, sampling no"
    assert arithmetic.verdict(large, whole) == "no"


def test_the_table_counts_bytes_as_they_are(arithmetic, tmp_path):
    pytest.importorskip("bitsandbytes")
    memory, work = importlib.import_module("memory"), importlib.import_module("speed_parts.work")
    count = work.build(str(tmp_path), 40, 64, 4, 4, 128, 48)
    results = memory.measure(work.Work(str(tmp_path), 40, 16, 2, 8, 2, 1, "cpu", "float32", 1), 1)
    rows = {row.name: row for row in results}
    plain, again, small = rows["(none)"], rows["gradient_checkpointing=True"], rows["optimizer='adamw_8bit'"]
    buffers = plain.weights - 4 * count
    assert 0 < buffers == plain.reference - 4 * count <= 256
    assert plain.optimizer == pytest.approx(8 * count, rel=0.01) and small.optimizer < 0.3 * plain.optimizer
    assert plain.update > 4 * count and again.update < 0.9 * plain.update
    assert rows["bf16=True"].update < plain.update + 2 * count
    text = memory.report(results, "title").splitlines()
    assert f"| {plain.weights / 2**20:.1f} |" in text[6] and text[6].count("1.00") == 3 and len(text) == 6 + len(results) + 2


def test_the_page_is_what_the_formulas_give(arithmetic):
    assert (ROOT / "examples/benchmarks/arithmetic.md").read_text() == arithmetic.page()


def test_the_page_of_one_gpu(arithmetic):
    """Bytes a weight by hand: 4 + 4 + 8 + 4 + 2 = 22, with AdamW in 8 bits 16.03; the base of adapters takes 4 + 2."""
    page = importlib.import_module("gpu_memory")
    assert (ROOT / "examples/benchmarks/gpu_memory.md").read_text() == page.page()
    full, eight_bit, lora = page.WAYS
    half, _, seven = page.SIZES
    assert full.held(half) == 22 * half.parameters
    assert eight_bit.held(half) == pytest.approx(16 * half.parameters, rel=0.01)
    assert lora.held(seven) == 6 * seven.parameters + (6 + 4 + 8) * seven.adapter(16)
    # 24 layers, 2 heads of 64: 12288 bytes a token; room for 512 tokens each, and logits in bfloat16, twice.
    assert page.group_bytes(half, 256, 8, 300) == 12288 * (256 + 8 * 512) + 8 * 151936 * 4
    measured = json.loads((ROOT / "examples/benchmarks/gpu.json").read_text())["decoding, Qwen2.5-0.5B"]["default"]["peak GB"]
    assert 10 * half.parameters + 64 * page.group_bytes(half, 256, 8, 512) == pytest.approx(measured * 1e9, rel=0.1)

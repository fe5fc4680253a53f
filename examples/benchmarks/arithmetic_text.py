"""Text of `arithmetic.md`: introduction, formulas and table headers."""

HEAD = """\
# Memory and time by sharding

**Everything on this page is computed, not measured**, with the formulas below (`arithmetic.py`). Memory is in GB (10^9 bytes)
per GPU, time in seconds per GRPO step. `tests/test_arithmetic.py` compares the memory formulas with the sizes of real tensors.
The times were not compared with any measurement. They are lower bounds: they include no time for Python, for rewards or for
waiting for the longest response.

## How to read

Each model has a table of memory and a table of time. Each row is a way to place the model on S GPUs (H100 SXM, 80 GB).

- `update` and `sampling` are the two memory peaks. Each includes everything that is held at that time.
- A configuration fits if both peaks are at most 72 GB (0.9 of a GPU).
- "yes, `max_num_seqs=n`": it fits with at most n concurrent responses per GPU.
- "update yes, sampling no": the update fits, but sampling does not. Sampling gathers all weights on each GPU, in addition to
  what training holds. It would need an engine that shards the weights; sharded weights cannot be sent to an engine yet.
- Times of configurations that do not fit are omitted.

The configurations are:

- *data parallel*: each GPU holds all weights, gradients and moments. Gradients are summed once per optimizer step, after the
  backward pass.
- *FSDP2*: each GPU holds 1/S of everything. The weights of a layer are gathered when it is computed. All weights are
  gathered for sampling, in bfloat16.
- *LoRA*: adapters of rank 16 for all matrices of all layers are trained. The reference is the model without adapters.

The GRPO step has 64 prompts of 512 tokens with 8 responses of 1024 tokens each: 512 episodes over all GPUs. It uses a
reference, one epoch, one optimizer step, and one group per forward pass (`max_tokens_per_batch=8704`), with `bf16=True`,
`gradient_checkpointing=True` and AdamW. To change lengths and batch sizes, edit the constants in `arithmetic.py`.

## Formulas

| symbol | meaning |
| :--- | :--- |
| N | parameters |
| M | N minus the input embedding, if it is not tied to the output embedding |
| a | parameters of the adapters |
| S | GPUs |
| L, h, f | layers, hidden size, intermediate size of the feed-forward network |
| n, k, d | query heads, KV heads, head dimension |
| P, T | tokens of a prompt, tokens of a response |
| G | responses per prompt |
| B, R | episodes per GPU, and how many of them are sampled at a time |

| memory | bytes per GPU |
| :--- | :--- |
| weights (float32 master weights) | 4 N; FSDP2: 4 N / S |
| gradients (float32; kept until the next update begins) | 4 N; FSDP2: 4 N / S; LoRA: 4 a |
| both moments of AdamW (float32) | 8 N; FSDP2: 8 N / S; LoRA: 8 a; `adamw_8bit`: 2 N (1 + 4 / 256) |
| reference (float32) | 4 N; FSDP2: 4 N / S; LoRA: 0 |
| bfloat16 weights, update | 2 N, cached by autocast; FSDP2: two layers and the embeddings; LoRA: the largest matrix |
| activations, with checkpointing | (P + G T) (4 h L + 16 h + 2 (2 h + 2 n d + 2 k d + 4 f)) |
| logits | 5 x 2^28: float32 tensors of one chunk (`llm_env.lm.scoring.CHUNK_BYTES`) at the peak; 4.8 were counted |
| `gathered`: bfloat16 weights, sampling | 2 N; FSDP2: 2 N, and 2 N for the reference; LoRA: the largest matrix; both: 2 N |
| KV cache (bfloat16), sampling | 4 L k d (P R / G + R W), where W is the smallest 64 x 2^i >= T |

With C = 0.4 x 989e12 FLOP/s, H = 0.6 x 3.35e12 bytes/s and V = 0.8 x 450e9 bytes/s (more than 8 GPUs: 0.8 x 400e9):

| time | seconds |
| :--- | :--- |
| `prompts` | 2 M P B / (G C) |
| `decoding` | T B / R x max((2 M + 4 L k d (P R / G + R T / 2)) / H, 2 M R / C) |
| `reference` | 2 M (P + G T) B / (G C) |
| old log-probs | as `reference`, if a rollout has several optimizer steps or the agent has a critic; here 0 |
| `update` | (6 M + 2 M) (P + G T) B / (G C), with 2 M to recompute layers; LoRA: 4 M + 2 M, no gradient of N |
| `communication`, data parallel | all-reduce: 2 (S - 1) / S x 4 N / V; LoRA: 4 a instead of 4 N |
| `communication`, FSDP2 | (S - 1) / S x (2 N + 2 N + B / G x (2 N + 2 N + 4 N)) / V; LoRA: 4 a instead of 4 N, one 2 N less |

FSDP2 gathers policy and reference once per rollout. Each forward and backward pass of the update gathers the policy twice and
needs one reduce-scatter. With LoRA the reference uses the weights of the policy, so it needs no gather. LoRA without FSDP2
reads 8 M bytes per token instead of 2 M: autocast caches the bfloat16 copies of trained weights, but casts a frozen weight
again for every matrix product (counted on a CPU).

### Sources

- Models: `config.json` of the repositories named.
- H100 SXM: 989 TFLOP/s in bfloat16 without sparsity, 80 GB, 3.35 TB/s, NVLink 900 GB/s for both directions together (NVIDIA,
  H100 data sheet).
- InfiniBand: eight ConnectX-7 adapters of 400 Gb/s per node of eight GPUs (NVIDIA, DGX H100 user guide). A ring over nodes
  uses all eight together: 400 GB/s.
- 6 N FLOP per token: Kaplan et al., arXiv 2001.08361, section 2.1.
- Volumes of collectives: nccl-tests, PERFORMANCE.md.
- Bytes of AdamW: Rajbhandari et al., arXiv 1910.02054, section 3.1.

### Assumptions

- Forward and backward passes reach 40% of the peak FLOP/s, decoding 60% of the memory bandwidth, communication 80% of the link
  bandwidth. These are usual values; none was measured here.
- The matrix products inside attention are omitted: 2 L n d (P + T) FLOP per token and forward pass, 2% of 2 N at 7B and these
  lengths.
- Communication does not overlap with computation. FSDP2 overlaps some of it.
- All responses have 1024 tokens.
"""

MEMORY_HEAD = [
    "| sharding | GPUs | weights | gradients | moments | reference | update | gathered | sampling | fits |",
    "| :--- |" + " ---: |" * 8 + " :--- |",
]
TIME_HEAD = [
    "| sharding | GPUs | prompts | decoding | reference | update | communication | step |",
    "| :--- |" + " ---: |" * 7,
]

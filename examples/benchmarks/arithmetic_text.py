"""What `arithmetic.md` says around its numbers."""

HEAD = """\
# Memory and time by sharding

**Everything on this page is computed, not measured**, by the formulas below (`arithmetic.py`). Memory is in GB (10^9 bytes)
per GPU, time in seconds per GRPO step. The formulas of memory are compared with tensors that are really there in
`tests/test_arithmetic.py`. Of the times none was ever seen, and they are lower bounds: nothing waits for Python, for rewards or
for the longest response.

## How to read

One table of memory and one of time for each model; a line is a way to lay the model on S GPUs (H100 SXM, 80 GB). `update`
and `sampling` are the two peaks, each with all that is held beside it; what exceeds 72 GB (0.9 of a GPU) does
not fit. "yes, `max_num_seqs=n`" fits with at most n responses under way on a GPU. "update yes, sampling no"
has no room for the whole weights, which sampling gathers on each GPU, beside what training holds: an engine that splits them
would have to sample, and sharded weights cannot be given to one yet. Times of what does not fit are left out.

- *data parallel*: every weight, gradient and moment on each GPU; gradients are summed once an optimizer step, after the
  backward pass.
- *FSDP2*: each GPU holds 1/S of everything; a layer's weights come together when it is computed, and all of them, in
  bfloat16, for sampling.
- *LoRA*: adapters of rank 16 beside every matrix of every layer are trained; the reference is the model without them.

The step: 64 prompts of 512 tokens, 8 responses of 1024 tokens to each, 512 episodes over all GPUs; GRPO with a reference,
one pass over them, one optimizer step, one group at a time (`max_tokens_per_batch=8704`), `bf16=True`,
`gradient_checkpointing=True`, AdamW. Other lengths and batches: a line of `arithmetic.py`.

## Formulas

N parameters, S GPUs, L layers, h hidden width, f the feed-forward network's, k heads of keys and values and n of queries, d
their width, P and T tokens of a prompt and a response, G responses to a prompt, B episodes on a GPU, R of them at a time, a
parameters of the adapters, M = N less an input embedding that is not the output's too.

| what | bytes on a GPU |
| :--- | :--- |
| weights (float32 masters) | 4 N; FSDP2: 4 N / S |
| gradients (float32; they stay until the next update begins) | 4 N; FSDP2: 4 N / S; LoRA: 4 a |
| AdamW's two moments (float32) | 8 N; FSDP2: 8 N / S; LoRA: 8 a; `adamw_8bit`: 2 N (1 + 4 / 256) |
| reference (float32) | 4 N; FSDP2: 4 N / S; LoRA: 0 |
| weights in bfloat16, update | 2 N, which autocast keeps; FSDP2: two layers, the embeddings; LoRA: the largest matrix |
| activations, checkpointed | (P + G T) (4 h L + 16 h + 2 (2 h + 2 n d + 2 k d + 4 f)) |
| logits | 5 x 2^28, float32 tables of a chunk (`llm_env.lm.scoring.CHUNK_BYTES`) at the peak; 4.8 were counted |
| `gathered`: weights in bfloat16, sampling | 2 N; FSDP2: 2 N and the reference's 2 N; LoRA: the largest matrix; both: 2 N |
| cache of keys and values (bfloat16), sampling | 4 L k d (P R / G + R W), W the least 64 x 2^i that holds T tokens |

With C = 0.4 x 989e12 FLOP/s, H = 0.6 x 3.35e12 bytes/s and V = 0.8 x 450e9 bytes/s (over 8 GPUs: 0.8 x 400e9):

| what | seconds |
| :--- | :--- |
| `prompts` | 2 M P B / (G C) |
| `decoding` | T B / R x max((2 M + 4 L k d (P R / G + R T / 2)) / H, 2 M R / C) |
| `reference` | 2 M (P + G T) B / (G C) |
| old log-probs | as much again where a rollout has several optimizer steps, or a critic; here 0 |
| `update` | (6 M + 2 M) (P + G T) B / (G C), 2 M for computing layers again; LoRA: 4 M + 2 M, no gradient of N |
| `moving`, data parallel | all-reduce: 2 (S - 1) / S x 4 N / V; LoRA: 4 a in the place of 4 N |
| `moving`, FSDP2 | (S - 1) / S x (2 N + 2 N + B / G x (2 N + 2 N + 4 N)) / V; LoRA: 4 a in the place of 4 N, one 2 N less |

FSDP2 gathers policy and reference once for a rollout, and the policy twice, with one reduce-scatter, in each pass of
the update. With LoRA the reference is the policy's weights, gathered or not. LoRA without FSDP2 reads 8 M bytes a
token in the place of 2 M: autocast keeps its bfloat16 copy of a weight that is trained, and makes one for every product
of a weight that is not (counted on a CPU).

Sources. Models: `config.json` of the repositories named. H100 SXM: 989 TFLOP/s in bfloat16 without sparsity, 80 GB, 3.35
TB/s, NVLink 900 GB/s in both directions together (NVIDIA, H100 data sheet). InfiniBand: eight ConnectX-7
of 400 Gb/s a node of eight GPUs (NVIDIA, DGX H100 user guide), which a ring over nodes uses together: 400 GB/s. 6 N a token:
Kaplan et al., arXiv 2001.08361, section 2.1. Volumes of collectives: nccl-tests, PERFORMANCE.md. AdamW's bytes: Rajbhandari
et al., arXiv 1910.02054, section 3.1.

Assumptions. 40% of the peak in passes, 60% of the memory's bandwidth in decoding, 80% of the links': usual values, none
measured here. Attention's own products are left out: 2 L n d (P + T) FLOP a token and forward pass, 2% of 2 N at 7B and
these lengths. Nothing that is moved is hidden behind computing; FSDP2 hides some of it. All responses have 1024 tokens.
"""

MEMORY_HEAD = [
    "| sharding | GPUs | weights | gradients | moments | reference | update | gathered | sampling | fits |",
    "| :--- |" + " ---: |" * 8 + " :--- |",
]
TIME_HEAD = [
    "| sharding | GPUs | prompts | decoding | reference | update | moving | a step |",
    "| :--- |" + " ---: |" * 7,
]

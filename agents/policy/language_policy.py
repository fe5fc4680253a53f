"""A causal language model, with a value head where one is needed, as an SB3 policy."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor, nn

from agents.distributed.communicator import collective, get_communicator
from agents.distributed.fsdp import full_params, full_state_dict, is_sharded, is_sharded_now
from agents.policy.gradient_checkpointing import checkpoint_layers
from agents.policy.identity import is_rebuilt, qualified_name
from agents.policy.loading import RECORD, PretrainedFiles, files_of, load, processor_of, record_of, tokenizer_of_object, write
from agents.policy.lora import Adapter, copy_sharing_frozen
from agents.policy.quantization import is_quantized
from agents.sampling.bf16_copy import DEVICES as BF16_COPY_DEVICES
from agents.sampling.bf16_copy import bf16_copy
from agents.sampling.generate import (
    StepState,
    StopRule,
    next_logits,
    response_limits,
    sample_responses,
    weights_version,
)
from agents.sampling.sampler import Sampler
from agents.validation import check_tokens, check_vocabulary, checked_masks, checked_starts, with_chat_templates_of
from agents.vec_env import ids_and_mask, rows_of
from llm_env.constraints import TokenConstraint
from llm_env.dialogue.chat import PromptFormat
from llm_env.end_tokens import as_token_ids, end_tokens_of_model
from llm_env.lm.capabilities import plain_outputs, trial, trial_rows, vocabulary_of
from llm_env.lm.compiling import compiled_layers
from llm_env.lm.positions import check_length, max_positions
from llm_env.lm.scoring import autocast, response_states, restrict, score
from llm_env.lm.sharing import PrefixSharing
from llm_env.observations import Observation, pick
from llm_env.rules import Rules
from llm_env.tokenization import vocabulary_size
from llm_env.warn import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FINGERPRINT_TOLERANCE = 1e-3  # nats; devices and versions differ by 1e-5


@dataclass
class Evaluation:
    """Log-probs, entropies and values of B responses of up to T tokens, by the training path; padded on the right.

    Attributes:
        logp: (B, T) float32, log pi of the action tokens at the training temperature, in nats.
        mask: (B, T) int64, 1 at action tokens (the end token is one), 0 at padding.
        entropy: (B, T) float32, of the distribution that each token was sampled from, in nats.
        values: (B, T + 1) float32, V of the state before each token and after the last; None without a value head.
    """

    logp: Tensor
    mask: Tensor
    entropy: Tensor
    values: Tensor | None


class LanguagePolicy(BasePolicy):
    """A causal language model of transformers as an SB3 policy, perhaps with a value head.

    Weights are stored and trained in float32. Dropout is off in sampling and in training. Parameters of a model object with
    `requires_grad=False` are not trained; all weights of a model from a path are. A quantized model (bitsandbytes, GPTQ, ...)
    needs an adapter and keeps its quantized weights; its other weights (norms, embeddings, head) are stored in float32.

    Args:
        model: a path, a hub id, a `PreTrainedModel`, or the contents of its config and tokenizer files by name (the weights are
            loaded later). Or a LoRA adapter to train on: its folder, hub id, files, or a `peft.PeftModel`.
        tokenizer: a path, a hub id or a tokenizer; by default the one in the model's folder. An agent gives its policy the
            env's tokenizer if there is none, and the env's chat templates, so that those of training are saved.
        value_head: add V(s), a linear map from the last hidden state, initially zero.
        separate_critic: compute V from the hidden states of a separate network, initially a copy of the model; with an adapter,
            a copy of the adapter on the same base.
        peft_config: a `peft.LoraConfig`, or the path or hub id of a saved adapter: the adapter is trained and the model's
            weights are frozen. A model object is changed in place. See `agents.policy.lora`.
        base: the base of an adapter that is not at the path it was loaded from: a path, a hub id or a `PreTrainedModel`. Or,
            for files of a full model, a model of its class to load the weights into.

    Attributes:
        lm: the language model, with the adapter if there is one.
        adapter: the adapter and its base, or None without an adapter.
        value_head: `nn.Linear(H, 1)`, or None.
        critic: the separate network that V is computed from, or None.
        tokenizer: the tokenizer, or None.
        original_tokenizer: `tokenizer`, or that of the folder from which a model object was loaded; None if that is unknown.
        processor: the files of a processor (of images, sound) that belongs to the model; `save_pretrained` writes them again.
        optimized: names of the parameters that its agent's optimizer steps.
        max_positions: tokens that the model can read, prompt and response together; None where it has no limit.
        vocab_size: V, the number of token ids that are actions. This and the next three are the env's after `set_rules`.
        constraint: the tokens that are allowed next; None for all.
        eos_ids: the tokens that end a response: the tokenizer's end token and those of the model's generation config.
        chat_template_kwargs: arguments of the chat template, saved with the agent.
        bf16: whether matrix products are computed in bfloat16: under autocast, or in sampling with a copy of the weights, see
            `samples_in_bf16`.
        gradient_checkpointing: whether layers are recomputed in the backward pass; see `agents.policy.gradient_checkpointing`.
        prefix_sharing: whether a prompt is computed once for several responses; see `llm_env.lm.sharing`.
        max_num_seqs: responses that are generated at a time; see `agents.sampling.generate.sample_responses`.
        compiles: whether the model's layers are compiled; see `llm_env.lm.compiling`.
        num_steps: optimizer steps since the policy was made; tells that weights have changed, which not all optimizers do.

    Raises:
        TypeError: If `model` is none of these, or not a causal language model.
        ValueError: If the model's vocabulary is smaller than the tokenizer's, it is quantized and has no adapter, its config
            asks for an auxiliary loss of routers, or it is not causal.
    """

    _has_warned_of_class = False

    def __init__(
        self,
        model: str | PreTrainedModel | PretrainedFiles,
        tokenizer: Any = None,
        value_head: bool = False,
        separate_critic: bool = False,
        peft_config: Any = None,
        base: Any = None,
    ) -> None:
        processor = processor_of(model, tokenizer)
        lm, tokenizer, adapter = load(model, tokenizer, peft_config, base)
        size = vocabulary_of(lm)
        limit = max_positions(lm)
        length = limit or 1024
        super().__init__(
            spaces.Dict(
                {
                    "input_ids": spaces.Box(0, size - 1, (length,), np.int64),
                    "attention_mask": spaces.Box(0, 1, (length,), np.int8),
                }
            ),
            spaces.Discrete(size),
        )
        check_auxiliary_loss(lm)
        self.lm = lm
        self.max_positions = limit
        self.adapter: Adapter | None = adapter
        self.tokenizer = tokenizer
        self.original_tokenizer = tokenizer_of_object(model) if tokenizer is None else tokenizer
        self.vocab_size = size
        self.constraint: TokenConstraint | None = None
        self.bf16 = False
        self.gradient_checkpointing = False
        self.prefix_sharing: PrefixSharing = "auto"
        self.max_num_seqs: int | None = None
        self.compiles = False
        self.num_steps = 0
        self.chat_template_kwargs: dict[str, Any] = dict(record_of(model).get("chat_template_kwargs", {}))
        if tokenizer is not None:
            self.vocab_size = vocabulary_size(tokenizer)
            check_vocabulary(lm, self.vocab_size)
        self.eos_ids = self.end_tokens(tokenizer)
        self.value_head: nn.Linear | None = None
        self.critic: PreTrainedModel | None = None
        self.processor = processor
        self.optimized: frozenset[str] = frozenset()
        if value_head:
            self.add_value_head(separate_critic)
        if adapter is None and isinstance(model, dict):
            self._train_only(record_of(model))
        self.train(False)

    def end_tokens(self, tokenizer: Any) -> frozenset[int]:
        """Return the end tokens of the model's generation config and of its tokenizer; an env may have others.

        Args:
            tokenizer: a tokenizer with the model's vocabulary, such as the env's.
        """
        ids = end_tokens_of_model(getattr(self.lm, "generation_config", None), self.lm.config, tokenizer)
        return frozenset([*ids, *as_token_ids(getattr(self.tokenizer, "eos_token_id", None))])

    def set_rules(self, rules: Rules) -> None:
        """Use the vocabulary, constraint, end tokens and chat template of an env; the last two are saved with the model."""
        self.vocab_size, self.constraint, self.eos_ids = rules.vocab_size, rules.constraint, rules.eos_ids
        self.tokenizer = with_chat_templates_of(self.tokenizer, rules.tokenizer)
        self.chat_template_kwargs = rules.prompts.format.chat_template_kwargs
        config = getattr(self.lm, "generation_config", None)
        if config is not None and set(as_token_ids(config.eos_token_id)) != self.eos_ids:
            ends = sorted(self.eos_ids)
            self.lm.generation_config = copy.deepcopy(config)
            self.lm.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]

    def configure(
        self,
        *,
        bf16: bool,
        gradient_checkpointing: bool,
        prefix_sharing: PrefixSharing,
        max_num_seqs: int | None,
        compile_layers: bool = False,
    ) -> None:
        """Set how the model is computed; see the attributes of the class.

        Raises:
            ValueError: If the model's config asks for an auxiliary loss of routers.
        """
        check_auxiliary_loss(self.lm)  # again: its flag in the config may have changed
        self.bf16, self.gradient_checkpointing = bf16, gradient_checkpointing
        self.prefix_sharing, self.max_num_seqs, self.compiles = prefix_sharing, max_num_seqs, compile_layers

    def prompt_format(self) -> PromptFormat:
        """Return the conversion of prompts to token ids, with the chat template and its arguments of training."""
        return PromptFormat(self.tokenizer, None, self.chat_template_kwargs)

    def add_value_head(self, separate_critic: bool = False) -> None:
        """Add a value head, initially zero, and a separate critic, unless they exist."""
        if separate_critic and self.critic is None:
            self.critic = copy_sharing_frozen(self.lm.base_model)
        if self.value_head is None:
            self.value_head = nn.Linear(self._state_width(), 1, device=self.lm.device)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def _state_width(self) -> int:
        """Return H of the hidden states that V is computed from, by a forward pass: configs may differ (OPT-350m)."""
        if self.critic is not None:
            with trial(self.critic):
                return response_states(self.critic, [[0]], [[0]]).shape[-1]
        with trial(self.lm):
            states = score(self.lm, [[0]], [[0]], self.vocab_size, states=True).states
        assert states is not None
        return states.shape[-1]

    def train(self, mode: bool = True) -> LanguagePolicy:
        """Set the training mode; the language model stays in evaluation mode, because dropout must be off."""
        super().train(mode)
        self.lm.eval()
        if self.critic is not None:
            self.critic.eval()
        return self

    # --- the training path -------------------------------------------------------------------------------------------

    def evaluate_actions(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        temperature: float = 1.0,
        turn_ids: Sequence[np.ndarray] | None = None,
    ) -> Evaluation:
        """Compute log-probs, entropies and values of the responses' tokens, in one forward pass.

        Args:
            prompts: B lists of token ids.
            responses: B lists of token ids, of turns and observations.
            temperature: divides the logits, as in sampling.
            turn_ids: B int arrays, the turn of each token and -1 at observations, for which no logits are computed. By default
                all tokens are one turn.

        Raises:
            ValueError: If a row has more tokens than the model has positions.
        """
        longest = max((len(p) + len(r) for p, r in zip(prompts, responses, strict=True)), default=0)
        check_length(self.max_positions, longest, 0)
        allowed = None
        if self.constraint is not None:
            turns = [np.zeros(len(response), int) for response in responses] if turn_ids is None else turn_ids
            allowed = [self.constraint.along_turns(*row) for row in zip(prompts, responses, turns, strict=True)]
        actions = None if turn_ids is None else [turns >= 0 for turns in turn_ids]
        return Evaluation(*self._evaluate(prompts, responses, allowed, temperature, actions))

    def _evaluate(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        allowed: Sequence[np.ndarray] | None,
        temperature: float,
        actions: Sequence[np.ndarray] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the fields of an `Evaluation`; here sharded weights are gathered, see `agents.distributed.fsdp`."""
        states = self.value_head is not None and self.critic is None
        models = [model for model in (self.lm, self.critic) if model is not None]
        checkpointed = models if self.gradient_checkpointing and torch.is_grad_enabled() else []
        compiled = models if self.compiles else []
        with autocast(self.device, self.bf16), compiled_layers(compiled), checkpoint_layers(checkpointed):
            scored = score(
                self.lm,
                prompts,
                responses,
                self.vocab_size,
                temperature,
                allowed,
                entropy=True,
                states=states,
                prefix_sharing=self.prefix_sharing,
                actions=actions,
            )
            hidden = scored.states
            if self.critic is not None:
                hidden = response_states(self.critic, prompts, responses, prefix_sharing=self.prefix_sharing)
        values = None
        if self.value_head is not None:
            assert hidden is not None
            head = self.value_head  # converted: FSDP gathers weights in bfloat16 under mixed precision
            values = nn.functional.linear(hidden.float(), head.weight.float(), head.bias.float())[..., 0]
        assert scored.entropy is not None
        return scored.logp, scored.mask, scored.entropy, values

    def log_probs(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[Tensor]:
        """Compute log pi of every response token by the training path.

        Args:
            prompts: B lists of token ids.
            responses: B lists of token ids.
            temperature: divides the logits.

        Returns:
            B float32 tensors of the responses' lengths, in nats.
        """
        with full_params(self):
            result = self.evaluate_actions(prompts, responses, temperature)
        return [row[keep] for row, keep in zip(result.logp, result.mask.bool(), strict=True)]

    # --- the sampling path -------------------------------------------------------------------------------------------

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int = 1,
        max_new_tokens: int | Sequence[int] = 64,
        temperature: float = 1.0,
        *,
        eos_id: int | Collection[int] | None = None,
        completes_stop: StopRule | None = None,
        **sampler: Any,
    ) -> tuple[list[list[int]], list[np.ndarray]]:
        """Sample `group_size` responses to each prompt.

        Args:
            prompts: N lists of token ids.
            group_size: G.
            max_new_tokens: tokens of the longest response, one limit or one a prompt.
            temperature: divides the logits.
            eos_id: the end token, or several; `eos_ids` by default.
            completes_stop: returns whether the last token of a response completes a stop string.
            sampler: `top_k`, `top_p`, `min_p`, `deterministic`, `generator`; see `agents.sampling.sampler.Sampler`.

        Returns:
            N * G responses, those to prompt i at i*G..i*G+G-1, each up to and including its end token, and the log-probs of
            their tokens in nats, one float32 array a response.
        """
        if not all(len(prompt) for prompt in prompts):
            raise ValueError("every prompt must have at least one token")
        limits = response_limits(max_new_tokens, len(prompts))
        with self.sampling(prompts, limits.tolist()) as lm:
            return sample_responses(
                lm,
                prompts,
                Sampler(temperature, **sampler),
                vocab_size=self.vocab_size,
                eos_id=self._known_eos_ids() if eos_id is None else eos_id,
                max_new_tokens=max_new_tokens,
                group_size=group_size,
                completes_stop=completes_stop,
                constraint=self.constraint,
                max_num_seqs=self.max_num_seqs,
                prefix_sharing=self.prefix_sharing,
                compile_layers=self.compiles,
            )

    @contextmanager
    def sampling(self, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int]) -> Iterator[PreTrainedModel]:
        """Turn gradients off, gather sharded weights and set mixed precision within the block; give the model to sample with.

        That is `lm`, or its copy in bfloat16 (see `samples_in_bf16`).

        Args:
            prompts: N lists of token ids.
            max_new_tokens: tokens of the longest response, one limit or one a prompt.

        Raises:
            ValueError: If a prompt and its longest response have more tokens than the model has positions.
        """
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
        for prompt, new in set(zip(map(len, prompts), limits, strict=True)):
            check_length(self.max_positions, prompt, new)
        with torch.no_grad(), full_params(self):
            if self.samples_in_bf16:
                yield bf16_copy(self.lm, (self.num_steps, weights_version(self.lm)))
            else:
                with autocast(self.device, self.bf16):
                    yield self.lm

    @property
    def samples_in_bf16(self) -> bool:
        """Whether responses are sampled with a copy of the weights in bfloat16: with `bf16` on a GPU.

        Not if the weights are sharded or quantized: sampling then uses autocast, as training does.
        """
        able = self.device.type in BF16_COPY_DEVICES and not is_sharded(self) and not is_quantized(self.lm)
        return self.bf16 and able

    def next_tokens(
        self,
        rows: list[list[int]],
        state: StepState | None,
        sampler: Sampler,
        episode_start: Sequence[bool] | None = None,
        action_masks: np.ndarray | None = None,
        uniforms: Tensor | None = None,
    ) -> tuple[np.ndarray, np.ndarray, StepState]:
        """Sample the next token of each row.

        Args:
            rows: B lists of token ids.
            state: the result of the last call; None for the first.
            sampler: samples a token.
            episode_start: B bools; see `agents.sampling.generate.next_logits`.
            action_masks: (B, V) bool, the allowed tokens, instead of the policy's constraint.
            uniforms: (B, 1 or 2), random numbers to sample by; see `Sampler.__call__`.

        Returns:
            The tokens (B,), their log-probs (B,) in nats, and the state for the next call.
        """
        if state is not None and is_sharded_now(self):
            state = replace(state, version=-1)  # gathered weights are new tensors: their version says nothing
        with full_params(self), autocast(self.device, self.bf16):
            logits, state = next_logits(self.lm, rows, state, episode_start)
        if action_masks is None and self.constraint is not None:
            lengths = [len(row) if row[-1] in self.eos_ids else n for row, n in zip(rows, state.context_lengths, strict=True)]
            states = [(row[:n], row[n:]) for row, n in zip(rows, lengths, strict=True)]
            action_masks = self.constraint.masks(states)
        tokens, logp = sampler(restrict(logits[:, : self.vocab_size], action_masks), uniforms)
        return tokens.cpu().numpy(), logp.cpu().numpy(), state

    def predict(  # type: ignore[override]
        self,
        observation: Observation,
        state: StepState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        *,
        action_masks: np.ndarray | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[np.ndarray, StepState | None]:
        """Return the next token for an observation or a batch of them, in SB3's form.

        Args:
            observation: `input_ids` and `attention_mask`, (L,) or (B, L); or a flat one, the ids with -1 for padding.
            state: the result of the last call, with the KV cache. A row that does not continue it starts anew, and a state of
                other weights is ignored.
            episode_start: (B,) bool, marks new episodes; needed only if a prompt continues the tokens of the last episode.
            deterministic: take the likeliest token instead of sampling.
            action_masks: (V,) or (B, V) bool, the allowed tokens, as in sb3-contrib. By default those that the env allows; the
                state tells where the turn under way began (without a state, it begins now).
            temperature: divides the logits.
            generator: source of randomness; torch's global generator by default.

        Returns:
            The tokens, () or (B,) int64, and the next state.

        Raises:
            TypeError, ValueError: If an argument is unusable: an id beyond the vocabulary, a mask that allows nothing, ...
        """
        if state is not None and not isinstance(state, StepState):
            raise TypeError(
                f"state is a {type(state).__name__}; give the state that the last call of predict returned, or None"
            )
        single = ids_and_mask(observation)[0].ndim == 1
        batch = pick(observation, None) if single else observation
        sampler = Sampler(temperature, deterministic=deterministic, generator=generator)
        rows = rows_of(batch)
        check_tokens(rows, 0, self.vocab_size, self.max_positions)
        masks = None if action_masks is None else checked_masks(action_masks, (len(rows), self.vocab_size))
        starts = None if episode_start is None else checked_starts(episode_start, len(rows))
        tokens, _, state = self.next_tokens(rows, state, sampler, starts, masks)
        return (tokens[0] if single else tokens), state

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        tensors = observation if isinstance(observation, dict) else {"": observation}
        arrays: Any = {key: tensor.cpu().numpy() for key, tensor in tensors.items()}
        tokens, _ = self.predict(arrays.get("", arrays), deterministic=deterministic)
        return torch.as_tensor(tokens, device=self.device)

    def _known_eos_ids(self) -> frozenset[int]:
        if not self.eos_ids:
            raise ValueError("no end token is known. Give eos_id=, or a tokenizer with policy_kwargs={'tokenizer': ...}")
        return self.eos_ids

    # --- weights -----------------------------------------------------------------------------------------------------

    @collective
    def save_pretrained(self, path: str | Path, merge: bool = False) -> None:
        """Write the language model and its tokenizer in transformers' format, without the value head.

        Also written are the generation config, the chat templates of training, the files of a processor, and the code of a
        model that was loaded with `trust_remote_code=True`. Of a model with an adapter, the adapter is written, in peft's
        format, for `peft.PeftModel.from_pretrained(base, path)`. All processes must call it; the main one writes.

        Args:
            path: a folder.
            merge: write a model with the adapter merged into the base. The policy is unchanged; a second model is in memory
                meanwhile.

        Raises:
            ValueError: If there is no adapter to merge, or it cannot be merged, for instance into a quantized base.
        """
        if merge and self.adapter is None:
            raise ValueError("merge=True, but the policy has no adapter: save_pretrained(path) writes the whole model")
        if merge and self.adapter is not None:
            self.adapter.check_mergeable()
        if merge and is_sharded(self):
            raise ValueError("merge=True, but the weights are sharded: save the agent, and merge it in a single process")
        if is_sharded(self):
            get_communicator().all_gather_object(None, "weights")
        weights = (
            None if merge else full_state_dict(self.lm.state_dict() if self.adapter is None else self.adapter.state_dict())
        )
        if not get_communicator().is_main_process:
            return
        if self.adapter is None:
            self.lm.save_pretrained(path, state_dict=weights)
        elif weights is None:
            merged = self.adapter.merged()
            merged.generation_config = getattr(self.lm, "generation_config", None)
            merged.save_pretrained(path)
        else:
            self.adapter.save(path, weights)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(path)
        if self.adapter is None or merge:
            write({name: content for name, content in self.processor.items() if not (Path(path) / name).exists()}, path)

    @property
    def base(self) -> PreTrainedModel:
        """The language model without its adapter."""
        return self.lm if self.adapter is None else self.adapter.base

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the language model's weights by name, one at a time, with an adapter merged into them."""
        yield from self.lm.state_dict().items() if self.adapter is None else self.adapter.merged_weights()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return all weights, or the trained ones of a policy with an adapter."""
        state = super().state_dict(*args, **kwargs)
        if self.adapter is None:
            return state
        trained = {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}
        return {name: value for name, value in state.items() if name in trained}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load weights that `state_dict` returned.

        Raises:
            ValueError: If they are weights of another model, or of an adapter of another kind.
        """
        if self.adapter is None:
            try:
                return super().load_state_dict(state_dict, strict, assign)
            except RuntimeError as error:
                raise ValueError(
                    f"the weights do not fit the policy, a {type(self.lm).__name__} ({str(error).splitlines()[-1].strip()}); "
                    "load the file with the algorithm that saved it, and give a model of the same class and config: load(path, "
                    "policy=<model>)"
                ) from error
        if strict and (differing := sorted(self.state_dict().keys() ^ state_dict.keys())):
            raise ValueError(
                f"{len(differing)} weights are trained either in the policy or in the file, such as {differing[0]}. Load the "
                "file into a policy with the same kind of adapter"
            )
        return super().load_state_dict(state_dict, False, assign)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        """Return the arguments that rebuild the policy without its weights: files, and which parameters are trained.

        Warns if `load` will need a model, because transformers does not rebuild its class from the config.
        """
        critic = {"value_head": self.value_head is not None, "separate_critic": self.critic is not None}
        files = files_of(self.lm, self.tokenizer, self.base, self.processor)
        record = record_of(files)
        if self.chat_template_kwargs:
            record["chat_template_kwargs"] = self.chat_template_kwargs
        if (fingerprint := self._fingerprint()) is not None:
            record["fingerprint"] = fingerprint
        files[RECORD] = json.dumps(record, default=str).encode()
        if not self._has_warned_of_class and not is_rebuilt(self.base):
            self._has_warned_of_class = True
            warn(
                f"transformers does not rebuild this {qualified_name(self.base)} from its config. Keep the code that makes it, "
                "and give the model to load: load(path, policy=<model>)"
            )
        if self.adapter is not None:
            return {"model": files | self.adapter.files(), **critic}
        record = json.loads(files[RECORD]) | self._trained()
        return {"model": {**files, RECORD: json.dumps(record).encode()}, **critic}

    @torch.no_grad()
    def _fingerprint(self) -> list[float] | None:
        """Return the log-probs of a few tokens; None for quantized, sharded or non-finite weights."""
        if is_quantized(self.base) or is_sharded(self):
            return None
        row = trial_rows(self.lm)[0]
        with trial(self.lm):
            logp = plain_outputs(self.lm, [row])[0].float().log_softmax(-1)
        selected = logp[torch.arange(len(row) - 1), torch.tensor(row[1:], device=logp.device)]
        return selected.tolist() if bool(selected.isfinite().all()) else None

    def check_fingerprint(self, saved: dict[str, Any]) -> None:
        """Warn if the model computes other log-probs than the saved one with the same weights.

        Args:
            saved: `_get_constructor_parameters` of the saved policy.
        """
        before, now = record_of(saved.get("model")).get("fingerprint"), self._fingerprint()
        if before is None or now is None:
            return
        gap = max(abs(a - b) for a, b in zip(before, now, strict=True)) if len(before) == len(now) else float("inf")
        if not gap <= FINGERPRINT_TOLERANCE:
            warn(
                f"the loaded {qualified_name(self.base)} computes other log-probs than the saved one, by up to {gap:.2g} nats, "
                "with the same weights: a part of that model is not in the file (a hook, an attribute, a config that was "
                "changed later). Make the same model and give it: load(path, policy=<model>)"
            )

    def _trained(self) -> dict[str, list[str]]:
        """Return the names of frozen parameters, and of the critic's parameters that are shared with the model."""
        of_model = {id(parameter) for parameter in self.lm.parameters()}
        critic = {} if self.critic is None else dict(self.critic.named_parameters(remove_duplicate=False))
        return {
            "frozen": [name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad],
            "shared": [name for name, p in critic.items() if id(p) in of_model],
        }

    def _train_only(self, record: dict[str, Any]) -> None:
        """Freeze and share the parameters that `_trained` named; files of version 0.1 name none."""
        if self.critic is not None and (shared := record.get("shared")):
            of_model = dict(self.lm.base_model.named_parameters(remove_duplicate=False))
            for name in shared:
                path, _, leaf = name.rpartition(".")
                self.critic.get_submodule(path)._parameters[leaf] = of_model[name]
        frozen = set(record.get("frozen", ()))
        for name, parameter in self.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name not in frozen)


def check_auxiliary_loss(lm: PreTrainedModel) -> None:
    """Raise if a config asks for an auxiliary loss on the routers of a mixture of experts, which no algorithm adds.

    Raises:
        ValueError: If `output_router_logits` is on and the loss has a weight.
    """
    for name, config in (("config", lm.config), ("config.text_config", getattr(lm.config, "text_config", None))):
        named = (getattr(part, key, None) for part in (lm, config) for key in ("router_aux_loss_coef", "aux_loss_coef"))
        coefficient = next((value for value in named if value is not None), 0.0)  # JetMoE has the shorter name
        if getattr(config, "output_router_logits", False) and coefficient:
            raise ValueError(
                f"{name}.output_router_logits=True asks for an auxiliary loss of the routers, weight {coefficient}, which is "
                f"not part of the training losses. Set {name}.output_router_logits=False to train without it"
            )

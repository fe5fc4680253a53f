"""A causal language model, with a value head where one is needed, as an SB3 policy."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor, nn
from transformers import PreTrainedModel

from agents.distributed.communicator import collective, get_communicator
from agents.distributed.fsdp import full_params, full_state_dict, is_sharded, is_sharded_now
from agents.policy.gradient_checkpointing import checkpoint_layers
from agents.policy.identity import is_rebuilt, qualified_name
from agents.policy.loading import RECORD, PretrainedFiles, files_of, load, processor_of, record_of, tokenizer_of_object, write
from agents.policy.lora import Adapter, copy_sharing_frozen
from agents.policy.quantization import is_quantized
from agents.sampling.generate import StepState, StopRule, next_logits, response_limits, sample_responses
from agents.sampling.sampler import Sampler
from agents.validation import check_tokens, check_vocabulary, checked_masks, checked_starts, with_chat_templates_of
from agents.vec_env import ids_and_mask, rows_of
from llm_env.constraints import TokenConstraint
from llm_env.dialogue.chat import PromptFormat
from llm_env.end_tokens import as_token_ids, end_tokens_of_model
from llm_env.lm.capabilities import plain_outputs, trial, trial_rows, vocabulary_of
from llm_env.lm.positions import check_length, max_positions
from llm_env.lm.scoring import autocast, response_states, restrict, score
from llm_env.lm.sharing import PrefixSharing
from llm_env.observations import Observation, pick
from llm_env.rules import Rules
from llm_env.tokenization import vocabulary_size

SAME = 1e-3  # nats; devices and versions differ by 1e-5


@dataclass
class Evaluation:
    """What the training path says of B responses of up to T tokens; padded on the right.

    Attributes:
        logp: (B, T) float32, log pi of the action tokens at the training temperature, in nats.
        mask: (B, T) int64, 1 at action tokens (the end token is one), 0 at padding.
        entropy: (B, T) float32, of the distribution each token was drawn from, in nats.
        values: (B, T + 1) float32, V of the state before each token and after the last; None without a value head.
    """

    logp: Tensor
    mask: Tensor
    entropy: Tensor
    values: Tensor | None


class LanguagePolicy(BasePolicy):
    """pi(token | tokens so far), by any causal language model that transformers loads.

    Weights are held and trained in float32. Dropout is off, while sampling and in training alike. Of a model object, parameters
    with `requires_grad=False` stay as they are; a model from a path is trained whole. A quantized model (bitsandbytes, GPTQ,
    ...) needs an adapter, and keeps its quantized weights; its other weights (norms, embeddings, head) are held in float32.

    Args:
        model: a path, a hub id, a `PreTrainedModel`, or the config and tokenizer files of one, by name (weights to be loaded).
            Or a LoRA adapter, to be trained on: its folder or hub id, its files, or a `peft.PeftModel`.
        tokenizer: a path, a hub id or a tokenizer; by default the one beside the model's weights. A model object has none. An
            agent gives its policy the env's where it has none, and the chat templates of the env's where that has some: what
            training used is what is saved.
        value_head: add V(s), a linear map from the last hidden state, zero at the beginning.
        separate_critic: read V from the hidden states of a network of its own, begun as a copy of the model's; with an adapter
            a copy of that, on the same base.
        peft_config: a `peft.LoraConfig`, or the path or hub id of a saved adapter: the model's weights stay as they are, and an
            adapter is trained. A model object gets it in its place. See `agents.policy.lora`.
        base: of a `model` that is an adapter, its base if it is not where it was: a path, a hub id or a `PreTrainedModel`. Of a
            whole model's files, a model of its class to take over the weights.

    Attributes:
        lm: the language model, with the adapter if there is one.
        adapter: what tells the adapter and its base apart, or None where all weights are trained.
        value_head: `nn.Linear(H, 1)`, or None.
        critic: the network that V is read from, or None where it is the language model.
        tokenizer: the tokenizer, or None.
        original_tokenizer: `tokenizer`, or that of the folder from which a model object was loaded; None if that is unknown.
        processor: the files of a processor (of images, sound) that belongs to the model; `save_pretrained` writes them again.
        optimized: names of the parameters that its agent's optimizer steps.
        max_positions: tokens that the model can read, prompt and response together; None where it has no limit.
        vocab_size: V, how many token ids are actions; the env's once there is one.
        constraint: which of them may come next; the env's once there is one, None for all.
        eos_ids: the tokens that end a response: the tokenizer's end token and those of the model's generation config; the env's
            once there is one.
        chat_template_kwargs: arguments of the chat template; the env's once there is one, saved with the agent.
        bf16: whether matrix products, here and in training, are computed in bfloat16, under autocast.
        gradient_checkpointing: whether layers are computed again in the backward pass; see
            `agents.policy.gradient_checkpointing`.
        prefix_sharing: whether a prompt is computed once for several responses; see `llm_env.lm.sharing.way_to_share`.
        max_num_seqs: responses that are drawn at a time; see `agents.sampling.generate.sample_responses`.
        num_steps: optimizer steps since the policy was made: not all optimizers tell torch that weights have moved.

    Raises:
        TypeError: If `model` is none of these, or not a causal language model.
        ValueError: If the model's vocabulary is smaller than the tokenizer's, it is quantized and has no adapter, its config
            asks for an auxiliary loss of routers, or it is not causal.
    """

    _told_of_class = False

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
        """Return the model's end tokens, whatever an env says: its generation config's, and its own tokenizer's if it has one.

        Args:
            tokenizer: one that has its vocabulary, such as the env's.
        """
        ids = end_tokens_of_model(getattr(self.lm, "generation_config", None), self.lm.config, tokenizer)
        return frozenset([*ids, *as_token_ids(getattr(self.tokenizer, "eos_token_id", None))])

    def take_over(self, rules: Rules) -> None:
        """Use an env's actions, ends and chat template from here on; the last two are saved with the model."""
        self.vocab_size, self.constraint, self.eos_ids = rules.vocab_size, rules.constraint, rules.eos_ids
        self.tokenizer = with_chat_templates_of(self.tokenizer, rules.tokenizer)
        self.chat_template_kwargs = rules.prompts.format.chat_template_kwargs
        config = getattr(self.lm, "generation_config", None)
        if config is not None and set(as_token_ids(config.eos_token_id)) != self.eos_ids:
            ends = sorted(self.eos_ids)
            self.lm.generation_config = copy.deepcopy(config)
            self.lm.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]

    def configure(
        self, *, bf16: bool, gradient_checkpointing: bool, prefix_sharing: PrefixSharing, max_num_seqs: int | None
    ) -> None:
        """Set how the model is computed; see the attributes.

        Raises:
            ValueError: If the model's config asks for an auxiliary loss of routers.
        """
        check_auxiliary_loss(self.lm)  # a flag of the config, which may have been set since
        self.bf16, self.gradient_checkpointing = bf16, gradient_checkpointing
        self.prefix_sharing, self.max_num_seqs = prefix_sharing, max_num_seqs

    def prompt_format(self) -> PromptFormat:
        """Return how prompts become text and token ids: with the chat template, and its arguments, of training."""
        return PromptFormat(self.tokenizer, None, self.chat_template_kwargs)

    def add_value_head(self, separate_critic: bool = False) -> None:
        """Add V(s), zero at the beginning, unless it is there; and a network of its own for it, unless it is there."""
        if separate_critic and self.critic is None:
            self.critic = copy_sharing_frozen(self.lm.base_model)
        if self.value_head is None:
            self.value_head = nn.Linear(self._state_width(), 1, device=self.lm.device)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def _state_width(self) -> int:
        """H of the hidden states that V is read from, by one forward pass: configs name other widths (OPT-350m)."""
        if self.critic is not None:
            with trial(self.critic):
                return response_states(self.critic, [[0]], [[0]]).shape[-1]
        with trial(self.lm):
            states = score(self.lm, [[0]], [[0]], self.vocab_size, states=True).states
        assert states is not None
        return states.shape[-1]

    def train(self, mode: bool = True) -> LanguagePolicy:
        """Set the training mode; the language model stays in evaluation mode, for dropout must be off (see the class)."""
        super().train(mode)
        self.lm.eval()
        if self.critic is not None:
            self.critic.eval()
        return self

    # --- the training path -------------------------------------------------------------------------------------------

    def evaluate_actions(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> Evaluation:
        """Compute log-probs, entropies and values of the responses' tokens, in one forward pass.

        Args:
            prompts: B lists of token ids.
            responses: B lists of token ids.
            temperature: divides the logits, as in sampling.

        Raises:
            ValueError: If a row has more tokens than the model has positions.
        """
        longest = max((len(p) + len(r) for p, r in zip(prompts, responses, strict=True)), default=0)
        check_length(self.max_positions, longest, 0)
        allowed = None
        if self.constraint is not None:
            allowed = [self.constraint.along(*row) for row in zip(prompts, responses, strict=True)]
        return Evaluation(*self._evaluate(prompts, responses, allowed, temperature))

    def _evaluate(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        allowed: Sequence[np.ndarray] | None,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the fields of an `Evaluation`; here sharded weights are gathered, see `agents.distributed.fsdp`."""
        states = self.value_head is not None and self.critic is None
        models = [model for model in (self.lm, self.critic) if model is not None]
        again = models if self.gradient_checkpointing and torch.is_grad_enabled() else []
        with autocast(self.device, self.bf16), checkpoint_layers(again):
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
            )
            hidden = scored.states
            if self.critic is not None:
                hidden = response_states(self.critic, prompts, responses, prefix_sharing=self.prefix_sharing)
        values = None
        if self.value_head is not None:
            assert hidden is not None
            head = self.value_head  # in float32 also where mixed precision has sharded weights come together in bfloat16
            values = nn.functional.linear(hidden.float(), head.weight.float(), head.bias.float())[..., 0]
        assert scored.entropy is not None
        return scored.logp, scored.mask, scored.entropy, values

    def log_probs(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[Tensor]:
        """Log pi of every response token, by the training path: one float32 tensor of the response's length a row."""
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
            max_new_tokens: the longest response, in tokens, or that to each of the prompts.
            temperature: divides the logits.
            eos_id: the end token, or several; `eos_ids` by default.
            completes_stop: whether the last token of a response completes a stop string.
            sampler: `top_k`, `top_p`, `min_p`, `deterministic`, `generator`; see `agents.sampling.sampler.Sampler`.

        Returns:
            N * G responses, those to prompt i at i*G..i*G+G-1, each up to and including its end token, and the log-probs of
            their tokens in nats, one float32 array a response.
        """
        if not all(len(prompt) for prompt in prompts):
            raise ValueError("every prompt must hold at least one token")
        limits = response_limits(max_new_tokens, len(prompts))
        with self.sampling(prompts, limits.tolist()):
            return sample_responses(
                self.lm,
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
            )

    @contextmanager
    def sampling(self, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int]) -> Iterator[None]:
        """Get ready to sample: no gradients, whole weights, and mixed precision as in training.

        Args:
            prompts: N lists of token ids.
            max_new_tokens: the longest response, in tokens, or that to each of the prompts.

        Raises:
            ValueError: If a prompt and its longest response have more tokens than the model has positions.
        """
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
        for prompt, new in set(zip(map(len, prompts), limits, strict=True)):
            check_length(self.max_positions, prompt, new)
        with torch.no_grad(), full_params(self), autocast(self.device, self.bf16):
            yield

    def next_tokens(
        self,
        rows: list[list[int]],
        state: StepState | None,
        sampler: Sampler,
        episode_start: Sequence[bool] | None = None,
        action_masks: np.ndarray | None = None,
        uniforms: Tensor | None = None,
    ) -> tuple[np.ndarray, np.ndarray, StepState]:
        """One more token for each of B rows: the tokens (B,), their log-probs (B,) in nats, and the state to go on with.

        `action_masks`, (B, V) bool, takes the place of the policy's constraint; `uniforms` as in `Sampler.__call__`.
        """
        if state is not None and is_sharded_now(self):
            state = replace(state, version=-1)  # whole weights are made anew, and do not say whether they are others
        with full_params(self), autocast(self.device, self.bf16):
            logits, state = next_logits(self.lm, rows, state, episode_start)
        if action_masks is None and self.constraint is not None:
            states = [(row[:n], row[n:]) for row, n in zip(rows, state.prompt_lengths, strict=True)]
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
        """The next token for an observation (or a batch of them), in SB3's form.

        Args:
            observation: `input_ids` and `attention_mask`, (L,) or (B, L); or a flat one, the ids with -1 for padding.
            state: what the last call returned; it holds the keys and values computed so far. Rows that do not go on from it
                are noticed by their tokens, and a state made by other weights is not used.
            episode_start: (B,) bool; tells a new episode whose prompt happens to go on from the last one's tokens.
            deterministic: take the likeliest token instead of drawing one.
            action_masks: (V,) or (B, V) bool, what may be drawn, as sb3-contrib gives it. By default what the env allows,
                where the state (or a first observation without one) tells prompt and response apart.
            temperature: divides the logits when drawing.
            generator: source of the randomness; torch's global one by default.

        Returns:
            The tokens, () or (B,) int64, and the next state.

        Raises:
            TypeError, ValueError: an argument is unusable: an id beyond the vocabulary, a mask that allows nothing, ...
        """
        if state is not None and not isinstance(state, StepState):
            raise TypeError(f"state is a {type(state).__name__}; give back what the last call of predict returned, or None")
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
            raise ValueError("no end token is known: pass eos_id=, or a tokenizer with policy_kwargs={'tokenizer': ...}")
        return self.eos_ids

    # --- weights -----------------------------------------------------------------------------------------------------

    @collective
    def save_pretrained(self, path: str | Path, merge: bool = False) -> None:
        """Write the language model and its tokenizer so that plain transformers loads them; the value head stays behind.

        With them go the generation config, the chat templates that training used, the files of a processor, and the code of a
        model that was loaded with `trust_remote_code=True`.

        Of a model with an adapter that is the adapter, in peft's format, for `peft.PeftModel.from_pretrained(base, path)`.

        Args:
            path: a folder.
            merge: write a model without an adapter that computes the same. The policy stays as it is; meanwhile there is room
                needed for another model.

        Raises:
            ValueError: If there is no adapter to merge, or it cannot be merged, as into a quantized base.

        Of several processes, all of which call it, the main one writes.
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
        """The language model without the adapter; without one itself."""
        return self.lm if self.adapter is None else self.adapter.base

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The language model's weights by name, one at a time; with an adapter, those that it would have with it merged in."""
        yield from self.lm.state_dict().items() if self.adapter is None else self.adapter.merged_weights()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Of a policy with an adapter the weights that are trained; the base's are where they came from."""
        state = super().state_dict(*args, **kwargs)
        if self.adapter is None:
            return state
        trained = {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}
        return {name: value for name, value in state.items() if name in trained}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Take over weights as `state_dict` gives them.

        Raises:
            ValueError: If the weights are those of another model, or an adapter trains others.
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
                f"{len(differing)} weights are trained here and not there, or there and not here, such as {differing[0]}; load "
                "them into a policy with the same kind of adapter"
            )
        return super().load_state_dict(state_dict, False, assign)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        """What makes the policy again, weights aside: its files, and in them what is trained.

        Warns where `load` will need a model, because its class does not come back from its config.
        """
        critic = {"value_head": self.value_head is not None, "separate_critic": self.critic is not None}
        files = files_of(self.lm, self.tokenizer, self.base, self.processor)
        record = record_of(files)
        if self.chat_template_kwargs:
            record["chat_template_kwargs"] = self.chat_template_kwargs
        if (said := self._fingerprint()) is not None:
            record["fingerprint"] = said
        files[RECORD] = json.dumps(record, default=str).encode()
        if not self._told_of_class and not is_rebuilt(self.base):
            self._told_of_class = True
            warnings.warn(
                f"transformers does not rebuild this {qualified_name(self.base)} from its config: keep the code that makes it, "
                "and give one when the file is loaded: load(path, policy=<model>)",
                stacklevel=3,
            )
        if self.adapter is not None:
            return {"model": files | self.adapter.files(), **critic}
        record = json.loads(files[RECORD]) | self._trained()
        return {"model": {**files, RECORD: json.dumps(record).encode()}, **critic}

    @torch.no_grad()
    def _fingerprint(self) -> list[float] | None:
        """Log-probs of a few tokens; None where they say nothing: of quantized, sharded or broken weights."""
        if is_quantized(self.base) or is_sharded(self):
            return None
        row = trial_rows(self.lm)[0]
        with trial(self.lm):
            logp = plain_outputs(self.lm, [row])[0].float().log_softmax(-1)
        said = logp[torch.arange(len(row) - 1), torch.tensor(row[1:], device=logp.device)]
        return said.tolist() if bool(said.isfinite().all()) else None

    def check_fingerprint(self, saved: dict[str, Any]) -> None:
        """Warn if the model computes other log-probs than the one that was saved, whose weights it has.

        Args:
            saved: what `_get_constructor_parameters` gave for the file.
        """
        before, now = record_of(saved.get("model")).get("fingerprint"), self._fingerprint()
        if before is None or now is None:
            return
        gap = max(abs(a - b) for a, b in zip(before, now, strict=True)) if len(before) == len(now) else float("inf")
        if not gap <= SAME:
            warnings.warn(
                f"the loaded {qualified_name(self.base)} computes other log-probs than the saved one, by up to {gap:.2g} nats, "
                "with the same weights: something of that model is in no file (a hook, an attribute, a config that was changed "
                "later); make the model as it was and give it: load(path, policy=<model>)",
                stacklevel=3,
            )

    def _trained(self) -> dict[str, list[str]]:
        """The names of the parameters that are frozen, and of those of the critic that it has in common with the model."""
        own = {id(parameter) for parameter in self.lm.parameters()}
        critic = {} if self.critic is None else dict(self.critic.named_parameters(remove_duplicate=False))
        return {
            "frozen": [name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad],
            "shared": [name for name, p in critic.items() if id(p) in own],
        }

    def _train_only(self, record: dict[str, Any]) -> None:
        """Freeze, and have in common, what `_trained` named; nothing for files of version 0.1, of which all is trained."""
        if self.critic is not None and (shared := record.get("shared")):
            of_model = dict(self.lm.base_model.named_parameters(remove_duplicate=False))
            for name in shared:
                path, _, leaf = name.rpartition(".")
                self.critic.get_submodule(path)._parameters[leaf] = of_model[name]
        frozen = set(record.get("frozen", ()))
        for name, parameter in self.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name not in frozen)


def check_auxiliary_loss(lm: PreTrainedModel) -> None:
    """Refuse a config that asks for a loss on the routers of a mixture of experts: no algorithm here adds it.

    Raises:
        ValueError: If `output_router_logits` is on and the loss has a weight.
    """
    for name, config in (("config", lm.config), ("config.text_config", getattr(lm.config, "text_config", None))):
        named = (getattr(part, key, None) for part in (lm, config) for key in ("router_aux_loss_coef", "aux_loss_coef"))
        coefficient = next((value for value in named if value is not None), 0.0)  # JetMoE has the shorter name
        if getattr(config, "output_router_logits", False) and coefficient:
            raise ValueError(
                f"{name}.output_router_logits=True asks for an auxiliary loss of the routers, weight {coefficient}, which is "
                f"not a part of the training losses; set {name}.output_router_logits=False to train without it"
            )

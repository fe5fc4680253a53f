"""Learned reward models: use a transformers sequence classifier as a reward function."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llm_env.dialogue.chat import Messages, Prompt, encode_prompts
from llm_env.lm.inputs import evaluation_mode, pad
from llm_env.lm.positions import max_positions
from llm_env.rewards.answers import completion_text
from llm_env.tokenization import vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Template = str | Callable[[Any, Any], str]
UNLIMITED = 10**9  # tokenizers without a length limit report a larger model_max_length


class RewardModel:
    """Reward function that scores texts with a sequence classifier, in TRL's convention.

    The text of row i is the template filled with its prompt and completion. For a chat, it is the chat rendered with the
    reward model's chat template. The reward is `(logit - mean) / std`.

    Texts are tokenized with the tokenizer's special tokens, sorted by length and padded on the right. Special tokens that a
    chat template has already written are not added again.

    The score of a text does not depend on the other texts in the batch. Padding is masked in the attention, does not shift
    positions, and does not change the token that the head reads. Decoder classifiers read the last token that is not
    `config.pad_token_id`, so batches are padded with that token. If the config has no pad token, or one outside the model's
    vocabulary, each batch is padded with a token that no text in the batch ends with.

    The model runs in evaluation mode without gradients. Its previous mode is restored afterwards. Several threads may score
    at once only if the model is already in evaluation mode; a model loaded from a path is. Non-finite scores are returned
    unchanged; an env raises an error on them.

    Args:
        model: a path, a hub id, or a sequence classification model. A model object is not copied, so it may be trained between
            calls. It is copied only if `device` or `dtype` differs from the model's.
        tokenizer: a path, a hub id or a tokenizer. Default: the tokenizer at the model's path. Required for a model object.
        template: how a text prompt and its completion become one text. A str with `{completion}` and, usually, `{prompt}`;
            default `"{prompt}{completion}"`. Or `"chat"`: a user and an assistant message, rendered with the tokenizer's
            chat template. Or a callable `(prompt, completion) -> str`, which receives chats as lists of messages. Braces in
            prompts and completions are not interpreted.
        name: the reward component's name in infos and logs.
        batch_size: texts per forward pass. Lower it to use less memory.
        device: device to run the model on. Default: the model's device (CPU for a path).
        dtype: a torch dtype or its name, for the weights. Default: the checkpoint's dtype.
        max_tokens: maximum length of a text in tokens, including special tokens. Default: the smaller of the model's number of
            positions and the tokenizer's limit, or no limit if neither has one.
        truncation: "left" or "right", the side on which texts longer than `max_tokens` are truncated. None raises an error.
        index: index of the logit to use as reward. Required if the head has several labels.
        mean: subtracted from the logit; see `calibrate`.
        std: divisor of the logit after `mean` is subtracted; see `calibrate`.

    Attributes:
        model: the classifier.
        tokenizer: the classifier's tokenizer.
        mean: subtracted from the logit.
        std: divisor of the logit after `mean` is subtracted.

    Raises:
        TypeError: If the model is not a sequence classifier.
        ValueError: If the checkpoint lacks weights of the classification head, the head has several labels and `index` is
            None, the tokenizer's vocabulary is larger than the model's, or an argument is invalid.

    Limitations: XLNet's head reads the last position even if it is padding; use `batch_size=1` with such a model.

    Examples:
        >>> import llm_env, torch
        >>> from transformers import AutoConfig, AutoModelForSequenceClassification
        >>> _ = torch.manual_seed(0)
        >>> config = AutoConfig.from_pretrained(llm_env.PUPIL, num_labels=1)
        >>> untrained = AutoModelForSequenceClassification.from_config(config)
        >>> score = RewardModel(untrained, llm_env.PUPIL).calibrate(["2+3=", "8+9="], ["5", "17"])
        >>> [round(value, 3) for value in sorted(score(prompts=["2+3=", "8+9="], completions=["5", "17"]))]
        [-1.0, 1.0]
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: Any = None,
        *,
        template: Template | None = None,
        name: str = "reward_model",
        batch_size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        max_tokens: int | None = None,
        truncation: str | None = None,
        index: int | None = None,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        if truncation not in (None, "left", "right"):
            raise ValueError(f"truncation={truncation!r} must be 'left' or 'right', the side that is cut off, or None")
        for key, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
            if value is not None and (not isinstance(value, (int, np.integer)) or value < 1):
                raise ValueError(f"{key}={value!r} must be a whole number of at least 1")
        self.__name__ = name
        self.model = _load_classifier(model, device, dtype)
        self.tokenizer = _load_tokenizer(model, tokenizer, truncation)
        self._index = _reward_label(self.model, index)
        self._render = _Renderer(template, self.tokenizer)
        self._batch_size = batch_size
        self._truncation = truncation
        self._max_tokens = max_tokens or _length_limit(self.model, self.tokenizer)
        self._vocab_size = self.model.get_input_embeddings().num_embeddings
        if vocabulary_size(self.tokenizer) > self._vocab_size:
            raise ValueError(
                f"the reward model's vocabulary has {self._vocab_size} tokens, the tokenizer's "
                f"{vocabulary_size(self.tokenizer)}; use the tokenizer that belongs to the model"
            )
        self._normalize_by(mean, std)
        self._try_out()

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Return one reward per completion.

        Args:
            prompts: B texts or chats.
            completions: B texts; for chats, B lists of one message.
            columns: dataset columns; ignored.

        Raises:
            ValueError: If a chat cannot be rendered, a text has no tokens, or a text has more than `max_tokens` tokens and
                `truncation` is None. The message names the row.
        """
        return [(logit - self.mean) / self.std for logit in self._score(prompts, completions)]

    def logits(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Tensor:
        """Return the unnormalized logits (B,), with gradients, to train the model.

        Texts are rendered, tokenized and padded as when they are scored. All rows go through one forward pass, in the model's
        current mode (training or evaluation).
        """
        return self._forward(self._encode(prompts, completions)).logits[:, self._index]

    def calibrate(self, prompts: Sequence[Any], completions: Sequence[Any]) -> RewardModel:
        """Set `mean` and `std` so that these completions' rewards have mean 0 and std 1.

        Ziegler et al. 2019 (arXiv 1909.08593, section 2) normalize in this way, over completions sampled from the policy
        before training. The standard deviation is the population's (divisor n).

        Returns:
            The reward model itself.

        Raises:
            ValueError: If there are fewer than two completions, a logit is not finite, or all logits are equal.
        """
        logits = np.array(self._score(prompts, completions))
        if len(logits) < 2 or not np.isfinite(logits).all():
            raise ValueError(
                f"calibrate needs two or more finite scores, but got {logits[:8].tolist()} from {len(logits)} texts"
            )
        mean, std = logits.mean(), logits.std()
        if std <= 1e-6 * np.abs(logits).max():  # equal up to float32 rounding
            raise ValueError(
                f"the {len(logits)} reference completions all score {mean:.6g}, so their standard deviation cannot be scaled "
                "to 1; pass completions that differ, and check that the template contains {completion}"
            )
        self._normalize_by(mean, std)
        return self

    def _normalize_by(self, mean: float, std: float) -> None:
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(f"mean={mean} and std={std} must be finite, and std positive")
        self.mean, self.std = float(mean), float(std)

    def _try_out(self) -> None:
        """Score one text, to raise early if the model is not a sequence classifier."""
        with evaluation_mode(self.model), torch.no_grad():
            logits = getattr(self._forward(self._encode(["a"], ["b"])), "logits", None)
        labels = self.model.config.num_labels
        if logits is None or logits.shape != (1, labels):
            got = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
            raise TypeError(
                f"{type(self.model).__name__} gives {got} for one text, but a sequence classifier gives logits of shape "
                f"(1, {labels}); load the model with AutoModelForSequenceClassification"
            )

    def _encode(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[list[int]]:
        rendered = [self._render(p, c) for p, c in zip(prompts, completions, strict=True)]
        cut = {"truncation": True, "max_length": self._max_tokens} if self._truncation and self._max_tokens else {}
        rows = encode_prompts(self.tokenizer, rendered, end=True, **cut)
        for i, row in enumerate(rows):
            if len(row) == 0:
                raise ValueError(f"row {i}: the text {rendered[i].text!r} has no tokens; a reward model needs at least one")
            if self._max_tokens is not None and len(row) > self._max_tokens:
                raise ValueError(
                    f"row {i}: the text has {len(row)} tokens, the reward model takes max_tokens={self._max_tokens}; shorten "
                    "it, or set truncation='left' to cut off its beginning or truncation='right' to cut off its end"
                )
        return rows

    def _score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        rows = self._encode(prompts, completions) if len(prompts) or len(completions) else []
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # longest first: out-of-memory shows in the first pass
        results = [0.0] * len(rows)
        with evaluation_mode(self.model), torch.no_grad():
            for begin in range(0, len(rows), self._batch_size):
                batch = order[begin : begin + self._batch_size]
                logits = self._forward([rows[i] for i in batch]).logits[:, self._index]
                for i, logit in zip(batch, logits.double().tolist(), strict=True):
                    results[i] = logit
        return results

    def _forward(self, rows: list[list[int]]) -> Any:
        """Run the model on a batch of token ids and return its outputs."""
        model, padding = self.model, self.model.config.get_text_config().pad_token_id
        if padding is None or not 0 <= padding < self._vocab_size:
            model, padding = _twin_that_skips(model, _unused_end(rows, self._vocab_size))
        input_ids, mask = pad(rows, "right", model.device)
        return model(input_ids=input_ids.masked_fill(mask == 0, padding), attention_mask=mask)


def _unused_end(rows: list[list[int]], vocab_size: int) -> int:
    """Return a token id that no row ends with, to use as padding."""
    ends = {row[-1] for row in rows}
    unused = next((token for token in range(vocab_size) if token not in ends), None)
    if unused is None:
        raise ValueError(
            f"the texts of a batch end with each of the {vocab_size} tokens, and the reward model's config has no "
            f"pad_token_id, so no token is left for padding; set batch_size={vocab_size - 1} or less"
        )
    return unused


def _twin_that_skips(model: PreTrainedModel, pad_id: int) -> tuple[PreTrainedModel, int]:
    """Return a shallow copy of the model whose config has this `pad_token_id`, and the id; weights are shared."""
    twin = copy.copy(model)
    twin.config = copy.deepcopy(model.config)
    twin.config.get_text_config().pad_token_id = pad_id
    return twin, pad_id


def _load_classifier(
    model: str | Path | PreTrainedModel, device: torch.device | str | None, dtype: torch.dtype | str | None
) -> PreTrainedModel:
    from transformers import AutoModelForSequenceClassification, PreTrainedModel

    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype={dtype!r} must be a torch dtype or the name of one, such as 'bfloat16'")
    if isinstance(model, (str, Path)):
        name = str(model)
        model, info = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype or "auto", output_loading_info=True)
        if untrained := sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])]):
            raise ValueError(
                f"{name} holds no weights for {untrained} of {type(model).__name__}, so they would be random; train a "
                "classification head first (examples/train_reward_model.py) or pass a model that has one"
            )
        model.requires_grad_(False).eval()
        return model if device is None else model.to(device)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}; give a path, a hub id or a transformers sequence classification model"
        )
    wanted = torch.empty(0, dtype=dtype or model.dtype, device=device or model.device)
    if (wanted.dtype, wanted.device) != (model.dtype, model.device):
        model = copy.deepcopy(model).to(device=wanted.device, dtype=wanted.dtype)
    return model


def _load_tokenizer(model: Any, tokenizer: Any, truncation: str | None) -> Any:
    from transformers import AutoTokenizer, PreTrainedModel

    if tokenizer is None:
        if isinstance(model, PreTrainedModel):
            raise ValueError("a model object brings no tokenizer; set tokenizer= to a path, a hub id or a tokenizer")
        tokenizer = model
    if isinstance(tokenizer, (str, Path)):
        tokenizer = AutoTokenizer.from_pretrained(str(tokenizer))
    if truncation is not None:
        tokenizer = copy.deepcopy(tokenizer)  # truncation_side is an attribute, and the caller may share this tokenizer
        tokenizer.truncation_side = truncation
    return tokenizer


def _reward_label(model: PreTrainedModel, index: int | None) -> int:
    labels, names = model.config.num_labels, model.config.id2label
    if index is None and labels != 1:
        raise ValueError(f"the reward model's head has {labels} labels, {names}; set index= to the one that is the reward")
    if index is not None and not 0 <= index < labels:
        raise ValueError(f"index={index} is out of range: the reward model's head has {labels} labels, {names}")
    return index or 0


def _length_limit(model: PreTrainedModel, tokenizer: Any) -> int | None:
    limits = (max_positions(model), tokenizer.model_max_length)
    return min((int(limit) for limit in limits if limit and 0 < limit < UNLIMITED), default=None)


class _Renderer:
    """Render a prompt and a completion as one text."""

    def __init__(self, template: Template | None, tokenizer: Any) -> None:
        if template == "chat" and tokenizer.chat_template is None:
            raise ValueError("template='chat', but the tokenizer has no chat template; set tokenizer.chat_template")
        if isinstance(template, str) and template != "chat" and "{completion}" not in template:
            raise ValueError(f"template={template!r} has no {{completion}}: every answer to a prompt would score the same")
        self._template, self._tokenizer = template, tokenizer

    def __call__(self, prompt: Any, completion: Any) -> Prompt:
        """Return the text, and its messages if a chat template rendered it."""
        if callable(self._template):
            return Prompt(self._template(prompt, completion), None)
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError(
                f"the prompt is a {type(prompt).__name__} and the completion a {type(completion).__name__}; both must be text, "
                "or both lists of messages"
            )
        if not isinstance(prompt, str):
            return self._chat(prompt, completion)
        if self._template == "chat":
            return self._chat([{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}])
        # Replace both in one pass, so that a literal {completion} inside a prompt is left alone.
        values = {"{prompt}": prompt, "{completion}": completion}
        template = self._template or "{prompt}{completion}"
        return Prompt(re.sub(r"\{prompt\}|\{completion\}", lambda place: values[place[0]], template), None)

    def _chat(self, prompt: Messages, completion: Messages) -> Prompt:
        if self._template not in (None, "chat"):
            raise ValueError(
                f"template={self._template!r} is for prompts that are text, but these are chats; set template=None to use the "
                "tokenizer's chat template, or pass a callable (prompt, completion) -> str"
            )
        if self._tokenizer.chat_template is None:
            raise ValueError(
                "the prompts are chats, but the reward model's tokenizer has no chat template; set tokenizer.chat_template, or "
                "set template= to a callable (prompt, completion) -> str"
            )
        messages = [*prompt, *completion]
        if prompt[-1]["role"] == "assistant":  # the completion continues that message
            content = completion_text(prompt[-1:]) + completion_text(completion)
            messages = [*prompt[:-1], {**prompt[-1], "content": content}]
        return Prompt(self._tokenizer.apply_chat_template(messages, tokenize=False), messages)

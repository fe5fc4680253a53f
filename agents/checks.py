"""What is checked before long work starts: that agent, model and env fit together."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from agents.quantization import weight_count
from agents.vec_env import all_rules
from llm_env.arguments import as_whole, whole
from llm_env.end_tokens import missing_end_tokens
from llm_env.lm.capabilities import vocabulary_of
from llm_env.lm.positions import check_length
from llm_env.reference import BaseReference, Reference, coefficient
from llm_env.rules import Rules

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv
    from transformers import PreTrainedModel

    from agents.base import LanguageAgent
    from agents.policy import LanguagePolicy

logger = logging.getLogger("llm_env")

SCHEDULES = ("clip_range", "clip_range_high", "clip_range_vf")  # which may be callables, of the progress that remains
ADAPTER_RATE = 10.0  # see `default_learning_rate`


def check_counts(**counts: int | None) -> None:
    """Refuse what is neither None nor a whole number of at least 1."""
    for name, value in counts.items():
        if value is not None:
            whole(name, value, 1)


def check_numbers(least: float = -np.inf, **numbers: Any) -> None:
    """Refuse what is not a finite number of at least `least`; None passes, and so does a schedule where there may be one."""
    for name, value in numbers.items():
        if value is None or (callable(value) and name in SCHEDULES):
            continue
        if not isinstance(value, (int, float, np.number)) or not np.isfinite(value) or value < least:
            raise ValueError(
                f"{name}={value!r} must be a finite number" + (f" of at least {least:g}" if np.isfinite(least) else "")
            )


def check_computation(prefix_sharing: Any, max_num_seqs: int | None, group_size: int, **switches: Any) -> None:
    """Refuse an unknown `prefix_sharing`, switches that are no bools, and fewer responses under way than a group has."""
    if not isinstance(prefix_sharing, bool) and not (isinstance(prefix_sharing, str) and prefix_sharing == "auto"):
        raise ValueError(f"prefix_sharing={prefix_sharing!r} must be 'auto', True or False")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be True or False")
    if max_num_seqs is not None and max_num_seqs < group_size:
        raise ValueError(f"max_num_seqs={max_num_seqs} has no room for a group of {group_size}; raise it to that at least")


def only(name: str, given: Any, again: Any) -> Any:
    """`given`, unless it was given again by another argument."""
    if again is not None:
        raise ValueError(f"{name} was given twice: {given!r} and {again!r}; drop one of them")
    return given


def sort_out(env_or_timesteps: Any, callback: Any, total_timesteps: Any, env: Any) -> tuple[Any, Any, int | None]:
    """Env, callback and total_timesteps of a call of `learn`, in whichever place they were given.

    Raises:
        ValueError: one was given twice, or total_timesteps is no finite number of at least 0.
    """
    if as_whole(env_or_timesteps) is not None or isinstance(env_or_timesteps, float):
        total_timesteps = only("total_timesteps", env_or_timesteps, total_timesteps)
    elif env_or_timesteps is not None:
        env = only("env", env_or_timesteps, env)
    if as_whole(callback) is not None:  # learn(env, 10_000)
        callback, total_timesteps = None, only("total_timesteps", callback, total_timesteps)
    check_numbers(0.0, total_timesteps=total_timesteps)
    return env, callback, None if total_timesteps is None else int(total_timesteps)


def check_tokens(rows: Sequence[Sequence[int]], new: int, vocab_size: int, max_positions: int | None) -> None:
    """Refuse contexts that the model cannot read, or after which it has not room for `new` more tokens.

    Raises:
        ValueError: a row holds what is no token id, or is too long.
    """
    for i, row in enumerate(rows):
        if not 0 <= min(row) <= max(row) < vocab_size:
            bad = next(token for token in row if not 0 <= token < vocab_size)
            raise ValueError(f"token {bad} in row {i} is not a token id: the vocabulary is 0..{vocab_size - 1}")
    check_length(max_positions, max(map(len, rows)), new)


def checked_masks(action_masks: Any, shape: tuple[int, int]) -> np.ndarray:
    """Action masks as bool, of `shape` (B, V); one of shape (V,) serves a single row.

    Raises:
        ValueError: another shape, other values than 0 and 1, or nothing allowed.
    """
    masks = np.atleast_2d(np.asarray(action_masks))
    if masks.shape != shape or not ((masks == 0) | (masks == 1)).all():
        raise ValueError(f"action_masks must be bool, of shape {shape}; got shape {masks.shape} of {masks.dtype}")
    masks = masks.astype(bool)
    if not masks.any(axis=1).all():
        raise ValueError(f"action_masks allows no token in row {masks.any(axis=1).argmin()}; at least one must be left")
    return masks


def checked_starts(episode_start: Any, rows: int) -> list[bool]:
    """Whether an episode begins, for each of the rows.

    Raises:
        ValueError: there are more or fewer than rows.
    """
    starts: list[bool] = np.atleast_1d(episode_start).astype(bool).tolist()
    if len(starts) != rows:
        raise ValueError(f"episode_start has {len(starts)} entries for {rows} observations; give one each")
    return starts


def check_groups(group_size: int, n_envs: int) -> None:
    """Refuse a rollout that cannot be cut into whole groups."""
    if n_envs % group_size:
        raise ValueError(
            f"group_size={group_size} must divide n_envs={n_envs}; try n_envs={group_size * -(-n_envs // group_size)}"
        )


def check_processes(n_envs: int, group_size: int, processes: int) -> None:
    """Refuse a rollout that has fewer groups than there are processes.

    Raises:
        ValueError: some process would have nothing to draw.
    """
    if n_envs // group_size < processes:
        raise ValueError(
            f"n_envs={n_envs} with group_size={group_size} is {n_envs // group_size} prompts a rollout, fewer than the "
            f"{processes} processes; raise n_envs to {processes * group_size} at least, or launch fewer"
        )


def check_sharding(sharded: bool, optimizer: str, quantized: bool = False, **offloads: bool) -> None:
    """Refuse to move weights about that accelerate has spread over processes, and an optimizer that cannot update them.

    Raises:
        ValueError: something is to be offloaded, the optimizer is bitsandbytes', or the weights are quantized.
    """
    if sharded and quantized:
        raise ValueError(
            "the model is quantized, and quantized weights are not sharded (FSDP2); launch without sharding, which keeps the "
            "whole quantized model in every process, or load the model without quantization"
        )
    if sharded and optimizer == "adamw_8bit":
        raise ValueError(
            "optimizer='adamw_8bit', but the weights are sharded, which bitsandbytes cannot update; leave it out: each process "
            "keeps its share of the optimizer's state alone"
        )
    if sharded and any(offloads.values()):
        name = next(name for name, wanted in offloads.items() if wanted)
        raise ValueError(f"{name}=True, but the weights are sharded, and each process keeps its share alone; set {name}=False")


def episodes_of(wanted: int | None, default: int, rows: int, by_response: bool) -> int:
    """Episodes in a rollout: as many as were asked for, else the rows of a vector env, else the default.

    Raises:
        ValueError: whole responses are taken of each of `rows` rows, and another number was asked for.
    """
    n_envs = rows if by_response or rows > 1 else default
    if wanted in (None, n_envs):
        return n_envs
    if by_response:
        raise ValueError(f"n_envs={wanted}, but the vector env has num_envs={rows}; leave n_envs out or make them equal")
    return wanted


def check_fit(agent: LanguageAgent, rules: Rules, n_envs: int) -> None:
    """Refuse an env whose tokens, lengths or KL do not fit the agent's model and arguments.

    Raises:
        ValueError: the message names the values and the remedy.
    """
    check_groups(agent.group_size, n_envs)
    check_tokenizers(agent.policy, rules)
    check_positions(agent.policy, rules)
    check_budget(agent.max_tokens_per_batch, rules)
    kl_coef = coefficient(agent.kl_coef)
    if kl_coef and rules.kl is not None:
        raise ValueError(
            f"the KL is penalized twice: by the env's kl_coef={rules.kl.value} in the reward and by the agent's "
            f"kl_coef={kl_coef} in the loss; drop the env's to keep it in the loss, or the agent's to keep it in the reward"
        )
    if kl_coef and rules.reference is None:
        raise ValueError(
            f"kl_coef={kl_coef} needs a reference to measure the KL from: make the env with reference=<path or model>"
        )
    check_base_reference(agent.policy, rules)
    agent.check_rules(rules)
    if agent.sampler().restricted:
        warnings.warn(
            f"top_k={agent.top_k}, top_p={agent.top_p}, min_p={agent.min_p}: tokens are drawn from a restricted distribution "
            "but trained on as if from the whole one: off-policy; leave them off unless that is what you want",
            stacklevel=4,
        )


def check_positions(policy: LanguagePolicy, rules: Rules) -> None:
    """Refuse an env whose longest prompt and response have more tokens than the model has positions.

    Raises:
        ValueError: If they have.
    """
    check_length(policy.max_positions, max(map(len, rules.prompts.ids)), rules.max_new_tokens)


def check_reference(reference: Reference, policy: LanguagePolicy, offload: bool) -> None:
    """Refuse to take weights from the device that the policy computes with.

    Raises:
        ValueError: the reference is to be offloaded and shares weights with the policy.
    """
    shared = {id(parameter) for parameter in policy.parameters()} & {id(p) for p in reference.model.parameters()}
    if offload and shared:
        raise ValueError(
            "offload_reference=True, but the env's reference has its weights in common with the policy and takes no memory of "
            "its own; set offload_reference=False"
        )


def check_base_reference(policy: LanguagePolicy, rules: Rules) -> None:
    """Refuse a reference that is the base of an adapter, where there is none; and tell of a base that is there twice.

    Raises:
        ValueError: the policy has no adapter.
    """
    if isinstance(rules.reference, BaseReference):
        if policy.adapter is None:
            raise ValueError(
                "the env's reference='base' is the policy with its adapter off, but all of this policy's weights are trained; "
                "make the env with reference=<path or model>, or the agent with policy_kwargs={'peft_config': LoraConfig(...)}"
            )
    elif policy.adapter is not None and rules.reference is not None:
        path = policy.base.name_or_path
        if path and path == rules.reference.model.name_or_path:
            warnings.warn(
                f"the env's reference is a second copy of {path!r}; with reference='base' the policy with its adapter off is "
                "the reference, and takes no memory",
                stacklevel=5,
            )


def check_budget(max_tokens_per_batch: int | None, rules: Rules) -> None:
    """Refuse a bound on the positions of a forward pass under which an episode of the env has no place.

    Raises:
        ValueError: the longest prompt with a response of `max_new_tokens` is longer.
    """
    prompt, new = max(map(len, rules.prompts.ids)), rules.max_new_tokens
    if max_tokens_per_batch is not None and max_tokens_per_batch < prompt + new:
        raise ValueError(
            f"max_tokens_per_batch={max_tokens_per_batch} does not hold the longest prompt, of {prompt} tokens, and "
            f"max_new_tokens={new}; raise it to {prompt + new} at least, lower max_new_tokens or shorten the prompts"
        )


def check_process_supervision(rules: Rules) -> None:
    """Refuse an env in which tokens are paid that end no step.

    Raises:
        ValueError: the KL is in the reward.
    """
    if rules.kl is not None:
        raise ValueError(
            f"supervision='process' normalizes the rewards of steps, but the env's kl_coef={rules.kl.value} pays every token; "
            "put the KL into the loss with the agent's kl_coef"
        )


def check_vocabulary(model: PreTrainedModel, vocab_size: int) -> None:
    """Refuse a tokenizer with more ids than the model has embeddings.

    Raises:
        ValueError: the model's vocabulary is smaller than `vocab_size`.
    """
    size = vocabulary_of(model)
    if size < vocab_size:
        raise ValueError(
            f"the model's vocabulary has {size} tokens, fewer than the tokenizer's {vocab_size}; use the tokenizer that "
            f"belongs to the model, or call model.resize_token_embeddings({vocab_size}) first"
        )


def check_trainable(policy: LanguagePolicy) -> None:
    """Refuse a policy of which nothing is trained.

    Raises:
        ValueError: If all of the model's parameters are frozen.
    """
    if not any(parameter.requires_grad for parameter in policy.lm.parameters()):
        raise ValueError(
            f"all parameters of the {type(policy.lm).__name__} have requires_grad=False, so that nothing would be trained; "
            "call model.requires_grad_(True), unfreeze some layers, or train an adapter with policy_kwargs={'peft_config': ...}"
        )


def check_optimizer(policy: LanguagePolicy) -> None:
    """Refuse a policy of which other parameters are trained than those that its optimizer was made for.

    Raises:
        ValueError: If `requires_grad` was changed since.
    """
    for name, parameter in policy.named_parameters():  # by name: sharded ones are other objects while they are together
        if parameter.requires_grad != (name in policy.optimized):
            raise ValueError(
                f"{name}.requires_grad was set to {parameter.requires_grad} after the agent was made, and its optimizer does "
                "not know; set it on the model or the LanguagePolicy before an agent is made with it, such as with agent.policy"
            )


def with_chat_templates_of(tokenizer: Any, other: Any) -> Any:
    """A tokenizer with the chat templates of another one where that has some: those that the env's prompts are rendered by.

    Args:
        tokenizer: the policy's, or None, which takes the other one.
        other: the env's.

    Returns:
        The tokenizer itself where nothing differs, and otherwise a copy. Named templates that the other has not are kept.
    """
    if tokenizer is None or tokenizer is other:
        return other
    mine, theirs = getattr(tokenizer, "chat_template", None), getattr(other, "chat_template", None)
    if theirs is None or mine == theirs:
        return tokenizer
    if isinstance(mine, dict) or isinstance(theirs, dict):
        mine, theirs = ({"default": value} if isinstance(value, str) else value or {} for value in (mine, theirs))
        theirs = mine | theirs
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = theirs
    return tokenizer


def check_tokenizers(policy: LanguagePolicy, rules: Rules) -> None:
    """Raise if the env's token ids mean something else to the model.

    Raises:
        ValueError: If the vocabularies differ.
    """
    check_vocabulary(policy.lm, rules.vocab_size)
    mine, theirs = policy.tokenizer, rules.tokenizer
    if mine is not None and mine is not theirs and mine.get_vocab() != theirs.get_vocab():
        own, other = mine.get_vocab(), theirs.get_vocab()
        raise ValueError(
            f"the env's tokenizer ({len(other)} tokens) is not the model's ({len(own)} tokens), for instance "
            f"{sorted(set(own.items()) ^ set(other.items()))[:3]}; make the env with tokenizer=<the model's path>"
        )


def agree_on_ends(policy: LanguagePolicy, env: VecEnv) -> None:
    """Let an env's episodes end at the model's end tokens, too, unless the env was made with `eos_token_ids`.

    An env that was made with a tokenizer object may not know those of the model's generation config.

    Raises:
        ValueError: If the envs are in other processes, and do not know all of the model's end tokens.
    """
    found = [rules for rules in all_rules(env) if not rules.ends_are_given]
    missing = {id(r): missing_end_tokens(r.eos_ids, policy.end_tokens(r.tokenizer), r.vocab_size) for r in found}
    for rules in found:
        if ids := missing[id(rules)]:
            rules.end_also_at(ids)
            logger.info(
                "episodes end at %s (%s), too: end tokens of the model", rules.tokenizer.convert_ids_to_tokens(ids), ids
            )
    for rules in all_rules(env):
        ids = missing_end_tokens(rules.eos_ids, policy.end_tokens(rules.tokenizer), rules.vocab_size)
        if ids and not rules.ends_are_given:  # copies of what is elsewhere
            names = rules.tokenizer.convert_ids_to_tokens(ids)
            raise ValueError(
                f"the model ends answers with {names} ({ids}), too, by its generation config or tokenizer, but the envs do not "
                f"know; make them with eos_token_ids={sorted({*ids, *rules.eos_ids})}"
            )
        rules.warn_of_endless_turn()


def default_learning_rate(policy: LanguagePolicy, n_epochs: int) -> float:
    """3e-4 up to a million parameters, 1e-6 from a billion on, a power law between: the usual choices at both ends.

    Divided by the passes over a rollout. PPO's four on the pupil at 3e-4 move by 0.06 nats a token and drift away from what
    was learned (0.88 right after 12,000 tokens, at best 0.96); at a quarter of that they stay (0.98 to 0.99).

    All parameters count, also frozen and quantized ones: the rate is chosen by the model's size, and a model of which some
    layers are frozen computes as before.

    Ten times that for a LoRA adapter, whose best rate was found to be about ten times that of all weights, in policy gradients
    too: Schulman et al. 2025, "LoRA without regret", https://thinkingmachines.ai/blog/lora/. (GRPO on the pupil, rank 8, alpha
    16, one seed: 0.993 right after 30,000 tokens, at a tenth of the rate 0.794.)
    """
    parameters = weight_count(policy.base)
    rate = float(min(3e-4, max(1e-6, 3e-4 * (1e6 / parameters) ** 0.826))) / n_epochs
    return rate if policy.adapter is None else ADAPTER_RATE * rate

"""Checks of whether a model and an env fit together, and the settings that follow from both."""

from __future__ import annotations

import logging

from stable_baselines3.common.vec_env import VecEnv

from agents.policy import LanguagePolicy
from agents.policy.quantization import weight_count
from agents.sampling.sampler import Sampler
from agents.validation import check_budget, check_groups, check_vocabulary
from agents.vec_env import unique_rules
from llm_env.end_tokens import missing_end_tokens
from llm_env.lm.capabilities import vocabulary_of
from llm_env.lm.positions import check_length
from llm_env.reference import BaseReference
from llm_env.rules import Rules
from llm_env.warn import warn

logger = logging.getLogger("llm_env")

PADDED_IDS = 64  # more ids than a tokenizer has, besides 1%, that models are given to make their number round
ADAPTER_RATE = 10.0  # see `default_learning_rate`


def check_fit(
    policy: LanguagePolicy,
    rules: Rules,
    sampler: Sampler,
    *,
    n_envs: int,
    group_size: int,
    max_tokens_per_batch: int | None,
    kl_coef: float,
) -> None:
    """Check that an env's tokens, lengths and KL fit the model and the agent's arguments.

    Raises:
        ValueError: If they do not; the message names the values and the remedy.
    """
    check_groups(group_size, n_envs)
    check_tokenizers(policy, rules)
    check_positions(policy, rules)
    check_budget(max_tokens_per_batch, rules)
    if kl_coef and rules.kl is not None:
        raise ValueError(
            f"the KL is penalized twice: by the env's kl_coef={rules.kl.value} in the reward and by the agent's "
            f"kl_coef={kl_coef} in the loss; drop the env's to keep it in the loss, or the agent's to keep it in the reward"
        )
    if kl_coef and rules.reference is None:
        raise ValueError(
            f"kl_coef={kl_coef} needs a reference to measure the KL from: make the env with reference=<path or model>"
        )
    check_base_reference(policy, rules)
    if sampler.restricted:
        warn(
            f"top_k={sampler.top_k}, top_p={sampler.top_p}, min_p={sampler.min_p}: tokens are sampled from a truncated "
            "distribution but trained on as if from the whole one: off-policy; leave them off unless that is what you want"
        )


def check_positions(policy: LanguagePolicy, rules: Rules) -> None:
    """Check that the model has positions for the env's longest prompt and response.

    Raises:
        ValueError: If it has fewer.
    """
    check_length(policy.max_positions, rules.longest_prompt, rules.max_episode_tokens, name=rules.length_argument)


def check_base_reference(policy: LanguagePolicy, rules: Rules) -> None:
    """Check that a reference that is the base of an adapter has one; warn of a base that is in memory twice.

    Raises:
        ValueError: If the policy has no adapter.
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
            warn(
                f"the env's reference is a second copy of {path!r}; with reference='base' the policy with its adapter off is "
                "the reference, and takes no memory"
            )


def check_trainable(policy: LanguagePolicy) -> None:
    """Check that a parameter of the policy is trained.

    Raises:
        ValueError: If all of the model's parameters are frozen.
    """
    if not any(parameter.requires_grad for parameter in policy.lm.parameters()):
        raise ValueError(
            f"all parameters of the {type(policy.lm).__name__} have requires_grad=False, so that nothing would be trained; "
            "call model.requires_grad_(True), unfreeze some layers, or train an adapter with policy_kwargs={'peft_config': ...}"
        )


def check_optimizer(policy: LanguagePolicy) -> None:
    """Check that the parameters that require gradients are those of the optimizer.

    Raises:
        ValueError: If `requires_grad` was changed since the optimizer was made.
    """
    for name, parameter in policy.named_parameters():  # by name: sharded ones are other objects while they are together
        if parameter.requires_grad != (name in policy.optimized):
            raise ValueError(
                f"{name}.requires_grad was set to {parameter.requires_grad} after the agent was made, and its optimizer does "
                "not know; set it on the model or the LanguagePolicy before an agent is made with it, such as with agent.policy"
            )


def check_tokenizers(policy: LanguagePolicy, rules: Rules) -> None:
    """Check that the env's token ids mean the same to the model.

    Of a model object without a tokenizer, that of the folder from which it was loaded counts; the env's may have more tokens.

    Raises:
        ValueError: If the vocabularies differ.
    """
    check_vocabulary(policy.lm, rules.vocab_size)
    theirs = rules.tokenizer
    if policy.tokenizer is not None and policy.tokenizer is not theirs:
        own, other = policy.tokenizer.get_vocab(), theirs.get_vocab()
        differing = set(own.items()) ^ set(other.items())
    elif policy.tokenizer is None and policy.original_tokenizer is not None:
        own, other = policy.original_tokenizer.get_vocab(), theirs.get_vocab()
        differing = set(own.items()) - set(other.items())
    else:
        own, other, differing = {}, {}, set()
    if differing:
        raise ValueError(
            f"the env's tokenizer ({len(other)} tokens) is not the model's ({len(own)} tokens), for instance "
            f"{sorted(differing)[:3]}; make the env with tokenizer=<the model's path>"
        )
    size = vocabulary_of(policy.lm)
    if policy.original_tokenizer is None and size > 1.01 * rules.vocab_size + PADDED_IDS:
        warn(
            f"the model has {size} token ids, the env's tokenizer {rules.vocab_size}, and it is not known which tokenizer the "
            "model was trained with: if that is another one, it reads noise. Give the model's with "
            "policy_kwargs={'tokenizer': ...}, and make the env with it"
        )


def agree_on_ends(policy: LanguagePolicy, env: VecEnv) -> None:
    """Let an env's episodes end at the model's end tokens, too, unless the env was made with `eos_token_ids`.

    An env that was made with a tokenizer object may not know those of the model's generation config.

    Raises:
        ValueError: If the envs are in other processes, and do not know all of the model's end tokens.
    """
    found = [rules for rules in unique_rules(env) if not rules.ends_are_given]
    missing = {id(r): missing_end_tokens(r.eos_ids, policy.end_tokens(r.tokenizer), r.vocab_size) for r in found}
    for rules in found:
        if ids := missing[id(rules)]:
            rules.end_also_at(ids)
            logger.info(
                "episodes end at %s (%s), too: end tokens of the model", rules.tokenizer.convert_ids_to_tokens(ids), ids
            )
    for rules in unique_rules(env):
        ids = missing_end_tokens(rules.eos_ids, policy.end_tokens(rules.tokenizer), rules.vocab_size)
        if ids and not rules.ends_are_given:  # copies of what is elsewhere
            names = rules.tokenizer.convert_ids_to_tokens(ids)
            raise ValueError(
                f"the model ends answers with {names} ({ids}), too, by its generation config or tokenizer, but the envs do not "
                f"know; make them with eos_token_ids={sorted({*ids, *rules.eos_ids})}"
            )
        rules.warn_of_endless_turn()


def default_learning_rate(policy: LanguagePolicy, n_epochs: int) -> float:
    """Choose a learning rate: 3e-4 up to a million parameters, 1e-6 from a billion on, a power law between.

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

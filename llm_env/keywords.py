"""Check keyword arguments; suggest similar names and those of other libraries."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping

OTHER_NAMES = {  # this project's name: the equivalent names in TRL, Stable-Baselines3, transformers, verl and OpenRLHF
    "group_size": ("num_generations", "n_samples_per_prompt", "rloo_k", "num_return_sequences", "n_generations"),
    "kl_coef": ("beta", "init_kl_coef", "kl_loss_coef", "kl_penalty", "kl_beta", "kl_coeff"),
    "clip_range": ("epsilon", "cliprange", "clip_ratio", "eps_clip", "clip_eps", "clip_epsilon", "clip_param"),
    "clip_range_high": ("epsilon_high", "clip_ratio_high", "eps_clip_high"),
    "clip_range_vf": ("cliprange_value", "value_clip", "vf_clip_param"),
    "dual_clip": ("delta", "clip_ratio_c"),
    "learning_rate": ("lr", "lr_rate"),
    "n_epochs": ("num_iterations", "num_ppo_epochs", "ppo_epochs", "num_epochs", "update_epochs", "mu"),
    "batch_size": ("ppo_mini_batch_size", "mini_batch_size", "minibatch_size"),
    "micro_batch_size": (
        "per_device_train_batch_size",
        "per_device_batch_size",
        "gradient_accumulation_steps",
        "micro_train_batch_size",
        "ppo_micro_batch_size",
    ),
    "n_envs": ("n_steps", "generation_batch_size", "rollout_batch_size", "num_envs", "train_batch_size", "num_prompts"),
    "ent_coef": ("entropy_coef", "entropy_coeff", "ent_coeff", "entropy_bonus"),
    "vf_coef": ("value_coef", "vf_coeff", "value_loss_coef"),
    "gae_lambda": ("lam", "gae_lam", "lambda_"),
    "max_grad_norm": ("grad_clip", "clip_grad", "gradient_clip", "max_norm", "grad_norm_clip"),
    "aggregation": ("loss_type", "loss_agg_mode"),
    "scale": ("scale_rewards", "norm_adv_by_std_in_grpo"),
    "ratio_level": ("importance_sampling_level",),
    "mask_truncated": ("mask_truncated_completions",),
    "importance_cap": ("vllm_importance_sampling_cap", "tis_imp_ratio_cap"),
    "unbiased_kl": ("use_bias_correction_kl",),
    "reference_every": ("sync_ref_model", "ref_model_sync_steps"),
    "max_resamples": ("filter_groups", "dynamic_sampling"),
    "normalize_advantage": ("whiten_advantages", "normalize_advantages", "whiten_rewards"),
    "separate_critic": ("value_model",),
    "engine": ("use_vllm", "vllm_mode", "rollout_engine"),
    "prefix_sharing": ("shared_prompt",),
    "tensorboard_log": ("logging_dir", "log_dir", "report_to", "tensorboard_dir"),
    "policy": ("model", "model_name", "model_id", "pretrained_model_name_or_path", "actor"),
    "policy_kwargs={'tokenizer': ...}": ("processing_class", "tokenizer"),
    "policy_kwargs={'peft_config': ...}": ("peft_config", "lora_config"),
    "policy_kwargs={'optimizer_class': ...}": ("optimizers", "optimizer_class", "optimizer_kwargs"),
    "optimizer": ("optim",),
    "bf16": ("fp16", "torch_dtype", "dtype", "mixed_precision"),
    "gradient_checkpointing": ("activation_checkpointing", "use_gradient_checkpointing"),
    "prompts": ("train_dataset", "dataset", "eval_dataset", "data"),
    "reward": ("reward_funcs", "reward_fn", "reward_function", "reward_funcs_list", "reward_model"),
    "reward_weights": ("reward_weight",),
    "reference": ("ref_model", "reference_model", "ref_policy"),
    "max_new_tokens": ("max_completion_length", "response_length", "max_response_length", "max_tokens", "max_length"),
    "max_prompt_tokens": ("max_prompt_length", "prompt_length"),
    "stop": ("stop_strings", "stop_sequences", "stop_token", "stop_words"),
    "eos_token_ids": ("eos_token_id", "stop_token_ids"),
    "overlong_buffer": ("soft_overlong_punishment", "overlong_filter"),
    "missing_eos_penalty": ("missing_eos",),
    "total_timesteps of learn": ("max_steps", "total_episodes", "num_train_epochs", "total_timesteps", "max_train_steps"),
    "callback of learn": ("callback", "callbacks"),
    "the path of save": ("output_dir", "save_path"),
    "group_size of the agent": (),
}
TRANSLATIONS = {other: name for name, others in OTHER_NAMES.items() for other in others}


AGENT_NAMES = {  # for the error messages of an env: arguments that belong to the agent
    "the agent": frozenset(
        "policy learning_rate n_envs n_epochs batch_size micro_batch_size group_size clip_range clip_range_high clip_range_vf "
        "ent_coef vf_coef gamma gae_lambda max_grad_norm temperature top_k top_p min_p engine tensorboard_log bf16 seed "
        "gradient_checkpointing aggregation scale device verbose optimizer policy_kwargs".split()
    )
}


def check_keywords(owner: str, given: Iterable[str], known: Collection[str], elsewhere: Mapping[str, Collection[str]]) -> None:
    """Raise if a keyword argument is unknown; suggest the probable name.

    Args:
        owner: name of the class that the user called.
        given: names of the keyword arguments in the call.
        known: names of the arguments that `owner` accepts.
        elsewhere: names of the arguments that other objects accept. The keys describe the objects in messages ("the env").

    Raises:
        TypeError: If a name in `given` is not in `known`.
    """
    for name in given:
        if name not in known:
            raise TypeError(f"{owner}() has no argument {name!r}{_hint(name, known, elsewhere)}")


def _hint(name: str, known: Collection[str], elsewhere: Mapping[str, Collection[str]]) -> str:
    meant = name if any(name in names for names in elsewhere.values()) else TRANSLATIONS.get(name.lower(), name)
    if meant in known or meant.split("=")[0] in known:
        return f"; it is called {meant} here"
    for place, names in elsewhere.items():
        if meant in names:
            return f"; {meant} is an argument of {place}"
    if meant != name and " of " in meant:
        return f"; use {meant}"
    close = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"; did you mean {close[0]}?" if close else f"; it has {', '.join(sorted(known))}"

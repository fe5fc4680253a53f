"""The policy: a causal language model, with a value head where one is needed."""

from agents.policy.language_policy import Evaluation, LanguagePolicy

__all__ = ["Evaluation", "LanguagePolicy"]

"""Tasks whose optimum is known, for agents to learn in seconds."""

from llm_env import TextGenerationEnv

LETTERS = "abcdefgh"


def always_a(completions, **kwargs):
    """The share of a among the four tokens: at most 1."""
    return [c.count("a") / 4 for c in completions]


def named(prompts, completions, **kwargs):
    """1 for naming the prompt's letter first: at most 1."""
    return [float(c[:1] == p) for p, c in zip(prompts, completions, strict=True)]


def last(completions, **kwargs):
    """1 if the last of three letters is b: paid at the end only, whatever came before."""
    return [float(len(c) == 3 and c[2] == "b") for c in completions]


def make_env(tokenizer, reward=always_a, prompts=("a", "b"), **kwargs):
    return TextGenerationEnv(list(prompts), reward, tokenizer, **{"max_prompt_tokens": 2, "max_new_tokens": 4, **kwargs})


PROBES = {
    "one token": dict(reward=always_a),
    "the token that the prompt names": dict(reward=named, prompts=tuple("abcd"), max_new_tokens=1),
    "only the last token counts": dict(reward=last, max_new_tokens=3),
}

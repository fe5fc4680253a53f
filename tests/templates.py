"""Chat templates in the manner of known instruct models, and by hand what each writes after a turn."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

QWEN25 = """\
{%- if tools %}<|im_start|>system
Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- elif m.tool_calls %}<|im_start|>assistant{% if m.content %}{{ '\\n' + m.content }}{% endif %}
{%- for c in m.tool_calls %}
{{- '\\n<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' }}
{{- (c.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Thoughts of turns before the last user message are dropped; the last turn always has one.
QWEN3 = QWEN25.replace(
    "{%- else %}{{ '<|im_start|>' + m.role",
    "{%- elif m.role == 'assistant' and loop.last %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + m.content + "
    "'<|im_end|>\\n' }}"
    "{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' + m.content.split('</think>')[-1].lstrip('\\n') + "
    "'<|im_end|>\\n' }}"
    "{%- else %}{{ '<|im_start|>' + m.role",
)

LLAMA31 = """\
{{- bos_token }}<|start_header_id|>system<|end_header_id|>

{% if tools %}Environment: ipython
{% endif %}Today Date: {{ strftime_now('%d %b %Y') }}
{% for tool in tools or [] %}
{{ tool | tojson }}{% endfor %}<|eot_id|>
{%- for m in messages %}
{%- if m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one tool call at a time') }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson }}
{{- '}<|eot_id|>' }}
{%- elif m.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (m.content | tojson) + '<|eot_id|>' }}
{%- else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + (m.content | trim) + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

GEMMA = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role not in ['user', 'assistant'] %}{{ raise_exception('no role ' + m.role) }}{% endif %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\\n' + (m.content | trim) + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

PHI3 = """\
{%- for m in messages %}
{%- if m.role in ['system', 'user', 'assistant'] %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

# The tools are told in front of the last user message.
MISTRAL = """\
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if tools and m == users[-1] %}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST] ' + m.content + '[/INST]' }}
{%- elif m.tool_calls %}[TOOL_CALLS] [
{%- for c in m.tool_calls %}
{%- if c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}
{{- '{"name": "' + c.function.name + '", "arguments": ' + (c.function.arguments | tojson) + ', "id": "' + c.id + '"}' }}
{%- if not loop.last %}, {% endif %}
{%- endfor %}]{{ eos_token }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}
{{- '[TOOL_RESULTS] {"content": ' + (m.content | tojson) + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %}{{ raise_exception('no role ' + m.role) }}
{%- endif %}
{%- endfor %}"""


@dataclass(frozen=True)
class Family:
    """A template, and by hand: what it writes between the text of a turn and the next turn."""

    template: str
    close: str  # the token that closes a turn
    other_end: str  # another end token
    user: str  # the rest, after a user message; %s is its text
    special: tuple[str, ...]
    trl: str | None = None  # name of TRL's copy of the real template

    def after_user(self, text):
        return self.close + self.user % text


CHATML_AFTER = "\n<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n"
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA_AFTER = "<|start_header_id|>user<|end_header_id|>\n\n%s<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
GEMMA_AFTER = "\n<start_of_turn>user\n%s<end_of_turn>\n<start_of_turn>model\n"
MISTRAL_TOKENS = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
FAMILIES = {
    "Qwen2.5": Family(QWEN25, "<|im_end|>", "<|endoftext|>", CHATML_AFTER, CHATML_TOKENS, "qwen2_5"),
    "Qwen3": Family(QWEN3, "<|im_end|>", "<|endoftext|>", CHATML_AFTER, CHATML_TOKENS, "qwen3"),
    "Llama 3.1": Family(LLAMA31, "<|eot_id|>", "<|eom_id|>", LLAMA_AFTER, LLAMA_TOKENS, "llama3_1"),
    "Gemma": Family(GEMMA, "<end_of_turn>", "<eos>", GEMMA_AFTER, ("<start_of_turn>", "<end_of_turn>"), "gemma"),
    "Phi-3": Family(
        PHI3,
        "<|end|>",
        "<|endoftext|>",
        "\n<|user|>\n%s<|end|>\n<|assistant|>\n",
        ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "phi3",
    ),
    "Mistral": Family(MISTRAL, "<eos>", "<pad>", "[INST] %s[/INST]", MISTRAL_TOKENS),
}


def after_results(name, results):
    """What a family writes after a turn with tool calls, by hand."""
    if name in ("Qwen2.5", "Qwen3"):
        shown = "".join(f"\n<tool_response>\n{result}\n</tool_response>" for result in results)
        return f"<|im_end|>\n<|im_start|>user{shown}<|im_end|>\n<|im_start|>assistant\n"
    if name == "Llama 3.1":
        head = "<|start_header_id|>%s<|end_header_id|>\n\n"
        shown = "".join(head % "ipython" + json.dumps(result) + "<|eot_id|>" for result in results)
        return "<|eot_id|>" + shown + head % "assistant"
    if name == "Mistral":
        parts = [
            f'[TOOL_RESULTS] {{"content": {json.dumps(result)}, "call_id": "call{i:05d}"}}[/TOOL_RESULTS]'
            for i, result in enumerate(results)
        ]
        return "<eos>" + "".join(parts)
    shown = "\n".join(f"<tool_response>\n{result}\n</tool_response>" for result in results)
    return FAMILIES[name].after_user(shown)


def real_template(name):
    """The text of a real template, from TRL's collection."""
    trl = pytest.importorskip("trl")
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not path.exists():
        pytest.skip("this version of TRL has no such template")
    return path.read_text()

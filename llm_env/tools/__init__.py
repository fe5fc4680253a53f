"""Tools that a model may call during an episode: `TextGenerationEnv(..., tools=[function, ...], max_turns=4)`.

A tool is a function with type hints and a Google-style docstring, as in TRL and transformers. **It runs with the rights of the
user who trains**: a model can write any argument, and tries many. Do not give it a function that runs code, opens paths or
addresses of the model's choice, or changes anything that matters, unless the function confines itself (for instance in a
container).

`calculator` and `make_search(texts)` are included; both work offline. `ToolFormat` is the base class of other formats of tool
calls.
"""

from llm_env.tools.formats import (
    HermesFormat,
    LlamaFormat,
    MistralFormat,
    PlainFormat,
    ToolCall,
    ToolFormat,
    ToolResult,
    XMLFormat,
)
from llm_env.tools.offline import calculator, make_search
from llm_env.tools.toolset import ToolSessions, ToolSet

__all__ = [
    "HermesFormat",
    "LlamaFormat",
    "MistralFormat",
    "PlainFormat",
    "ToolCall",
    "ToolFormat",
    "ToolResult",
    "ToolSessions",
    "ToolSet",
    "XMLFormat",
    "calculator",
    "make_search",
]

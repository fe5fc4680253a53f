"""Client of a vLLM server: generation requests and weight updates over HTTP."""

from __future__ import annotations

import base64
import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from safetensors.torch import save
from torch import Tensor

from agents.policy import LanguagePolicy
from llm_env.arguments import check_int
from llm_env.rules import Rules

TOGETHER = 64  # concurrent requests; the server queues those that do not fit
COMMAND = "VLLM_SERVER_DEV_MODE=1 VLLM_USE_V2_MODEL_RUNNER=0 vllm serve MODEL --worker-extension-cls {}"
START = COMMAND.format("agents.engines.vllm.worker.PolicyWeights")


class VLLMServer:
    """Client of a running `vllm serve`.

    Requests are retried if there is no answer, or if the answer is an error caused by the server's state. Other errors are
    raised immediately. `agents.engines.vllm.engine.VLLMEngine` documents the arguments.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        timeout: float = 600.0,
        attempts: int = 4,
        api_key: str | None = None,
        **others: Any,
    ) -> None:
        if others:
            raise ValueError(f"{sorted(others)} are arguments of vllm.LLM; with base_url, give them to the server's command")
        if not isinstance(base_url, str) or not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url={base_url!r} must be the address of a server, such as 'http://localhost:8000'")
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
            raise ValueError(f"timeout={timeout!r} must be a number of seconds above 0")
        self.url = base_url.rstrip("/").removesuffix("/v1")
        self.wanted, self.timeout, self.attempts = model, timeout, check_int("attempts", attempts, 1)
        key = api_key or os.environ.get("VLLM_API_KEY")
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._model = ""
        self._gave_up = threading.Event()

    def open(self, policy: LanguagePolicy, rules: Rules) -> None:
        """Get the name of the served model.

        Raises:
            ConnectionError: If the server does not answer.
            ValueError: If the server does not serve the requested model, or is not a vLLM server.
        """
        answer = self._ask("/v1/models")
        names = [entry.get("id") for entry in answer.get("data", [])]
        if not names or (self.wanted is not None and self.wanted not in names):
            raise ValueError(f"{self.url} serves {names}, not {self.wanted or 'a model'}; give model= one of these")
        self._model = names[0] if self.wanted is None else self.wanted

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker.

        Raises:
            ValueError: If the server was started without dev mode or without the worker extension.
        """
        return list(self._ask("/collective_rpc", {"method": method, "args": list(args)})["results"])

    def take(self, tensors: list[tuple[str, Tensor]]) -> None:
        """Send weights to the server."""
        text = base64.b64encode(save({name: tensor.contiguous() for name, tensor in tensors})).decode()
        self.call("llm_env_take_text", text)

    def forget_prefixes(self) -> None:
        """Reset the prefix cache.

        Raises:
            RuntimeError: If a request is using the prefix cache.
        """
        if not self._ask("/reset_prefix_cache", {}).get("success"):
            raise RuntimeError(f"the prefix cache of {self.url} is in use and was not emptied: another run has requests there")

    def complete(self, requests: list[dict[str, Any]]) -> list[list[tuple[list[int], list[float]]]]:
        """Generate `n` responses per request; return token ids and log-probs of each."""
        self._gave_up.clear()
        with ThreadPoolExecutor(TOGETHER) as threads:
            try:
                return list(threads.map(self._complete, requests))
            except BaseException:
                self._gave_up.set()  # stops the retries of the other requests
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _complete(self, request: dict[str, Any]) -> list[tuple[list[int], list[float]]]:
        # Texts are requested, too: some versions look for stop strings only if they return texts.
        answer = self._ask("/v1/completions", {**request, "model": self._model, "return_token_ids": True})
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]

    def close(self) -> None:
        """Do nothing: the server keeps running."""

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a GET request, or a POST request with `body`; return the decoded JSON.

        Raises:
            ConnectionError: If all attempts failed.
            ValueError: If the server rejects the request, or its answer is not a JSON object.
        """
        data = None if body is None else json.dumps(body).encode()
        problem: Exception | str = ""
        for attempt in range(self.attempts):
            if attempt:
                self._gave_up.wait(0.5 * 2 ** (attempt - 1))
            if attempt and self._gave_up.is_set():
                break
            try:
                request = urllib.request.Request(self.url + path, data, self._headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return dict(json.loads(response.read() or b"{}"))
            except urllib.error.HTTPError as error:
                said = error.read().decode(errors="replace")[:500]
                if not in_trouble(path, error.code, said):
                    raise ValueError(self._refusal(path, error.code, said)) from error
                problem = f"{error.code} {said}"
            except (OSError, http.client.HTTPException) as error:
                problem = error
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self.url}{path} gave an invalid answer: {error}; is it a vLLM server?") from error
        raise ConnectionError(
            f"{self.url}{path} gave no answer in {self.attempts} attempts ({problem}). Start the server again, or give the "
            "agent another with agent.set_engine('vllm', {'base_url': ...}). The current rollout is discarded, and the agent "
            "can be saved"
        )

    def _refusal(self, path: str, code: int, said: str) -> str:
        hint = ""
        if path in ("/collective_rpc", "/reset_prefix_cache") and (code == 404 or "has no attribute" in said):
            hint = f"; start the server with: {START}"
        return f"{self.url}{path} answered {code}: {said}{hint}"


def in_trouble(path: str, code: int, said: str) -> bool:
    """Return whether an HTTP error is caused by the server, not by the request.

    Errors raised by a worker method have code 500, too, and are not retried unless the engine has died.

    Args:
        path: path of the request.
        code: HTTP status code.
        said: text of the answer.
    """
    return code > 500 or (code == 500 and (path != "/collective_rpc" or "EngineDead" in said or "EngineCore" in said))

"""vLLM behind its server."""

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

TOGETHER = 64  # requests under way at a time; what there is no room for waits in the server
COMMAND = "VLLM_SERVER_DEV_MODE=1 VLLM_USE_V2_MODEL_RUNNER=0 vllm serve MODEL --worker-extension-cls {}"
START = COMMAND.format("agents.engines.vllm.worker.PolicyWeights")


class VLLMServer:
    """A `vllm serve` that somebody started; see `agents.engines.vllm.engine.VLLMEngine` for the arguments.

    A request that gets no answer, or one of a server in trouble, is tried again; other errors are not.
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
        """Find out which model is served.

        Raises:
            ConnectionError: If nobody answers.
            ValueError: If another model is served, or it is no vLLM server.
        """
        answer = self._ask("/v1/models")
        names = [entry.get("id") for entry in answer.get("data", [])]
        if not names or (self.wanted is not None and self.wanted not in names):
            raise ValueError(f"{self.url} serves {names}, not {self.wanted or 'a model'}; give model= one of these")
        self._model = names[0] if self.wanted is None else self.wanted

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of the workers.

        Raises:
            ValueError: If the server was not started for this.
        """
        return list(self._ask("/collective_rpc", {"method": method, "args": list(args)})["results"])

    def take(self, tensors: list[tuple[str, Tensor]]) -> None:
        """Send weights."""
        text = base64.b64encode(save({name: tensor.contiguous() for name, tensor in tensors})).decode()
        self.call("llm_env_take_text", text)

    def forget_prefixes(self) -> None:
        """Empty the prefix cache.

        Raises:
            RuntimeError: If it is in use.
        """
        if not self._ask("/reset_prefix_cache", {}).get("success"):
            raise RuntimeError(f"the prefix cache of {self.url} is in use and was not emptied: another run has requests there")

    def complete(self, requests: list[dict[str, Any]]) -> list[list[tuple[list[int], list[float]]]]:
        """Return token ids and their log-probs: for each request `n` responses."""
        self._gave_up.clear()
        with ThreadPoolExecutor(TOGETHER) as threads:
            try:
                return list(threads.map(self._complete, requests))
            except BaseException:
                self._gave_up.set()  # the others need not wait for a server that is gone
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _complete(self, request: dict[str, Any]) -> list[tuple[list[int], list[float]]]:
        # Not without the texts: some versions look for stop strings in them only where they are asked for.
        answer = self._ask("/v1/completions", {**request, "model": self._model, "return_token_ids": True})
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]

    def close(self) -> None:
        """Nothing: the server is its starter's."""

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the server's answer to a GET, or to a POST of `body`.

        Raises:
            ConnectionError: If none came, as often as it was tried.
            ValueError: If the server refused, or what it said is no JSON.
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
                raise ValueError(f"{self.url}{path} answered what is not vLLM's: {error}; is it a vLLM server?") from error
        raise ConnectionError(
            f"{self.url}{path} gave no answer in {self.attempts} attempts ({problem}). Start the server again, or give the "
            "agent another with agent.set_engine('vllm', {'base_url': ...}). The rollout under way does not count, and the "
            "agent can be saved"
        )

    def _refusal(self, path: str, code: int, said: str) -> str:
        hint = ""
        if path in ("/collective_rpc", "/reset_prefix_cache") and (code == 404 or "has no attribute" in said):
            hint = f"; start the server with: {START}"
        return f"{self.url}{path} answered {code}: {said}{hint}"


def in_trouble(path: str, code: int, said: str) -> bool:
    """Return whether an error is the server's state, rather than what was asked: a worker's own errors are 500 as well."""
    return code > 500 or (code == 500 and (path != "/collective_rpc" or "EngineDead" in said or "EngineCore" in said))

"""Check an agent on its own model and env: see `check_agent`."""

from agents.diagnostics.check_agent import check_agent

__all__ = ["check_agent"]

"""An audit of an agent on its own model and env: see `check_agent`."""

from agents.audit.table import check_agent

__all__ = ["check_agent"]

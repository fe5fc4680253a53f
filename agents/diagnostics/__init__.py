"""Check an agent on its own model and env: see `check_agent`."""

from agents.diagnostics.check_agent import check_agent
from agents.diagnostics.playback import Playback, play

__all__ = ["Playback", "check_agent", "play"]

"""From an env and an engine to rollouts."""

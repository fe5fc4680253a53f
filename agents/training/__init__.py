"""From a rollout to optimizer steps."""

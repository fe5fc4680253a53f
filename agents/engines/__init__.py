"""Engines: what generates responses in training, the policy itself or an external engine that is given its weights."""

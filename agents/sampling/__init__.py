"""Sampling responses and single tokens from a causal language model."""

"""One forward pass over prompts and responses: scoring, shared-prompt attention, micro-batches. Needs torch."""

"""Training in several processes: `communicator` (replicated weights) and `fsdp` (sharded weights)."""

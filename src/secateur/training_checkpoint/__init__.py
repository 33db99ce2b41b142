"""A plan applied to what training left: torch.distributed.checkpoint folders and shards, model and optimizer state."""

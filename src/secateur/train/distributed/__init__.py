"""Pruning in jobs of several processes: torch.distributed is used nowhere else."""

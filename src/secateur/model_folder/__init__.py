"""Prune a Hugging Face checkpoint on the disk: read without trust, streamed, verified, undone."""

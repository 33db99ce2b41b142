"""Text for pre-training: read, split by document, tokenise, pack."""

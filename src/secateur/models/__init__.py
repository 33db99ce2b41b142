"""Which transformers models are Secateur's own? One folder each, with the same file names."""

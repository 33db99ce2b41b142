"""Models of our own, as transformers models: one folder each, with the same names of files in all."""

"""How does a model folder become a pruned one: from a source to a plan, and all stages in one?

A model folder is what others load: config.json, safetensors files, and what lies beside them. (A checkpoint is what
training leaves; see `secateur.training_checkpoint`.)
"""

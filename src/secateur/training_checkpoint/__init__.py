"""How is a plan applied to a training checkpoint, to its model and its optimizer state?

A checkpoint is what training leaves: a torch.distributed.checkpoint folder, or the shards of one. (A model folder is
what others load; see `secateur.model_folder`.)
"""

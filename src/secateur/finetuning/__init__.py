"""How does `secateur finetune` train a model folder, of text or of images, pruned or not?"""

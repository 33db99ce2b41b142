"""When does a training loop prune, what, and on which ranks?"""

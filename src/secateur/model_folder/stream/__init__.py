"""How does a model larger than memory run?"""

"""How good is a model folder, on text or on images?"""

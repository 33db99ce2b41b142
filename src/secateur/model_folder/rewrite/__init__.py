"""A plan applied to a model folder: which bytes stay, how do they get into new files, how does the source come back?"""

"""How does a plan change a model folder, and how does the source come back?

`pieces.py` says which bytes stay, `writer.py` brings them into new files, `undo.py` keeps the rest and brings it back.
"""

"""Which kind of folder is this, and what treats it?"""

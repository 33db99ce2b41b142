"""Which kind of folder is this, and what applies a plan to it?"""

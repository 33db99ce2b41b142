"""How do bytes get to the disk and back: whole or not at all, by one process at a time, read without trust?"""

"""What does each command of `secateur` take, call and show? One command a file.

Heavy imports happen inside the functions, so that `--help` answers at once.
"""

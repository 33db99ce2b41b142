"""Which experts stay? From statistics and a goal to a plan.

Pure: numbers in, a value out.
"""

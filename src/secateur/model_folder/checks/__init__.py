"""Is the result what the plan makes of the source?"""

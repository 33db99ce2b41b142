"""When would LAEP have pruned a run that was recorded, and why not earlier?"""

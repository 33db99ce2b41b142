"""How is a plan applied to a live model and its optimizer, and is the result right?"""

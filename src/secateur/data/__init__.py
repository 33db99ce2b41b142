"""How do text and images become what a model takes?"""

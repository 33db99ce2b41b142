"""How does a Mixture-of-Experts grow from dense models?"""

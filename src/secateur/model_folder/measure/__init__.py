"""What do the experts of a model folder do on data, and what do its weights say of them?"""

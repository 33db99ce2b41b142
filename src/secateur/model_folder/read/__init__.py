"""What is in a model folder, and which tensor is whose? Nothing in it is trusted."""

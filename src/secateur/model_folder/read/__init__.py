"""What is in a Hugging Face folder, and which tensor is whose? Nothing in it is trusted."""

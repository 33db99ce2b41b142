"""Fine-tune a model folder, pruned or not: text models and image classifiers."""

"""Training: data, recipes, and the loop."""

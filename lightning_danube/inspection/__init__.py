"""Shows what a model will see of its data: tokens, what is learned, and what was left out."""

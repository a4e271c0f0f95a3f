"""What is not trusted, and the one place that deals with each kind of it: secrets, names, texts and modules."""

"""What trains a model, whatever the task."""

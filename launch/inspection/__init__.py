"""Pictures of what the model is shown."""

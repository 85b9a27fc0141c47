"""The loop, the step, the hooks."""

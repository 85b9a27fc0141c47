"""The demo's evaluation: scores, pictures, and what transformers answers."""

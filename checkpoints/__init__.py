"""Committed, verified, resharding checkpoints, and the Hugging Face format."""

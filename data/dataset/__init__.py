"""A dataset folder on disk: text, media index, what decides the number of tokens."""

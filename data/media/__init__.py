"""Kinds of media: from encoded bytes to ViT patches."""

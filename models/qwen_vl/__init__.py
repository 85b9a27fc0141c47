"""Qwen2-VL: vision tower, merger, language model, and their composition per pipeline stage."""

"""Triptych: three-stage training of Qwen2-VL-class vision-language models."""

"""Turns raw files into a dataset folder."""

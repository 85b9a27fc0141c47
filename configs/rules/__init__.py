"""The rules of ``validate.py``, by what they are about. Each yields the problems that it finds."""

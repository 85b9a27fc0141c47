"""Hangs and slow ranks: noticed beside training, named, and ended where nothing else would."""

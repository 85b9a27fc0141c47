"""FLOPs and bytes per layer and tower: pure arithmetic, no torch."""

"""The way of a sample: dataset folder, plan, loader, batch."""

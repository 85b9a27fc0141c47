"""The data of the demo and of the default run: handwritten digits, and what is said of them."""

"""Everything optional around the loop: what is called after each step."""

"""What decides order, packing, balance and shapes of training: pure functions of metadata."""

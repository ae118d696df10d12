"""Records, packing, order, the embedded world and its checkers."""

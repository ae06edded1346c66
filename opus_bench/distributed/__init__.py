"""Training by several processes: their layout, sharded state, one selection, checkpoints."""

"""fusednn's proof."""

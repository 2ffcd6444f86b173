"""What the families share: storage types, activations, checks, ahead-of-time cases."""

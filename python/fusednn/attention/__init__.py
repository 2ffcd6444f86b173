"""Multi-head attention: scaled dot products with masks, weights and dropout in the kernel, and layers."""

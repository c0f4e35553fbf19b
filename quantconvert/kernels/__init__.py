"""Pure tensor functions: rounding and packing. Torch only."""

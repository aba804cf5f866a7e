"""How a forward pass runs: eager, through our kernels, through compiled layers, or as captured CUDA graphs."""

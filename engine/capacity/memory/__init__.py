"""What fits: weights, KV cache, activations, overheads of engines, and the one budget they make."""

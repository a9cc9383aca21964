"""The prompt window: several batches share one pass through the encoder, and the gradient is exact."""

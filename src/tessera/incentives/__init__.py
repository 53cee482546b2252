"""Layer 8: pure maths of who gets what. Exact numbers, no input, no output."""

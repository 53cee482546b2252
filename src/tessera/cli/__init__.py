"""Layer 1: the command line. It reads configuration and chooses adapters; nothing below it does."""

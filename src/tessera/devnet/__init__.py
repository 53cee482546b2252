"""A whole economy on one machine: chain, workers, gateway and buyer, and the snapshots that show what they do."""

"""Layer 5: training one model over several peers, and turning the work they verify into shares."""

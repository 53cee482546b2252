"""Layer 9: units, ids, errors, clock, canonical encoding, signing, Merkle trees. No input, no output."""

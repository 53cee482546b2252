"""Peers that cannot reach each other meet at a relay: a process that forwards ciphertext and knows no keys."""

"""Tessera: train a model together, own it by verified work, sell access to it."""

__version__ = "0.1.0"

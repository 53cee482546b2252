"""Models cut into stages: the decoder, the boundary codec, the trainer of one stage, and the text that it learns from.

Importing this package loads nothing heavy: `tessera.models.config` and `tessera.models.presets` read manifests
without torch.
"""

"""Layer 7: contracts seen from Python.

`client` talks to any EVM network, `local` is one, `faces` are the contracts, `indexer` folds their events into tables,
`settle` computes the books. Import the modules you need: this package itself imports nothing, because the EVM is slow
to load.
"""

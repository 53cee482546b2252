"""The oracle: Ethereum's executable specification (EELS) on a corpus of our own transactions.

`corpus` makes the transactions with LocalChain, in this environment; `replay_corpus.py` replays them in another.
"""

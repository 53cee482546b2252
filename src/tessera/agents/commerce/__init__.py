"""Agents that work for each other: jobs in escrow, messages, bounties, cards, clusters.

Everything that is agreed is signed, everything that is paid goes through a mandate and its ledger, and what became of a
job is read from the chain alone.
"""

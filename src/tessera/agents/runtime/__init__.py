"""Agents that run: a model, tools and a person around the guard, on pydantic-ai.

Everything here may know models and networks; nothing below it does (`lint-imports` holds that). An `Agent` is defined
in Python or in a file, `Runtime` runs it, and what it did is in the steps' ledger, from which a killed run goes on.
"""

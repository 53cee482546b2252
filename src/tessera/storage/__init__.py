"""Layer 8: tables, in SQLite or PostgreSQL. `open_database` takes one URL or file for either.

Import the modules you need: this package itself imports nothing, because SQLAlchemy takes 0.2 s to load.
"""

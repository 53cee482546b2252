"""Contracts' events, folded into tables.

    blocks -> logs -> facts and totals -> typed queries

`engine` follows a chain and keeps the tables equal to it, through reorgs, crashes and nodes that disagree; `facts` is
what a reducer is; `tables` stores. Each other module is one contract: a pure reducer (log -> facts), and a view with
the questions that pages, commands and agents ask. Adding a contract is adding such a file.
"""

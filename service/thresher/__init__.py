"""Thresher shrinks the embedding tables of recommendation models.

`thresher.tables.load` reads exported tables and needs NumPy alone; importing this package imports nothing else.
"""

"""Lookup and update of embedding tables: one operator, its plain-PyTorch reference, and room for faster backends."""

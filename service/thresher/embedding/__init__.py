"""Representations of embedding tables and the collection that replaces TorchRec's EmbeddingBagCollection."""

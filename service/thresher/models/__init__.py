"""Recommendation models over one EmbeddingBagCollection: logits from a batch, and nothing of training."""

"""Training on any number of ranks: one loop for the baseline, the search and the retraining."""

"""From raw files to batches: readers, vocabulary, splits, columnar shards, and the loader."""

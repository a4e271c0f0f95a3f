"""Documents and messages become token ids in memory-mapped shards."""

"""Turns documents and messages into token ids, in memory-mapped shards."""

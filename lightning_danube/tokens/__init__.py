"""Turns documents and messages into token ids, in shards that are read row by row."""

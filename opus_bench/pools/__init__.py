"""Pools of token shards: text of a hub or of files in, shards with hashes out, read by seed and step."""

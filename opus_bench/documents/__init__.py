"""Pools of documents: read, embedded, scored and cut; BENCH-PROXY."""

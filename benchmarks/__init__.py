"""Measurements of what selection costs, each beside the paper's algorithm done literally."""

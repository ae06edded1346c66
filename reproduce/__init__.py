"""One script for each table and figure of the paper: a list of runs and one call."""

"""The results page: one self-contained file made from the records and the pages beside them."""

"""A scheduled step on its device: batches, decode graphs and sampling."""

"""Weights of 4 and 8 bits on GPUs: their layout, and products of rows with them."""

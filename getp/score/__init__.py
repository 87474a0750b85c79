"""Mode score: log-likelihood and perplexity of given texts, or of given completions of prompts.

A job like that of mode getp, with its journal: a record of its input is a part of a text that the
model can hold at once. The main function is `score_file`.
"""

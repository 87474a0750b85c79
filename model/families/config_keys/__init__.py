"""The keys of config.json: typed reading (`Keys`), and those of rotary embeddings and experts."""

"""The interface for Python programs and notebooks: text in, text out.

Owns no computation: it runs the requests of one `Engine`. The main class is `LLM`.
"""

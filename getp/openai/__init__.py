"""Bodies of OpenAI's chat and text completions: requests → `ParsedBody`, answers → responses.

Owns the fields, with vLLM's extensions, and their errors; never touches files or the engine. The
main functions are `read_body` and `response_body`.
"""

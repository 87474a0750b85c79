"""The server: OpenAI's API, online and in batches, over one engine.

Owns HTTP, the engine's thread, files and batches; requests and their answers are those of
`getp.openai` and `getp.job`. The main function is `serve` in `getp.serve.server`.
"""

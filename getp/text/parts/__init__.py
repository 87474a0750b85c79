"""The parts of an answer that is not in channels: thinking and tool calls, read as text arrives.

Each parser takes text in pieces of any size, returns what is certain, and gives the same parts
however the text is split. The main classes are `ThinkingParser` and `ToolCallParser`.
"""

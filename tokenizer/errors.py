"""The exceptions of this package."""


class TokenizerError(Exception):
    """A tokenizer or chat template cannot be used, or a text cannot be encoded or decoded.

    The message is one sentence for the user.
    """


class TemplateError(TokenizerError):
    """A chat template is not valid, rejected a conversation, or exceeded a limit of its sandbox."""

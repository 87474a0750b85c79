"""What goes wrong in this package."""


class TokenizerError(Exception):
    """A tokenizer or template that cannot be used, or text that cannot be encoded.

    The message is one sentence for the user.
    """


class TemplateError(TokenizerError):
    """A chat template that refused a conversation, or went beyond its limits."""

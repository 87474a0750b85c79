"""The maximum length of a request, as set by the options of the command line."""

DEFAULT_MAX_LENGTH = 1024  # tokens, prompt included
NO_LIMIT = 1 << 60  # stands for "no limit" where token counts are compared


def length_limit(max_length: int | None, max_new_tokens: int | None) -> int | None:
    """Return the maximum tokens per request, prompt included; None: the model's limit.

    max_length: the value of -n (0: the model's limit). Without -n, a requested output length is
    the only limit: the default length must not shorten it.
    """
    if max_length is None:
        return DEFAULT_MAX_LENGTH if max_new_tokens is None else None
    return max_length or None

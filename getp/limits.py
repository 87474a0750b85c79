"""The limit on the length of a request that the options of the command line set."""

DEFAULT_MAX_LENGTH = 1024


def most_positions(max_length: int | None, max_new_tokens: int | None) -> int | None:
    """Return the positions allowed by -n (0: no limit) and --max-new-tokens; None: no limit.

    Without -n a requested output length applies alone: the default length must not shorten it.
    """
    if max_length is None:
        return DEFAULT_MAX_LENGTH if max_new_tokens is None else None
    return max_length or None

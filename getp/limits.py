"""The default limits of a request's length."""

DEFAULT_MAX_LENGTH = 1024  # tokens, prompt included: of a text prompt
DEFAULT_NEW_TOKENS = 4096  # of an answer to a JSONL request
NO_LIMIT = 1 << 60  # stands for "no limit" where token counts are compared

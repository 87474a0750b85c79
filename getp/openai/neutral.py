"""Fields of OpenAI and vLLM that have no reader: those without effect, and unsupported ones."""

from typing import Any

# Fields that do not affect the tokens. `model` is ignored because a job has only one model.
IGNORED_FIELDS = frozenset(
    """model user metadata store service_tier safety_identifier prompt_cache_key
    prompt_cache_retention stream stream_options request_id priority
    cache_salt guided_decoding_backend""".split()
)
# Unsupported fields: the values that have no effect, and the error message for any other value.
_NOT_SUPPORTED = "is not supported"
_OLD_TOOLS = "is OpenAI's former field: use 'tools' and 'tool_choice'"
_NEUTRAL_VALUES: dict[str, tuple[tuple[Any, ...], str]] = {
    "suffix": (("",), _NOT_SUPPORTED),
    "length_penalty": ((1,), "must be 1 (beam search is not supported)"),
    "typical_p": ((1,), "must be 1 (typical sampling is not supported)"),
    "use_beam_search": ((False,), "must be false (beam search is not supported)"),
    "early_stopping": ((False,), "must be false (beam search is not supported)"),
    "allowed_token_ids": (([],), _NOT_SUPPORTED),
    "spaces_between_special_tokens": ((True,), "must be true"),
    "detokenize": ((True,), "must be true"),
    "return_token_ids": ((False,), _NOT_SUPPORTED),
    "return_tokens_as_token_ids": ((False,), _NOT_SUPPORTED),
    "truncate_prompt_tokens": ((), _NOT_SUPPORTED),
    "vllm_xargs": (({},), _NOT_SUPPORTED),
}
_NEUTRAL_IN_TEXT = {
    "add_special_tokens": ((True,), "must be true"),
}
_NEUTRAL_IN_CHAT = {
    "echo": ((False,), "must be false (echo is not supported in chats)"),
    "add_special_tokens": ((False,), "must be false (the chat template writes them)"),
    "add_generation_prompt": ((True,), "must be true"),
    "continue_final_message": ((False,), "must be false (this is not supported)"),
    "include_reasoning": ((True,), "must be true"),
    "verbosity": (("medium",), "must be 'medium'"),
    "modalities": ((["text"],), "must be ['text']"),
    "documents": (([],), _NOT_SUPPORTED),
    "functions": (([],), _OLD_TOOLS),
    "function_call": (("none", "auto"), _OLD_TOOLS),
}
NEUTRAL = {
    True: _NEUTRAL_VALUES | _NEUTRAL_IN_CHAT,
    False: _NEUTRAL_VALUES | _NEUTRAL_IN_TEXT,
}
"""For chats (True) and texts: field → the values without effect, and what is wrong with others."""


def equals_neutral(value: Any, neutral: Any) -> bool:
    """Return whether a value is one without effect."""
    # In Python, True == 1.
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral

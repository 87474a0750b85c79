"""Text to token ids and back: tokenizer.json, streaming, chat templates, harmony channels.

The package is a leaf: it imports none of the other packages and does not deal with models, input
files or terminals. The main class is `Tokenizer`.
"""

from tokenizer.chat import ChatTemplate, Message
from tokenizer.errors import TemplateError, TokenizerError
from tokenizer.harmony import HarmonyParser, answer_text
from tokenizer.stream import StopStrings, StreamDecoder
from tokenizer.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "HarmonyParser",
    "Message",
    "StopStrings",
    "StreamDecoder",
    "TemplateError",
    "Tokenizer",
    "TokenizerError",
    "answer_text",
]

"""Reading the keys of a config.json, with errors that name the file and the key."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from model.config import CheckpointError

# Keys that cannot change what a forward pass computes (training, bookkeeping, generation).
_HARMLESS = frozenset(
    """architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward dtype
    eos_token_id id2label initializer_range is_decoder is_encoder_decoder
    keys_to_ignore_at_inference label2id max_length name_or_path output_attentions
    output_hidden_states output_router_logits pad_token_id pretraining_tp problem_type return_dict
    router_aux_loss_coef router_jitter_noise sep_token_id task_specific_params tokenizer_class
    torch_dtype torchscript transformers_version unk_token_id use_cache use_return_dict
    unsloth_fixed unsloth_version""".split()
)

# The largest values of integers, far above those of every published model. Whatever is larger is a
# mistake or an attack, and would take much time before something else refuses it.
_MAXIMUM = {
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "num_experts": 1 << 12,
    "num_local_experts": 1 << 12,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 20,
    "moe_intermediate_size": 1 << 20,
    "vocab_size": 1 << 24,
}


class Keys:
    """The keys of one JSON object and the file or name that errors refer to."""

    def __init__(self, source: str | Path, values: dict[str, Any]):
        self.source, self.values = source, values

    def fail(self, problem: str) -> CheckpointError:
        """The error to raise for a problem with these keys."""
        return CheckpointError(f"{self.source}: {problem}")

    def get(self, key: str, default: Any = None) -> Any:
        """A value of any type; null counts as missing."""
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """An integer of at least `minimum` that is not absurdly large.

        Raises CheckpointError for any other value, and if it is missing without a default.
        """
        value = self.get(key, default)
        if value is None:
            raise self.fail(f"'{key}' is missing")
        maximum = _MAXIMUM.get(key, 2**31 - 1)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.fail(
                f"'{key}' must be an integer from {minimum} to {maximum}, not {value!r:.60}"
            )
        return value

    def optional_integer(self, key: str) -> int | None:
        """An integer of at least 1, or None if the key is missing."""
        return None if self.get(key) is None else self.integer(key)

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0. Raises CheckpointError if missing without a default."""
        value = self.get(key, default)
        if value is None:
            raise self.fail(f"'{key}' is missing")
        if not _is_positive(value):
            raise self.fail(f"'{key}' must be a number above 0, not {value!r}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A number above 0, or None if the key is missing."""
        return None if self.get(key) is None else self.number(key)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` numbers above 0. Raises CheckpointError."""
        value = self.get(key)
        if value is None:
            raise self.fail(f"'{key}' is missing")
        if not isinstance(value, list) or not all(map(_is_positive, value)):
            raise self.fail(f"'{key}' must be a list of numbers above 0")
        if len(value) != count:
            raise self.fail(f"'{key}' must contain {count} numbers, not {len(value)}")
        return tuple(map(float, value))

    def boolean(self, key: str, default: bool) -> bool:
        """True or False."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(f"'{key}' must be true or false, not {value!r}")
        return value

    def token_ids(self, key: str) -> frozenset[int]:
        """One token id or a list of them; empty if the key is missing."""
        ids = self.get(key, [])
        ids = ids if isinstance(ids, list) else [ids]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.fail(f"'{key}' must be token ids, not {ids!r}")
        return frozenset(ids)

    def refuse_unknown(self, understood: Iterable[str]) -> None:
        """Raise CheckpointError for a key that has a value and is not understood."""
        known = _HARMLESS.union(understood)
        for key, value in self.values.items():
            if key in known or key.startswith("_"):
                continue
            if value is None or value is False or value == [] or value == {}:
                continue  # switched off
            raise self.fail(
                f"'{key}' = {str(value)[:60]} is not supported and may change the results; if it "
                "does not, remove it from the file"
            )


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30

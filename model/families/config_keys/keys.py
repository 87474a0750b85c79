"""Reading the keys of a config.json, with errors that name the file and the key."""

import json
from collections.abc import Collection, Container, Mapping
from pathlib import Path
from typing import Any

from model.config import CheckpointError

# Keys that cannot change what a forward pass computes. Each is in published configs, or was written
# by transformers into every config of its time.
_HARMLESS = frozenset(
    """architectures auto_map chunk_size_feed_forward dtype eos_token_id finetuning_task id2label
    initializer_range internal_version is_decoder is_llama_config keys_to_ignore_at_inference
    label2id max_sequence_length model_max_length name_or_path neftune_noise_alpha num_labels
    output_attentions output_hidden_states output_router_logits prefix pretraining_tp problem_type
    return_dict task_specific_params tf_legacy_loss tokenizer_class torch_dtype torchscript
    transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache
    use_return_dict

    bos_token_id decoder_start_token_id eod_token_id pad_token_id sep_token_id unk_token_id

    attention_dropout attn_pdrop embd_pdrop resid_pdrop residual_dropout
    aux_loss_alpha ep_size router_aux_loss_coef router_jitter_noise seq_aux

    bad_words_ids begin_suppress_tokens cache_implementation diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty
    max_length max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_logits output_scores penalty_alpha
    remove_invalid_values renormalize_logits repetition_penalty return_dict_in_generate
    suppress_tokens temperature top_k top_p typical_p""".split()
)
# Keys of other architectures that published configs of these families contain, each with the value
# at which it changes nothing.
_NEUTRAL: dict[str, Any] = {
    "activation": "swiglu",
    "is_causal": True,
    "shared_expert_intermediate_size": 0,
}

# The largest values of integers, far above those of every published model. Whatever is larger is a
# mistake or an attack, and would take much time before something else refuses it.
_MAXIMUM = {
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "kv_lora_rank": 1 << 14,
    "q_lora_rank": 1 << 16,
    "qk_nope_head_dim": 1 << 14,
    "qk_rope_head_dim": 1 << 14,
    "v_head_dim": 1 << 14,
    "num_experts": 1 << 12,
    "num_local_experts": 1 << 12,
    "n_routed_experts": 1 << 12,
    "n_shared_experts": 1 << 6,
    "n_group": 1 << 10,
    "num_nextn_predict_layers": 1 << 10,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 20,
    "moe_intermediate_size": 1 << 20,
    "shared_expert_intermediate_size": 1 << 20,
    "vocab_size": 1 << 24,
}


_MAX_PROBLEM = 1000  # characters of a message


class Keys:
    """The keys of one JSON object and the file or name that errors refer to.

    A missing key has its value in `defaults`, if there is one; null means that it has no value.
    """

    def __init__(
        self, source: str | Path, values: dict[str, Any], defaults: Mapping[str, Any] | None = None
    ):
        self.source, self.values, self.defaults = source, values, defaults or {}

    def fail(self, problem: str) -> CheckpointError:
        """The error to raise for a problem with these keys."""
        if len(problem) > _MAX_PROBLEM:  # a value of the file can have any length
            problem = f"{problem[:_MAX_PROBLEM]}…"
        return CheckpointError(f"{self.source}: {problem}")

    def get(self, key: str, default: Any = None) -> Any:
        """A value of any type; `default` if it is null, or missing without a default of its own."""
        value = self.values.get(key, self.defaults.get(key))
        return default if value is None else value

    def inside(self, key: str, values: dict[str, Any]) -> "Keys":
        """The keys of the object that is the value of a key."""
        return Keys(f"{self.source}: {key}", values)

    def with_defaults(self, defaults: Mapping[str, Any], neutral: Collection[str] = ()) -> "Keys":
        """These keys with defaults, which name all keys that are understood.

        Those in `neutral` may have any value. Raises CheckpointError for other keys.
        """
        self.refuse_unknown({*defaults, *neutral})
        return Keys(self.source, self.values, defaults)

    def one_of(self, key: str, *allowed: Any) -> Any:
        """A value that must be one of these; null is the default. Raises CheckpointError."""
        value = self.get(key, self.defaults.get(key))
        if not any(
            value is each or (type(value) is type(each) and value == each) for each in allowed
        ):
            raise self.fail(
                f"'{key}' = {str(value)[:60]} is not supported; supported: "
                f"{', '.join(map(str, allowed))}"
            )
        return value

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
        """An integer of at least 1, or None if the key has no value."""
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
        """A number above 0, or None if the key has no value."""
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

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """True or False; null is the default."""
        value = self.get(key, self.defaults.get(key, default))
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

    def refuse_unknown(
        self, understood: Container[str], neutral: Mapping[str, Any] | None = None
    ) -> None:
        """Raise CheckpointError for a key that is not understood and may change the results.

        Accepted are keys that cannot change them, keys with no value, keys that are switched off
        by false or an empty value, and those that have their value in `neutral` (or _NEUTRAL).
        """
        needed = _NEUTRAL | dict(neutral or {})
        for key, value in self.values.items():
            if value is None or key in understood or key in _HARMLESS or key.startswith("_"):
                continue
            if key in needed:
                # 1 and True are equal, but not the same setting.
                number = isinstance(value, int | float) and not isinstance(value, bool)
                if value == needed[key] and number == (type(needed[key]) is int):
                    continue
                wanted, given = json.dumps(needed[key]), json.dumps(value)[:60]
                raise self.fail(f"'{key}' must be {wanted}, not {given}")
            if value is False or value in ([], {}):
                continue
            raise self.fail(
                f"'{key}' = {str(value)[:60]} is not supported and may change the results; if it "
                "does not, remove it from the file"
            )


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30

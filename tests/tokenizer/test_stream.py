import codecs
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.getp.helpers import byte_level, metaspace, metaspace_by_words
from tokenizer import StopStrings, StreamDecoder, Tokenizer

BYTE_LEVEL = Tokenizer(byte_level())
METASPACE = Tokenizer(metaspace())
METASPACE_BY_WORDS = Tokenizer(metaspace_by_words())


def decode_in_pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=60))
def test_pieces_of_any_byte_level_tokens_join_to_the_decoded_text(ids: list[int]) -> None:
    assert "".join(decode_in_pieces(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


@given(
    st.text(
        st.characters(exclude_categories=["Cs"]) | st.sampled_from("🙂👩‍🚀한é the"), max_size=40
    )
)
def test_pieces_of_any_text_join_to_the_decoded_text(text: str) -> None:
    for tokenizer in (BYTE_LEVEL, METASPACE, METASPACE_BY_WORDS):
        ids = tokenizer.encode(text, special=False)
        assert "".join(decode_in_pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_an_emoji_is_returned_with_its_last_byte() -> None:
    ids = BYTE_LEVEL.encode("a🙂b", special=False)
    assert len(ids) == 6
    assert decode_in_pieces(BYTE_LEVEL, ids) == ["a", "", "", "", "🙂", "b", ""]


def test_spaces_between_sentencepiece_words_are_kept_and_the_first_one_is_dropped() -> None:
    ids = METASPACE.encode("ab the  ab", special=False)
    assert "".join(decode_in_pieces(METASPACE, ids)) == METASPACE.decode(ids) == "ab the  ab"


def test_an_incomplete_character_at_the_end_becomes_the_replacement_character() -> None:
    ids = BYTE_LEVEL.encode("🙂", special=False)[:2]
    assert decode_in_pieces(BYTE_LEVEL, ids) == ["", "", "\ufffd"]


def test_long_runs_of_invalid_bytes_are_emitted_in_a_window_of_constant_length() -> None:
    longest = 0

    class Counting(Tokenizer):
        def decode(self, ids: list[int], skip_special: bool = True) -> str:  # type: ignore[override]
            nonlocal longest
            longest = max(longest, len(ids))
            return super().decode(ids, skip_special)

    tokenizer = Counting(byte_level())
    lone_byte = BYTE_LEVEL.encode("🙂", special=False)[1]
    pieces = decode_in_pieces(tokenizer, [lone_byte] * 200)
    assert "".join(pieces) == "\ufffd" * 200
    assert longest < 30


@given(st.text("ab-", max_size=30), st.lists(st.text("ab-", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_stop_string_that_is_completed_first(
    text: str, stops: list[str]
) -> None:
    ends = [
        (end, start)
        for stop in stops
        for start in range(len(text))
        if (end := start + len(stop)) <= len(text) and text[start:end] == stop
    ]
    expected = text[: min(ends)[1]] if ends else text
    for size in (1, 2, 5):
        matcher, shown, stopped = StopStrings(stops), "", False
        for at in range(0, len(text), size):
            result = matcher.push(text[at : at + size])
            shown += result.text
            assert expected.startswith(shown)  # returned text is never withdrawn
            if stopped := result.stopped:
                break
        assert shown + ("" if stopped else matcher.flush()) == expected
        assert stopped == bool(ends)


def test_only_a_suffix_that_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["</end>"])
    assert [matcher.push(piece).text for piece in ("one", " <", "b>", "</e")] == [
        "one",
        " ",
        "<b>",
        "",
    ]
    assert matcher.push("nd> more").stopped


def test_an_empty_stop_string_is_rejected() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["x", ""])


def test_byte_level_pieces_agree_with_an_incremental_utf8_decoder() -> None:
    data = bytes(itertools.chain(range(256), "ß🙂".encode(), range(255, -1, -1)))
    to_char = dict(zip(_byte_order(), _char_order(), strict=True))
    ids = [BYTE_LEVEL.token_id(to_char[byte]) for byte in data]
    assert all(token_id is not None for token_id in ids)
    text = "".join(
        decode_in_pieces(BYTE_LEVEL, [token_id for token_id in ids if token_id is not None])
    )
    assert text == codecs.getincrementaldecoder("utf-8")("replace").decode(data, final=True)


def _byte_order() -> list[int]:
    """GPT-2's order of bytes: printable bytes map to themselves, the others from U+0100 up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return printable + [byte for byte in range(256) if byte not in printable]


def _char_order() -> list[str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(c) for c in printable] + [chr(256 + n) for n in range(256 - len(printable))]

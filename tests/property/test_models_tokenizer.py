"""Every text survives its encoding, and every name its batch."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.models.tokenizer import END, Tokenizer, train_tokenizer

TOKENIZER = train_tokenizer(["def add(first, second):\n    return first + second\n" * 20, "Grüße 🙂\n"], 400)
AGAIN = Tokenizer.from_bytes(TOKENIZER.to_bytes())


@given(st.text(max_size=60))
def test_decoding_an_encoding_gives_the_text_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert END not in ids
    assert all(0 < token < TOKENIZER.vocab_size for token in ids)


@given(st.lists(st.text(max_size=30), max_size=5))
def test_a_stored_tokenizer_encodes_alike_alone_and_in_batches(texts: list[str]) -> None:
    assert [ids.tolist() for ids in AGAIN.encode_all(texts)] == [TOKENIZER.encode(text) for text in texts]


@settings(max_examples=50)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=20))
def test_any_ids_have_a_text(ids: list[int]) -> None:
    assert isinstance(TOKENIZER.decode(ids), str)

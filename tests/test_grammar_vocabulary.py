"""Tokens as bytes: they spell what the tokenizer reads and writes, for byte-level and for sentencepiece vocabularies.

pytest tests/test_grammar_vocabulary.py
"""

import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from errors import UserError
from grammar.vocabulary import Vocabulary
from tokenizer import Tokenizer

TINY = Path(__file__).parent.parent / "assets" / "folio-tiny"
WORDS = ["the", "cat", "sat", "{", "}", '"name":', '"age"', "12", ", ", "été", "日本", "\n", "true", "[", "]", "naïve"]
ODD = st.sampled_from('{}[]":, \\\n\tabc019.é日🙂\u0301')
TEXT = st.text(ODD | st.characters(codec="utf-8"), max_size=40)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("sentencepiece")
    rng = random.Random(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(rng.choices(WORDS, k=8)) for _ in range(500)]),
        model_prefix=str(folder / "tokenizer"), vocab_size=330, model_type="bpe", byte_fallback=True, minloglevel=2,
        user_defined_symbols=["<tool>"], hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return {"byte-level": Tokenizer.from_pretrained(TINY), "sentencepiece": Tokenizer.from_pretrained(folder)}


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def pair(request, tokenizers) -> tuple[Tokenizer, Vocabulary]:
    tokenizer = tokenizers[request.param]
    return tokenizer, Vocabulary.of(tokenizer, tokenizer.vocab_size + 7, sorted(tokenizer.eos_token_ids))


def test_tokens_spell_texts(pair):
    tokenizer, vocabulary = pair

    @settings(max_examples=300)
    @given(TEXT)
    def spells(text: str):
        ids = vocabulary.encode(text)
        spelled = b"".join(vocabulary.tokens[i] for i in ids)
        assert spelled == text.encode()
        before = tokenizer.encode("a", add_special_tokens=False)  # a decoder drops the space that a text begins with
        assert tokenizer.decode([*before, *ids]).encode() == b"a" + spelled

    spells()


def test_sentencepiece_prompts_begin_with_a_space_and_texts_do_not(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    vocabulary = Vocabulary.of(tokenizer, tokenizer.vocab_size, sorted(tokenizer.eos_token_ids))
    as_prompt = tokenizer.encode("cat", add_special_tokens=False)
    assert b"".join(vocabulary.tokens[i] for i in as_prompt) == b" cat"
    assert b"".join(vocabulary.tokens[i] for i in vocabulary.encode("cat")) == b"cat"


def test_control_tokens_and_ids_of_nobody_are_no_text(pair):
    tokenizer, vocabulary = pair
    assert len(vocabulary) == tokenizer.vocab_size + 7
    assert vocabulary.tokens[-7:] == [b""] * 7
    assert all(vocabulary.tokens[i] == b"" for i in tokenizer.special_ids | tokenizer.eos_token_ids)
    empty = {i for i, token in enumerate(vocabulary.tokens) if not token}
    assert empty == set(tokenizer.special_ids) | tokenizer.eos_token_ids | set(
        range(tokenizer.vocab_size, len(vocabulary))
    )


def test_a_symbol_that_is_no_control_token_is_text(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    vocabulary = Vocabulary.of(tokenizer, tokenizer.vocab_size, sorted(tokenizer.eos_token_ids))
    assert vocabulary.tokens[tokenizer.backend.token_to_id("<tool>")] == b"<tool>"


def test_every_byte_can_be_spelled(pair):
    _, vocabulary = pair
    assert {token for token in vocabulary.tokens if len(token) == 1} == {bytes([i]) for i in range(256)}


def test_tokens_by_prefix(pair):
    _, vocabulary = pair
    rng = random.Random(1)
    prefixes = {token[: rng.randint(0, 3)] for token in vocabulary.tokens} | {b"\xff", b"\xff\xff", b"no such"}
    for prefix in prefixes:
        expected = {i for i, token in enumerate(vocabulary.tokens) if token and token.startswith(prefix)}
        assert set(vocabulary.starting_with(prefix)) == expected


def test_a_vocabulary_needs_an_end_and_a_kind():
    with pytest.raises(UserError, match="names no token that ends a text"):
        Vocabulary([b"a"], [], list)
    backend = Backend(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match="neither"):
        Vocabulary.of(Tokenizer(backend, {}, {}), 2, [0])

"""A sentencepiece `tokenizer.model` as a tokenizer of the `tokenizers` library, with the ids of sentencepiece itself.

The file is a protobuf message: pieces with scores, and how text is normalised. `transformers` can convert it too, but wants
the protobuf package for it, and its result differs from sentencepiece on repeated spaces.

Tests: `pytest tests/test_tokenizer.py` (against the sentencepiece library).
"""

import struct
from collections.abc import Iterator

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors


def sentencepiece_decoder(prefix: bool) -> decoders.Decoder:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + [decoders.Strip(content=" ", left=1)] * prefix)


def load_sentencepiece(data: bytes, config: dict, special: dict) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """A sentencepiece model as a `tokenizers` one that gives the same ids, and its special tokens.

    User-defined pieces become added tokens, as in transformers, so that the text behind one is normalised, and prefixed
    with a space, like a text of its own. BOS is added unless tokenizer_config.json says otherwise, as the Llama family
    expects; the model itself does not say.
    """
    # The fields of sentencepiece_model.proto used here, with their defaults:
    # piece: 1 text, 2 score, 3 type; trainer: 3 model_type, 35 byte_fallback, 40-42 ids of unk, bos, eos;
    # normalizer: 2 precompiled_charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces, 5 escape_whitespaces
    proto = list(_protobuf(data))
    pieces = [{1: b"", 2: bytes(4), 3: 1} | dict(_protobuf(value)) for field, value in proto if field == 1]
    trainer = {3: 1, 35: 0, 40: 0, 41: 1, 42: 2} | dict(_protobuf(b"".join(v for f, v in proto if f == 2)))
    normal = {2: b"", 3: 1, 4: 1, 5: 1} | dict(_protobuf(b"".join(v for f, v in proto if f == 3)))
    vocab = [(piece[1].decode(), struct.unpack("<f", piece[2])[0]) for piece in pieces]
    backend = tokenizers.Tokenizer(_sentencepiece_model(vocab, [piece[3] for piece in pieces], trainer))
    steps = [normalizers.Precompiled(normal[2])] if normal[2] else []
    if normal[4]:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" +"), " ")]
    steps += [normalizers.Prepend(" ")] * normal[3] + [normalizers.Replace(" ", "▁")] * normal[5]
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = sentencepiece_decoder(prefix=bool(normal[3]))
    kinds = {2: True, 3: True, 4: False}  # unknown and control pieces are special, user-defined ones only indivisible
    added = [(text, kinds[piece[3]]) for (text, _), piece in zip(vocab, pieces, strict=True) if piece[3] in kinds]
    backend.add_tokens([AddedToken(text, normalized=False, special=is_special) for text, is_special in added])
    ids = {"unk_token": trainer[40], "bos_token": trainer[41], "eos_token": trainer[42]}
    special = {name: vocab[i][0] for name, i in ids.items() if 0 <= i < len(vocab)} | special
    ends = [config.get("add_bos_token", True) and special.get("bos_token")]
    ends += [config.get("add_eos_token", False) and special.get("eos_token")]
    backend.post_processor = processors.TemplateProcessing(
        single=[token for token in (ends[0], "$A", ends[1]) if token],
        special_tokens=[(token, backend.token_to_id(token)) for token in ends if token],
    )
    return backend, special


def _sentencepiece_model(vocab: list[tuple[str, float]], kinds: list[int], trainer: dict) -> models.Model:
    if not vocab or trainer[3] not in (1, 2):
        raise ValueError("not a sentencepiece model of type BPE or unigram")
    if trainer[3] == 1:
        return models.Unigram(vocab, unk_id=trainer[40], byte_fallback=bool(trainer[35]))
    ids = {text: i for i, (text, _) in enumerate(vocab)}
    # sentencepiece merges whichever pair makes the piece of the best score: a merge ranks as the piece it makes.
    merges = [
        (score, cut, text)
        for (text, score), kind in zip(vocab, kinds, strict=True)
        for cut in range(1, len(text))
        if kind in (1, 4, 5) and text[:cut] in ids and text[cut:] in ids
    ]
    pairs = [(text[:cut], text[cut:]) for _, cut, text in sorted(merges, reverse=True)]
    unknown = vocab[trainer[40]][0]
    return models.BPE(ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=bool(trainer[35]))


def _protobuf(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of each field of a protobuf message: all of the format that this file needs."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value - (1 << 64) if value >> 63 else value

    while at < len(data):
        field, kind = divmod(varint(), 8)
        if kind == 0:
            yield field, varint()
        elif kind in (1, 2, 5):
            size = {1: 8, 2: 0, 5: 4}[kind] or varint()
            yield field, data[at : at + size]
            at += size
        else:
            raise ValueError("not a sentencepiece model")

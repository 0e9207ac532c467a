"""The tokenizer against transformers and sentencepiece, on tokenizers made here, and on real ones where they are kept.

    pytest tests/test_tokenizer.py

The detokenizer is property-tested: whatever the ids and however they are split, its deltas add up to the full decode.
`test_simpler_detokenizers_break` shows that the same examples tell the obvious methods apart from it.
"""

import itertools
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tokenizer import Tokenizer, TokenizerError

REAL = Path(os.environ.get("FOLIO_TEST_DATA", "no-such-folder"))  # real tokenizers, where there are some
REAL_FOLDERS = ["tokenizers/qwen2.5", "tokenizers/llama2", "models/stories260K"]
TEXTS = [
    "Hello world",
    " leading and  double  spaces ",
    "",
    " ",
    "line\n\n  indented\ttab\n",
    "naïve café e\u0301 ﬁ",
    "日本語のテキスト 🙂👩‍👩‍👧 ok",
    "<s>special</s> inside <s> it's 3.14, isn't it?",
]
TEMPLATE = (
    "{{ bos_token }}{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}\n"
    "{%- for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no role ' ~ m.role) }}{% endif %}\n"
    "    {%- if m.role == 'skip' %}{% continue %}{% endif %}\n"
    "    {%- generation %}<{{ m.role }}>{% if m.content is defined %}{{ m.content }}{% endif %}{% endgeneration %}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}{{ mood }}{{ documents is defined }}"
)
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<b>ü & 'q'</b>", "parameters": {}}}]
CHAT = [
    {"role": "user", "content": " Hi <s> 日本 "},
    {"role": "skip", "content": "x"},
    {"role": "assistant", "content": None, "name": "a"},
]
fixed = settings(max_examples=100, derandomize=True)


def sentences(n=400):
    words = [
        "the",
        "a",
        "cat",
        "dog",
        "runs",
        "over",
        "lazy",
        "naïve",
        "café日本",
        "語",
        "world",
        "it's",
        "fn(x):",
        "🙂",
    ]
    rng = random.Random(1)
    return [" ".join(rng.choices(words, k=rng.randint(3, 12))) + rng.choice(".!?") for _ in range(n)]


def write(folder, config=None, **files):
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def make_byte_level(folder):
    """Byte-level BPE whose post-processor adds BOS, with added tokens of every kind."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(sentences(), trainer)
    backend.add_tokens([AddedToken("<l>", lstrip=True), AddedToken("<r>", rstrip=True), "added words", "日本"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(5)
    write(folder, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
                   "eos_token": {"__type": "AddedToken", "content": "</s>"},
                   "pad_token": "[PAD]", "add_bos_token": False, "chat_template": TEMPLATE,
                   "added_tokens_decoder": {"402": {"content": "<x>", "special": True}}})  # fmt: skip
    backend.save(str(folder / "tokenizer.json"))


def make_sentencepiece(folder, kind, **options):
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()), model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type=kind,
        byte_fallback=True, user_defined_symbols=["<tool>"], minloglevel=2, hard_vocab_limit=False, **options,
    )  # fmt: skip


def make_llama(folder, source, legacy, prefix=None):
    """A tokenizer.json as converters wrote it, whose class makes transformers split it in another way."""
    backend = Tokenizer.from_pretrained(source).backend
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    write(folder, {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": False, "bos_token": "<s>",
                   "eos_token": "</s>", "unk_token": "<unk>", "add_prefix_space": prefix})  # fmt: skip
    backend.save(str(folder / "tokenizer.json"))


def make_cleaned(folder, kind):
    """Not BPE, with clean_up_tokenization_spaces: pieces of a kind that the clean-up has something to do with."""
    words = ["[UNK]", "n", "'", "'t", "t", "##n", "##'", "##t", "m", "s", "ve", "re", ".", "?", "!", ",", "##.", "x"]
    if kind == "wordpiece":
        backend = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
        backend.decoder, backend.pre_tokenizer = decoders.WordPiece(cleanup=False), pre_tokenizers.Whitespace()
    else:
        pieces = [w.replace("##", "▁") for w in words] + ["▁", "▁▁"]
        backend = tokenizers.Tokenizer(models.Unigram([(w, -1.0) for w in dict.fromkeys(pieces)], unk_id=0))
        backend.decoder, backend.pre_tokenizer = decoders.Metaspace(), pre_tokenizers.Metaspace()
    write(folder, {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True})
    backend.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    make_byte_level(root / "bytes")
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    make_sentencepiece(root / "sp", "bpe", **plain)
    make_sentencepiece(root / "sp-nfkc", "bpe", pad_id=3)
    make_sentencepiece(root / "sp-unigram", "unigram", **plain, add_dummy_prefix=False)
    make_llama(root / "llama", root / "sp", legacy=False)
    make_llama(root / "llama-legacy", root / "sp", legacy=True)
    make_llama(root / "llama-no-prefix", root / "sp", legacy=True, prefix=False)
    make_cleaned(root / "wordpiece", "wordpiece")
    make_cleaned(root / "unigram", "unigram")
    return root


MADE = ["bytes", "sp", "sp-nfkc", "sp-unigram", "llama", "llama-legacy", "llama-no-prefix", "wordpiece", "unigram"]
HUGGING = ["bytes", "llama", "llama-legacy", "llama-no-prefix", "wordpiece", "unigram"]


def locate(folders, name):
    path = REAL / name if "/" in name else folders / name
    if not path.is_dir():
        pytest.skip(f"{name} is not kept on this machine")
    return path


# ---- the same ids and texts as transformers and sentencepiece


@pytest.mark.parametrize("name", HUGGING + REAL_FOLDERS)
def test_equals_transformers(folders, name):
    path = locate(folders, name)
    ours, theirs = Tokenizer.from_pretrained(path), transformers.AutoTokenizer.from_pretrained(path)
    rng = random.Random(0)
    for text in [*TEXTS, *sentences(20), "x" * 50]:
        for special in (True, False):
            assert ours.encode(text, special) == theirs.encode(text, add_special_tokens=special), text
    for _ in range(50):
        ids = [rng.randrange(ours.vocab_size) for _ in range(12)]
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.vocab_size == len(theirs)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == {theirs.eos_token_id} - {None}
    assert ours.special_ids >= set(theirs.all_special_ids)


@pytest.mark.parametrize("name", ["sp", "sp-nfkc", "sp-unigram", "tokenizers/llama2", "models/stories260K"])
def test_equals_sentencepiece(folders, name, tmp_path):
    shutil.copy(locate(folders, name) / "tokenizer.model", tmp_path)
    ours = Tokenizer.from_pretrained(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    for text in [*TEXTS[:-1], *sentences(100)]:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text), text
        assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))
    if "sp" in name:
        tool = theirs.piece_to_id("<tool>")
        assert ours.encode("a<tool>").count(tool) == 1 and tool not in ours.special_ids
    assert ours.encode("a cat") == [theirs.bos_id(), *theirs.encode("a cat")]
    assert (ours.vocab_size, ours.eos_token_ids) == (theirs.get_piece_size(), {theirs.eos_id()})
    write(tmp_path, {"add_bos_token": False, "add_eos_token": True})
    assert Tokenizer.from_pretrained(tmp_path).encode("a cat") == [*theirs.encode("a cat"), theirs.eos_id()]


def test_special_tokens(folders):
    ours = Tokenizer.from_pretrained(folders / "bytes")
    text = "a <l> b <r> c <x> d added words"
    assert ours.encode(text)[0] == ours.bos_token_id == 0
    assert ours.backend.token_to_id("[PAD]") in ours.special_ids
    assert ours.decode(ours.encode(text)) == "a<l> b <r>c  d added words"
    assert ours.decode(ours.encode(text), skip_special_tokens=False) == "<s>a<l> b <r>c <x> d added words"


def test_token_text(folders):
    sp, byte_level = Tokenizer.from_pretrained(folders / "sp"), Tokenizer.from_pretrained(folders / "bytes")
    assert [sp.token_text(sp.backend.token_to_id(t)) for t in ("▁the", "<0xE2>", "<s>")] == [" the", "\ufffd", "<s>"]
    assert [byte_level.token_text(byte_level.backend.token_to_id(t)) for t in ("Ġthe", "Ã", "<l>")] == [
        " the", "\ufffd", "<l>"]  # fmt: skip


# ---- chat templates


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_equals_transformers(folders, tools, prompt):
    path = folders / "bytes"
    ours, theirs = Tokenizer.from_pretrained(path), transformers.AutoTokenizer.from_pretrained(path)
    options = {"tools": tools, "add_generation_prompt": prompt, "mood": "!"}
    assert ours.render_chat(CHAT, **options) == theirs.apply_chat_template(CHAT, tokenize=False, **options)
    ids = ours.apply_chat_template(CHAT, **options)
    assert ids == theirs.apply_chat_template(CHAT, return_dict=False, **options)
    assert ids[:2].count(ours.bos_token_id) == 1
    assert CHAT[2]["content"] is None  # the caller's messages stay as they were


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_real_chat_template(folders, tools):
    path = locate(folders, "tokenizers/qwen2.5")
    ours, theirs = Tokenizer.from_pretrained(path), transformers.AutoTokenizer.from_pretrained(path)
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "<1> & ü"}}}
    chat = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
    ]
    assert ours.apply_chat_template(chat, tools) == theirs.apply_chat_template(
        chat, tools=tools, add_generation_prompt=True, return_dict=False
    )


def test_where_templates_are_found(folders, tmp_path):
    def rendered(tools=None, **files):
        for old in tmp_path.glob("*chat_template*"):
            old.unlink()
        write(tmp_path, **files)
        return Tokenizer.from_pretrained(tmp_path).render_chat([{"role": "user", "content": "x"}], tools)

    shutil.copy(folders / "bytes" / "tokenizer.json", tmp_path)
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    assert rendered(config={"chat_template": named}) == "plain"
    assert rendered(TOOLS, config={"chat_template": named}) == "tools"
    assert rendered(chat_template__jinja="file", config={"chat_template": "config"}) == "file"
    assert rendered(chat_template__json='{"chat_template": "json"}', config={}) == "json"
    with pytest.raises(TokenizerError, match="no chat template 'default'"):
        rendered(config={})


def test_chat_errors(folders):
    ours = Tokenizer.from_pretrained(folders / "bytes")
    with pytest.raises(TokenizerError, match="no role bad"):
        ours.apply_chat_template([{"role": "bad", "content": "x"}])
    with pytest.raises(TokenizerError, match="at least one message"):
        ours.apply_chat_template([])
    for source in ("{% if %}", "{{ messages.x.y }}", "{{ 1 / 0 }}", "{{ ''.__class__.__mro__[1] }}"):
        with pytest.raises(TokenizerError, match="the chat template failed: ."):
            Tokenizer(ours.backend, {}, {"default": source}).render_chat(CHAT)


# ---- the detokenizer


def deltas(tokenizer, ids, sizes, skip=True):
    stream, out, rest = tokenizer.detokenizer(skip), [], list(ids)
    for size in itertools.cycle(sizes):
        if not rest:
            break
        out.append(stream.add(rest[:size]))
        rest = rest[size:]
    out.append(stream.finish())
    assert stream.text == "".join(out)
    assert stream.finish() == ""
    return out


def interesting_ids(tokenizer):
    """Ids, mostly of the tokens that make trouble: single bytes, special and added tokens, spaces."""
    backend = tokenizer.backend
    tokens = {i: backend.id_to_token(i) for i in range(tokenizer.vocab_size)}
    odd = [i for i, t in tokens.items() if (t and (t.startswith("<") or set(t) <= set("▁ Ġâðï¿Ł½ĤĻÃ"))) or i % 97 == 0]
    odd += [i for i, t in tokens.items() if t in {f"<0x{b:02X}>" for b in (*"🙂€é ".encode(), 0xFF)}] * 6
    return st.lists(st.sampled_from(odd) | st.integers(0, tokenizer.vocab_size - 1), max_size=60)


@pytest.mark.parametrize("name", MADE + REAL_FOLDERS)
def test_deltas_add_up(folders, name):
    tokenizer = Tokenizer.from_pretrained(locate(folders, name))

    @fixed
    @given(interesting_ids(tokenizer), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.booleans())
    def ids_of_any_kind(ids, sizes, skip):
        assert "".join(deltas(tokenizer, ids, sizes, skip)) == tokenizer.decode(ids, skip)

    @fixed
    @given(st.text(st.sampled_from("ab \n'.n日本é\u0301🙂👩\u200d\ufffd") | st.characters(codec="utf-8"), max_size=40))
    def text_of_any_kind(text):
        ids = tokenizer.encode(text)
        assert "".join(deltas(tokenizer, ids, [1])) == tokenizer.decode(ids)

    ids_of_any_kind()
    text_of_any_kind()


@pytest.mark.parametrize("name", ["bytes", "sp"])
def test_every_split_point(folders, name):
    tokenizer = Tokenizer.from_pretrained(folders / name)
    ids = tokenizer.encode(" 🙂日 the café</s> world 🙂")
    for split in range(len(ids) + 1):
        stream = tokenizer.detokenizer()
        first = stream.add(ids[:split])
        assert first + stream.add(ids[split:]) + stream.finish() == tokenizer.decode(ids)
        assert "\ufffd" not in first


def per_token(tokenizer, ids):
    return [tokenizer.decode([i]) for i in ids]


def prefix_offset(tokenizer, ids):
    """As in TGI and vLLM: two offsets, and text that ends in U+FFFD is held, whatever comes."""
    out, prefix, read = [], 0, 0
    for end in range(1, len(ids) + 1):
        old, new = tokenizer.decode(ids[prefix:read]), tokenizer.decode(ids[prefix:end])
        if len(new) > len(old) and not new.endswith("\ufffd"):
            out.append(new[len(old) :])
            prefix, read = read, end
    return [*out, tokenizer.decode(ids[prefix:])[len(tokenizer.decode(ids[prefix:read])) :]]


def library_stream(tokenizer, ids):
    stream = decoders.DecodeStream(skip_special_tokens=True)
    return [stream.step(tokenizer.backend, i) or "" for i in ids]


@pytest.mark.parametrize(
    ("method", "folder", "tokens"),
    [
        (per_token, "bytes", ["ð", "Ł", "Ļ", "Ĥ"]),  # a character over four tokens
        (per_token, "sp", ["▁the", "▁the"]),  # the space of a word
        (prefix_offset, "wordpiece", ["x", "n", "'", "t"]),  # a clean-up that reaches back: "x n ' t" is "xn't"
        (prefix_offset, "sp", ["<0xE2>", "<0x82>", "<0xAC>", "<0xFF>", "▁the"]),  # a valid run that breaks later
        (library_stream, "bytes", ["Ġthe", "ð"]),  # an end in the middle of a character
    ],
)
def test_simpler_detokenizers_break(folders, method, folder, tokens):
    tokenizer = Tokenizer.from_pretrained(folders / folder)
    ids = [tokenizer.backend.token_to_id(token) for token in tokens]
    assert None not in ids
    assert "".join(method(tokenizer, ids)) != tokenizer.decode(ids) == "".join(deltas(tokenizer, ids, [1]))


@pytest.mark.parametrize(("folder", "bad"), [("bytes", "ð"), ("sp", "<0xFF>")])
def test_broken_bytes_are_not_held(folders, folder, bad):
    """Text flows (one character behind) through endless invalid bytes, and through words, with a bounded window."""
    tokenizer = Tokenizer.from_pretrained(folders / folder)
    stream = tokenizer.detokenizer()
    bad = tokenizer.backend.token_to_id(bad)
    for count in range(1, 300):
        stream.add([bad])
        assert count - 1 <= len(stream.text) <= count
        assert len(stream._window) <= stream.WINDOW
    word = tokenizer.encode("world", add_special_tokens=False)
    assert [stream.add(word) for _ in range(50)][-1].strip() == "world"


def test_broken_run_stays_broken(folders):
    """Characters far behind the byte that broke their run look valid, but the full decode has U+FFFD for them."""
    tokenizer = Tokenizer.from_pretrained(folders / "sp")
    tokens = ["▁the", "<0xFF>"] + ["<0xE2>", "<0x82>", "<0xAC>"] * 20 + ["▁the"]
    ids = [tokenizer.backend.token_to_id(t) for t in tokens]
    assert "".join(deltas(tokenizer, ids, [1])) == tokenizer.decode(ids) == "the" + "\ufffd" * 61 + " the"


def test_text_is_not_held_back(folders):
    """A whole character, or a word, is out as soon as its last token is in; a byte run once it is over or broken."""
    tokenizer = Tokenizer.from_pretrained(folders / "bytes")
    add = tokenizer.detokenizer().add
    assert [add([tokenizer.backend.token_to_id(t)]) for t in ("Ġthe", "ð", "Ł", "Ļ", "Ĥ", "ð", "ð")] == [
        " the", "", "", "", "🙂", "", "\ufffd"]  # fmt: skip
    tokenizer = Tokenizer.from_pretrained(folders / "sp")
    add = tokenizer.detokenizer().add
    run = ["▁the", "<0xC3>", "<0xA9>", "▁the", "<0xC3>", "<0xFF>", "<0xFF>", "▁the"]
    assert [add([tokenizer.backend.token_to_id(t)]) for t in run] == [
        "the", "", "", "é the", "", "\ufffd", "\ufffd", "\ufffd the"]  # fmt: skip


# ---- bad input


def test_unreadable_folders(folders, tmp_path):
    with pytest.raises(TokenizerError, match=r"nowhere is not a folder"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match=r"looked for tokenizer.json and tokenizer.model"):
        Tokenizer.from_pretrained(write(tmp_path / "empty"))
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.json"):
        for content in ("{broken", "[]", '{"a": ', "", "IQ== 0\nIg== 1\n"):
            folder = tmp_path / f"bad-{name}"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(folders / "bytes", folder)
            if name == "tokenizer.model":
                (folder / "tokenizer.json").unlink()
            if name == "chat_template.json":
                (folder / "tokenizer_config.json").unlink()
            (folder / name).write_text(content)
            with pytest.raises(TokenizerError, match=f"cannot read .*bad-{name}"):
                Tokenizer.from_pretrained(folder)


def test_bad_ids_and_text(folders):
    tokenizer = Tokenizer.from_pretrained(folders / "bytes")
    size = tokenizer.vocab_size
    for call in (tokenizer.decode, tokenizer.detokenizer().add):
        for bad in (size, -1, 10**12):
            with pytest.raises(ValueError, match=f"{bad} is outside the vocabulary of {size} ids"):
                call([0, bad])
    with pytest.raises(TokenizerError, match="valid Unicode"):
        tokenizer.encode("half \ud83d")


def test_import_is_cheap():
    import subprocess
    import sys

    code = "import sys, tokenizer; print([m for m in ('torch', 'transformers', 'jinja2') if m in sys.modules])"
    root = Path(__file__).parents[1]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"

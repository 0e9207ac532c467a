"""The engine end to end on tiny random models: same tokens on any road, every way to end, pages given back.

pytest tests/test_engine.py
"""

import functools
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import zoo
from test_families import folder, our_model
from tokenizers import decoders, models, pre_tokenizers
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from waiting import HANG, until

from engine import Engine, SamplingParams
from engine_args import BUNDLED_MODEL
from errors import UserError
from tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
TEXT_PROMPTS = ["Once", " upon a time", "x", "0123456789 " * 3]


@functools.cache
def tokenizer() -> Tokenizer:
    """Byte-level, 128 tokens: all of ASCII that can be seen, and ids 102 to 127 of two letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ascii_only = [c for c in alphabet if c.isascii()] + ["Ġ", "Ċ", "ł", "Ģ", "ģ", "Ĥ", "ĥ", "Ħ"]
    vocab = {c: i for i, c in enumerate(ascii_only)}
    merges = [(a, b) for a in "aeiou" for b in "nrstl"]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    assert len(vocab) <= zoo.VOCAB
    return Tokenizer(backend, {}, {}, False)


@functools.cache
def model(name: str = "llama3"):
    return our_model(folder(name))


def make(name: str = "llama3", **options) -> Engine:
    return Engine(model(name), tokenizer(), **({"max_batch_size": 4, "page_size": 4} | options))


def prompt_ids(*lengths: int) -> list[list[int]]:
    rng = random.Random(sum(lengths))
    return [[rng.randrange(zoo.VOCAB) for _ in range(n)] for n in lengths]


def ids_of(outputs) -> list[list[int]]:
    return [c.token_ids for output in outputs for c in output.outputs]


def settle(engine: Engine) -> None:
    """Wait until what was closed has left, then check that nothing is lost."""
    until(lambda: not engine.has_work)
    engine.check()
    assert engine.scheduler.available_pages == engine.pool.total and not engine._groups and not engine._live


def one(engine: Engine, prompt, **params):
    (output,) = engine.generate(prompt, SamplingParams(**({"temperature": 0, "max_new_tokens": 12} | params)))
    engine.check()
    return output.outputs[0]


# ---- the same tokens on any road

MIXED = [
    GREEDY,
    SamplingParams(temperature=1.0, seed=1, max_new_tokens=9),
    SamplingParams(temperature=0.7, top_p=0.8, seed=2, max_new_tokens=15, presence_penalty=1.0),
    SamplingParams(temperature=2.0, top_k=20, min_p=0.01, seed=3, max_new_tokens=12, frequency_penalty=0.5),
    SamplingParams(temperature=0, repetition_penalty=1.4, max_new_tokens=14),
    SamplingParams(temperature=0, max_new_tokens=20, logprobs=2),
]


@functools.cache
def alone(name: str) -> list[list[int]]:
    """Each request of MIXED by itself, in a new engine each."""
    prompts = prompt_ids(3, 20, 33, 8, 17, 1)
    return [ids_of(make(name).generate(p, params))[0] for p, params in zip(prompts, MIXED, strict=True)]


@pytest.mark.parametrize("name", ["llama3", "gemma2", "deepseek_v3_dense"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_size": 1},
        {"max_batch_size": 6},
        {"chunk_size": 1},
        {"chunk_size": 7},
        {"page_size": 1},
        {"page_size": 16},
        {"page_size": 5, "chunk_size": 3},
        {"max_total_tokens": 60},
    ],
    ids=str,
)
def test_batch_chunks_and_pages_change_nothing(name: str, options: dict):
    """Greedy and seeded; with fewer rows or pages than requests, some wait."""
    engine = make(name, **options)
    prompts = prompt_ids(3, 20, 33, 8, 17, 1)
    assert len({tuple(ids) for ids in alone(name)}) == len(MIXED)
    assert ids_of(engine.generate(prompts, MIXED)) == alone(name)
    engine.check()
    backwards = ids_of(engine.generate(prompts[::-1], MIXED[::-1]))  # rows and pages that others have used
    assert backwards[::-1] == alone(name)
    engine.check()


def test_a_row_keeps_nothing_of_who_had_it_before():
    """A greedy request in a sampled batch, in rows whose last owners had every penalty."""
    engine = make()
    heavy = SamplingParams(
        temperature=1.5, repetition_penalty=5.0, presence_penalty=2.0, frequency_penalty=2.0, min_new_tokens=99,
        logit_bias=dict.fromkeys(range(5), 90.0), stop_token_ids=list(range(5, 30)), max_new_tokens=99, top_k=2,
    )  # fmt: skip
    prompts = prompt_ids(5, 6, 7, 8)
    expected = [ids_of(make().generate(p, GREEDY))[0] for p in prompts[:3]]
    engine.generate(prompts, heavy)
    together = engine.generate(prompts, [GREEDY, GREEDY, GREEDY, SamplingParams(seed=1, max_new_tokens=12)])
    assert ids_of(together)[:3] == expected


def test_n_samples():
    engine = make()
    params = SamplingParams(n=6, seed=5, max_new_tokens=10, temperature=1.5)
    (output,) = engine.generate(prompt_ids(9)[0], params)
    assert [c.index for c in output.outputs] == list(range(6))
    assert len({tuple(c.token_ids) for c in output.outputs}) == 6
    assert ids_of(engine.generate(prompt_ids(9)[0], params)) == ids_of([output])
    single = SamplingParams(seed=5, max_new_tokens=10, temperature=1.5)
    assert ids_of(engine.generate(prompt_ids(9)[0], single))[0] == output.outputs[0].token_ids
    (greedy,) = engine.generate(prompt_ids(9)[0], SamplingParams(n=3, temperature=0, max_new_tokens=5))
    assert len({tuple(c.token_ids) for c in greedy.outputs}) == 1
    engine.check()


def test_the_largest_seed_with_many_samples():
    (output,) = make().generate([1], SamplingParams(n=2, seed=2**63 - 1, max_new_tokens=2))
    assert [c.finish_reason for c in output.outputs] == ["length"] * 2


def test_without_a_seed_two_runs_differ():
    engine, params = make(), SamplingParams(temperature=2.0, max_new_tokens=20)
    assert ids_of(engine.generate([1], params)) != ids_of(engine.generate([1], params))


# ---- text and streams


def test_texts_are_the_decoded_ids():
    engine = make()
    outputs = engine.generate(TEXT_PROMPTS, GREEDY)
    for text, output in zip(TEXT_PROMPTS, outputs, strict=True):
        c = output.outputs[0]
        assert output.prompt == text and output.prompt_token_ids == tokenizer().encode(text)
        assert c.text == tokenizer().decode([i for i in c.token_ids if i < tokenizer().vocab_size])
        assert (len(c.token_ids), c.finish_reason, len(c.metrics.token_times)) == (12, "length", 12)
        assert c.metrics.token_times == sorted(c.metrics.token_times) and c.logprobs is None
    assert any(c.text for output in outputs for c in output.outputs)


@pytest.mark.parametrize("stop", [[], ["an"], ["e", "o", " "]], ids=str)
def test_deltas_add_up_to_what_generate_gives(stop: list[str]):
    engine = make()
    params = SamplingParams(n=3, temperature=1.2, seed=11, max_new_tokens=40, stop=stop)
    for prompt in TEXT_PROMPTS:
        deltas = list(engine.stream(prompt, params))
        (output,) = engine.generate(prompt, params)
        for c in output.outputs:
            mine = [d for d in deltas if d.index == c.index]
            assert "".join(d.text for d in mine) == c.text
            assert [i for d in mine for i in d.token_ids] == c.token_ids
            assert [d.finish_reason for d in mine] == [None] * (len(mine) - 1) + [c.finish_reason]
            assert mine[-1].stop_reason == c.stop_reason
    engine.check()


@pytest.mark.parametrize("after", [0, 1, 5])
def test_closing_a_stream_gives_everything_back(after: int):
    engine = make(chunk_size=8)
    stream = engine.stream(prompt_ids(30)[0], SamplingParams(n=6, temperature=0, max_new_tokens=50))
    for _ in range(after):
        next(stream)
    stream.close()
    settle(engine)
    assert one(engine, [1, 2]).finish_reason == "length"


def test_streams_that_run_together():
    """Steps of one carry the other; closing one leaves the other whole."""
    engine, (a, b, c) = make(), prompt_ids(5, 9, 7)
    first, second, third = (engine.stream(p, GREEDY) for p in (a, b, c))
    ids = [next(first).token_ids, next(second).token_ids, next(third).token_ids]
    third.close()
    for delta in first:
        ids[0] = ids[0] + delta.token_ids
    for delta in second:
        ids[1] = ids[1] + delta.token_ids
    assert ids[:2] == ids_of(make().generate([a, b], GREEDY))
    settle(engine)


# ---- how a text ends


@functools.cache
def free_run() -> tuple[str, list[int]]:
    c = one(make(), "Once", temperature=1.0, seed=4, max_new_tokens=40)
    return c.text, c.token_ids


SAMPLED = dict(temperature=1.0, seed=4, max_new_tokens=40)


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("at", [0, 7, 20])
def test_stop_strings(length: int, at: int):
    text, ids = free_run()
    stop = text[at : at + length]
    c = one(make(), "Once", stop=["\x00never", stop], **SAMPLED)
    assert (c.finish_reason, c.stop_reason) == ("stop", stop)
    assert c.text == text[: text.index(stop)]
    assert c.token_ids == ids[: len(c.token_ids)]
    so_far = [tokenizer().decode([i for i in ids[:n] if i < tokenizer().vocab_size]) for n in range(len(ids) + 1)]
    assert len(c.token_ids) == next(n for n, part in enumerate(so_far) if stop in part)


def test_a_stop_string_before_min_new_tokens_does_not_end():
    text, ids = free_run()
    c = one(make(), "Once", stop=text[:1], min_new_tokens=10, **SAMPLED)
    assert len(c.token_ids) >= 10 and c.token_ids[:10] == ids[:10]
    assert c.text.startswith(text[:1])


def test_stop_token_ids():
    _, ids = free_run()
    stop = ids[8]
    first = ids.index(stop)
    c = one(make(), "Once", stop_token_ids=[stop], **SAMPLED)
    assert (c.finish_reason, c.stop_reason, c.token_ids) == ("stop", stop, ids[: first + 1])
    assert c.text == tokenizer().decode([i for i in ids[:first] if i < tokenizer().vocab_size])  # it is no text


def test_eos_and_ignore_eos():
    _, ids = free_run()
    engine = make(eos_token_ids=[ids[8]])
    c = one(engine, "Once", **SAMPLED)
    assert (c.finish_reason, c.stop_reason, c.token_ids) == ("stop", ids[8], ids[: ids.index(ids[8]) + 1])
    c = one(engine, "Once", ignore_eos=True, **SAMPLED)
    assert (c.finish_reason, c.stop_reason, c.token_ids) == ("length", None, ids)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_min_new_tokens_bans_stop_ids(temperature: float):
    """With all ids but one a stop id, only that one may come until then."""
    every = list(range(zoo.VOCAB))
    params = dict(temperature=temperature, seed=0, stop_token_ids=every[:32], logit_bias=dict.fromkeys(every[:32], 100))
    assert len(one(make(), [1, 2, 3], **params).token_ids) == 1
    c = one(make(), [1, 2, 3], min_new_tokens=5, **params)
    assert len(c.token_ids) == 6 and c.finish_reason == "stop"
    assert all(i >= 32 for i in c.token_ids[:5]) and c.stop_reason == c.token_ids[5] < 32


def test_max_new_tokens_and_the_end_of_the_context():
    engine = make(max_model_len=32)
    assert len(one(engine, [1] * 10, max_new_tokens=1).token_ids) == 1
    for params in ({"max_new_tokens": None}, {"max_new_tokens": 22}):
        c = one(engine, [1] * 10, **params)
        assert (len(c.token_ids), c.finish_reason) == (22, "length")
    assert len(one(engine, [1] * 31, max_new_tokens=None).token_ids) == 1


@pytest.mark.parametrize("max_model_len, page_size", [(33, 16), (10, 16), (100, 128), (31, 4)])
def test_the_default_cache_holds_the_longest_sequence(max_model_len: int, page_size: int):
    """Also when that is no multiple of the page size."""
    engine = make(max_model_len=max_model_len, page_size=page_size, max_batch_size=1)
    assert len(one(engine, [1, 2, 3], max_new_tokens=None).token_ids) == max_model_len - 3


@pytest.mark.parametrize("name, row", [("llama3", 2 * 2 * 32), ("youtu", 24 + 8)])
@pytest.mark.parametrize("device, share", [("cpu", 0.5), ("cuda", 0.9)])
def test_the_cache_takes_a_share_of_the_memory_that_the_largest_step_leaves(
    device: str, share: float, name: str, row: int, monkeypatch
):
    """On a GPU that step is run first, to see what it needs. (A stand-in for the GPU.)"""
    asked = []
    runner = SimpleNamespace(device=torch.device(device), memory_of_largest_step=lambda n: asked.append(n) or 400_000)
    monkeypatch.setattr("engine.free_memory", lambda on: 2_400_000)
    tokens = Engine._tokens_in_memory(SimpleNamespace(model=model(name), runner=runner), 77)
    c = model(name).config
    left = 2_400_000 - (400_000 if device == "cuda" else 0)
    assert tokens == int(left * share) // (c.num_layers * row * 4)
    assert asked == ([77] if device == "cuda" else [])


# ---- logprobs and penalties, against transformers


@functools.cache
def theirs(name: str):
    return zoo.build(name)


@pytest.mark.parametrize(
    "params", [dict(temperature=0), dict(temperature=1.5, seed=3, top_k=9, repetition_penalty=1.5)]
)
@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_logprobs_are_those_of_transformers(name: str, params: dict):
    prompt = prompt_ids(12)[0]
    c = one(make(name), prompt, logprobs=5, max_new_tokens=10, **params)
    with torch.no_grad():
        logits = theirs(name)(torch.tensor([prompt + c.token_ids])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    assert len(c.logprobs) == 10
    for i, token in enumerate(c.token_ids):
        mine, row = c.logprobs[i], expected[i]
        assert mine.token_id == token and len(mine.top) == 5
        assert mine.logprob == pytest.approx(row[token].item(), abs=1e-4)
        above = [int((row > row[token] + close).sum()) for close in (1e-4, -1e-4)]
        assert above[0] + 1 <= mine.rank <= above[1]  # the token itself is among the second
        assert [v for _, v in mine.top] == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)
        assert [row[k].item() for k, _ in mine.top] == pytest.approx([v for _, v in mine.top], abs=1e-4)
    if params["temperature"]:
        assert max(x.rank for x in c.logprobs) > 1


def test_logprobs_of_none_and_of_the_chosen_alone():
    prompts = prompt_ids(4, 4)
    with_none, bare = make().generate(prompts, [SamplingParams(logprobs=0, max_new_tokens=3, seed=1), GREEDY])
    assert [x.top for x in with_none.outputs[0].logprobs] == [[], [], []]
    assert bare.outputs[0].logprobs is None


@pytest.mark.parametrize("penalty", [1.3, 0.8, 2.5])
@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_the_repetition_penalty_of_transformers(name: str, penalty: float):
    prompt = torch.tensor(prompt_ids(15))
    expected = (
        theirs(name)
        .generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=30,
            do_sample=False,
            logits_processor=LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)]),
        )[0, 15:]
        .tolist()
    )
    ours = one(make(name), prompt[0].tolist(), repetition_penalty=penalty, max_new_tokens=30).token_ids
    assert ours == expected != one(make(name), prompt[0].tolist(), max_new_tokens=30).token_ids


# ---- what goes wrong, and harms nobody else


NAN_PARAMS = [dict(temperature=0), dict(temperature=1.0, seed=1), dict(temperature=0, logprobs=3)]


def poisoned(**options) -> Engine:
    """An engine whose model makes NaN of token 5, and of nothing else."""
    weights = our_model(folder("llama2"))
    weights.embed.weight = torch.nn.Parameter(weights.embed.weight.clone(), requires_grad=False)
    weights.embed.weight[5] = float("nan")
    return Engine(weights, tokenizer(), max_batch_size=3, page_size=16, chunk_size=20, **options)


@pytest.mark.parametrize("params", NAN_PARAMS, ids=str)
@pytest.mark.parametrize("bad", [[7, 8, 5], [5] * 12, [7] * 49 + [5]], ids=["last token", "all", "last of many"])
def test_nan_logits_end_one_request_and_harm_no_other(params: dict, bad: list[int]):
    """Healthy requests run next to it, and after it on the pages that it had."""
    engine = poisoned(max_total_tokens=9 * 16)
    healthy = [[i for i in p if i != 5] for p in prompt_ids(9, 12, 7)]
    settings = SamplingParams(max_new_tokens=11, logit_bias={5: -100}, **params)
    expected = ids_of(engine.generate(healthy, settings))
    first, error, second = engine.generate([healthy[0], bad, healthy[1]], settings)
    c = error.outputs[0]
    assert (c.finish_reason, c.token_ids, c.text) == ("error", [], "") and "not finite" in c.stop_reason
    assert ids_of([first, second]) == expected[:2]
    settle(engine)
    for _ in range(2):
        after = engine.generate(healthy, settings)
        assert [o.outputs[0].finish_reason for o in after] == ["length"] * 3
        assert ids_of(after) == expected


@pytest.mark.parametrize("params", NAN_PARAMS, ids=str)
def test_a_request_that_ends_with_an_error_has_as_many_times_and_logprobs_as_tokens(params: dict):
    c = one(poisoned(), [5], **params)
    assert (c.token_ids, c.metrics.token_times, c.logprobs or []) == ([], [], [])


REFUSED = {
    "too long": ([1] * 32, {}, "the prompt has 32 tokens; the context has 32"),
    "far too long": ([1] * 1000, {}, "the prompt has 1000 tokens; the context has 32"),
    "no ids": ([[]], {}, "the prompt is empty"),
    "no text": ("", {}, "the prompt is empty"),
    "id too large": ([1, 128], {}, "prompt has token id 128; the vocabulary has ids 0 to 127"),
    "negative id": ([1, -1], {}, "prompt has token id -1"),
    "stop id": ([1], {"stop_token_ids": [3, 128]}, "stop_token_ids has token id 128"),
    "bias": ([1], {"logit_bias": {-3: 1.0}}, "logit_bias has token id -3"),
    "more than fits": ([1] * 30, {"max_new_tokens": 3}, "30 prompt tokens + 3 new ones exceed the context of 32"),
    "stop ids": ([1], {"stop_token_ids": list(range(33))}, "32 is the limit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused(case: str):
    prompt, params, message = REFUSED[case]
    engine = make(max_model_len=32)
    with pytest.raises(UserError, match=message.replace("+", r"\+")):
        engine.generate(prompt, SamplingParams(**params))
    with pytest.raises(UserError, match=message.replace("+", r"\+")):
        list(engine.stream(prompt if case != "no ids" else [], SamplingParams(**params)))
    engine.check()
    assert one(engine, [1, 2]).finish_reason == "length"


def test_one_prompt_that_never_fits_takes_the_others_with_it():
    engine = make(max_total_tokens=20, max_model_len=100)
    with pytest.raises(UserError, match="34 tokens .* cache of 20"):
        engine.generate(prompt_ids(3, 30, 3), SamplingParams(max_new_tokens=4))
    settle(engine)


def test_lists_of_prompts():
    engine = make()
    assert engine.generate([]) == []
    assert len(engine.generate("x", GREEDY)) == len(engine.generate([1, 2], GREEDY)) == 1
    assert len(engine.generate(["x", [1, 2]], [GREEDY, MIXED[1]])) == 2
    with pytest.raises(UserError, match="2 prompts, but 1 sampling params"):
        engine.generate(["x", "y"], [GREEDY])
    with pytest.raises(UserError, match="no tokenizer"):
        Engine(model(), max_batch_size=1).generate("x")
    assert Engine(model(), max_batch_size=1).generate([1], GREEDY)[0].outputs[0].text == ""


@pytest.mark.parametrize(
    "options",
    [{"max_batch_size": 0}, {"chunk_size": 0}, {"page_size": 0}, {"page_size": 129}, {"max_model_len": 1},
     {"max_model_len": 257}, {"max_total_tokens": 0}, {"max_total_tokens": -5}, {"max_total_tokens": 3}],
    ids=str,
)  # fmt: skip
def test_options_that_make_no_sense(options: dict):
    with pytest.raises(UserError):
        make(**options)


def test_from_pretrained(tmp_path: Path):
    zoo.save(theirs("llama3"), tmp_path)
    tokenizer().backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    engine = Engine.from_pretrained(tmp_path, device="cpu", max_model_len=64, max_batch_size=2)
    assert engine.eos_token_ids == [3, 4] and engine.max_model_len == 64
    mine, same = engine.generate("Once", GREEDY), make(eos_token_ids=[3, 4]).generate("Once", GREEDY)
    assert (mine[0].outputs[0].text, ids_of(mine)) == (same[0].outputs[0].text, ids_of(same))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts the threads that Linux tells of")
def test_who_has_loaded_leaves_no_openmp_team_behind():
    script = f"""
import os, torch
from engine import Engine
torch.set_num_threads(2)
before = set(os.listdir("/proc/self/task"))
torch.ones(1 << 20) * 2
team = set(os.listdir("/proc/self/task")) - before
assert team, "there was no team: this test could not fail"
engine = Engine.from_pretrained({str(BUNDLED_MODEL)!r}, dtype="float32")
assert not team & set(os.listdir("/proc/self/task")), "the team is still there"
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1], timeout=HANG)

"""What requests read of their own prompts, against transformers: logprobs of each token, pooled hidden states.

python -m pytest tests/test_readings.py
"""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import Engine, SamplingParams
from errors import UserError

TINY = Path(__file__).parent.parent / "assets" / "folio-tiny"
TEXTS = ["Once upon a time there was a little dog.", "Rain", "The cat sat on the mat, and the mat was red. " * 6]


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


def engine_of(**options) -> Engine:
    return Engine.from_pretrained(TINY, dtype="float32", **options)


@pytest.fixture(scope="module", params=[dict(), dict(chunk_size=16), dict(overlap=False, max_batch_size=1)], ids=str)
def engine(request):
    return engine_of(**request.param)


def hidden_states(reference, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference.model(torch.tensor([ids])).last_hidden_state[0]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_those_of_transformers(engine, reference, pooling):
    for _ in range(2):  # the second time there is something in the cache
        for text, got in zip(TEXTS, engine.embed(TEXTS, pooling), strict=True):
            hidden = hidden_states(reference, engine.tokenizer.encode(text))
            expected = hidden.mean(0) if pooling == "mean" else hidden[-1]
            torch.testing.assert_close(torch.tensor(got), expected, atol=1e-4, rtol=1e-4)
    engine.check()


def test_logprobs_of_prompts_are_those_of_transformers(engine, reference):
    engine.generate(TEXTS, SamplingParams(max_new_tokens=1))  # so that they are cached
    params = SamplingParams(prompt_logprobs=3, max_new_tokens=4, temperature=0)
    for text, output in zip(TEXTS, engine.generate(TEXTS, params), strict=True):
        ids = engine.tokenizer.encode(text)
        with torch.inference_mode():
            expected = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert [token.token_id for token in output.prompt_logprobs] == ids[1:]
        got = torch.tensor([token.logprob for token in output.prompt_logprobs])
        torch.testing.assert_close(
            got, expected[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0], atol=1e-4, rtol=1e-4
        )
        for token, row in zip(output.prompt_logprobs, expected, strict=False):
            top = row.topk(3)
            torch.testing.assert_close(torch.tensor([v for _, v in token.top]), top.values, atol=1e-4, rtol=1e-4)
            assert token.rank == 1 + int((row > row[token.token_id] + 1e-5).sum())
    engine.check()


def test_the_others_get_the_text_that_they_get_alone():
    engine = engine_of(chunk_size=32)
    plain, reads = SamplingParams(temperature=0, max_new_tokens=12), SamplingParams(pooling="mean")
    alone = engine.generate(TEXTS, plain)
    mixed = engine.generate(TEXTS * 2, [plain] * 3 + [reads] * 3)
    assert [o.outputs[0].token_ids for o in mixed[:3]] == [o.outputs[0].token_ids for o in alone]
    assert [o.outputs[0].finish_reason for o in mixed[3:]] == ["stop"] * 3


def test_with_a_grammar_and_with_several_samples(reference):
    engine = engine_of()
    params = SamplingParams(prompt_logprobs=0, n=3, seed=1, max_new_tokens=6, regex="[0-9]{3}", logprobs=1)
    [output] = engine.generate(["My number is "], params)
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids) - 1
    assert all(len(o.text) == 3 and o.text.isdigit() and o.logprobs for o in output.outputs)
    engine.check()


def test_what_reads_all_takes_nothing_from_the_cache_and_leaves_it_to_others():
    engine, one = engine_of(), SamplingParams(max_new_tokens=1)
    cached = [
        engine.generate([TEXTS[2]], params)[0].outputs[0].metrics.cached_tokens
        for params in (one, SamplingParams(pooling="mean"), one, SamplingParams(prompt_logprobs=0, max_new_tokens=0))
    ]
    assert cached[0] == cached[1] == cached[3] == 0 and cached[2] > 64
    engine.flush_cache()
    engine.embed([TEXTS[2]])
    assert engine.generate([TEXTS[2]], one)[0].outputs[0].metrics.cached_tokens == cached[2]
    engine.check()


def test_a_reading_from_some_position_on_takes_what_is_before_it_from_the_cache(engine):
    ids = engine.tokenizer.encode(TEXTS[2])
    [whole] = engine.generate([ids], SamplingParams(prompt_logprobs=2, max_new_tokens=0))
    page, again = engine.pool.page_size, [random.randrange(len(ids)) for _ in range(5)]
    for start in [0, 1, 2, page, page + 1, page + 2, len(ids) - 1, len(ids), *again]:
        [part] = engine.generate([ids], SamplingParams(prompt_logprobs=2, logprob_start_len=start, max_new_tokens=0))
        expected = whole.prompt_logprobs[max(0, start - 1) :]
        assert [token.token_id for token in part.prompt_logprobs] == ids[max(1, start) :]
        got = [token.logprob for token in part.prompt_logprobs]
        assert got == pytest.approx([token.logprob for token in expected], abs=1e-4)
        cached = part.outputs[0].metrics.cached_tokens
        assert cached == min(max(0, start - 1), len(ids) - 1) // page * page
    engine.check()


def test_many_that_read_the_ends_of_what_begins_alike():
    engine = engine_of(chunk_size=64, max_batch_size=4)
    prompt = engine.tokenizer.encode(TEXTS[2])
    params = SamplingParams(prompt_logprobs=0, logprob_start_len=len(prompt), max_new_tokens=0)
    prompts = [prompt + engine.tokenizer.encode(word) for word in ("red", "green", "blue", "a dog", "Rain") * 3]
    together = engine.generate(prompts, params)
    alone = [engine_of().generate([ids], params)[0] for ids in prompts[:5]]
    for i, output in enumerate(together):
        assert [x.token_id for x in output.prompt_logprobs] == prompts[i][len(prompt) :]
        expected = [x.logprob for x in alone[i % 5].prompt_logprobs]
        assert [x.logprob for x in output.prompt_logprobs] == pytest.approx(expected, abs=1e-4)
    shared = (len(prompt) - 1) // engine.pool.page_size * engine.pool.page_size
    assert sorted({output.outputs[0].metrics.cached_tokens for output in together}) == [0, shared]
    engine.check()


def test_no_token_is_wanted():
    engine = engine_of()
    params = SamplingParams(max_new_tokens=0, logprobs=1, n=2, regex="[0-9]{3}")
    [output] = engine.generate([TEXTS[0]], params)
    for sample in output.outputs:
        assert (sample.text, sample.token_ids, sample.logprobs, sample.finish_reason) == ("", [], [], "length")
    assert not [delta for delta in engine.stream(TEXTS[0], params) if delta.text or delta.token_ids]
    engine.check()


@pytest.mark.parametrize("chunk_size", [16, 64])
def test_a_prompt_that_is_preempted_is_read_anew(reference, chunk_size):
    engine = engine_of(chunk_size=chunk_size, overlap=False)  # between two of its steps, nobody is in flight
    ids = engine.tokenizer.encode(TEXTS[2])
    for params in (SamplingParams(pooling="mean"), SamplingParams(prompt_logprobs=0, max_new_tokens=8, temperature=0)):
        expected = engine.generate([ids], params)[0]
        engine.add(ids, params, request_id="again")
        deltas, preempted = [], False
        while engine.has_work:
            deltas += engine.step()
            for request in [*engine.scheduler.prefilling, *engine.scheduler.running]:
                if not preempted and not request.in_flight and request.computed:
                    engine.scheduler.preempt(request)
                    preempted = True
        told = [d for d in deltas if d.embedding is not None or d.prompt_logprobs is not None]
        assert preempted and len(told) == 1
        if params.pooling:
            torch.testing.assert_close(torch.tensor(told[0].embedding), torch.tensor(expected.outputs[0].embedding))
        else:
            got = [token.logprob for token in told[0].prompt_logprobs]
            assert got == pytest.approx([token.logprob for token in expected.prompt_logprobs], abs=1e-4)
        engine.check()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(pooling="max"), "pooling is 'max'"),
        (dict(pooling="mean", n=2), "n is 2"),
        (dict(prompt_logprobs=21), "prompt_logprobs is 21"),
        (dict(logprob_start_len=2), "logprob_start_len is 2, but prompt_logprobs is not given"),
        (dict(prompt_logprobs=0, logprob_start_len=-1), "logprob_start_len is -1"),
        (dict(max_new_tokens=-1), "max_new_tokens is -1"),
    ],
)
def test_what_is_wrong_is_named(wrong, says):
    with pytest.raises(UserError, match=says):
        SamplingParams(**wrong)


def test_a_start_beyond_the_prompt_is_named():
    with pytest.raises(UserError, match="logprob_start_len is 4; the prompt has 3 tokens"):
        engine_of().generate([[5, 6, 7]], SamplingParams(prompt_logprobs=0, logprob_start_len=4))

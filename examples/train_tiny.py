"""Train folio-tiny from scratch: tokenizer, chat template, model, checkpoint folder in Hugging Face form.

    python -m examples.train_tiny --out out/folio-tiny          # the real run; the folder to load is out/folio-tiny/model
    python -m examples.train_tiny --out out/trial --steps 100   # a trial: does the loss fall, how fast is it?

The shipped weights: 2.56 M parameters, 3,000 steps of 4,096 tokens = 12.3 M tokens, 40 minutes on two cores of an AMD
EPYC (Zen 4, AVX-512 with bf16) and torch 2.13. That is 5,100 tokens/s over the whole run and 6,500 while nothing else
ran; a machine that is shared does better with OMP_WAIT_POLICY=passive. The run was stopped and resumed four times: at
step 1,350 to bring in the late mixture of the corpus, then to bring the end nearer. Both are written down below
(LATE, SCHEDULE), so that one uninterrupted run of this command takes the same steps over the same documents.

What each skill needed: the grammar of stories and of JSON came within 500 steps, copying an unseen name from step 900
on, sums only with the late mixture, and a good part of the rest from the decay.

The model is `transformers.LlamaForCausalLM` on purpose: Folio's own model.py has to give the same tokens as an
implementation that we did not write. Everything else is the shortest form of the usual recipe: packed rows,
AdamW, a warm-up, a flat stretch and a decay to zero, and loss on what the model has to say, not on what it reads.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import jinja2
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.tiny_corpus import Chat, documents

VOCAB = 1024  # all of it is used: 3 special tokens, 256 bytes, merges, 2 tool tags; a multiple of 64 as it stands
CONTEXT = 2048
# Row lengths, rows a batch (always 4096 tokens) and their share of the steps. Short rows are where most learning
# happens; the long ones teach that position 1,500 is as good as position 15.
ROWS = {512: (8, 0.65), 1024: (4, 0.25), 2048: (2, 0.10)}
BATCH_TOKENS = 4096
INIT = 0.05  # the usual 0.02 is meant for wider models; attention starts flatter than it need be in one of width 192
# (step, share of the peak learning rate), straight lines between: warm-up, a flat stretch that lets one decide late when
# to stop, decay to zero. The knees of the decay are where the real run was stopped and resumed with a nearer end,
# because the machine had other work to do.
SCHEDULE = [(0, 0.005), (199, 1.0), (2340, 1.0), (2605, 0.83), (2710, 0.73), (3000, 0.0)]
LATE = 1600  # the step from which the late mixture applies
CHUNK = 200  # steps that are generated, tokenized and packed at a time

# ChatML. Tools cost one short line each, in the form of a signature; calls are said in the Hermes / Qwen form.
CHAT_TEMPLATE = """\
{%- set has_system = messages and messages[0].role == 'system' %}
{%- if has_system or tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if has_system %}
        {{- messages[0].content }}
    {%- endif %}
    {%- if tools %}
        {{- ('\\n' if has_system else '') + 'You can call these tools:' }}
        {%- for tool in tools %}
            {%- set f = tool.function if tool.function else tool %}
            {{- '\\n' + f.name + '(' }}
            {%- for key, kind in ((f.parameters or {}).properties or {}).items() %}
                {{- (', ' if not loop.first else '') + key + ': ' + (kind.type or 'any') | string }}
            {%- endfor %}
            {{- '): ' + (f.description or '') }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (loop.first and has_system) %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- set f = call.function if call.function else call %}
            {{- ('\\n' if message.content or not loop.first else '') + '<tool_call>\\n' }}
            {{- '{"name": "' + f.name + '", "arguments": ' }}
            {{- f.arguments if f.arguments is string else f.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def chat_renderer():
    """The chat template, compiled once, for it renders every chat of the training data."""
    env = jinja2.Environment()
    env.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)  # Jinja's own escapes for HTML
    template = env.from_string(CHAT_TEMPLATE)
    return lambda document: template.render(messages=document.messages, tools=document.tools)


def texts(seed: int, long: bool, late: bool = False) -> Iterator[str]:
    render = chat_renderer()
    for document in documents(seed, long, late):
        yield (render(document) if isinstance(document, Chat) else document) + "<|endoftext|>"


def train_tokenizer(samples: int = 40_000) -> Tokenizer:
    """Byte-level BPE: every UTF-8 text round-trips, and each digit is a token, so that sums are learnt by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tags = ["<tool_call>", "</tool_call>"]  # plain tokens: a client must be able to read them in the text
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(tags),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stream = texts(seed=10**6, long=False)  # a seed that training never reaches
    sample = [next(stream) for _ in range(samples)]
    for mark in special + tags:
        sample = [text.replace(mark, "\n") for text in sample]
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    assert tokenizer.get_vocab_size() == VOCAB
    return tokenizer


def loss_mask(ids: list[int], start: int, end: int, header: list[int]) -> np.ndarray:
    """True where a token has to be said: a plain document whole; in a chat, the assistant's words and <|im_end|>."""
    if start not in ids:
        return np.ones(len(ids), dtype=bool)
    mask, speaking, i = np.zeros(len(ids), dtype=bool), False, 0
    while i < len(ids):
        if ids[i] == start:
            speaking = ids[i + 1 : i + 1 + len(header)] == header
            i += len(header) if speaking else 0
        elif speaking:
            mask[i] = True
            speaking = ids[i] != end
        i += 1
    return mask


def packed_rows(tokenizer: Tokenizer, stream: Iterator[str], count: int, length: int) -> np.ndarray:
    """[count, 2, length + 1] int16: ids, and the mask of what to learn. A row starts with the start of a document.

    The documents of a row can see each other: it is cheap, and it teaches the model to ignore what is not its business.
    """
    start, end = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
    header = tokenizer.encode("assistant\n").ids
    rows = np.zeros((count, 2, length + 1), dtype=np.int16)
    row, at = 0, 0
    while row < count:
        for encoding in tokenizer.encode_batch([next(stream) for _ in range(512)]):
            ids = encoding.ids[: length + 1 - at]
            rows[row, 0, at : at + len(ids)] = ids
            rows[row, 1, at : at + len(ids)] = loss_mask(encoding.ids, start, end, header)[: len(ids)]
            at += len(ids)
            if at == length + 1:
                row, at = row + 1, 0
                if row == count:
                    break
    return rows


def chunk_of_batches(tokenizer: Tokenizer, chunk: int) -> list[torch.Tensor]:
    """The batches of steps [chunk * CHUNK, (chunk + 1) * CHUNK), each [rows, 2, length + 1], in a shuffled order."""
    batches = []
    for k, (length, (rows, share)) in enumerate(ROWS.items()):
        steps = round(CHUNK * share)
        stream = texts(seed=chunk * len(ROWS) + k, long=length > 512, late=chunk * CHUNK >= LATE)
        packed = packed_rows(tokenizer, stream, steps * rows, length)
        batches += torch.from_numpy(packed).view(steps, rows, 2, length + 1).unbind()
    order = np.random.default_rng(chunk).permutation(len(batches))
    return [batches[i] for i in order]


def build_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    end, stop = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=512,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        initializer_range=INIT,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=stop,
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():  # as in GPT-2: what writes to the residual stream starts smaller
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(weight, std=INIT / math.sqrt(2 * config.num_hidden_layers))
    model.generation_config = GenerationConfig(eos_token_id=[end, stop], pad_token_id=stop, do_sample=False)
    return model


def learning_rate(step: int, peak: float) -> float:
    steps, shares = zip(*SCHEDULE, strict=True)
    return peak * float(np.interp(step, steps, shares))


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor, bf16: bool) -> torch.Tensor:
    ids, learn = batch[:, 0].long(), batch[:, 1].bool()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # [rows, length, V]
    targets = ids[:, 1:].masked_fill(~learn[:, 1:], -100)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the checkpoint folder in bf16. Files appear by rename, so a reader never sees half of one."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.save_pretrained(fresh)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(fresh, save_jinja_files=False)  # the template stays inside tokenizer_config.json
    folder.mkdir(parents=True, exist_ok=True)
    for file in fresh.iterdir():
        os.replace(file, folder / file.name)
    fresh.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train folio-tiny from scratch.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=SCHEDULE[-1][0], help="stop here; the schedule does not change")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=float, default=300.0, help="seconds between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = train_tokenizer()
    model = build_model(tokenizer)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    state, step = args.out / "state.pt", 0
    if args.resume:
        saved = torch.load(state)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.steps * BATCH_TOKENS:,} tokens", flush=True
    )

    started = saved_at = shown_at = time.time()
    losses: list[float] = []
    batches: list[torch.Tensor] = []
    while step < args.steps:
        if not batches or step % CHUNK == 0:
            batches = chunk_of_batches(tokenizer, step // CHUNK)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.lr)
        loss = loss_of(model, batches[step % CHUNK], args.bf16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        step += 1
        if step % 20 == 0 or step == args.steps:
            speed = len(losses) * BATCH_TOKENS / (time.time() - shown_at)
            print(
                f"step {step} loss {np.mean(losses):.4f} {speed:,.0f} tok/s {time.time() - started:.0f} s", flush=True
            )
            losses, shown_at = [], time.time()
        if time.time() - saved_at > args.save_every or step == args.steps:
            fresh = state.with_suffix(".new")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, fresh)
            os.replace(fresh, state)
            export(model, tokenizer, args.out / "model")
            saved_at = time.time()


if __name__ == "__main__":
    main()

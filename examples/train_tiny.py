"""Train the bundled models from scratch: tokenizer, chat template, model, checkpoint folder in Hugging Face form.

    python -m examples.train_tiny --out out/folio-tiny          # the real run; the folder to load is out/folio-tiny/model
    python -m examples.train_tiny --out out/folio-tiny-mla --architecture mla
    python -m examples.train_tiny --out out/trial --steps 100   # a trial: does the loss fall, how fast is it?

The models are in `tiny_models.py`. Everything else is the shortest form of the usual recipe: packed rows, AdamW
(for the second model Muon, too), a warm-up, a flat stretch and a decay to zero, and loss on what the model has to say,
not on what it reads.

folio-tiny: 2.56 M parameters, 3,000 steps of 4,096 tokens = 12.3 M tokens, 40 minutes on two cores of an AMD EPYC
(Zen 4, AVX-512 with bf16) and torch 2.13. That is 5,100 tokens/s over the whole run and 6,500 while nothing else ran; a
machine that is shared does better with OMP_WAIT_POLICY=passive. The run was stopped and resumed four times: at step
1,350 to bring in the late mixture of the corpus, then to bring the end nearer. Both are written down below (RECIPES), so
that one uninterrupted run of this command takes the same steps over the same documents. What each skill needed: the
grammar of stories and of JSON came within 500 steps, copying an unseen name from step 900 on, sums only with the late
mixture, and a good part of the rest from the decay.

folio-tiny-mla: 3.92 M parameters, 740 steps of 4,096 tokens = 3.0 M tokens, a quarter of what the other read, on the same
machine beside other work that left it 300 to 3,600 tokens/s. Stopped and resumed, too: at step 141 to raise the learning
rate, then to bring the end nearer. The loss was 0.93 by step 380, 0.68 by step
580, for now names were copied, and 0.47 in the end. Of sums it saw too few: the end came before the late mixture.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import jinja2
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from examples.tiny_corpus import Chat, documents
from examples.tiny_models import ARCHITECTURES, BALANCE_RATE, CONTEXT, Balance, build

VOCAB = 1024  # all of it is used: 3 special tokens, 256 bytes, merges, 2 tool tags; a multiple of 64 as it stands
BATCH = 4096  # tokens a step: a multiple of the longest row
CHUNK = 200  # steps that are generated, tokenized and packed at a time


@dataclass(frozen=True)
class Recipe:
    """How long a model learns, and from what. The schedule is (step, share of the peak learning rate) with straight lines
    between: warm-up, a flat stretch that lets one decide late when to stop, decay to zero."""

    lr: float  # the peak
    # Row lengths and their share of the steps; all rows of a batch have one length. Short rows are where most learning
    # happens; the long ones teach that position 1,500 is as good as position 15.
    rows: dict[int, float]
    muon: bool  # Muon for the matrices of the layers, in place of AdamW
    late: int | None  # the step from which the late mixture of the corpus applies, if any: a multiple of CHUNK
    schedule: list[tuple[int, float]]


RECIPES = {
    # The knees of the decay are where the real run was stopped and resumed with a nearer end, because the machine had
    # other work to do.
    "llama": Recipe(
        lr=3e-3,
        rows={512: 0.65, 1024: 0.25, 2048: 0.10},
        muon=False,
        late=1600,
        schedule=[(0, 0.005), (199, 1.0), (2340, 1.0), (2605, 0.83), (2710, 0.73), (3000, 0.0)],
    ),
    # Resumed at step 141 with a higher rate, after the loss had fallen at the first one without a bump.
    "mla": Recipe(
        lr=5e-3,
        rows={256: 0.45, 512: 0.35, 1024: 0.13, 2048: 0.07},
        muon=True,
        late=None,
        schedule=[(0, 0.006), (99, 0.6), (140, 0.6), (160, 1.0), (600, 1.0), (740, 0.0)],
    ),
}

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


def chunk_of_batches(tokenizer: Tokenizer, chunk: int, recipe: Recipe) -> list[torch.Tensor]:
    """The batches of steps [chunk * CHUNK, (chunk + 1) * CHUNK), each [rows, 2, length + 1], in a shuffled order."""
    batches, late = [], recipe.late is not None and chunk * CHUNK >= recipe.late
    for k, (length, share) in enumerate(recipe.rows.items()):
        steps, rows = round(CHUNK * share), BATCH // length
        stream = texts(seed=chunk * len(recipe.rows) + k, long=length > 512, late=late)
        packed = packed_rows(tokenizer, stream, steps * rows, length)
        batches += torch.from_numpy(packed).view(steps, rows, 2, length + 1).unbind()
    order = np.random.default_rng(chunk).permutation(len(batches))
    return [batches[i] for i in order]


def build_model(architecture: str, tokenizer: Tokenizer) -> PreTrainedModel:
    end, stop = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    model = build(architecture, vocab_size=VOCAB, eos_token_id=end, pad_token_id=stop)
    model.generation_config = GenerationConfig(eos_token_id=[end, stop], pad_token_id=stop, do_sample=False)
    return model


def share_of_peak(step: int, schedule: list[tuple[int, float]]) -> float:
    steps, shares = zip(*schedule, strict=True)
    return float(np.interp(step, steps, shares))


def optimizers_of(model: PreTrainedModel, muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW; with `muon` only for vectors, the embedding, routers and stacks of experts, and for the other matrices Muon
    (Jordan et al., 2024), with steps as large as AdamW's, so that one learning rate serves both."""
    decayed = {name: p for name, p in model.named_parameters() if p.dim() >= 2}
    vectors = [p for p in model.parameters() if p.dim() < 2]
    hidden = (
        {name: p for name, p in decayed.items() if p.dim() == 2 and name.endswith(("_proj.weight", "_mqa.weight"))}
        if muon
        else {}
    )
    others = [p for name, p in decayed.items() if name not in hidden]
    groups = [{"params": others, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)]
    if hidden:
        optimizers.append(torch.optim.Muon(hidden.values(), weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def loss_of(model: PreTrainedModel, batch: torch.Tensor, bf16: bool) -> torch.Tensor:
    ids, learn = batch[:, 0].long(), batch[:, 1, 1:].bool()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # [rows, length, hidden]
        logits = model.lm_head(hidden[learn])  # [tokens to learn, V]
    return F.cross_entropy(logits.float(), ids[:, 1:][learn])


def export(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the checkpoint folder in bf16. Files appear by rename, so a reader never sees half of one."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    half = copy.deepcopy(model)
    for parameter in half.parameters():  # not .to(): the routers' correction bias is a buffer, and stays float32
        parameter.data = parameter.data.bfloat16()
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
    parser = argparse.ArgumentParser(description="Train folio-tiny or folio-tiny-mla from scratch.")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="llama")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="stop here (default: where the schedule ends; it does not change)")
    parser.add_argument("--lr", type=float, help="the peak of the learning rate (default: the recipe's)")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=float, default=300.0, help="seconds between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    args = parser.parse_args()
    recipe = RECIPES[args.architecture]
    peak = args.lr or recipe.lr
    steps = args.steps or recipe.schedule[-1][0]
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = train_tokenizer()
    model = build_model(args.architecture, tokenizer)
    balance = Balance(model)
    optimizers = optimizers_of(model, recipe.muon)
    state, step = args.out / "state.pt", 0
    if args.resume:
        saved = torch.load(state)
        model.load_state_dict(saved["model"])
        for optimizer, its_state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
        step = saved["step"]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps * BATCH:,} tokens", flush=True)

    started = saved_at = shown_at = time.time()
    losses: list[float] = []
    batches: list[torch.Tensor] = []
    while step < steps:
        if not batches or step % CHUNK == 0:
            batches = chunk_of_batches(tokenizer, step // CHUNK, recipe)
        share = share_of_peak(step, recipe.schedule)
        for group in chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
            group["lr"] = share * peak
        loss = loss_of(model, batches[step % CHUNK], args.bf16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        busiest = balance.step(share * BALANCE_RATE)
        losses.append(loss.item())
        step += 1
        if step % 20 == 0 or step == steps:
            speed = len(losses) * BATCH / (time.time() - shown_at)
            routed = f" busiest expert {busiest:.2f}x" if balance.routers else ""
            seconds = time.time() - started
            print(f"step {step} loss {np.mean(losses):.4f}{routed} {speed:,.0f} tok/s {seconds:.0f} s", flush=True)
            losses, shown_at = [], time.time()
        if time.time() - saved_at > args.save_every or step == steps:
            fresh = state.with_suffix(".new")
            states = [optimizer.state_dict() for optimizer in optimizers]
            torch.save({"model": model.state_dict(), "optimizers": states, "step": step}, fresh)
            os.replace(fresh, state)
            export(model, tokenizer, args.out / "model")
            saved_at = time.time()


if __name__ == "__main__":
    main()

"""Multi-head Latent Attention over pages in plain PyTorch: what runs where `kernels/mla.py` does not.

Both forms of `reference_mla.py` are here, made for a CPU: matrix products by BLAS, over a piece of the history at a time that
stays in the CPU's cache, with a softmax of each piece, merged by logsumexp (Milakov and Gimelshein, 2018). Nothing is as large as
the history of a sequence: not its rows, gathered from their pages, not its expanded heads, not its scores.

    absorbed    all heads are rows of one product with the rows of the cache, which nobody expands
    expanded    a piece of the history becomes each head's keys and values, once for all queries of a chunk

Which one a sequence takes is a matter of counting (`expanded_is_cheaper`): a decode takes the absorbed form, a long chunk of a
prompt the expanded one. A step may have both.

Two ops, opaque to the compiler. On a CPU they read the positions, to leave nothing but what is needed to the products; on a GPU a
decode looks at no number, so that it can be captured.

    python -m pytest tests/test_latent.py

Shapes: B sequences, T new tokens, L history, H heads, R latent rank; a row of the cache is [latent (R) | rotated key (rope)].
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kernels.reference_mla import absorb_query, project_output

# Bytes of the history that are gathered at once. On a CPU they come from memory once, into a buffer that stays in the
# third-level cache, where both products find them: 2,048 of DeepSeek's rows of 576 in float32. `python -m bench.mla`
PIECE = {"cpu": 9 << 19, "cuda": 1 << 29}
TOGETHER = 8  # sequences that a decode's products take at once: each thread has its own, whose rows its cache holds
QUERIES = 128  # of a chunk that meet a piece together
FORMS = ("cheaper", "absorbed", "expanded")


def expanded_is_cheaper(heads: int, nope: int, rope: int, value: int, rank: int, new: int, history: int) -> bool:
    """Has the expanded form fewer operations, for `new` tokens at the end of a `history` (both included)?

    A pair of query and entry costs 2 H (nope + rope + value) expanded, 2 H (2 R + rope) absorbed. Beside that, one form
    projects every entry up and the other every query and output: 2 H R (nope + value) each.
    """
    pairs = new * history - new * (new - 1) // 2  # causal
    up = rank * (nope + value)
    return pairs * (nope + rope + value) + history * up < pairs * (2 * rank + rope) + new * up


class OnlineSoftmax:
    """softmax(query keys') values for N x M queries, of keys that come piece by piece.

    A piece is finished by itself, with PyTorch's softmax, which is several times as fast as the steps that it consists of, and
    the pieces are weighed by their logsumexp.
    """

    def __init__(self, query: Tensor, value_dim: int):
        """query [N, M, D]. Every query must see an entry of the first piece that it is given."""
        N, M, _ = query.shape
        self.query, self.dtype = query, torch.promote_types(query.dtype, torch.float32)
        self.mass = query.new_full((N, M, 1), float("-inf"), dtype=self.dtype)  # log of the sum of all weights so far
        self.mean = query.new_zeros(N, M, value_dim, dtype=self.dtype)

    def add(
        self, at: tuple[slice, slice], keys: Tensor, values: Tensor, scale: float, hidden: Tensor | None = None
    ) -> None:
        """The queries `at` [n, m, D] meet keys [n, C, D], values [n, C, V]; not those that are `hidden` [?, m or 1, C]."""
        scores = torch.bmm(self.query[at], keys.transpose(1, 2)).to(self.dtype).mul_(scale)
        if hidden is not None:  # finite, so that a query that sees nothing gets numbers, which then weigh nothing
            scores.masked_fill_(hidden, torch.finfo(self.dtype).min)
        top, weights = scores.amax(-1, keepdim=True), scores.softmax(-1)
        mass = top - weights.amax(-1, keepdim=True).log_()  # logsumexp
        before, mean = self.mass[at], self.mean[at]
        share = torch.sigmoid(mass - before)  # e^mass / (e^mass + e^before)
        mean.lerp_(torch.bmm(weights.to(values.dtype), values).to(self.dtype), share)
        before.copy_(torch.logaddexp(before, mass))


def entries_of_piece(cache: Tensor) -> int:
    """cache [slots, D]."""
    return max(2, PIECE[cache.device.type] // (cache.shape[1] * cache.itemsize))


def gather(cache: Tensor, slots: Tensor, buffer: Tensor) -> Tensor:
    """cache [slots, D], slots [B, C] -> [B, C, D], which lie in the buffer [at least B * C, D]."""
    rows = buffer[: slots.numel()]
    return torch.index_select(cache, 0, slots.flatten(), out=rows).view(*slots.shape, -1)


def pieces(lengths: Sequence[int], most: int) -> Iterator[tuple[slice, slice]]:
    """Cut histories, the longest first, into pieces: (which sequences, which entries of each), of at most `most` entries
    together, or one of each sequence.

    TOGETHER sequences at a time, or as many as fit whole; of those a piece has the ones that reach so far.
    """
    start = 0
    while start < len(lengths):
        longest = lengths[start]
        stop = reach = min(start + max(TOGETHER, most // longest), len(lengths))
        first = 0
        while first < longest:
            while lengths[reach - 1] <= first:
                reach -= 1
            end = min(first + max(1, most // (reach - start)), longest)
            yield slice(start, reach), slice(first, end)
            first = end
        start = stop


def decode_absorbed(
    q_nope: Tensor, q_rope: Tensor, kv_up: Tensor, cache: Tensor, slots: Tensor, positions: Tensor, scale: float
) -> Tensor:
    """One new token of each sequence: q_nope [B, H, nope], slots [B, L], positions [B] -> [B, H, V]."""
    nope, R = q_nope.shape[-1], kv_up.shape[-1]
    query = torch.cat((absorb_query(q_nope, kv_up[:, :nope]), q_rope), -1)
    lengths, order = [slots.shape[1]] * len(slots), None
    if query.device.type == "cpu":
        order = positions.argsort(descending=True)
        query, slots, positions = query[order], slots[order], positions[order]
        lengths = (positions + 1).tolist()
    most = entries_of_piece(cache)
    buffer = cache.new_empty(min(max(most, len(slots)), slots.numel()), cache.shape[1])
    softmax = OnlineSoftmax(query, R)
    for some, entries in pieces(lengths, most):
        rows, hidden = gather(cache, slots[some, entries], buffer), None
        if order is None or entries.stop > lengths[some.stop - 1]:
            entry = torch.arange(entries.start, entries.stop, device=rows.device)
            hidden = entry > positions[some, None, None]  # [n, 1, C]
        softmax.add((some, slice(None)), rows, rows[..., :R], scale, hidden)
    out = softmax.mean if order is None else softmax.mean[order.argsort()]
    # contiguous, as the compiler has been told: it reads what comes back without a look at its strides
    return project_output(out.to(q_nope.dtype), kv_up[:, nope:]).contiguous()


def chunk_of_prompt(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_up: Tensor,
    cache: Tensor,
    slots: Tensor,
    start: int,
    scale: float,
    expand: bool,
) -> Tensor:
    """Q new tokens of one sequence, the first at `start`: q_nope [Q, H, nope], slots [L] -> [Q, H, V]."""
    Q, H, nope = q_nope.shape
    R = kv_up.shape[-1]
    if expand:
        each = 1  # row of a query
        query = torch.cat((q_nope, q_rope), -1).transpose(0, 1).contiguous()  # [H, Q, nope + rope]
    else:
        each = H
        query = torch.cat((absorb_query(q_nope, kv_up[:, :nope]), q_rope), -1)
        query = query.view(1, Q * H, -1)  # [1, Q * H, R + rope]
    softmax = OnlineSoftmax(query, kv_up.shape[1] - nope if expand else R)
    piece = entries_of_piece(cache) // 2  # beside it lie its keys and values, or the scores of many queries
    buffer = cache.new_empty(min(piece, len(slots)), cache.shape[1])
    for first in range(0, start + Q, piece):
        entry = torch.arange(first, min(first + piece, start + Q), device=query.device)
        rows = gather(cache, slots[None, first : first + len(entry)], buffer)  # [1, C, R + rope]
        keys, values = expanded(rows[0], kv_up, nope) if expand else (rows, rows[..., :R])
        for block in range(max(0, first - start) // QUERIES * QUERIES, Q, QUERIES):  # the earlier ones see none of it
            end = min(block + QUERIES, Q)
            hidden = None
            if first + len(entry) > start + block + 1:
                position = torch.arange(start + block, start + end, device=query.device)
                hidden = entry > position.repeat_interleave(each)[:, None]
            at = slice(block * each, end * each)
            softmax.add((slice(None), at), keys, values, scale, hidden)
    out = softmax.mean.to(q_nope.dtype)
    return out.transpose(0, 1) if expand else project_output(out.view(Q, H, R), kv_up[:, nope:])


def expanded(rows: Tensor, kv_up: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    """rows [C, R + rope] of the cache -> each head's keys [H, C, nope + rope] and values [H, C, V]."""
    H, _, R = kv_up.shape
    up = (rows[:, :R] @ kv_up.flatten(0, 1).T).view(len(rows), H, -1).transpose(0, 1)  # [H, C, nope + V]
    keys = torch.cat((up[..., :nope], rows[None, :, R:].expand(H, -1, -1)), -1)
    return keys, up[..., nope:]


# ---- the ops

_library = torch.library.Library("folio", "FRAGMENT")
_library.define(
    "latent_decode(Tensor q_nope, Tensor q_rope, Tensor kv_up, Tensor cache, Tensor slots, Tensor positions, float scale) "
    "-> Tensor"
)
_library.define(
    "latent_extend(Tensor q_nope, Tensor q_rope, Tensor kv_up, Tensor cache, Tensor read_slots, Tensor shapes, "
    'Tensor positions, float scale, str form="cheaper") -> Tensor'
)


def _extend(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_up: Tensor,
    cache: Tensor,
    read_slots: Tensor,
    shapes: Tensor,
    positions: Tensor,
    scale: float,
    form: str = "cheaper",
) -> Tensor:
    """T new tokens of any sequences: q_nope [T, H, nope], q_rope [T, H, rope], kv_up [H, nope + V, R] -> [T, H, V].

    read_slots, shapes: as in `reference.Rectangles`; positions [T]. `form`: of FORMS.
    """
    (_, H, nope), (_, both, R) = q_nope.shape, kv_up.shape
    parts, token, entry = [], 0, 0
    for B, new, history in shapes.view(-1, 3).tolist():
        at, slots = slice(token, token + B * new), read_slots.narrow(0, entry, B * history)
        token, entry = at.stop, entry + len(slots)
        q = q_nope[at], q_rope[at], kv_up, cache
        if new == 1 and form != "expanded":
            parts.append(decode_absorbed(*q, slots.view(B, history), positions[at], scale))
            continue
        for b, start in enumerate(positions[at][::new].tolist()):  # on a GPU this waits: its way is `kernels/mla.py`
            mine = slice(at.start + b * new, at.start + (b + 1) * new)
            expand = form == "expanded" or (
                form == "cheaper" and expanded_is_cheaper(H, nope, q_rope.shape[-1], both - nope, R, new, start + new)
            )
            own = slots.view(B, history)[b]
            parts.append(chunk_of_prompt(q_nope[mine], q_rope[mine], kv_up, cache, own, start, scale, expand))
    return torch.cat(parts).contiguous()


_library.impl("latent_decode", decode_absorbed, "CompositeExplicitAutograd")
_library.impl("latent_extend", _extend, "CompositeExplicitAutograd")


def _shape_of_output(q_nope: Tensor, q_rope: Tensor, kv_up: Tensor, *_: object) -> Tensor:
    return q_nope.new_empty(*q_nope.shape[:2], kv_up.shape[1] - q_nope.shape[2])


torch.library.register_fake("folio::latent_decode", _shape_of_output, lib=_library)
torch.library.register_fake("folio::latent_extend", _shape_of_output, lib=_library)

latent_decode, latent_extend = torch.ops.folio.latent_decode, torch.ops.folio.latent_extend

"""One step as the scheduler plans it and the runner runs it: plain ints, no tensors.

It is a snapshot: once it is planned, nothing in it changes, so the device may be a step behind the host.
"""

from dataclasses import dataclass, field

from scheduler.request import Request


@dataclass(slots=True)
class Changes:
    """What a step has to do on the device before it computes, in this order."""

    copies: list[tuple[int, int]] = field(default_factory=list)  # page to page
    admitted: dict[Request, int] = field(
        default_factory=dict
    )  # whose parameters go to their rows, and its tokens so far
    tables: list[tuple[int, int, list[int]]] = field(default_factory=list)  # row, first column, its new pages
    forced: list[tuple[int, int]] = field(default_factory=list)  # row, a token that counts as sampled there


@dataclass(slots=True)
class Batch:
    """T new tokens of B requests, one request after the other: first the decodes, one token each, then chunks of prompts."""

    requests: list[Request] = field(default_factory=list)  # [B]
    ids: list[int] = field(default_factory=list)  # [T]; -row: the last token sampled for that row, still on the device
    starts: list[int] = field(default_factory=list)  # [B] position of each one's first new token
    lengths: list[int] = field(default_factory=list)  # [B] how many there are
    samples: list[bool] = field(default_factory=list)  # [B] False: a chunk that does not reach the end of its prompt
    decodes: int = 0  # how many of the B, from the front
    changes: Changes = field(default_factory=Changes)

    @property
    def decodes_only(self) -> bool:
        return self.decodes == len(self.requests)

    @property
    def logprobs(self) -> bool:
        """Does somebody want to know how likely the tokens are?"""
        return any(r.params.logprobs is not None for r in self.requests)

    @property
    def reads(self) -> bool:
        """Does somebody want to know more of a prompt than what comes after it?"""
        chunks = zip(self.requests[self.decodes :], self.starts[self.decodes :], strict=True)
        return any(r.reading is not None and start < r.num_prompt for r, start in chunks)

    @property
    def greedy(self) -> bool:
        """Is an argmax over the bare logits all that its requests ask for, those included whose turn to sample is to come?

        So requests of one kind meet graphs of one kind, whatever is chunked.
        """
        return all(r.params.greedy for r in self.requests)

    @property
    def masked(self) -> bool:
        """Has the host to say which tokens some of them may take?"""
        return any(r.constraint is not None for r in self.requests)

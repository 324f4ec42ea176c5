"""The sequences of llama.cpp's memory: what each one holds, what they share, what is read next.

A slot's work is always the same: decode those of its ids that are not there yet. A prompt starts
from the slot that holds most of it, so that the samples of an item, and items under one rubric,
share what was read before.
"""

from dataclasses import dataclass, field
from operator import eq
from typing import Any, Sequence

from tract_lite.engines.context import Context

# A shorter common prefix is read again: that is less work than copying a slot's memory.
MIN_SHARED = 32
# As many ids cost less beside the sampling, one in each step, than in a step of their own.
MAX_BESIDE = 16


@dataclass
class Slot:
    """A sequence of llama.cpp's memory, which holds the first `filled` of `ids`.

    It is free where it has no `job`; what it holds can then still be shared.
    """

    number: int
    ids: list[int] = field(default_factory=list)
    filled: int = 0
    job: Any = None

    @property
    def missing(self) -> int:
        return len(self.ids) - self.filled


class Slots:
    """All the sequences of a context, empty at first."""

    def __init__(self, context: Context, count: int):
        self._context = context
        self._slots = [Slot(number) for number in range(count)]
        context.clear()

    @property
    def busy(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.job]

    def take(self, job: Any, ids: Sequence[int]) -> Slot | None:
        """A slot for a job and its first ids, filled with as much of them as any slot holds.

        None where no slot is free, or what could be shared is still being read.
        """
        free = [slot for slot in self._slots if not slot.job]
        if not free:
            return None
        shared = [_shared(slot.ids, ids) for slot in self._slots]
        slot = max(free, key=lambda slot: shared[slot.number])
        source = max(self._slots, key=lambda slot: shared[slot.number])
        if shared[source.number] >= shared[slot.number] + MIN_SHARED:
            if source.filled < shared[source.number]:
                return None
            self._copy(source, slot)
        slot.job = job
        self.hold(slot, ids)
        return slot

    def hold(self, slot: Slot, ids: Sequence[int]) -> None:
        """Make a slot hold these ids, of which what is there is kept, but for the last's logits."""
        held, slot.ids = slot.ids[: slot.filled], list(ids)
        slot.filled = min(_shared(held, slot.ids), len(slot.ids) - 1)
        self._context.cut(slot.number, slot.filled)

    def close_gap(self) -> None:
        """Move the last busy slot into a gap: llama.cpp decodes only neighbours together."""
        busy = self.busy
        gap = next((slot for slot in self._slots if not slot.job), busy[-1])
        if gap.number < busy[-1].number:
            self._copy(busy[-1], gap)
            gap.job, busy[-1].job = busy[-1].job, None

    def decode(self) -> list[tuple[Slot, int]]:
        """Run one batch; returns the slots that now hold all their ids, with their logits' row."""
        tokens, sequences, ready = [], [], []
        positions: list[int] = []
        for slot, count in self._next_batch():
            end = slot.filled + count
            tokens += slot.ids[slot.filled : end]
            positions += range(slot.filled, end)
            sequences += [slot.number] * count
            slot.filled = end
            if not slot.missing:
                ready.append((slot, len(tokens) - 1))
        self._context.decode(tokens, positions, sequences, [row for _, row in ready])
        return ready

    def _next_batch(self) -> list[tuple[Slot, int]]:
        """Which slots go on, by how many ids.

        Those that lack several go first, so that as many as possible are then sampled together; a
        few ids more are read beside the sampling, at the pace of the slot that lacks least.
        """
        busy, spare = self.busy, self._context.batch_size
        reading = [slot for slot in busy if slot.missing > 1]
        if sum(slot.missing for slot in reading) <= MAX_BESIDE:
            pace = min(slot.missing for slot in busy)
            return [(slot, pace) for slot in busy]
        batch = []
        for slot in reading:
            if count := min(slot.missing, spare):
                batch.append((slot, count))
                spare -= count
        return batch

    def _copy(self, source: Slot, target: Slot) -> None:
        self._context.copy(source.number, target.number)
        target.ids, target.filled = list(source.ids), source.filled


def _shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """The length of the common prefix."""
    return [*map(eq, ids, others), False].index(False)

"""The sequences of llama.cpp's memory: what each one holds, what they share, what is read next.

A slot's work is always the same: decode those of its ids that are not there yet. A prompt starts
from the slot that holds most of it, so that the samples of an item, and items under one rubric,
share what was read before.

A recurrent state holds all of its ids or none. There a slot stops where its prompt forks into
samples, and the context keeps that state: the slot and its copies can be set back to it.
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

    It is free where it has no `job`; what it holds can then still be shared. `fork`: after how many
    ids its state is kept, 0 for none.
    """

    number: int
    ids: list[int] = field(default_factory=list)
    filled: int = 0
    job: Any = None
    fork: int = 0

    @property
    def missing(self) -> int:
        """How many ids are to be read until all are there, or the state is to be kept."""
        return (self.fork if self.filled < self.fork else len(self.ids)) - self.filled


class Slots:
    """All the sequences of a context, empty at first."""

    def __init__(self, context: Context, count: int):
        self._context = context
        self._slots = [Slot(number) for number in range(count)]
        context.clear()

    @property
    def busy(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.job]

    def take(self, job: Any, ids: Sequence[int], fork: int) -> Slot | None:
        """A slot for a job and its first ids, filled with as much of them as any slot holds.

        `fork`: with how many of them the other samples of the job's task begin as well.
        None where no slot is free, or what could be shared is still being read.
        """
        free = [slot for slot in self._slots if not slot.job]
        if not free:
            return None
        shared = [self._shared(slot, ids) for slot in self._slots]
        slot = max(free, key=lambda slot: shared[slot.number])
        source = max(self._slots, key=lambda slot: shared[slot.number])
        if shared[source.number] >= shared[slot.number] + MIN_SHARED:
            if source.filled < shared[source.number]:
                return None
            self._copy(source, slot)
        slot.job = job
        self.hold(slot, ids)
        if slot.filled < fork and not self._context.forgets:
            slot.fork = fork
        return slot

    def hold(self, slot: Slot, ids: Sequence[int], comes_back: bool = False) -> None:
        """Make a slot hold these ids, of which what is there is kept, but for the last's logits.

        `comes_back`: later ids will begin with these, more than once.
        """
        slot.ids = slot.ids[: slot.filled]
        length = min(self._shared(slot, ids), len(ids) - 1)
        slot.ids, slot.filled, slot.fork = list(ids), length, slot.fork if slot.fork <= length else 0
        self._context.cut(slot.number, slot.filled)
        if comes_back and not self._context.forgets:
            slot.fork = len(ids)

    def _shared(self, slot: Slot, ids: Sequence[int]) -> int:
        """How many of these ids a slot holds or is to hold, and can be set back to."""
        common = _common(slot.ids, ids)
        if self._context.forgets:
            return common
        return max((n for n in (slot.filled, slot.fork) if n <= common and n < len(ids)), default=0)

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
        batch = self._next_batch()
        for slot, count in batch:
            end = slot.filled + count
            tokens += slot.ids[slot.filled : end]
            positions += range(slot.filled, end)
            sequences += [slot.number] * count
            slot.filled = end
            if slot.filled == len(slot.ids):
                ready.append((slot, len(tokens) - 1))
        self._context.decode(tokens, positions, sequences, [row for _, row in ready])
        for slot, _ in batch:
            if slot.filled == slot.fork:
                self._context.keep(slot.number)
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
        target.ids, target.filled, target.fork = list(source.ids), source.filled, source.fork


def _common(ids: Sequence[int], others: Sequence[int]) -> int:
    """The length of the common prefix."""
    return [*map(eq, ids, others), False].index(False)

"""A model of barriers, copies and products of a program: its partitions as lists of events, in any order.

The events are those that `gluon_shim` notes: they do not depend on the order in which partitions ran. `check` tries one
order, drawn at random; `explore` tries all.
"""

from collections.abc import Hashable, Mapping, Sequence
from random import Random
from typing import NamedTuple

from gluon_shim import DeadlockError, HazardError

Events = Sequence[tuple]


class Bar(NamedTuple):
    """A barrier: what it counts in its phase, and the phases that are over."""

    arrived: int = 0
    expected: int = 0
    ended: int = 0


class Buffer(NamedTuple):
    """A buffer: copies that were begun, whether the last has arrived, and products that read it now."""

    copies: int = 0
    arrived: bool = True
    readers: int = 0


class State(NamedTuple):
    """Where partitions are, their products that were begun, copies on their way, barriers and buffers."""

    places: tuple[int, ...]
    products: tuple[tuple, ...]
    copies: tuple[tuple, ...]
    bars: tuple[Bar, ...]
    buffers: tuple[Buffer, ...]


def put(items: tuple, i: int, x: Hashable) -> tuple:
    return (*items[:i], x, *items[i + 1 :])


class Model:
    """Partitions by their events.

    A partition's n-th product with a buffer must find the n-th copy into it, or the only one.

    Args:
        events: of every partition.
        counts: arrivals of a phase, by barrier.
        turns: whether the first two partitions, the consumers, must take turns: after its first product, each begins
            two at a time.
    """

    def __init__(self, events: Sequence[Events], counts: Mapping[str, int], *, turns: bool):
        names = list(counts)
        self.blocked: set[tuple[int, int]] = set()
        self.events, self.counts, self.turns = events, tuple(counts.values()), turns
        self.bars = {name: i for i, name in enumerate(names)}
        written = [event[1] for some in events for event in some if event[0] == "copy"]
        self.buffers = {name: i for i, name in enumerate(dict.fromkeys(written))}
        self.total = {name: written.count(name) for name in written}
        self.reads: list[dict[int, tuple[int, ...]]] = []  # by partition and place: products, and reads of each buffer
        for some in events:
            seen: dict[str, int] = {}
            self.reads.append({})
            for place, event in enumerate(some):
                if event[0] == "product":
                    for name in event[1:]:
                        seen[name] = seen.get(name, 0) + 1
                    self.reads[-1][place] = tuple(seen[name] for name in event[1:])
        self.begun = [[sum(e[0] == "product" for e in some[:i]) for i in range(len(some) + 1)] for some in events]
        self.start = State(
            (0,) * len(events),
            ((),) * len(events),
            (),
            (Bar(),) * len(names),
            (Buffer(),) * len(self.buffers),
        )

    def choices(self, state: State) -> list[tuple]:
        """What may happen next: a partition goes on, its oldest product ends, or a copy arrives."""
        found: list[tuple] = [("arrives", i) for i in range(len(state.copies))]
        for me, place in enumerate(state.places):
            if state.products[me]:
                found.append(("ends", me))
            if place < len(self.events[me]):
                event = self.events[me][place]
                waits = event[0] == "wait" and state.bars[self.bars[event[1]]].ended % 2 == event[2]
                if not waits and not (event[0] == "done" and len(state.products[me]) > event[1]):
                    found.append(("goes on", me))
        return found

    def settle(self, state: State, i: int, bar: Bar) -> State:
        if bar.arrived > self.counts[i]:
            raise HazardError(f"barrier {i}: {bar.arrived} arrivals of {self.counts[i]}")
        if bar.arrived == self.counts[i] and bar.expected == 0:
            bar = Bar(0, 0, bar.ended + 1)
        return state._replace(bars=put(state.bars, i, bar))

    def step(self, state: State, choice: tuple) -> State:
        """The state after a choice.

        Raises:
            HazardError: a buffer is overwritten before it was read, or read before it was written, or out of turn.
        """
        kind, i = choice
        if kind == "arrives":
            buffer, bar, size = state.copies[i]
            buffers = put(state.buffers, buffer, state.buffers[buffer]._replace(arrived=True))
            state = state._replace(copies=state.copies[:i] + state.copies[i + 1 :], buffers=buffers)
            return self.settle(state, bar, state.bars[bar]._replace(expected=state.bars[bar].expected - size))
        if kind == "ends":
            for buffer in state.products[i][0]:
                old = state.buffers[buffer]
                buffers = put(state.buffers, buffer, old._replace(readers=old.readers - 1))
                state = state._replace(buffers=buffers)
            return state._replace(products=put(state.products, i, state.products[i][1:]))
        place = state.places[i]
        event = self.events[i][place]
        state = state._replace(places=put(state.places, i, place + 1))
        if event[0] in ("expect", "arrive"):
            bar = self.bars[event[1]]
            old = state.bars[bar]
            size = event[2] if event[0] == "expect" else 0
            return self.settle(state, bar, old._replace(arrived=old.arrived + 1, expected=old.expected + size))
        if event[0] == "copy":
            return self._copy(state, event)
        if event[0] == "use" and self.begun[i][place] - len(state.products[i]) <= max(event[1:]):
            raise HazardError(f"partition {i} uses product {max(event[1:])} before it has ended")
        return self._product(state, i, place, event) if event[0] == "product" else state

    def _copy(self, state: State, event: tuple) -> State:
        buffer = self.buffers[event[1]]
        old = state.buffers[buffer]
        if old.readers or not old.arrived:
            raise HazardError(f"{event[1]} is overwritten while it is in use")
        copies = (*state.copies, (buffer, self.bars[event[2]], event[4]))
        return state._replace(copies=copies, buffers=put(state.buffers, buffer, Buffer(old.copies + 1, False)))

    def _product(self, state: State, me: int, place: int, event: tuple) -> State:
        reads = tuple(self.buffers[name] for name in event[1:])
        for name, buffer, nth in zip(event[1:], reads, self.reads[me][place], strict=True):
            old = state.buffers[buffer]
            if not old.arrived or old.copies != (1 if self.total[name] == 1 else nth):
                raise HazardError(f"read {nth} of {name} finds copy {old.copies}")
            state = state._replace(buffers=put(state.buffers, buffer, old._replace(readers=old.readers + 1)))
        mine, theirs = self.begun[me][place], self.begun[1 - me][state.places[1 - me]]
        first, last = mine % 2 == 1, mine == self.begun[me][-1] - 1
        if self.turns and first and not last and theirs < (mine + 2 if me else mine if mine > 1 else 0):
            raise HazardError(f"consumer {me} begins product {mine} out of turn")
        return state._replace(products=put(state.products, me, (*state.products[me], reads)))

    def ended(self, state: State) -> bool:
        """Whether all partitions are at their end.

        Raises:
            HazardError: copies or products are left.
        """
        if any(place < len(some) for place, some in zip(state.places, self.events, strict=True)):
            return False
        if state.copies or any(state.products):
            raise HazardError("copies or products are left at the end")
        return True

    def stuck(self, state: State) -> DeadlockError:
        """The error of a state in which nothing can happen."""
        waiting = (e[p] for p, e in zip(state.places, self.events, strict=True) if p < len(e))
        return DeadlockError(f"all wait: {list(waiting)}")

    def check(self, random: Random) -> None:
        """Go through the events in one order.

        Raises:
            HazardError, DeadlockError: what went wrong.
        """
        state = self.start
        while choices := self.choices(state):
            state = self.step(state, random.choice(choices))
        if not self.ended(state):
            raise self.stuck(state)

    def explore(self) -> int:
        """Go through the events in every order; returns the number of states, and notes in `blocked` where partitions
        had to wait: partition and place.

        Raises:
            HazardError, DeadlockError: what went wrong in one.
        """
        seen, todo = {self.start}, [self.start]
        while todo:
            state = todo.pop()
            choices = self.choices(state)
            self.blocked.update(x for x in enumerate(state.places) if ("goes on", x[0]) not in choices)
            if not choices and not self.ended(state):
                raise self.stuck(state)
            for choice in choices:
                after = self.step(state, choice)
                if after not in seen:
                    seen.add(after)
                    todo.append(after)
        return len(seen)

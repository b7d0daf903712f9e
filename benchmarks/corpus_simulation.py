"""A simulation of workers that embed a corpus, by discrete events.

Cores read a shard from its disk, decode its images and hand them on in units; a bounded queue stands before the GPUs,
each of which takes the next unit as soon as it is free; one driver collects embeddings, and when a shard's are all
there, its part is written. A worker is a GPU and the cores that decode beside it. When it dies, its cores' shards are
read again by others, and its GPU's unit is embedded again, by itself when it is back (as Ray does it) or elsewhere;
what the driver has already is not taken twice.
"""

from __future__ import annotations

import bisect
import functools
import heapq
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

Array = np.ndarray[Any, np.dtype[Any]]
Waiting = Generator[simpy.Event, Any, Any]
BATCH, EMBEDDING = 64, 3072
WAITING = 4
"""Units for each worker that may wait to be embedded."""
PATIENCE = 10.0
"""Seconds of collecting that the driver may be behind, before GPUs wait for it."""


@dataclass(frozen=True, eq=False)
class Costs:
    """What was measured.

    Attributes:
        decode: seconds of a core for each of some images, preprocessing included.
        size: bytes of their files.
        embed: seconds of a GPU for a batch of 64, several times.
    """

    decode: Array
    size: Array
    embed: Array


@dataclass(frozen=True)
class Setup:
    """A run, and what goes wrong in it.

    Attributes:
        costs: of images and batches.
        cores: that decode, for each worker.
        images, shard, unit: of the corpus, of a shard, and of what is handed on at once; each a multiple of the next.
        workers: GPUs.
        stragglers: workers whose GPU takes three times as long.
        between: mean hours between two deaths of a worker; 0 for none.
        back: minutes until it is back, its model loaded.
        elsewhere: what it was embedding goes to another worker instead of waiting for it.
        disks: shards are dealt out to them; each has `bandwidth` bytes a second.
        slow_disks: of these, how many have a tenth of it.
        collect: seconds of the driver for a batch.
        network: bytes a second that reach the driver.
        write: seconds for a part.
        writers: threads that write parts beside the driver; with 0 it writes them itself.
    """

    costs: Costs
    cores: int
    images: int = 100_000_000
    shard: int = 1_000
    unit: int = 500
    workers: int = 64
    stragglers: int = 0
    between: float = 0.0
    back: float = 10.0
    elsewhere: bool = False
    disks: int = 8
    bandwidth: float = 4e9
    slow_disks: int = 0
    collect: float = 0.0
    network: float = 1.25e9
    write: float = 0.0
    writers: int = 8

    def __post_init__(self) -> None:
        if self.images % self.shard or self.shard % self.unit:
            raise ValueError(f"{self.images} images, {self.shard} a shard, {self.unit} a unit: each must divide")

    def slowness(self, worker: int) -> float:
        return 3.0 if worker < self.stragglers else 1.0

    def rate(self, disk: int) -> float:
        """Bytes a second of a disk."""
        return self.bandwidth / 10 if disk < self.slow_disks else self.bandwidth

    def collecting(self) -> float:
        """Seconds of the driver for a unit, without writing."""
        return self.unit * (self.collect / BATCH + EMBEDDING / self.network)


@dataclass(frozen=True)
class Outcome:
    """What a run took.

    Attributes:
        seconds: until the last part was written.
        used: by stage, the share of that time in which it worked; of the disks, the busiest one's.
        written: images in parts.
        again: images that were decoded or embedded once more.
        held: the most images that were embedded and in no part yet, which a killed run loses.
    """

    seconds: float
    used: dict[str, float]
    written: int
    again: int
    held: int


def ceilings(setup: Setup) -> dict[str, float]:
    """Images a second that each stage would reach if the others took no time; deaths left out."""
    costs, size = setup.costs, float(setup.costs.size.mean())
    reading = np.mean([size / setup.rate(disk) for disk in range(setup.disks)])
    writing = setup.write / setup.shard
    driver = setup.collecting() / setup.unit + (0 if setup.writers else writing)
    found = {
        "GPUs": sum(BATCH / costs.embed.mean() / setup.slowness(worker) for worker in range(setup.workers)),
        "cores": setup.workers * setup.cores / (costs.decode.mean() + reading),
        "disks": setup.disks / size * min(setup.rate(disk) for disk in range(setup.disks)),
        "driver": 1 / driver,
        "writers": setup.writers / writing if setup.writers and writing else np.inf,
    }
    return {stage: float(rate) for stage, rate in found.items()}


def simulate(setup: Setup, seed: int) -> Outcome:
    """One run; equal seeds draw equal corpora, whatever else the setups say."""
    return _Run(setup, seed).outcome()


@functools.lru_cache(maxsize=8)
def _decoding(costs: Costs, images: int, unit: int, seed: int) -> tuple[list[float], list[float]]:
    """Seconds of decoding and bytes of every unit, each image drawn from those measured."""
    chance, seconds, size = np.random.default_rng([seed, 0]), [], []
    step = max(1, 1_000_000 // unit)
    for first in range(0, images // unit, step):
        drawn = chance.integers(len(costs.decode), size=(min(step, images // unit - first), unit), dtype=np.int16)
        seconds += costs.decode[drawn].sum(1).tolist()
        size += costs.size[drawn].sum(1).tolist()
    return seconds, size


@functools.lru_cache(maxsize=8)
def _embedding(costs: Costs, images: int, unit: int, seed: int) -> list[float]:
    """Seconds of a GPU for every unit, each of its batches drawn from those measured."""
    batches = max(1, round(unit / BATCH))
    drawn = np.random.default_rng([seed, 1]).choice(costs.embed, size=(images // unit, batches))
    found: list[float] = (drawn.mean(1) * (unit / BATCH)).tolist()
    return found


class _Life:
    """When a worker is there: times to its death are exponential, and it is back after a fixed time."""

    def __init__(self, setup: Setup, chance: np.random.Generator) -> None:
        self.between, self.back, self.chance = setup.between * 3600, setup.back * 60, chance
        self.deaths = [self._after(0.0)]

    def _after(self, time: float) -> float:
        return time + self.chance.exponential(self.between) if self.between else np.inf

    def died(self, now: float) -> int:
        """How often until now."""
        while self.deaths[-1] <= now:
            self.deaths.append(self._after(self.deaths[-1] + self.back))
        return bisect.bisect_right(self.deaths, now)

    def death(self, now: float) -> float:
        """The next one."""
        return self.deaths[self.died(now)]

    def absent(self, now: float) -> float:
        """Seconds until it is back; 0 if it is there."""
        died = self.died(now)
        return max(0.0, self.deaths[died - 1] + self.back - now) if died else 0.0


class _Queue:
    """First in, first out; an event is made where someone must wait alone."""

    def __init__(self, environment: simpy.Environment, room: int, items: Iterable[int] = ()) -> None:
        self.environment, self.room, self.items = environment, room, deque(items)
        self.takers: deque[simpy.Event] = deque()
        self.givers: deque[simpy.Event] = deque()

    def put(self, item: int) -> None:
        """Put back what was taken, room or none."""
        self.items.append(item)
        if self.takers:
            self.takers.popleft().succeed()

    def give(self, item: int) -> Waiting:
        while len(self.items) >= self.room:
            yield self.waiting(self.givers)
        self.put(item)

    def take(self) -> Waiting:
        while not self.items:
            yield self.waiting(self.takers)
        if self.givers:
            self.givers.popleft().succeed()
        return self.items.popleft()

    def waiting(self, line: deque[simpy.Event]) -> simpy.Event:
        line.append(self.environment.event())
        return line[-1]


class _Run:
    def __init__(self, setup: Setup, seed: int) -> None:
        self.setup, self.environment = setup, simpy.Environment()
        self.decode, self.size = _decoding(setup.costs, setup.images, setup.unit, seed)
        self.embed = _embedding(setup.costs, setup.images, setup.unit, seed)
        self.queue = _Queue(self.environment, WAITING * setup.workers)
        self.each = setup.shard // setup.unit
        self.parts = setup.images // setup.shard
        self.shards = _Queue(self.environment, self.parts, range(self.parts))
        self.left = [self.each] * self.parts
        self.seen = bytearray(len(self.embed))
        self.disk_free = [0.0] * setup.disks
        self.driver_free, self.writer_free = 0.0, [0.0] * setup.writers
        self.busy = dict.fromkeys(("GPUs", "cores", "driver", "writers"), 0.0)
        self.disk_busy = [0.0] * setup.disks
        self.held: list[tuple[float, int]] = []
        self.written, self.again, self.last = 0, 0, 0.0
        self.done = self.environment.event()
        lives = [np.random.default_rng([seed, 2, worker]) for worker in range(setup.workers)]
        self.lives = [_Life(setup, chance) for chance in lives]

    def outcome(self) -> Outcome:
        setup, environment = self.setup, self.environment
        for worker in range(setup.workers):
            environment.process(self.gpu(worker))
            for _ in range(setup.cores):
                environment.process(self.core(worker))
        environment.run(until=self.done)
        servers = {"GPUs": setup.workers, "cores": setup.workers * setup.cores, "writers": setup.writers}
        used = {stage: busy / max(1, servers.get(stage, 1)) / self.last for stage, busy in self.busy.items()}
        used["disks"] = max(self.disk_busy) / self.last
        held = np.cumsum([change for _, change in sorted(self.held)])
        return Outcome(self.last, used, self.written, self.again, int(held.max()))

    def core(self, worker: int) -> Waiting:
        """Shard after shard: what is decoded of it goes into the queue."""
        environment, life = self.environment, self.lives[worker]
        while True:
            shard = yield from self.shards.take()
            died = life.died(environment.now)
            units = range(shard * self.each, (shard + 1) * self.each) if life.absent(environment.now) == 0 else ()
            for unit in units:
                self.busy["cores"] += self.decode[unit]
                yield environment.timeout(self.read(shard, self.size[unit]) - environment.now + self.decode[unit])
                if life.died(environment.now) == died:
                    yield from self.queue.give(unit)
                if life.died(environment.now) > died:
                    self.again += self.setup.unit * (unit + 1 - units[0])
                    break
            if not units or life.died(environment.now) > died:
                self.shards.put(shard)
                yield environment.timeout(life.absent(environment.now))

    def read(self, shard: int, size: float) -> float:
        """When a disk, which serves one after another, has read so many bytes."""
        disk = shard % self.setup.disks
        seconds = size / self.setup.rate(disk)
        self.disk_busy[disk] += seconds
        self.disk_free[disk] = max(self.environment.now, self.disk_free[disk]) + seconds
        return self.disk_free[disk]

    def gpu(self, worker: int) -> Waiting:
        """Unit after unit, as long as there are any."""
        environment, life = self.environment, self.lives[worker]
        while True:
            unit = yield from self.queue.take()
            if life.absent(environment.now):
                self.queue.put(unit)
                yield environment.timeout(life.absent(environment.now))
                continue
            seconds, held = self.embed[unit] * self.setup.slowness(worker), True
            while held and (death := life.death(environment.now)) <= environment.now + seconds:
                self.again += self.setup.unit
                self.busy["GPUs"] += death - environment.now
                yield environment.timeout(death - environment.now)
                if self.setup.elsewhere:
                    self.queue.put(unit)
                    held = False
                yield environment.timeout(life.back)
            if held:
                yield environment.timeout(seconds)
                self.busy["GPUs"] += seconds
                self.collected(unit)
                if (behind := self.driver_free - environment.now - PATIENCE) > 0:
                    yield environment.timeout(behind)

    def collected(self, unit: int) -> None:
        """The driver takes a unit's embeddings, and has the part written with the last of them."""
        setup, now, shard = self.setup, self.environment.now, unit // self.each
        self.drive(setup.collecting())
        if self.seen[unit]:
            return
        self.seen[unit] = 1
        self.held.append((now, setup.unit))
        self.left[shard] -= 1
        if self.left[shard]:
            return
        if setup.writers:
            end = max(self.driver_free, heapq.heappop(self.writer_free)) + setup.write
            heapq.heappush(self.writer_free, end)
            self.busy["writers"] += setup.write
        else:
            end = self.drive(setup.write)
        self.held.append((end, -setup.shard))
        self.written += setup.unit * sum(self.seen[shard * self.each : (shard + 1) * self.each])
        self.last, self.parts = max(self.last, end), self.parts - 1
        if not self.parts:
            self.done.succeed()

    def drive(self, seconds: float) -> float:
        """When the driver, which does one thing after another, has worked so long."""
        self.busy["driver"] += seconds
        self.driver_free = max(self.environment.now, self.driver_free) + seconds
        return self.driver_free

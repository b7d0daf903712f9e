"""The simulation of a corpus that many workers embed agrees with arithmetic, loses no image and is monotonous."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("simpy")
pytest.importorskip("rich")

DECODE, EMBED = 0.02, 0.064
NOISY = {"stragglers": 1, "between": 0.01, "back": 0.2, "slow_disks": 1}


@pytest.fixture
def simulation(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("corpus_simulation")


@pytest.fixture
def scale(simulation):
    return importlib.import_module("corpus_scale")


def costs(simulation, decode=(DECODE,), embed=(EMBED,)):
    return simulation.Costs(np.array(decode), np.full(len(decode), 2e5), np.array(embed))


def small(simulation, **settings):
    """Two hundred shards of 640 images, in units of a batch."""
    noise = costs(simulation, np.linspace(0.5, 1.5, 11) * DECODE, np.linspace(0.9, 1.1, 5) * EMBED)
    given = {"cores": 4, "images": 200 * 640, "shard": 640, "unit": 64, "workers": 4, "collect": 1e-4, "write": 0.05}
    return simulation.Setup(**{"costs": noise, **given, **settings})


@pytest.mark.parametrize("writers", [0, 1])
@pytest.mark.parametrize(
    ("decode", "embed", "collect", "limit"),
    [(DECODE, EMBED, 1e-3, "cores"), (1e-4, EMBED, 1e-3, "GPUs"), (1e-4, 0.01, 0.1, "driver")],
)
def test_one_worker_without_noise_takes_what_arithmetic_says(simulation, decode, embed, collect, limit, writers):
    given = {"cores": 1, "workers": 1, "disks": 1, "images": 6400, "shard": 6400, "unit": 64, "writers": writers}
    setup = simulation.Setup(costs(simulation, (decode,), (embed,)), collect=collect, write=0.5, **given)
    stages = [64 * decode + 64 * 2e5 / setup.bandwidth, embed, setup.collecting()]
    found = simulation.simulate(setup, 0)
    assert found.seconds == pytest.approx(sum(stages) + 99 * max(stages) + setup.write)
    assert found.used["GPUs"] == pytest.approx(100 * embed / found.seconds)
    ceilings = simulation.ceilings(setup)
    assert min(ceilings, key=ceilings.get) == limit and ceilings[limit] == pytest.approx(64 / max(stages), rel=0.1)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_every_image_is_written_once_whatever_fails(simulation, seed, elsewhere):
    setup = small(simulation, **NOISY, elsewhere=elsewhere)
    found = simulation.simulate(setup, seed)
    assert found.written == setup.images and found.again > 0
    assert setup.shard <= found.held <= setup.images
    assert simulation.simulate(setup, seed) == found


def test_what_fails_costs_time_and_what_is_added_saves_it(simulation):
    def seconds(**settings):
        return simulation.simulate(small(simulation, **settings), 1).seconds

    usual = seconds(cores=32)
    worse = {"stragglers": 4}, {"between": 0.01, "back": 0.2}, {"slow_disks": 1, "bandwidth": 1e8}, {"network": 1e6}
    assert all(seconds(**{"cores": 32, **each}) > 1.05 * usual for each in (*worse, {"write": 1.0, "writers": 0}))
    by_cores = [seconds(cores=cores) for cores in (1, 2, 4, 8, 16, 32)]
    assert by_cores == sorted(by_cores, reverse=True) and by_cores[0] > 3.5 * by_cores[2]
    faster = replace(small(simulation).costs, embed=small(simulation).costs.embed / 1.5)
    few, many = (seconds(cores=cores) / seconds(cores=cores, costs=faster) for cores in (4, 64))
    assert few < 1.02 and 1.3 < many < 1.5


@pytest.mark.parametrize("settings", [{}, {"stragglers": 2}, {"cores": 64}, {"cores": 64, "slow_disks": 1, "disks": 2}])
def test_no_stage_is_faster_than_its_ceiling(simulation, settings):
    setup = small(simulation, **settings)
    found, ceilings = simulation.simulate(setup, 0), simulation.ceilings(setup)
    reached = setup.images / found.seconds
    assert 0.7 * min(ceilings.values()) < reached < 1.02 * min(ceilings.values())
    assert all(0 <= share <= 1 for share in found.used.values())


def test_shares_that_do_not_divide_are_refused(simulation):
    with pytest.raises(ValueError, match="each must divide"):
        small(simulation, shard=1000)


def test_a_gpu_is_fed_from_the_break_even_on(scale):
    inputs = scale.read_inputs()
    row = next(line for line in scale.break_even(inputs) if line.startswith(f"| {scale.VIT}, {scale.NONE}"))
    feeding = float(row.split("**")[1])
    for cores, limit in ((int(feeding), "cores"), (int(feeding) + 1, "GPUs")):
        ceilings = scale.ceilings(scale.setup(scale.Case(scale.VIT, scale.NONE, cores), inputs))
        assert min(ceilings, key=ceilings.get) == limit


def test_the_report_is_of_the_runs_that_are_committed(scale):
    found = scale.load(scale.RESULTS / "corpus_scale.json")
    assert found["inputs"] == scale.read_inputs() and found["seeds"] >= 8
    assert found["cases"] == [case.name for case in scale.cases(found["inputs"])] == [*found["runs"]]
    assert all(run["written"] == found["images"] for runs in found["runs"].values() for run in runs)
    report = scale.report(found)
    assert report == (scale.RESULTS / "corpus_scale.md").read_text()
    page = (Path(__file__).parents[2] / "docs" / "corpora.md").read_text().partition("## At scale")[2]
    rows = [line for line in page.splitlines() if line.startswith(("| ViT-L", "| EVA-g"))]
    assert len(rows) > 3 and set(rows) <= set(report.splitlines())


def test_it_goes_on_behind_the_last_seed(scale, monkeypatch, tmp_path):
    monkeypatch.setattr(
        scale, "cases", lambda inputs: [scale.Case(scale.VIT, merging, 8) for merging in ("unmerged", "merged")]
    )
    monkeypatch.setattr(scale, "report", lambda found: f"{found['seeds']} seeds")
    monkeypatch.setattr(scale, "plot", lambda found, path: None)
    runs = []
    for seeds in ("1", "2", "2"):
        monkeypatch.setattr(
            "sys.argv", ["corpus_scale.py", "--seeds", seeds, "--images", "20000", "--out", str(tmp_path)]
        )
        scale.main()
        runs.append(scale.load(tmp_path / "corpus_scale.json")["runs"])
    assert all(first != second for first, second in runs[1].values()) and runs[1] == runs[2]
    assert [each[:1] for each in runs[1].values()] == [*runs[0].values()]
    assert (tmp_path / "corpus_scale.md").read_text() == "2 seeds"


def test_who_finds_no_room_waits(simulation):
    environment = simulation.simpy.Environment()
    queue, taken = simulation._Queue(environment, 2), []
    for item in range(5):
        environment.process(queue.give(item))
    environment.run()
    assert [*queue.items] == [0, 1] and len(queue.givers) == 3

    def taker():
        while True:
            taken.append((yield from queue.take()))

    environment.process(taker())
    environment.run()
    assert taken == [0, 1, 2, 3, 4] and not queue.items and len(queue.takers) == 1

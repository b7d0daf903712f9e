"""Everything that `turbovlm reproduce` declares, run with the built-in models on a few images."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from turbovlm.cli import main
from turbovlm_lab.reproduce.declared import WEIGHTS
from turbovlm_lab.reproduce.studies import every_study

pytest.importorskip("transformers")
pytest.importorskip("diffusers")


pytestmark = pytest.mark.slow


WHOLE = (*WEIGHTS, "GPTQ (here nf4)")
"""Lines that quantise, and merge nothing."""


@pytest.mark.timeout(1800)
def test_all_of_it_runs(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["reproduce", "all", "--builtin", "--quick", "--out", str(out)]) == 0, capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    studies = [s for s in every_study() if not getattr(s, "pruned", False)]
    wanted = list(dict.fromkeys(s.name if s.name == "table11" else s.key for s in studies))
    assert list(results) == wanted
    report = (out / "report.md").read_text()
    assert report.index("## All tasks at 60%") < report.index("## Saliency at 60%")
    for entry in results.values():
        assert f"## {entry['sheet']['title']}" in report
        plot = out / f"{entry['sheet']['picture']}.png"
        assert Image.open(plot).size[0] > 500 and plot.with_suffix(".svg").exists()
        for line in (entry["numbers"] if isinstance(entry["numbers"], dict) else {}).get("lines", ()):
            if line["row"] is not None and line["line"] != "unmerged":
                whole = line["line"] in WHOLE
                assert line["row"]["ratio"] == 1 if whole else line["row"]["ratio"] < 1, (entry["sheet"]["title"], line)
    blocks = results["figure3"]["numbers"]
    assert len(blocks["redundancy"]) == len(blocks["concentration"]) == 10
    savings = results["table11"]["numbers"]
    assert set(savings) == {"nlvr2", "vqa", "captioning", "retrieval"} and min(savings["vqa"].values()) >= 1

"""What commands print: tables of 80 columns, or one JSON document and nothing else; shell completion."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import corpora
from turbovlm.cli import inspect, main, measuring
from turbovlm.cli.output import console, print_table, tables, write_json

transformers = pytest.importorskip("transformers")

MODEL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
QUICK = ["--batch", "1", "--rounds", "1", "--warmup", "0"]
COMMANDS = {
    "inspect": (["inspect", "model", "--r", "2"], ["encoders", "model", "reading"]),
    "macs": (["macs", "model", "--r", "2"], ["amount", "encoders", "model"]),
    "bench": (["bench", "model", "--r", "2", "--quantize", "int8", *QUICK], ["encoders", "image_size", "model"]),
    "embed": (["embed", "photos", "--model", "./model", "--out", "out"], ["counts", "folder", "found", "made"]),
    "reproduce": (["reproduce", "--list"], ["studies"]),
    "doctor": (["doctor"], ["caches", "devices", "families", "kernels"]),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small model and photographs."""
    folder = tmp_path_factory.mktemp("place")
    config = transformers.Dinov2Config(**MODEL)
    transformers.Dinov2Model(config).save_pretrained(folder / "model")
    size, crop = {"shortest_edge": 56}, {"height": 56, "width": 56}
    transformers.BitImageProcessor(size=size, crop_size=crop).save_pretrained(folder / "model")
    corpora.in_folder(folder / "photos", 4, bad=(3,))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_tables_of_80_columns_or_one_document(command, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "80")
    argv, keys = COMMANDS[command]
    assert main([*argv, "--json", "a.json"]) == 0
    tables = capsys.readouterr().out
    assert tables.strip() and max(map(len, tables.splitlines())) <= 80 and "…" not in tables
    assert main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert out.startswith("{") and sorted(document)[: len(keys)] == keys and "──" not in err
    assert sorted(document) == sorted(json.loads((place / "a.json").read_text()))


def test_what_libraries_print_is_beside_the_document(monkeypatch, capsys):
    def run(args):
        print("a library says hello")
        write_json(args.json, {"macs": float("nan"), "all": (1, float("inf"))})
        return 0

    monkeypatch.setattr(inspect, "run", run)
    assert main(["inspect", "timm:test_vit", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out, parse_constant=pytest.fail) == {"macs": None, "all": [1, None]}
    assert err == "a library says hello\n"


def test_the_model_is_not_taken_for_a_file(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "--json", "timm:test_vit"])
    assert "'timm:test_vit' does not end in .json" in capsys.readouterr().err
    assert main(["inspect", "--json", "-", "timm:test_vit"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "timm:test_vit"


def test_a_failure_prints_no_document(capsys):
    assert main(["inspect", "keras:vit", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("turbovlm: keras:vit")


def test_a_figure_has_a_title_and_no_table(capsys):
    print_table(console(), "Figure 6", [], ())
    assert capsys.readouterr().out == "Figure 6\n"


@pytest.mark.parametrize("width", [40, 80, 120, 400])
def test_every_cell_is_printed_at_any_width(width, capsys):
    header = ["setting", *(f"metric {i}" for i in range(9))]
    names = ("a setting with a long name, number 1", "another with a long name, number 2")
    rows = [[name, *(f"0.8{i} [0.7{i}, 0.9{i}]" for i in range(9))] for name in names]
    made = tables(header, rows, width)
    terminal = Console(width=width)
    for table in made:
        terminal.print(table)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width and (len(made) == 1) == (width == 400)
    assert all(cell in printed for row in rows for cell in row[1:])


def test_a_bar_has_totals_speed_and_what_is_done_now(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with measuring.progress_bar(4, "loading") as advance:
        advance()
        advance(2, "merging")
    out, err = capsys.readouterr()
    assert out == "" and "3/4" in err and "merging" in err
    with measuring.progress_bar(None, "images") as advance:
        advance.to(7, 5)
    assert "5/7" in capsys.readouterr().err


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    from contextlib import redirect_stdout

    file = tmp_path_factory.mktemp("completion") / "turbovlm.bash"
    with file.open("w") as stream, redirect_stdout(stream):
        assert main(["completion", "bash"]) == 0
    return file


def completed(script, folder, *words):
    """What bash offers for the last word."""
    quoted = " ".join(f"'{word}'" for word in words)
    lines = [f"source {script}", "complete -p turbovlm >&2", f"COMP_WORDS=({quoted})", f"COMP_CWORD={len(words) - 1}"]
    lines += ["function=$(complete -p turbovlm | sed 's/.*-F \\([^ ]*\\).*/\\1/')"]
    lines += [f"$function turbovlm '{words[-1]}' '{words[-2]}'", "printf '%s\\n' \"${COMPREPLY[@]}\""]
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=True, cwd=folder)
    assert "turbovlm" in done.stderr
    return done.stdout.split()


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_bash_completes_commands_options_choices_and_files(script, place):
    assert completed(script, place, "turbovlm", "ins") == ["inspect"]
    assert completed(script, place, "turbovlm", "bench", "--qua") == ["--quantize"]
    assert completed(script, place, "turbovlm", "bench", "m", "--dtype", "bf") == ["bfloat16"]
    assert "photos/" in {f"{name.rstrip('/')}/" for name in completed(script, place, "turbovlm", "embed", "pho")}
    assert completed(script, place, "turbovlm", "inspect", "mod") == []


OTHERS = {"zsh": ("calibrate", "--max-drift", "_files"), "tcsh": ("calibrate",)}


@pytest.mark.parametrize(("shell", "words"), OTHERS.items())
def test_scripts_for_other_shells(shell, words, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in words)


def test_completion_without_shtab(monkeypatch, capsys):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "shtab" else found(name))
    assert main(["completion", "bash"]) == 2
    assert "pip install 'turbovlm[cli]'" in capsys.readouterr().err


def test_the_page_shows_what_was_printed():
    root = Path(__file__).parents[1]
    page = (root / "docs" / "terminal.md").read_text()
    blocks = re.findall(r"^```text\n(\$ .*?)^```", page, re.DOTALL | re.MULTILINE)
    measured = (root / "benchmarks" / "results" / "terminal.md").read_text()
    assert blocks and all(block in measured for block in blocks)

"""How commands end: Ctrl-C, a closed pipe, too little of something, and errors that are not turbovlm's."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import logging
import os
import signal
import subprocess
import sys

import pytest
import torch

from turbovlm import process
from turbovlm.cli import bench_encoders, inspect, main, measuring, remarks
from turbovlm.errors import TurboError
from turbovlm.loading import running
from turbovlm.loading.spec import reason

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")

COMMAND = ["inspect", "timm:test_vit"]


def interrupted(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("before", ["", "plan.json"])
def test_ctrl_c_is_one_line_and_130(before, monkeypatch, capfd):
    def run(args):
        measuring.written.extend([before] if before else [])
        interrupted()

    monkeypatch.setattr(inspect, "run", run)
    assert main(COMMAND) == 130
    said = f"written: {before}" if before else "nothing was written"
    assert capfd.readouterr() == ("", f"turbovlm: interrupted; {said}\n")


def test_ctrl_c_before_the_arguments_are_read(monkeypatch, capfd):
    monkeypatch.setattr("turbovlm.cli.entry_points", interrupted)
    assert main(COMMAND) == 130
    assert capfd.readouterr().err == "turbovlm: interrupted; nothing was written\n"


@pytest.mark.parametrize("kind", [ImportError, RuntimeError, TurboError, BrokenPipeError])
def test_ctrl_c_that_a_library_turns_into_an_error_of_its_own(kind, monkeypatch, capfd):
    def run(args):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise kind("numpy could not be imported") from None

    monkeypatch.setattr(inspect, "run", run)
    before = signal.getsignal(signal.SIGINT)
    assert main(COMMAND) == 130
    assert capfd.readouterr().err == "turbovlm: interrupted; nothing was written\n"
    assert signal.getsignal(signal.SIGINT) is before


TWICE = """
import signal, sys
from turbovlm.cli import inspect, main, measuring
signal.signal(signal.SIGINT, signal.default_int_handler)
def run(args):
    measuring.written.append("plan.json")
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.raise_signal(signal.SIGINT)
inspect.run = run
main(["inspect", "timm:test_vit"])
"""


def test_ctrl_c_twice_says_nothing_that_is_not_so():
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True)
    said = "turbovlm: interrupted; what was written by then is kept\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", said)


def test_a_handler_of_the_callers_own_stays(monkeypatch):
    seen = []
    monkeypatch.setattr(inspect, "run", lambda args: signal.raise_signal(signal.SIGINT) or 0)
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        assert main(COMMAND) == 0 and seen == [1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_mistakes_of_turbovlm_are_not_hidden(monkeypatch):
    def run(args):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(inspect, "run", run)
    with pytest.raises(ZeroDivisionError):
        main(COMMAND)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory"),
        (OSError(errno.ENOSPC, "No space left on device", "a.json"), "a.json: No space left on device"),
    ],
)
def test_too_little_of_something_is_one_line(error, said, monkeypatch, capsys):
    def run(args):
        raise error

    monkeypatch.setattr(inspect, "run", run)
    assert main(COMMAND) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"turbovlm: {said}") and err.count("\n") == 1


def test_a_broken_pipe_that_is_not_standard_output_is_seen(monkeypatch):
    def run(args):
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr(inspect, "run", run)
    with pytest.raises(BrokenPipeError):
        main(COMMAND)


BEGINNING = """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, *_):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
sys.argv = [{name!r}, "inspect"]
import turbovlm
"""


def test_ctrl_c_while_pytorch_is_imported():
    done = subprocess.run([sys.executable, "-c", BEGINNING.format(name="bin/turbovlm")], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "turbovlm: interrupted; nothing was written\n")
    own = subprocess.run([sys.executable, "-c", BEGINNING.format(name="train.py")], capture_output=True, text=True)
    assert own.returncode == -signal.SIGINT and "KeyboardInterrupt" in own.stderr


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/usr/bin/turbovlm", "bench"], True),
        (["C:/Scripts/turbovlm.exe"], True),
        (["train.py", "turbovlm"], False),
        ([""], False),
    ],
)
def test_which_process_is_the_command(argv, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert process.is_command() is expected


def test_which_process_is_the_command_as_a_module(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-m", "--version"])
    for arguments, expected in (
        (["-m", "turbovlm", "--version"], True),
        (["-W", "ignore", "-Im", "turbovlm", "inspect"], True),
        (["-m", "pytest", "--version"], False),
        (["-m", "pytest", "-m", "turbovlm"], False),
        (["-m", "package", "turbovlm"], False),
    ):
        monkeypatch.setattr(sys, "orig_argv", ["python", *arguments])
        assert process.is_command() is expected


def test_a_program_keeps_its_environment_and_its_signals():
    code = "import os, signal, turbovlm; print([n for n in os.environ if n[:6] in ('TORCH_', 'KINETO')])"
    code += "; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TORCH_", "KINETO"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split("\n")[:2] == ["[]", "True"]


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_a_reader_that_goes_away():
    """And what a command prints and says of what libraries remark: nothing but its own."""
    pytest.importorskip("timm")
    code = "import sys; sys.argv[0] = 'turbovlm'; from turbovlm.cli import main; sys.exit(main(sys.argv[1:]))"
    running = subprocess.Popen(
        [sys.executable, "-c", code, *COMMAND], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None and running.stderr is not None
    running.stdout.close()
    assert running.stderr.read() == "" and running.wait() == 141


def test_remarks_are_left_out_and_warnings_are_not(caplog):
    shown = {"torchao": "is too old", "torch.utils._pytree": "another", "diffusers.models.modeling_utils": "unused"}
    with caplog.at_level(logging.WARNING):
        with remarks.without_remarks():
            for name, parts in remarks.REMARKS.items():
                logging.getLogger(name).warning(f"so.{parts[0]}x")
            for name, text in shown.items():
                logging.getLogger(name).warning(text)
        assert [record.getMessage() for record in caplog.records] == list(shown.values())
        logging.getLogger("torchao").warning("Failed to load it.so")
    assert caplog.records[-1].getMessage() == "Failed to load it.so"


def folder_of(config, architecture, path, **broken):
    config.architectures = [architecture]
    config.save_pretrained(path)
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **broken}))
    return str(path)


VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
BROKEN = [
    ({"patch_size": 100}, "the model itself, unmerged, does not run: RuntimeError"),
    ({"patch_size": 0}, "patch_size=0; must be an integer ≥ 1"),
    ({"image_size": -56}, "image_size=-56; must be an integer ≥ 1"),
    ({"num_attention_heads": 0}, "ZeroDivisionError"),
    ({"hidden_act": "nope"}, "KeyError"),
    ({"hidden_size": -4}, "could not load it: "),
]


@pytest.mark.parametrize(("broken", "said"), BROKEN, ids=[str(broken) for broken, _ in BROKEN])
@pytest.mark.parametrize("command", ["inspect", "macs", "bench"])
def test_a_config_that_no_model_can_have(command, broken, said, tmp_path, capsys):
    folder = folder_of(transformers.ViTConfig(**VIT), "ViTModel", tmp_path, **broken)
    assert main([command, folder, "--r", "2"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("turbovlm: ") and folder in err and said in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["inspect", "macs", "bench"])
@pytest.mark.parametrize("size", ["100", "1"])
def test_an_image_size_that_the_library_refuses(command, size, capsys):
    pytest.importorskip("timm")
    assert main([command, "timm:test_vit", "--r", "2", "--image-size", size]) == 2
    assert f"does not run: AssertionError: Input height ({size}) should be" in capsys.readouterr().err


def test_a_config_of_which_no_visual_token_comes(tmp_path, capsys):
    folder = folder_of(transformers.Gemma3Config(), "Gemma3ForConditionalGeneration", tmp_path)
    assert main(["inspect", folder, "--visual-keep", "0.5"]) == 2
    err = capsys.readouterr().err
    assert f"{folder}: the model itself, unmerged, does not read an image of 224x224 pixels: RuntimeError" in err


def test_bench_asks_before_it_builds(monkeypatch, tmp_path, capsys):
    """A model that is refused is built nowhere but on the meta device."""
    folder = folder_of(transformers.ViTConfig(**VIT), "ViTModel", tmp_path)
    build, built = transformers.ViTModel.__init__, []

    def init(self, *args, **kwargs):
        build(self, *args, **kwargs)
        built.append(next(self.parameters()).device.type)

    monkeypatch.setattr(transformers.ViTModel, "__init__", init)
    monkeypatch.setattr(bench_encoders, "compare_shown", interrupted)
    assert main(["bench", folder, "--r", "2"]) == 130 and built == ["meta", "cpu"]
    built.clear()
    monkeypatch.setattr("turbovlm.loading.models.find_towers", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["bench", folder, "--r", "2"])
    assert built == ["meta"]
    capsys.readouterr()


def test_only_what_a_library_raises_becomes_its_answer():
    def library():
        raise KeyError("head")

    ours = {"__name__": "turbovlm.encoder.blocks"}
    exec("def mistake(): raise KeyError('head')", ours)
    said = r"^mine: the model itself, unmerged, does not run: KeyError: 'head'$"
    with pytest.raises(TurboError, match=said), running("mine"):
        library()
    with pytest.raises(KeyError), running("mine"):
        ours["mistake"]()
    with pytest.raises(MemoryError), running("mine"):
        raise MemoryError


def test_reasons_are_one_line():
    assert reason(ValueError("a\n  b")) == "ValueError: a b"
    assert reason(StopIteration()) == "StopIteration"
    assert len(reason(ValueError("word " * 500))) < 220


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--steps", "0"], "--steps 0"),
        (["--steps", "1000000000"], "--steps 1000000000"),
        (["--seed", "-1"], "--seed -1"),
        (["--seed", "9" * 30], "--seed 999"),
        (["--guidance-scale", "nan"], "--guidance-scale nan"),
    ],
)
def test_what_no_image_can_be_made_with(given, said, capsys):
    pytest.importorskip("turbovlm_lab")
    assert main(["bench", "diffusers:a/pipeline", *given]) == 2
    assert capsys.readouterr().err.startswith(f"turbovlm: {said}")


def test_progress_is_for_terminals(capsys):
    with measuring.progress_bar(3) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")


def test_names_of_commands_have_what_they_keep():
    """A command that says what it keeps says it for any arguments."""
    for name in ("evaluate", "reproduce"):
        module = importlib.import_module(f"turbovlm_lab.cli.{name}")
        parser = argparse.ArgumentParser()
        module.register(parser.add_subparsers())
        args = parser.parse_args([name, *(["saliency"] if name == "evaluate" else [])])
        assert args.kept(args) is None

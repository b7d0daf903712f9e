"""vLLM's server with the plug-in, asked by the `openai` client over loopback; and what is refused before it starts."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from answer import images
from served import ENGINE, NEW, SETTINGS, environment, python_of_vllm
from tiny_served import save

import turbovlm

if importlib.util.find_spec("openai") is None:
    pytest.skip("vllm is not installed: make test-engines sets up an environment with it", allow_module_level=True)

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %} w1"
QUESTIONS = [("w5 w6", [0]), ("w9 w8 w7", []), ("w6 w9 w11", [1, 2]), ("w5 w6 w7", [0])]
SETTING = SETTINGS["in rounds"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("served")
    save("llava", made)
    (made / "chat.jinja").write_text(TEMPLATE)
    return made


@pytest.fixture(scope="module")
def client(folder):
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {name: ENGINE[name] for name in ("dtype", "max_num_batched_tokens", "block_size")} | {
        "max_model_len": 768
    }
    command = [python_of_vllm(), "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command += ["--enforce-eager", "--served-model-name", "small", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--chat-template", str(folder / "chat.jinja"), "--additional-config", json.dumps({"turbovlm": SETTING})]
    log = (folder / "server.log").open("w")
    several = environment(VLLM_ENABLE_V1_MULTIPROCESSING="1")  # front end, engine and worker apart
    server = subprocess.Popen(command, env=several, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server, folder / "server.log")
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    finally:
        server.terminate()
        server.wait(60)


def _wait_for(url, server, log):
    for _ in range(400):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def _ask(client, question):
    text, seeds = question
    content = []
    for image in images(seeds, [[48, 48]]):
        image.save(written := io.BytesIO(), "PNG")
        url = f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": text})
    parts = client.chat.completions.create(
        model="small",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=NEW,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )
    words, used = "", None
    for part in parts:
        words += "".join(choice.delta.content or "" for choice in part.choices)
        used = part.usage or used
    return words.split(), used.prompt_tokens


def test_streams_are_what_transformers_generates(folder, client):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    turbovlm.apply(model, **SETTING)
    with ThreadPoolExecutor(len(QUESTIONS)) as threads:
        rounds = [list(threads.map(lambda question: _ask(client, question), QUESTIONS)) for _ in range(2)]
    for i, (text, seeds) in enumerate(QUESTIONS):
        prompt = "<image>\n" * len(seeds) + f"{text} w1"
        inputs = processor(text=prompt, images=images(seeds, [[48, 48]]) or None, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        expected = processor.tokenizer.convert_ids_to_tokens(out[0, length:])
        for answered, prompt_tokens in (answers[i] for answers in rounds):
            assert answered == expected
            assert prompt_tokens == length - 18 * len(seeds)


def test_a_prompt_beyond_the_model_s_positions_is_refused_and_the_server_goes_on(client):
    import openai

    with pytest.raises(openai.BadRequestError, match="keep the positions of the full prompt"):
        _ask(client, ("w5", list(range(30))))  # 1,080 tokens, of which 540 would be read
    assert _ask(client, QUESTIONS[1])[0]


REFUSALS = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
for model, given, beside in json.loads(sys.argv[1]):
    try:
        config = EngineArgs(model=model, additional_config={"turbovlm": given}, **beside).create_engine_config()
        limits = MULTIMODAL_REGISTRY.get_processing_info(config.model_config).allowed_mm_limits
        print("accepted", {modality: limit > 0 for modality, limit in limits.items()})
    except ValueError as error:
        print(type(error).__name__, " ".join(str(error).split()))
"""


def test_what_is_wrong_is_named_before_an_engine_starts(folder, tmp_path):
    from tiny_served import TEXT
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    save("qwen3", tmp_path / "qwen")
    llava, llama, qwen = str(folder), str(tmp_path), str(tmp_path / "qwen")
    cases = [
        (llava, {"visual_keep": 0.5}, {}, "accepted {'image': True}"),
        (qwen, {"visual_keep": 0.5}, {}, "accepted {'image': True, 'video': False}"),
        (llava, {"tokens": 0.5}, {}, "ConfigError tokens=0.5: no such setting"),
        (llava, {"keep": 0.5}, {}, "accepted {'image': True}"),
        (llava, {"r": 4, "blocks": [3]}, {}, "ConfigError blocks=[3]: the encoder in 'vision_tower' has 3 blocks"),
        (qwen, {"r": 4}, {}, "UnsupportedModelError Qwen3VLForConditionalGeneration: r=4 merges inside the towers of"),
        (llava, {"r": 4}, {"tensor_parallel_size": 2}, "ConfigError tensor_parallel_size"),
        (llava, {"r": 4}, {"compilation_config": {"compile_mm_encoder": True}}, "ConfigError compile_mm_encoder"),
        (llava, {"r": 4}, {"cpu_offload_gb": 1}, "ConfigError cpu_offload_gb"),
        (llava, {"visual_keep": 2.5}, {}, "ConfigError visual_keep=2.5"),
        (llama, {"visual_keep": 0.5}, {}, "UnsupportedModelError LlamaForCausalLM"),
        (llava, {"visual_keep": 0.5}, {"enable_mm_embeds": True}, "ConfigError enable_mm_embeds"),
    ]
    script = [python_of_vllm(), "-W", "ignore", "-c", REFUSALS, json.dumps([case[:3] for case in cases])]
    done = subprocess.run(script, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if line.startswith(("accepted", "ConfigError", "Unsupp", "Val"))]
    assert len(said) == len(cases), done.stdout[-3000:]
    for line, case in zip(said, cases):
        assert line.startswith(case[3]), line

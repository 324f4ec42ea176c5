"""Servers for tests, on free ports of this machine: real ones, and fakes of what can't be run."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import weakref
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock, Thread
from typing import Any, Callable, Iterator

import httpx
import llama_cpp
import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from tract_lite.data.files import cache_folder
from tract_lite.engines.llama_cpp import load_model

START_SECONDS = 60
# Not tuned to the machine: the cache may travel, and AMX stays off.
CMAKE_OPTIONS = """-DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DBUILD_SHARED_LIBS=OFF
-DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF
-DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
-DLLAMA_BUILD_APP=OFF""".split()


def llama_server_path() -> Path:
    """llama-server in the version of llama-cpp-python, built once (some minutes) into the cache."""
    release = version("llama_cpp_python").partition("+")[0]
    path = cache_folder() / f"llama-server-{release}"
    if not path.is_file():
        if not shutil.which("c++") and not shutil.which("g++"):
            pytest.skip("no C++ compiler to build llama-server with")
        # Of several workers, one builds.
        with FileLock(f"{path}.lock"), TemporaryDirectory(prefix="llama-server-", dir=path.parent) as folder:
            if not path.is_file():
                built = _build(_fetch(release, Path(folder)), Path(folder, "build"))
                os.replace(built, path)
    return path


def _fetch(release: str, folder: Path) -> Path:
    """llama.cpp's source, out of the source package of llama-cpp-python."""
    _run(
        sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python",
        f"llama-cpp-python=={release}", "--dest", folder
    )  # fmt: skip
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("*/vendor/llama.cpp"))


def _build(source: Path, build: Path) -> Path:
    places = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])
    cmake = shutil.which("cmake", path=places)
    assert cmake, "building llama-server needs cmake: pip install cmake"
    _run(cmake, "-S", source, "-B", build, *CMAKE_OPTIONS)
    command = [cmake, "--build", build, "--target", "llama-server", "--parallel", os.cpu_count()]
    _run("nice", *command)
    return build / "bin" / "llama-server"


def _run(*command: Any) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def running(command: list[Any], port: int, ready: str) -> Iterator[str]:
    """The URL of a server that a command starts, once its page `ready` is there."""
    url = f"http://127.0.0.1:{port}"
    with TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=subprocess.STDOUT)
        try:
            for _ in range(START_SECONDS * 20):
                assert process.poll() is None, log.read_text(errors="replace")
                if _answers(url + ready):
                    break
                time.sleep(0.05)
            else:
                raise AssertionError(log.read_text(errors="replace"))
            yield url
        finally:
            process.kill()
            process.wait()


def _answers(page: str) -> bool:
    try:
        return httpx.get(page).is_success
    except httpx.TransportError:
        return False


@contextmanager
def llama_server(model: Path, slots: int = 4, context: int = 256) -> Iterator[str]:
    """llama-server with a model, computing in float32 throughout."""
    port = free_port()
    options = f"--port {port} -np {slots} -c {slots * context} -t 1 -ctk f32 -ctv f32 -fa off"
    command = [llama_server_path(), "-m", model, *options.split(), "--no-warmup"]
    with running(command, port, "/health") as url:
        yield url


Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]]


@contextmanager
def fake_server(answer: Callable[[str, Any, str | None], Answer]) -> Iterator[str]:
    """The URL of a server that answers as told.

    `answer` gets path, body and the Authorization header, and gives status, content and headers.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._answer(self.path.partition("?")[0], None)

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            body = self.rfile.read(length)
            # Unless whoever asked is gone.
            if len(body) == length:
                self._answer(self.path, json.loads(body))

        def _answer(self, path: str, body: Any) -> None:
            self._send(*answer(path, body, self.headers["Authorization"]))

        def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *details: Any) -> None:
            if not isinstance(sys.exc_info()[1], ConnectionError):
                super().handle_error(*details)

    server = Server(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class FakeLlamaServer:
    """A fake: llama-server's protocol over a transformers model, with llama.cpp's own vocabulary.

    Where the real one can be built, tests hold both to the same. `path`: the GGUF with the
    vocabulary. `folder`: the model; without one only texts are taken apart. `near`: whether the
    server's file is there for its clients.
    """

    KNOWN = set(
        """model prompt n_predict stop seed samplers temperature top_p mirostat dynatemp_range
        min_keep return_tokens n_probs post_sampling_probs logit_bias""".split()
    )

    def __init__(self, path: Path, folder: Path | None = None, *, near: bool = True, context: int = 256):
        self.path, self.near, self.context = path, near, context
        self.model = folder and AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.gguf = load_model(path, vocab_only=True)
        weakref.finalize(self, llama_cpp.llama_model_free, self.gguf)
        self.vocab = llama_cpp.llama_model_get_vocab(self.gguf)
        self.lock = Lock()

    def __call__(self, path: str, body: Any, key: str | None) -> Answer:
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": self.path.name, "owned_by": "llamacpp"}]}
        if path == "/props":
            place = str(self.path if self.near else self.path.with_name("far.gguf"))
            return 200, {"default_generation_settings": {"n_ctx": self.context}, "model_path": place}
        if path not in ("/tokenize", "/detokenize", "/completion"):
            return 404, {"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}
        with self.lock, torch.inference_mode():
            return 200, getattr(self, path[1:])(body)

    def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        data = body["content"].encode()
        ids = (llama_cpp.llama_token * (len(data) + 8))()
        options = body["add_special"], body["parse_special"]
        return {"tokens": ids[: llama_cpp.llama_tokenize(self.vocab, data, len(data), ids, len(ids), *options)]}

    def detokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"content": b"".join(map(self._piece, body["tokens"])).decode("utf-8", "replace")}

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        assert set(body) <= self.KNOWN and body["model"] == self.path.name
        assert not body["mirostat"] and not body["dynatemp_range"] and not body["min_keep"]
        answer = {"truncated": False, "tokens_evaluated": len(body["prompt"]), "stop_type": "limit"}
        ids, text, output = [], b"", None
        with _sampler(body, len(self.model.lm_head.weight)) as choose:
            while len(ids) < body["n_predict"]:
                taken = torch.tensor([[ids[-1]] if ids else body["prompt"]])
                output = self.model(taken, past_key_values=output and output.past_key_values, use_cache=True)
                logits = output.logits[0, -1]
                ids.append(choose(logits.numpy()))
                text += self._piece(ids[-1])
                if llama_cpp.llama_vocab_is_eog(self.vocab, ids[-1]):
                    answer["stop_type"] = "eos"
                elif any(word.encode() in text for word in body.get("stop", [])):
                    answer["stop_type"] = "word"
                else:
                    continue
                break
        if body.get("return_tokens"):
            answer["tokens"] = ids
        if count := body.get("n_probs"):
            assert len(ids) == 1 and not body["post_sampling_probs"]
            rows = logits.log_softmax(-1)
            top = [{"id": i, "logprob": rows[i].item()} for i in rows.topk(count).indices.tolist()]
            # Of a token that is no whole character nothing is told.
            whole = "\ufffd" not in text.decode("utf-8", "replace")
            answer["completion_probabilities"] = [{"id": ids[0], "top_logprobs": top}] * whole
        return answer

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        length = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[:length]


@contextmanager
def _sampler(body: dict[str, Any], size: int) -> Iterator[Callable[[Any], int]]:
    """Chooses from logits as llama-server does, by the samplers that it is asked for."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    biases = [llama_cpp.llama_logit_bias(*pair) for pair in body.get("logit_bias", [])]
    array = (llama_cpp.llama_logit_bias * len(biases))(*biases)
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_logit_bias(size, len(biases), array))
    for name in body["samplers"]:
        added = {
            "temperature": lambda: llama_cpp.llama_sampler_init_temp(body["temperature"]),
            "top_p": lambda: llama_cpp.llama_sampler_init_top_p(body["top_p"], 1),
        }[name]()
        llama_cpp.llama_sampler_chain_add(chain, added)
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(body.get("seed", 0xFFFFFFFF)))

    def choose(logits: Any) -> int:
        data = (llama_cpp.llama_token_data * size)(
            *(llama_cpp.llama_token_data(i, logit, 0.0) for i, logit in enumerate(logits))
        )
        candidates = llama_cpp.llama_token_data_array(data, size, -1, False)
        llama_cpp.llama_sampler_apply(chain, ctypes.byref(candidates))
        token = candidates.data[candidates.selected].id
        llama_cpp.llama_sampler_accept(chain, token)
        return token

    try:
        yield choose
    finally:
        llama_cpp.llama_sampler_free(chain)


class FakeVLLM:
    """A fake: what vLLM documents of its completions by token ids, over a real transformers model.

    vLLM itself can't be installed on a machine like the tests'. This knows the fields that it
    documents and refuses others, so that no field is sent in vain.
    """

    KNOWN = set(
        """model prompt max_tokens temperature top_p top_k min_p seed stop stop_token_ids
        repetition_penalty presence_penalty frequency_penalty logprobs return_token_ids
        return_tokens_as_token_ids include_stop_str_in_output""".split()
    )

    def __init__(self, folder: Path, root: str, max_logprobs: int = 20, context: int = 256):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.root, self.max_logprobs, self.context = root, max_logprobs, context
        self.lock = Lock()

    def __call__(self, path: str, body: Any, key: str | None) -> Answer:
        if path == "/v1/models":
            card = {"id": "judge", "owned_by": "vllm", "root": self.root}
            return 200, {"object": "list", "data": [{**card, "max_model_len": self.context}]}
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        assert set(body) <= self.KNOWN and body["model"] == "judge" and body["top_k"] == -1
        wanted = body.get("logprobs") or 0
        if wanted > self.max_logprobs:
            text = f"Requested sample logprobs of {wanted}, which is greater than max allowed"
            return 400, {"error": {"message": f"{text}: {self.max_logprobs}", "code": 400}}
        if len(body["prompt"]) + body["max_tokens"] > self.context:
            text = f"This model's maximum context length is {self.context} tokens."
            return 400, {"error": {"message": text, "code": 400}}
        with self.lock, torch.inference_mode():
            return 200, {"choices": [self._choice(body)]}

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, stop = body["prompt"], body.get("stop") or None
        ends = [self.tokenizer.eos_token_id, *body.get("stop_token_ids", [])]
        torch.manual_seed(body.get("seed", 0))
        sampled = {"temperature": body["temperature"], "top_p": body.get("top_p", 1.0), "top_k": 0}
        output = self.model.generate(
            torch.tensor([prompt]),
            max_new_tokens=body["max_tokens"],
            repetition_penalty=float(body["repetition_penalty"]),
            eos_token_id=ends,
            stop_strings=stop,
            tokenizer=self.tokenizer if stop else None,
            **({"do_sample": True, **sampled} if body["temperature"] else {"do_sample": False}),
        )
        ids = output[0, len(prompt) :].tolist()
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        stopped = ids[-1] in ends or any(word in text for word in stop or [])
        choice = {"text": text, "finish_reason": "stop" if stopped else "length"}
        if body.get("return_token_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": prompt}
        if body.get("logprobs") is not None:
            assert len(ids) == 1 and body["return_tokens_as_token_ids"]
            rows = self.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            top = {f"token_id:{i}": rows[i].item() for i in rows.topk(body["logprobs"]).indices}
            choice["logprobs"] = {"top_logprobs": [top]}
        return choice

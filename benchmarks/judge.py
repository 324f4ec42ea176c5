"""Judging with a GGUF: the engine against llama-cpp-python's own API, in items per minute.

    python benchmarks/judge.py              # a random model of the shape of Llama-3.2-1B, Q4_K_M
    python benchmarks/judge.py --smallest   # shows that it works, and measures nothing

All ways judge with one model, in one run: each item has a prompt, a sampled reasoning of one
length, and the full distribution read behind the marker. Every way has a process of its own, and
its time starts when the model is loaded. Asked besides: how fast llama-server is where that program
is at hand, what a score without a reasoning costs, what repacked weights bring, and whether the
engine keeps to the memory of the model file, the cache and, repacked, the second copy. On a
processor with AMX nothing is repacked, since llama.cpp would crash.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import json
import logging
import re
import shutil
import socket
import statistics
import subprocess
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Callable, Iterator, Sequence
from unittest.mock import patch

import httpx
import measure
import numpy as np
from measure import MB, in_child, table, verdict

from tract_lite import rail
from tract_lite.data.files import cache_folder
from tract_lite.engines.context import usable_cpus
from tract_lite.engines.llama import LlamaEngine, default_parallel
from tract_lite.engines.llama_cpp import has_amx, load_model, read_spec, system_info
from tract_lite.engines.task import Task
from tract_lite.rail import label_log_probabilities
from tract_lite.scale import ScoreScale
from tract_lite.spec import MARKER, JudgeSpec, spec_for
from tract_lite.vocabulary import GGUFVocabulary

# Logits spread so far make distributions about as peaked as those of text: a nucleus of 0.9 holds
# a handful to some dozens of tokens.
LOGIT_SPREAD = 6.0
INITIAL_SPREAD = 0.02
# All ids from here on can stand in a prompt: bytes, then pieces.
FIRST_ID = 3
# Tokens for marker, label and end.
SCORE_ROOM = 24
MEMORY_ALLOWANCE = 300 * MB
LOGGED_BUFFER = re.compile(r"(\S+)\s+(model|KV) buffer size =\s+([\d.]+) MiB")


@dataclass(frozen=True)
class Shape:
    hidden: int = 2048
    layers: int = 16
    heads: int = 32
    kv_heads: int = 8
    intermediate: int = 8192
    vocabulary: int = 128_256

    @property
    def token_bytes(self) -> int:
        """Of keys and values in the cache, in 16 bits."""
        return 4 * self.layers * self.kv_heads * self.hidden // self.heads


@dataclass(frozen=True)
class Lengths:
    """In tokens; `shared` is what prompts under one rubric and instruction have in common.

    `own`: what a short item has beside it.
    """

    prompt: int = 1000
    shared: int = 600
    reasoning: int = 128
    own: int = 40

    @property
    def all(self) -> int:
        return self.prompt + self.reasoning + SCORE_ROOM


@dataclass(frozen=True)
class Way:
    """`function` judges; `bar`: how many times as fast as `base` (a name) it has to be.

    On another `scale` than 1-5 every branch of the labels' tree is followed, however unlikely.
    """

    name: str
    function: str
    n_cot: int = 1
    shares: bool = False
    short: bool = False
    repack: bool = False
    scale: str = ""
    base: str = ""
    bar: float | None = None


# Judges tasks and returns how many tokens each reasoning has.
Judging = Callable[[Sequence[Task]], list[int]]

PLAIN, PLAIN_8 = "llama-cpp-python, one at a time", "llama-cpp-python, prefix cache"
SHARED, SHORT = "ours, one rubric and instruction", "ours, short items under one rubric"
WAYS = (
    Way(PLAIN, "plain"),
    Way("llama-cpp-python with logprobs", "logprobs", base=PLAIN),
    Way("llama-server, unrelated prompts", "server", base=PLAIN),
    Way("ours, unrelated prompts", "ours", base=PLAIN, bar=2.0),
    Way(SHARED, "ours", shares=True, base=PLAIN, bar=3.5),
    Way("ours, the same, repacked", "ours", shares=True, repack=True, base=PLAIN),
    Way("ours, the same on 1-10", "ours", shares=True, scale="1-10", base=SHARED, bar=0.87),
    Way("ours, the same on 0-100", "ours", shares=True, scale="0-100", base=SHARED, bar=0.67),
    Way(PLAIN_8, "plain", n_cot=8),
    Way("llama-server, 8 reasonings an item", "server", n_cot=8, base=PLAIN_8),
    Way("ours, 8 reasonings an item", "ours", n_cot=8, base=PLAIN_8, bar=3.0),
    Way(SHORT, "ours", shares=True, short=True),
    Way("ours, the same without a reasoning", "ours", n_cot=0, shares=True, short=True, base=SHORT, bar=8.0),
)
# How many times as fast as llama-server ours has to be.
SERVER_BARS = {("ours, unrelated prompts", "llama-server, unrelated prompts"): 1.3}
SERVER_BARS |= {("ours, 8 reasonings an item", "llama-server, 8 reasonings an item"): 1.5}
SERVER_SLOTS = 16


def make_model(shape: dict[str, int], path: str) -> dict[str, Any]:
    """Write a random judge as GGUF."""
    # Imported with torch, which would count as memory of judging.
    from tract_lite.export.gguf import export_gguf

    with TemporaryDirectory(dir=Path(path).parent) as folder:
        export_gguf(folder, path, "q4_k_m", write_seed(Path(folder), Shape(**shape)), check=False)
    return {"peak": measure.peak_memory()}


def write_seed(folder: Path, shape: Shape) -> JudgeSpec:
    """Write a random seed model; its vocabulary is a small one, filled up with unused tokens."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tract_lite.spec import make_spec

    _write_vocabulary(folder)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        initializer_range=INITIAL_SPREAD,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight.fill_(LOGIT_SPREAD / INITIAL_SPREAD / shape.hidden**0.5)
    model.save_pretrained(folder)
    return make_spec(AutoTokenizer.from_pretrained(folder), ScoreScale.integers(1, 5))


def _write_vocabulary(folder: Path) -> None:
    """A small one in which the marker has a token for each word, as in a real one."""
    import sentencepiece

    text = Path(__file__).read_text().splitlines() + 20 * [f"{MARKER} {n}" for n in range(10)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "legacy": False,
                "add_bos_token": True,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
            }
        )
    )


def make_tasks(way: Way, lengths: Lengths, vocabulary: int, items: int) -> list[Task]:
    rng = np.random.default_rng(0)
    shared = rng.integers(FIRST_ID, vocabulary, lengths.shared).tolist()
    tasks = []
    for number in range(items):
        length = lengths.shared + lengths.own if way.short else lengths.prompt
        prompt = [1, *rng.integers(FIRST_ID, vocabulary, length - 1).tolist()]
        if way.shares:
            prompt[1 : len(shared)] = shared[1:]
        seeds = [way.n_cot * number + n for n in range(way.n_cot)]
        tasks.append(Task(prompt, seeds) if seeds else Task.direct(prompt))
    return tasks


def judge(
    way: dict[str, Any],
    lengths: dict[str, int],
    vocabulary: int,
    path: str,
    items: int,
    threads: int,
    parallel: int,
    amx: bool,
    server: str,
) -> dict[str, Any]:
    """Judge some items one way: seconds, peak memory, tokens written, the sizes of buffers.

    `amx`: whether the processor has it. `server`: the program llama-server.
    """
    way, lengths = Way(**way), Lengths(**lengths)
    buffers = _record_buffers()
    spec = read_spec(path)
    spec = replace(spec, sampling=replace(spec.sampling, max_new_tokens=lengths.reasoning))
    if way.scale:
        spec = on_scale(spec, ScoreScale.parse(way.scale), path)
    functions = {"ours": _ours, "plain": _plain, "logprobs": _logprobs, "server": _server}
    run = functions[way.function](
        path, spec, lengths.all, threads=threads, parallel=parallel, repack=way.repack, amx=amx, server=server
    )
    tasks = make_tasks(way, lengths, vocabulary, items)
    run([Task([1, FIRST_ID], [0])])
    # A random judge puts next to nothing on labels: all branches would be left out.
    with patch.object(rail, "PRUNED_MASS", 0.0) if way.scale else nullcontext():
        start = time.perf_counter()
        written = run(tasks)
        seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "written": statistics.mean(written),
        "peak": measure.peak_memory(),
        "file": Path(path).stat().st_size,
        "buffers": buffers,
    }


def on_scale(spec: JudgeSpec, scale: ScoreScale, path: str) -> JudgeSpec:
    """The spec with another scale, spelled in the vocabulary of a GGUF file."""
    vocabulary = GGUFVocabulary(load_model(path, vocab_only=True))
    return spec_for(vocabulary, spec.chat, scale, template=spec.template, sampling=spec.sampling)


def _record_buffers() -> dict[str, float]:
    """Fills itself with the bytes of the buffers that llama.cpp's log names from now on."""
    buffers: dict[str, float] = {}

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if found := LOGGED_BUFFER.search(record.getMessage()):
                buffers[f"{found[1]} {found[2]}"] = float(found[3]) * 2**20

    logger = logging.getLogger("tract_lite.engines.llama_cpp")
    logger.addHandler(Recorder())
    logger.setLevel(logging.DEBUG)
    return buffers


def _ours(path: str, spec: JudgeSpec, length: int, threads: int, parallel: int, repack: bool, **_: Any) -> Judging:
    engine = LlamaEngine(path, spec, context_length=length, threads=threads, parallel=parallel, repack=repack)
    return lambda tasks: [len(sample.reasoning) for _, samples in engine.run(tasks) for sample in samples]


def _plain(path: str, spec: JudgeSpec, length: int, threads: int, amx: bool, **_: Any) -> Judging:
    """`Llama.generate`, which keeps the prefix that a prompt shares with the one before."""
    llama = open_llama(path, length, threads, spec, amx)

    def run(tasks: Sequence[Task]) -> list[int]:
        written = []
        for task in tasks:
            for seed in task.seeds:
                llama.set_seed(seed)
                sampled = llama.generate(list(task.prompt), temp=spec.sampling.temperature, **_rule(spec))
                reasoning = list(islice(sampled, spec.sampling.max_new_tokens))
                llama.eval([reasoning[-1], *spec.marker_ids])
                logits = np.ctypeslib.as_array(llama._ctx.get_logits_ith(-1), (llama.n_vocab(),))
                label_log_probabilities(logits, [label[0] for label in spec.label_ids])
                written.append(len(reasoning))
        return written

    return run


def _logprobs(path: str, spec: JudgeSpec, length: int, threads: int, amx: bool, **_: Any) -> Judging:
    """`Llama.create_completion` twice: for the reasoning, and with logprobs for the score."""
    llama = open_llama(path, length, threads, spec, amx, logits_all=True)

    def run(tasks: Sequence[Task]) -> list[int]:
        written = []
        for task in tasks:
            reasoning = llama.create_completion(
                list(task.prompt),
                max_tokens=spec.sampling.max_new_tokens,
                seed=task.seeds[0],
                temperature=spec.sampling.temperature,
                **_rule(spec),
            )
            read = llama.input_ids[: llama.n_tokens].tolist()
            llama.create_completion([*read, *spec.marker_ids], max_tokens=1, logprobs=5)
            written.append(reasoning["usage"]["completion_tokens"])
        return written

    return run


def _server(path: str, spec: JudgeSpec, length: int, threads: int, amx: bool, server: str, **_: Any) -> Judging:
    """llama-server with 16 slots, each as long as ours, asked by the package's own client."""
    from tract_lite.engines.server import ServerEngine

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    sizes = f"-np {SERVER_SLOTS} -c {SERVER_SLOTS * length} -t {threads} -tb {threads} --port {port}"
    command = [server, "-m", path, "--host", "127.0.0.1", *sizes.split(), *["--no-repack"] * amx]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    atexit.register(process.kill)
    url = f"http://127.0.0.1:{port}"
    while process.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").is_success:
                break
        time.sleep(0.2)
    else:
        raise RuntimeError(f"{server} ended with exit code {process.returncode}")
    engine = ServerEngine(url, spec=spec, vocabulary=path, parallel=SERVER_SLOTS, timeout=600)
    return lambda tasks: [len(sample.reasoning) for _, samples in engine.run(tasks) for sample in samples]


def open_llama(path: str, length: int, threads: int, spec: JudgeSpec, amx: bool, **options: Any) -> Any:
    """llama-cpp-python's own model: as it comes, but for repacked weights where `amx`."""
    from llama_cpp import Llama

    with _without_repacking() if amx else nullcontext():
        return Llama(
            path,
            n_ctx=length,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
            last_n_tokens_size=spec.sampling.max_new_tokens,
            **options,
        )


@contextmanager
def _without_repacking() -> Iterator[None]:
    """Here `Llama`, which has no parameter for it, loads weights as they are."""
    from llama_cpp import llama_cpp

    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = False
    with patch.object(llama_cpp, "llama_model_default_params", lambda: params):
        yield


def _rule(spec: JudgeSpec) -> dict[str, float]:
    return {"top_p": spec.sampling.top_p, "top_k": 0, "min_p": 0.0, "repeat_penalty": spec.sampling.repetition_penalty}


def child(job: str, **arguments: Any) -> dict[str, Any]:
    return {"make": make_model, "judge": judge}[job](**arguments)


class Comparison:
    """The measurements of one call; every one of them runs in a process of its own."""

    def __init__(self, options: argparse.Namespace):
        self.shape, self.lengths = Shape(), Lengths()
        if options.smallest:
            self.shape = Shape(256, 2, 4, 2, 512, 2048)
            self.lengths = Lengths(80, 48, 8)
            options.parallel = options.parallel or 8
        self.threads = options.threads
        self.parallel = options.parallel or default_parallel(self.lengths.all, self.shape.token_bytes)
        self.amx = has_amx()
        self.server = shutil.which(options.llama_server) or ""
        self.failures: list[str] = []

    def show(self) -> None:
        shape, lengths = self.shape, self.lengths
        print(f"{measure.machine('llama_cpp_python', 'numpy')}, {self.threads} threads")
        print(f"{system_info().strip()}\n")
        path = self.model()
        print(
            f"{path}: {path.stat().st_size / MB:,.0f} MB, hidden size {shape.hidden:,}, "
            f"{shape.layers} layers, vocabulary {shape.vocabulary:,}\n"
            f"prompts of {lengths.prompt:,} tokens, reasonings of {lengths.reasoning}, "
            f"{self.parallel} sequences at once; the bars are for the default sizes on two "
            "cores",
            flush=True,
        )
        if self.amx:
            print("this processor has AMX, with which llama.cpp crashes: no way has repacked weights (extra buffers)")
        print()
        results = {way: self.measure(way, path) for way in WAYS}
        print(f"\n{self.speed_table(results)}\n{self.server_lines(results)}")
        print(f"\nMemory in MB; at most {MEMORY_ALLOWANCE / MB:g} more than the parts named\n")
        print(self.memory_table(results))
        print("".join(f"\n{failure}" for failure in self.failures), end="")

    def model(self) -> Path:
        """The model file, made at first use."""
        shape = asdict(self.shape)
        key = hashlib.sha256(json.dumps([shape, LOGIT_SPREAD]).encode()).hexdigest()[:12]
        path = cache_folder() / f"random_judge-{key}.gguf"
        if not path.exists():
            made = in_child(__file__, {"job": "make", "shape": shape, "path": str(path)})
            if "error" in made:
                raise SystemExit(f"no model: {made['error']}")
            print(f"the model was made with {made['peak'] / MB:,.0f} MB of memory at most")
        return path

    def measure(self, way: Way, path: Path) -> dict[str, Any]:
        """What `judge` measures and the `speed`, or `missing`: why there is nothing, in a word."""
        if way.repack and self.amx:
            return {"missing": "crashes with AMX"}
        if way.function == "server" and not self.server:
            return {"missing": "no llama-server"}
        result = in_child(
            __file__,
            {
                "job": "judge",
                "way": asdict(way),
                "lengths": asdict(self.lengths),
                "vocabulary": self.shape.vocabulary,
                "path": str(path),
                "items": self.items(way),
                "threads": self.threads,
                "parallel": self.parallel,
                "amx": self.amx,
                "server": self.server,
            },
        )
        if "error" in result:
            self.failures.append(f"{way.name}: {result['error']}")
            return {"missing": "failed"}
        print(f"{way.name}: {result['seconds']:.1f} s", flush=True)
        return {**result, "speed": 60 * self.items(way) / result["seconds"]}

    def items(self, way: Way) -> int:
        """As many as fill all sequences once; fewer in the slow ways."""
        if way.function in ("ours", "server"):
            return max(1, (self.parallel if way.function == "ours" else SERVER_SLOTS) // max(1, way.n_cot))
        return 1 if way.n_cot > 1 else 3

    def speed_table(self, results: dict[Way, dict[str, Any]]) -> str:
        rows = []
        speeds = {way.name: result.get("speed") for way, result in results.items()}
        for way, result in results.items():
            if missing := result.get("missing"):
                rows.append([way.name, str(way.n_cot), missing, *[""] * 4])
                continue
            base = speeds.get(way.base)
            rows.append(
                [
                    way.name,
                    str(way.n_cot),
                    str(self.items(way)),
                    f"{result['written']:.0f}",
                    f"{result['speed']:.2f}",
                    _times(result["speed"], base, way.bar),
                    # That of the server is not this process's.
                    "" if way.function == "server" else f"{result['peak'] / MB:,.0f}",
                ]
            )
        return table(["way", "n_cot", "items", "tokens written", "items/min", "times", "peak MB"], rows)

    def server_lines(self, results: dict[Way, dict[str, Any]]) -> str:
        """How ours compares with llama-server."""
        speeds = {way.name: result.get("speed") for way, result in results.items()}
        pairs = [(ours, speeds[ours], speeds[theirs], bar) for (ours, theirs), bar in SERVER_BARS.items()]
        return "\n".join(f"{ours}: {_times(s, base, bar)} x llama-server" for ours, s, base, bar in pairs if s and base)

    def memory_table(self, results: dict[Way, dict[str, Any]]) -> str:
        rows = []
        for way, result in results.items():
            if way.function != "ours" or "missing" in result:
                continue
            buffers = result["buffers"]
            cache, repacked = (sum(size for name, size in buffers.items() if kind in name) for kind in ("KV", "REPACK"))
            allowed = result["file"] + cache + repacked + MEMORY_ALLOWANCE
            rows.append(
                [
                    way.name,
                    *(f"{part / MB:,.0f}" for part in (result["file"], cache, repacked, allowed)),
                    f"{result['peak'] / MB:,.0f} ({verdict(result['peak'] <= allowed)})",
                ]
            )
        return table(["way", "file", "cache", "repacked", "allowed", "peak"], rows)


def _times(speed: float, plain: float | None, bar: float | None) -> str:
    if not plain:
        return ""
    times = f"{speed / plain:.2f}"
    return times if bar is None else f"{times} (bar {bar:g}: {verdict(speed >= bar * plain)})"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parallel", type=int, help="of the engine, its own choice by default")
    parser.add_argument("--threads", type=int, default=usable_cpus(), help="of every way")
    parser.add_argument("--llama-server", default="llama-server", metavar="PATH", help="the program, to compare with")
    parser.add_argument("--smallest", action="store_true", help="a tiny model, few tokens")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        return measure.answer(child, options.child)
    Comparison(options).show()


if __name__ == "__main__":
    main()

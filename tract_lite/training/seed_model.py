"""The seed model: load it, attach LoRA, load an adapter, get its hidden states.

Only this module knows the backends: Unsloth where CUDA is there, else transformers with
bitsandbytes. A model that Unsloth has loaded carries a mark.
"""

import gc
import importlib.util
import logging
import os
import re
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Iterator

import torch

from tract_lite.data.places import check_model, why_not_loaded
from tract_lite.scale import ScoreScale
from tract_lite.spec import JudgeSpec, make_spec
from tract_lite.training.layers import keeps_prefixes, last_hidden_states, lora_targets
from tract_lite.training.precision import pick_4bit, pick_dtype
from tract_lite.training.quiet import without_bars

logger = logging.getLogger(__name__)

HIDDEN_STATES_SWITCH = "UNSLOTH_RETURN_HIDDEN_STATES"
# Read when Unsloth is imported. Models with its fused forward, such as Phi, give logits in place of
# hidden states; its statistics ask the hub at each loading.
IMPORT_SWITCHES = {"UNSLOTH_FUSED_FORWARD": "0", "UNSLOTH_DISABLE_STATISTICS": "1"}
# In what the lower-cased names of one model's copies differ.
COPY_MARKS = re.compile(r"^meta-|(-hf)?(-unsloth)?(-bnb-4bit)?$")
REPACKING_SWITCH = "support_avx512bf16_for_cpu"
UNSLOTH_MARK, PLAIN_MARK = "loaded_by_unsloth", "forward_of_transformers"


def load_seed(
    name_or_path: str | Path,
    load_in_4bit: bool | None = None,
    max_seq_length: int = 3072,
    backend: str = "auto",
    precision: str | None = None,
) -> tuple[Any, Any]:
    """A seed model and its tokenizer, ready for `add_lora`.

    `load_in_4bit`: as in `pick_4bit`; weights of 4 bits stay such. `precision`: as in `pick_dtype`.
    `backend`: "unsloth", "transformers", or "auto" (Unsloth where it and CUDA are there).
    Raises RuntimeError: this torch has no kernels for the card, there is no CUDA for Unsloth, or
        4 bits were asked for and none of the model's layers has them.
    Raises FileNotFoundError: no such folder, or the hub does not give it.
    Raises ValueError: the folder's model can't be loaded; an unknown backend or precision; Unsloth
        is to read longer sequences than the model does.
    """
    dtype, reason = pick_dtype(precision)
    load_in_4bit = pick_4bit(load_in_4bit)
    check_model(name_or_path)
    logger.info("precision: %s", reason)
    if backend == "auto":
        backend = "transformers"
        if torch.cuda.is_available() and importlib.util.find_spec("unsloth"):
            backend = "unsloth"
        elif torch.cuda.is_available():
            advice = "pip install -r requirements-gpu.txt"
            logger.warning("unsloth is not installed, training is slower without it: %s", advice)
    if backend not in ("unsloth", "transformers"):
        raise ValueError(f"backend must be 'auto', 'unsloth' or 'transformers', got {backend!r}")
    with _faults_in_words(name_or_path):
        if backend == "unsloth":
            model, tokenizer = _load_with_unsloth(str(name_or_path), load_in_4bit, max_seq_length, dtype)
        else:
            model, tokenizer = _load_with_transformers(str(name_or_path), load_in_4bit, dtype)
    if backend == "unsloth":
        # For more than a model's own positions, Unsloth has stretched them: that is another model.
        check_length(_positions(_config(model.config._name_or_path)), max_seq_length)
    # Either backend goes on in 16 bits, with a line at most, where bitsandbytes can't be had.
    if load_in_4bit and not is_in_4bit(model):
        advice = "see what `python -m bitsandbytes` says, or choose another seed model"
        raise RuntimeError(f"{name_or_path} was asked for in 4 bits, and has loaded without them\n{advice}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return model, tokenizer


def open_seed_model(
    seed_model: str | Path,
    scale: ScoreScale,
    *,
    load_in_4bit: bool | None = None,
    precision: str | None = None,
    max_length: int = 3000,
    **fields: Any,
) -> tuple[Any, Any, JudgeSpec]:
    """A seed model, its tokenizer, and the spec by which it is asked; see `SeedOptions`.

    Where the model reads fewer tokens than `max_length`, the spec has as many as it reads.
    Raises ValueError: the scale does not fit the model's vocabulary; else as `load_seed`.
    """
    free_memory()
    check_model(seed_model)
    with _faults_in_words(seed_model):
        longest = _positions(_config(str(seed_model)))
    if longest and longest < max_length:
        logger.warning(
            "the seed model reads %d tokens of a sequence, not %d: longer items are left out", longest, max_length
        )
        max_length = longest
    model, tokenizer = load_seed(seed_model, load_in_4bit, max_length, precision=precision)
    # Unsloth may have loaded its own 4-bit copy of the model; that is the adapter's base.
    fields["base_model"] = model.config._name_or_path
    precision = str(compute_dtype(model)).removeprefix("torch.")
    fields["method"] = {"load_in_4bit": is_in_4bit(model), "precision": precision}
    return model, tokenizer, make_spec(tokenizer, scale, max_length=max_length, **fields)


def free_memory() -> None:
    """Give back what models that nobody holds any more have taken."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _faults_in_words(name: str | Path) -> Iterator[None]:
    """What the libraries say of a model that they can't load, in a line that tells what to do."""
    try:
        yield
    except (RuntimeError, ImportError, MemoryError):
        raise
    except Exception as error:
        kind = ValueError if Path(name).is_dir() else FileNotFoundError
        raise kind(why_not_loaded(name, error)) from error


def _load_with_unsloth(name: str, load_in_4bit: bool, max_seq_length: int, dtype: torch.dtype) -> tuple[Any, Any]:
    if not torch.cuda.is_available():
        raise RuntimeError("Unsloth needs a CUDA GPU: use backend='transformers' on this machine")
    if "transformers" in sys.modules and "unsloth" not in sys.modules:
        logger.warning("transformers was imported before unsloth: some of its speed-ups are lost")
    os.environ |= IMPORT_SWITCHES
    from unsloth import FastLanguageModel

    options = {"max_seq_length": max_seq_length, "load_in_4bit": load_in_4bit, "dtype": dtype}
    model, tokenizer = FastLanguageModel.from_pretrained(name, **options)
    setattr(model, UNSLOTH_MARK, True)
    return model, tokenizer


def _load_with_transformers(name: str, load_in_4bit: bool, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = _config(name)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    options: dict[str, Any] = {"dtype": dtype}
    if load_in_4bit and not hasattr(config, "quantization_config"):
        kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options["quantization_config"] = BitsAndBytesConfig(**kind, bnb_4bit_compute_dtype=dtype)
    if torch.cuda.is_available():
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0))}
    with without_bars() if Path(name).is_dir() else nullcontext():
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    # Gemma-3n clamps frozen weights while it trains, which those in 4 bits can't be; its config
    # takes no None in the usual way.
    vars(model.config.get_text_config()).update({"altup_coef_clip": None})
    for module in model.modules():
        # Else bitsandbytes repacks the weights when a CPU with bfloat16 units first evaluates them:
        # it computes in bfloat16 from then on, and without a gradient.
        if hasattr(module, REPACKING_SWITCH):
            setattr(module, REPACKING_SWITCH, False)
    return model, tokenizer


def _config(name: str) -> Any:
    from transformers import AutoConfig

    # Code that a model brings along is not run, and nobody is asked.
    return AutoConfig.from_pretrained(name, trust_remote_code=False)


def _positions(config: Any) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def longest_sequence(model: Any) -> int | None:
    """How many tokens of a sequence the model reads; None: any number."""
    loaded_for = model.max_seq_length if _is_unsloth(model) else None
    return min(filter(None, (loaded_for, _positions(model.config))), default=None)


def check_length(longest: int | None, asked: int) -> None:
    """Raises ValueError: longer sequences are asked for than the seed model reads."""
    if longest and longest < asked:
        fault = f"the seed model reads {longest} tokens of a sequence, and {asked} are asked for"
        raise ValueError(f"{fault}\ntake a max_length of {longest}, or another seed model")


def add_lora(
    model: Any,
    rank: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    *,
    gradient_checkpointing: bool = True,
    seed: int = 42,
) -> Any:
    """A new adapter on all linear layers of the blocks, by TRACT's settings; all else is frozen."""
    from transformers import set_seed

    set_seed(seed)
    targets = lora_targets(model)
    lora: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": targets}
    if _is_unsloth(model):
        from unsloth import FastLanguageModel

        lora |= {"use_gradient_checkpointing": "unsloth" if gradient_checkpointing else False, "random_state": seed}
        return FastLanguageModel.get_peft_model(model, **lora)
    from peft import LoraConfig, get_peft_model

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))


def for_training(model: Any) -> None:
    """Undo what judging with the model has switched, so that it can be trained."""
    if _is_unsloth(model):
        from unsloth import FastLanguageModel

        FastLanguageModel.for_training(model)
    model.train()


def load_adapter(model: Any, adapter: str | Path) -> Any:
    """The seed model with a trained adapter on it, for judging."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter)).eval()


def compute_dtype(model: Any) -> torch.dtype:
    """The type that a model from `load_seed` computes in."""
    return model.get_input_embeddings().weight.dtype


def is_in_4bit(model: Any) -> bool:
    """Whether a model from `load_seed` has weights in 4 bits."""
    return any(type(module).__name__ == "Linear4bit" for module in model.modules())


def hidden_states(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The last hidden states (B, T, H), after the final norm and before the vocabulary projection.

    They come out of the model's own forward, so that wrappers such as DDP see the pass.
    Raises ValueError: a sequence is longer than the model was loaded for.
    """
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    held = getattr(model, "module", model)
    if _is_unsloth(model) and not getattr(held, PLAIN_MARK, False):
        hidden = _by_switch(model, batch)
        # Unsloth cuts what is longer than it was asked for.
        if hidden.shape[1] < input_ids.shape[1]:
            fault = f"a sequence has {input_ids.shape[1]} tokens, and the model was loaded for {hidden.shape[1]}"
            raise ValueError(f"{fault}\nload it with a larger max_seq_length, or take shorter sequences")
        if hidden.shape[-1] == held.config.get_text_config().hidden_size:
            return hidden
        # Those are logits: the model's class was looked up before Unsloth had put its own there.
        setattr(held, PLAIN_MARK, True)
    return last_hidden_states(model, batch)


def goes_on_from_prefixes(model: Any) -> bool:
    """Whether `prefix_states` can be had of a model."""
    return not _is_unsloth(model) and keeps_prefixes(model)


def _by_switch(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The last hidden states as Unsloth gives them, in place of the logits."""
    os.environ[HIDDEN_STATES_SWITCH] = "1"
    try:
        return model(**batch).logits
    finally:
        os.environ[HIDDEN_STATES_SWITCH] = "0"


def _is_unsloth(model: Any) -> bool:
    """Whether Unsloth has loaded the model, which may be inside DDP and have an adapter on it."""
    return getattr(getattr(model, "module", model), UNSLOTH_MARK, False)

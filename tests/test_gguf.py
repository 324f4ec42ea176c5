import json
import shutil
from pathlib import Path

import pytest
from llama_cpp import llama_model_free
from tiny import make_llama, make_sentences, make_spm
from transformers import AutoTokenizer

from tract_lite.engines.llama import LlamaEngine
from tract_lite.engines.llama_cpp import load_model, read_spec
from tract_lite.engines.task import Task
from tract_lite.export.converter import llama_cpp_source
from tract_lite.export.gguf import export_gguf
from tract_lite.scale import ScoreScale
from tract_lite.spec import JudgeSpec, make_spec
from tract_lite.vocabulary import GGUFVocabulary, TransformersVocabulary

TOKENIZERS = Path(__file__).parents[1].parent / "shared" / "tokenizers"
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
TEXTS = ODD_TEXTS + make_sentences(87, seed=1)
needs_tokenizers = pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="no real vocabularies here")


def make_judge(folder: Path, tokenizer_folder: Path, **options) -> JudgeSpec:
    """A tiny model folder with a spec for scores of 1 to 5."""
    make_llama(folder, tokenizer_folder, **options)
    spec = make_spec(
        AutoTokenizer.from_pretrained(folder),
        ScoreScale.integers(1, 5),
        max_length=256,
        method={"stage": 2, "note": "π"},
    )
    spec.save(folder)
    return spec


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    # Q4_K needs widths that 256 divides.
    make_judge(folder / "model", make_spm(folder / "spm", make_sentences()), hidden=256)
    return folder / "model"


@pytest.fixture(scope="module")
def exported(model):
    return export_gguf(model, model.parent / "out" / "judge.gguf", ("f32", "q8_0", "Q4_K_M"))


def test_several_types_give_a_file_each_and_nothing_else(exported):
    expected = ["judge-f32.gguf", "judge-q8_0.gguf", "judge-q4_k_m.gguf"]
    assert [path.name for path in exported] == expected
    assert names_in(exported[0].parent) == set(expected)


def test_the_spec_travels_through_conversion_and_quantisation(model, exported):
    spec = JudgeSpec.load(model)
    assert [read_spec(path) for path in exported] == [spec] * 3


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_type_loads_and_judges(exported, number):
    with LlamaEngine(exported[number], threads=1, parallel=2) as engine:
        task = Task([1, *engine.vocabulary.encode("The answer is clear.")], [7, 8])
        [(index, samples)] = engine.run([task])
    assert index == 0 and len(samples) == 2
    assert all((sample.label_log_probabilities < 0).all() for sample in samples)


def test_smaller_types_give_smaller_files(exported):
    f32, q8_0, q4_k_m = (path.stat().st_size for path in exported)
    assert q8_0 < 0.3 * f32 and q4_k_m < 0.2 * f32


def assert_same_ids(gguf: Path, tokenizer_folder: Path) -> None:
    theirs = TransformersVocabulary(AutoTokenizer.from_pretrained(tokenizer_folder))
    model = load_model(gguf, vocab_only=True)
    ours = GGUFVocabulary(model)
    differing = [text for text in TEXTS if ours.encode(text) != theirs.encode(text)]
    sizes = len(ours), len(theirs)
    llama_model_free(model)
    assert differing == [] and len(set(sizes)) == 1


def test_a_trained_spm_vocabulary_gives_the_same_ids_on_both_sides(model, exported):
    assert_same_ids(exported[0], model)


@needs_tokenizers
@pytest.mark.parametrize("name", ["llama-spm", "llama-bpe", "qwen2", "gpt-2"])
def test_a_real_vocabulary_gives_the_same_ids_on_both_sides(name):
    assert_same_ids(TOKENIZERS / name / "vocab.gguf", TOKENIZERS / name)


def test_an_spm_folder_without_its_model_file_is_refused(model, tmp_path):
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path)
    shutil.copy(model / "config.json", tmp_path)
    (tmp_path / "tokenizer.model").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="tokenizer.model"):
        export_gguf(tmp_path, tmp_path / "judge.gguf")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "give the model in 16 bits"),
        ({"model_type": "gemma2", "tie_word_embeddings": False}, "untied embeddings"),
    ],
)
def test_a_folder_that_the_converter_can_not_take_is_refused(model, tmp_path, change, words):
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=words):
        export_gguf(folder, tmp_path / "judge.gguf")


def test_what_can_not_be_written_is_said_before_any_work(model, tmp_path):
    with pytest.raises(ValueError, match="no quantization"):
        export_gguf(model, tmp_path / "judge.gguf", [], cleanup=True)
    with pytest.raises(ValueError, match="is a folder"):
        export_gguf(model, tmp_path)
    assert model.exists()


def test_a_dot_in_a_name_is_not_always_a_suffix(model, tmp_path):
    (written,) = export_gguf(model, tmp_path / "judge-3.2-1B", ["f32"], check=False)
    assert written == tmp_path / "judge-3.2-1B-f32" and written.is_file()


def test_an_unknown_quantization_is_refused_with_the_known_ones(model, tmp_path):
    with pytest.raises(ValueError, match="q5_9.*f32.*q4_k_m"):
        export_gguf(model, tmp_path / "judge.gguf", ["q8_0", "q5_9"])
    assert names_in(tmp_path) == set()


def test_a_failed_export_says_why_and_leaves_nothing(model, tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    (source / "gguf.py").write_text("class GGUFWriter: pass")
    (source / "convert_hf_to_gguf.py").write_text("raise SystemExit('no such architecture')")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(source))
    with pytest.raises(RuntimeError, match="no such architecture"):
        export_gguf(model, tmp_path / "out" / "judge.gguf", "q4_k_m")
    assert names_in(tmp_path / "out") == set()


def test_a_folder_without_a_converter_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="LLAMA_CPP_DIR"):
        llama_cpp_source()


def test_the_spec_of_another_vocabulary_is_refused(model, tmp_path):
    spec = json.loads(JudgeSpec.load(model).to_json())
    spec["pieces"][-1] = "9"
    with pytest.raises(ValueError, match="vocabulary"):
        export_gguf(model, tmp_path / "judge.gguf", "f32", JudgeSpec.from_json(json.dumps(spec)))
    assert names_in(tmp_path) == set()


def test_what_is_no_gguf_file_is_refused_in_one_line(exported, tmp_path):
    text, torn = tmp_path / "text.gguf", tmp_path / "torn.gguf"
    text.write_text("The answer is clear.")
    torn.write_bytes(exported[0].read_bytes()[:4000])
    for path in (text, torn):
        with pytest.raises(ValueError, match=path.name) as refusal:
            read_spec(path)
        assert "\n" not in str(refusal.value)

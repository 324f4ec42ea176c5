import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from stages import load_exact
from tiny import gguf_weights, make_plain_judge, make_sentences
from transformers import AutoModelForCausalLM, AutoTokenizer

from tract_lite.engines.llama import LlamaEngine
from tract_lite.engines.task import Task
from tract_lite.engines.transformers import TransformersEngine
from tract_lite.judge import Judge
from tract_lite.prompt import cut_reasoning
from tract_lite.record import Record
from tract_lite.scale import ScoreScale
from tract_lite.spec import Sampling, make_spec
from tract_lite.training.seed_model import add_lora

LENGTH = 24


@pytest.fixture(scope="module")
def folder(shared_once):
    return shared_once("plain_judge", make_plain_judge) / "model"


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def spec(tokenizer):
    """A marker so short that a random model writes it now and then."""
    return make_spec(
        tokenizer, ScoreScale.integers(1, 5), marker="the", max_length=128, sampling=Sampling(max_new_tokens=LENGTH)
    )


def make_tasks(spec, tokenizer, count: int = 11, samples: int = 2) -> list[Task]:
    """Tasks with prompts of very different lengths."""
    sentences = make_sentences(2 * count, seed=3)
    return [
        Task(
            [1, *tokenizer(" ".join(sentences[n : 2 * n + 1]), add_special_tokens=False)["input_ids"]][:90],
            [100 * n + k for k in range(samples)],
        )
        for n in range(count)
    ]


def answers_of(engine, tasks) -> list:
    answers = dict(engine.run(tasks))
    return [answers[index] for index in range(len(tasks))]


def sampled_with(model, tokenizer, spec, prompt, seeds=(1,), **sampling) -> list[list[int]]:
    spec = replace(spec, sampling=replace(spec.sampling, **sampling))
    [(_, samples)] = TransformersEngine(model, tokenizer, spec, 8).run([Task(prompt, list(seeds))])
    return [sample.reasoning for sample in samples]


@torch.no_grad()
def greedy(model, spec, engine, prompt, penalty=1.0, count_prompt=False) -> list[int]:
    """The most likely reasoning, token by token, without batch or cache."""
    ids = list(prompt)
    for _ in range(spec.sampling.max_new_tokens):
        logits = model(torch.tensor([ids])).logits[0, -1]
        for token in set(ids if count_prompt else ids[len(prompt) :]):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        ids.append(logits.argmax().item())
    return cut_reasoning(ids[len(prompt) :], spec, engine.vocabulary)[0]


def test_a_sample_does_not_depend_on_the_others_in_its_batch(model, tokenizer, spec):
    tasks = make_tasks(spec, tokenizer)
    alone = answers_of(TransformersEngine(model, tokenizer, spec, 1), tasks)
    for batch_size, order in ((4, tasks), (16, tasks[::-1])):
        together = answers_of(TransformersEngine(model, tokenizer, spec, batch_size), order)
        for one, other in zip(alone, together if order is tasks else together[::-1]):
            for sample, twin in zip(one, other, strict=True):
                assert (sample.reasoning, sample.truncated) == (twin.reasoning, twin.truncated)
                np.testing.assert_allclose(sample.label_log_probabilities, twin.label_log_probabilities, atol=1e-3)
    written = [tuple(sample.reasoning) for samples in alone for sample in samples]
    assert len(set(written)) > len(written) // 2
    ends = [sample.truncated for samples in alone for sample in samples]
    assert any(ends) and not all(ends)


def test_the_same_seed_gives_the_same_sample_and_another_one_another(model, tokenizer, spec):
    task = make_tasks(spec, tokenizer)[3]
    first, again, other = sampled_with(model, tokenizer, spec, task.prompt, (5, 5, 6), top_p=1.0)
    assert first == again != other


def test_temperature_zero_is_greedy(model, tokenizer, spec):
    engine = TransformersEngine(model, tokenizer, spec)
    for task in make_tasks(spec, tokenizer, 4):
        [found] = sampled_with(model, tokenizer, spec, task.prompt, temperature=0.0, repetition_penalty=1.0)
        assert found == greedy(model, spec, engine, task.prompt)


def test_the_repetition_penalty_counts_generated_tokens_only(model, tokenizer, spec):
    engine = TransformersEngine(model, tokenizer, spec)
    differs = 0
    for task in make_tasks(spec, tokenizer, 6):
        [found] = sampled_with(model, tokenizer, spec, task.prompt, temperature=0.0, repetition_penalty=1.5)
        assert found == greedy(model, spec, engine, task.prompt, penalty=1.5)
        differs += found != greedy(model, spec, engine, task.prompt, penalty=1.5, count_prompt=True)
    assert differs  # else the test could not tell


def test_the_sampling_defaults_of_the_seed_do_not_mix_in(model, tokenizer, spec):
    """Qwen2 seeds ship a repetition penalty, which transformers applies unasked."""
    task = make_tasks(spec, tokenizer)[3]
    expected = sampled_with(model, tokenizer, spec, task.prompt, range(4))
    before = model.generation_config
    model.generation_config = type(before)(repetition_penalty=2.0, no_repeat_ngram_size=1, min_new_tokens=9)
    try:
        assert sampled_with(model, tokenizer, spec, task.prompt, range(4)) == expected
        assert model.generation_config.repetition_penalty == 2.0
    finally:
        model.generation_config = before


def test_tokens_are_drawn_with_their_probabilities(model, tokenizer, spec):
    """400 draws; a count 5 standard deviations off has a chance of one in a million."""
    prompt = make_tasks(spec, tokenizer)[2].prompt
    with torch.no_grad():
        p = (model(torch.tensor([prompt])).logits[0, -1].double() / 3).softmax(-1)
    drawn = sampled_with(model, tokenizer, spec, prompt, range(400), temperature=3.0, top_p=1.0, max_new_tokens=1)
    for token in p.topk(3).indices.tolist():
        mean, deviation = 400 * p[token], (400 * p[token] * (1 - p[token])).sqrt()
        assert abs(drawn.count([token]) - mean) < 5 * deviation


@pytest.mark.parametrize("top_p", [0.0, 1e-9])
def test_a_small_top_p_leaves_the_most_likely_token(model, tokenizer, spec, top_p):
    engine = TransformersEngine(model, tokenizer, replace(spec, sampling=Sampling(max_new_tokens=3)))
    rule = {"temperature": 3.0, "repetition_penalty": 1.0, "max_new_tokens": 3}
    for task in make_tasks(spec, tokenizer, 3):
        drawn = sampled_with(model, tokenizer, spec, task.prompt, range(20), top_p=top_p, **rule)
        assert drawn == [greedy(model, engine.spec, engine, task.prompt)] * 20


def test_given_reasonings_are_read_and_not_sampled(model, tokenizer, spec):
    tasks = [
        replace(task, reasonings=[[5, 6, 7 + n], [9] * (n + 1)]) for n, task in enumerate(make_tasks(spec, tokenizer))
    ]
    for task, samples in zip(tasks, answers_of(TransformersEngine(model, tokenizer, spec, 4), tasks)):
        for reasoning, sample in zip(task.reasonings, samples, strict=True):
            with torch.no_grad():
                ids = torch.tensor([[*task.prompt, *reasoning, *spec.marker_ids]])
                expected = model(ids).logits[0, -1].double().log_softmax(-1)[[token for (token,) in spec.label_ids]]
            assert sample.reasoning == reasoning and not sample.truncated
            np.testing.assert_allclose(sample.label_log_probabilities, expected, atol=1e-4)


def test_what_is_read_and_what_is_written_do_not_change_each_other(model, tokenizer, spec):
    tasks = make_tasks(spec, tokenizer)
    direct = [Task.direct(task.prompt) for task in tasks]
    engine = TransformersEngine(model, tokenizer, spec, 3)
    mixed = answers_of(engine, [task for pair in zip(direct, tasks) for task in pair])
    for found, alone in zip((mixed[::2], mixed[1::2]), (answers_of(engine, direct), answers_of(engine, tasks))):
        for samples, others in zip(found, alone, strict=True):
            for sample, other in zip(samples, others, strict=True):
                assert (sample.reasoning, sample.truncated) == (other.reasoning, other.truncated)
                np.testing.assert_allclose(sample.label_log_probabilities, other.label_log_probabilities, atol=1e-4)
    assert all(sample.reasoning == [] and not sample.truncated for [sample] in mixed[::2])


def test_a_direct_score_needs_no_room_for_a_reasoning(model, tokenizer, spec):
    prompt = [1] + [5] * (spec.max_length - len(spec.marker_ids) - 3)
    tasks = [Task.direct(prompt), Task(prompt, [0]), Task.direct([*prompt, 5])]
    direct, *others = answers_of(TransformersEngine(model, tokenizer, spec), tasks)
    assert len(direct) == 1 and all(isinstance(other, ValueError) for other in others)


def test_a_reasoning_that_fills_its_limit_is_truncated(model, tokenizer, spec):
    tasks = make_tasks(spec, tokenizer)
    for samples in answers_of(TransformersEngine(model, tokenizer, spec, 8), tasks):
        for sample in samples:
            assert len(sample.reasoning) == LENGTH if sample.truncated else len(sample.reasoning) < LENGTH


def test_a_prompt_that_does_not_fit_is_answered_with_an_error_and_the_others_go_on(model, tokenizer, spec):
    tasks = make_tasks(spec, tokenizer, 4)
    tasks.insert(1, Task([1] + [5] * 200, [1, 2]))
    answers = answers_of(TransformersEngine(model, tokenizer, spec, 2), tasks)
    assert isinstance(answers[1], ValueError) and "128" in str(answers[1])
    assert [len(answer) for n, answer in enumerate(answers) if n != 1] == [2] * 4


def test_a_sequence_never_grows_beyond_the_spec_s_length(model, tokenizer, spec):
    prompt = [1] + [5] * 110
    written = sampled_with(model, tokenizer, spec, prompt, range(8), max_new_tokens=100)
    longest = max(map(len, written))
    assert len(prompt) + longest + len(spec.marker_ids) + 2 == spec.max_length


def test_a_4_bit_seed_with_an_adapter_answers_too(folder, spec):
    model, tokenizer = load_exact(folder, in_4bit=True)
    model.generation_config.repetition_penalty = 2.0
    tasks = make_tasks(spec, tokenizer, 3)
    seed = answers_of(TransformersEngine(model, tokenizer, spec, 4), tasks)
    adapted = answers_of(TransformersEngine(add_lora(model), tokenizer, spec, 4), tasks)
    for one, other in zip(seed, adapted):
        assert [sample.reasoning for sample in one] == [sample.reasoning for sample in other]
    assert model.generation_config.repetition_penalty == 2.0


def test_a_spec_of_another_vocabulary_is_refused(model, tokenizer, spec):
    with pytest.raises(ValueError, match="not the one"):
        TransformersEngine(model, tokenizer, replace(spec, pieces=("x",) * len(spec.pieces)))


@pytest.fixture(scope="module")
def small_weights(model, folder, tmp_path_factory):
    """The model with a quarter of its weights, and its GGUF file.

    Both libraries then round alike to some 8 digits, which hardly ever decides on a token.
    """
    path = shutil.copy(folder.parent / "judge.gguf", tmp_path_factory.mktemp("small"))
    for weight in gguf_weights(path).values():
        weight /= 1 if weight.ndim == 1 else 4
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter /= 1 if parameter.dim() == 1 else 4
    return model, path


@pytest.mark.parametrize("rule", [{}, {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.3}, {"top_p": 0.0}])
def test_llama_cpp_writes_the_same_reasonings_for_the_same_seeds(small_weights, tokenizer, spec, rule):
    model, path = small_weights
    spec = replace(spec, sampling=replace(spec.sampling, **rule))
    tasks = make_tasks(spec, tokenizer, 6)
    ours = answers_of(TransformersEngine(model, tokenizer, spec, 4), tasks)
    with LlamaEngine(path, spec, parallel=4, threads=1, flash_attention=False, cache_type="f32") as engine:
        theirs = answers_of(engine, tasks)
    for one, other in zip(ours, theirs, strict=True):
        for sample, twin in zip(one, other, strict=True):
            assert (sample.reasoning, sample.truncated) == (twin.reasoning, twin.truncated)
            np.testing.assert_allclose(sample.label_log_probabilities, twin.label_log_probabilities, atol=1e-4)
    written = {tuple(sample.reasoning) for samples in ours for sample in samples}
    assert len(written) == (6 if rule.get("top_p") == 0 else 12) and max(map(len, written)) == LENGTH


def test_a_record_that_the_model_can_not_compute_fails_alone(model, tokenizer, spec):
    spec = replace(spec, template="{{ response }}")
    texts = ["honest", "clear and right", "2024", "of any kind"]
    [broken_id] = tokenizer("2024", add_special_tokens=False)["input_ids"][-1:]
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[broken_id] = torch.nan
    records = [Record(response=text, id=text) for text in texts]
    healthy, found = (
        list(Judge.from_model(each, tokenizer, spec, parallel=8).score_many(records, n_cot=2))
        for each in (model, broken)
    )
    assert [judgement.id for judgement in found if judgement.error] == ["2024"]
    assert found[2].error == "the model's probabilities are not numbers (NaN)" and not healthy[2].error
    for one, other in zip(healthy, found):
        if not other.error:
            assert one.feedback_ids == other.feedback_ids
            assert one.scores == pytest.approx(other.scores, abs=1e-6)

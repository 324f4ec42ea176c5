import gc
import json
import math
import operator
import weakref
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from tiny import WritingEngine, load_tokenizer, make_family, make_sentences, make_spm

from tract_lite.data.jsonl import read_json, read_rows
from tract_lite.data.resume import MOST_WAITING
from tract_lite.engines.task import SECOND_TOGETHER, Sample, Task
from tract_lite.judge import Judge
from tract_lite.prompt import prompt_ids
from tract_lite.record import Record, Rubric
from tract_lite.scale import ScoreScale
from tract_lite.spec import Sampling, make_spec
from tract_lite.training.seed_model import load_seed
from tract_lite.vocabulary import TransformersVocabulary

VALUES = np.array([1.0, 2.0, 3.0, 4.0, 5.0])


class FixedEngine(WritingEngine):
    """Gives the label probabilities it is told, one row for each sample."""

    def __init__(self, spec, vocabulary, rows):
        super().__init__(spec, vocabulary)
        self.rows = rows

    def run(self, tasks):
        for index, task in enumerate(tasks):
            yield index, [Sample([5], False, np.log(row)) for row in self.rows[: len(task.seeds)]]


class RoomyEngine(WritingEngine):
    """Takes a prompt of any length, and is the same judge otherwise."""

    def run(self, tasks):
        for index, answer in super().run(tasks):
            yield index, [self._sample("", 1, None)] if isinstance(answer, Exception) else answer


def make_engine(kind=WritingEngine, *arguments):
    tokenizer = load_tokenizer("spm")
    spec = make_spec(tokenizer, ScoreScale.integers(1, 5))
    engine = kind(spec, TransformersVocabulary(tokenizer), *arguments)
    engine.identity, engine.shape = {"fingerprint": str(kind is FixedEngine)}, {"parallel": 4}
    return engine


def make_records(*texts: str) -> list[Record]:
    return [Record(prompt=text, id=f"id {n}") for n, text in enumerate(texts)]


def judge_fixed(*rows, n_cot=1):
    return Judge(make_engine(FixedEngine, rows)).score(make_records("x")[0], n_cot=n_cot)


def test_score_is_the_expectation_and_mass_what_the_labels_hold():
    judgement = judge_fixed([0.1, 0.1, 0.2, 0.3, 0.1])
    assert judgement.score == pytest.approx(0.1 + 0.2 + 0.6 + 1.2 + 0.5)
    assert judgement.mass == pytest.approx(0.8)
    assert judgement.probabilities == pytest.approx({"1": 0.1, "2": 0.1, "3": 0.2, "4": 0.3, "5": 0.1})
    assert judgement.scores == [pytest.approx(judgement.score)]


def test_std_and_mode_are_those_of_the_label_distribution():
    row = np.array([0.1, 0.1, 0.2, 0.3, 0.1])
    judgement = judge_fixed(row)
    p = row / row.sum()
    assert judgement.mode == 4.0
    assert judgement.std == pytest.approx(math.sqrt(p @ (VALUES - p @ VALUES) ** 2))
    assert judge_fixed([1e-12, 1e-12, 1, 1e-12, 1e-12]).std == pytest.approx(0, abs=1e-5)


def test_several_reasonings_are_averaged():
    rows = [[0.7, 0.1, 0.1, 0.05, 0.05], [0.05, 0.05, 0.1, 0.1, 0.6]]
    judgement = judge_fixed(*rows, n_cot=2)
    assert judgement.scores == pytest.approx([row @ VALUES for row in np.array(rows)])
    assert judgement.score == pytest.approx(np.mean(judgement.scores))
    assert list(judgement.probabilities.values()) == pytest.approx(np.mean(rows, axis=0))
    assert judgement.mode == 1.0 and len(judgement.feedback) == 2


def test_labels_without_any_probability_give_a_judgement_all_the_same():
    with np.errstate(divide="ignore"):
        judgement = judge_fixed([0.0] * 5)
    assert judgement.mass == 0 and judgement.score == 0 and math.isnan(judgement.std)
    assert json.loads(json.dumps(judgement.to_row(), allow_nan=False))["std"] is None


def test_low_mass_is_reported_once_for_all(caplog):
    judge = Judge(make_engine(WritingEngine, 0.4))
    list(judge.score_many(make_records(*"abc")))
    judge.score(make_records("a")[0])
    list(zip("ab", judge.score_many(make_records(*"abcdef"))))
    messages = [record.getMessage().partition(" judgements")[0] for record in caplog.records]
    assert messages == ["3 of 3", "1 of 1", "4 of 4"]


def test_enough_mass_is_not_reported(caplog):
    list(Judge(make_engine()).score_many(make_records(*"abc")))
    assert not caplog.records


BAD = {1: "a LONG one", 4: None, 5: "LONG", 10: None}


def make_mixed(count: int = 11) -> list[Record]:
    """Records of which some can't be judged: too long for the engine, or without a prompt."""
    texts = [BAD.get(n, f"text {n}") for n in range(count)]
    return [Record(prompt=text, response="x", id=str(n)) for n, text in enumerate(texts)]


def test_judgements_come_in_order_with_errors_and_none_is_lost():
    judgements = list(Judge(make_engine()).score_many(iter(make_mixed())))
    assert [judgement.id for judgement in judgements] == [str(n) for n in range(11)]
    assert {n for n, judgement in enumerate(judgements) if judgement.error} == set(BAD)
    assert all(math.isnan(judgement.score) == bool(judgement.error) for judgement in judgements)
    assert "no criteria" in judgements[4].error and judgements[5].error == "too long"


def test_records_that_are_all_unusable_give_an_error_each():
    records = [Record(response="x", id=str(n)) for n in range(3)]
    judgements = list(Judge(make_engine()).score_many(records))
    assert [judgement.id for judgement in judgements] == ["0", "1", "2"]
    assert all(judgement.error for judgement in judgements)


def test_no_records_give_no_judgements():
    assert list(Judge(make_engine()).score_many([])) == []


def test_records_are_taken_as_they_are_needed():
    taken = []
    judgements = Judge(make_engine()).score_many(taken.append(r) or r for r in make_records(*"abcdefghijkl"))
    next(judgements)
    assert len(taken) < 12


def test_what_is_no_record_is_an_error_and_the_rest_is_judged():
    records = [*make_records("a"), {"response": "b"}, None, Record(prompt=5, id="c"), "d"]
    judgements = list(Judge(make_engine()).score_many([*records, *make_records("e")]))
    assert [judgement.id for judgement in judgements] == ["id 0", None, None, "c", None, "id 0"]
    assert [bool(judgement.error) for judgement in judgements] == [False, *[True] * 4, False]
    assert judgements[1].error == "not a Record: {'response': 'b'}; read_records gives them"
    assert judgements[3].error.startswith("TypeError: ")


def test_what_breaks_the_input_is_raised_after_all_that_came_before_it():
    def records():
        yield from make_records("a", "LONG", "b", "c", "d")
        raise OSError("the line is cut")

    judgements = []
    with pytest.raises(OSError, match="the line is cut"):
        for judgement in Judge(make_engine()).score_many(records()):
            judgements.append(judgement)
    assert [bool(judgement.error) for judgement in judgements] == [False, True] + [False] * 3


def test_what_breaks_the_engine_is_raised_and_not_made_an_item_s_error():
    class BreakingEngine(WritingEngine):
        def run(self, tasks):
            yield from islice(super().run(tasks), 6)
            raise RuntimeError("out of memory")

    judgements = Judge(make_engine(BreakingEngine)).score_many(make_records(*"abcdefghij"))
    assert [next(judgements).id for _ in range(4)] == [f"id {n}" for n in range(4)]
    with pytest.raises(RuntimeError, match="out of memory"):
        next(judgements)


def test_an_item_that_the_engine_forgets_is_an_error_and_is_not_lost():
    class ForgetfulEngine(WritingEngine):
        def run(self, tasks):
            return ((index, answer) for index, answer in super().run(tasks) if index != 2)

    judgements = list(Judge(make_engine(ForgetfulEngine)).score_many(make_records(*"abcdef")))
    assert [judgement.id for judgement in judgements] == [f"id {n}" for n in range(6)]
    assert [judgement.error for judgement in judgements] == [
        "the engine gave no answer" if n == 2 else None for n in range(6)
    ]


@pytest.mark.parametrize("error", [KeyError("x"), TimeoutError(), ValueError("no"), ValueError()])
def test_an_engine_s_error_always_has_a_text(error):
    class FailingEngine(WritingEngine):
        def run(self, tasks):
            return ((index, error) for index, _ in enumerate(tasks))

    [judgement] = Judge(make_engine(FailingEngine)).score_many(make_records("a"))
    assert judgement.error and math.isnan(judgement.score)
    assert judgement.error == "no" or type(error).__name__ in judgement.error


def test_probabilities_that_are_not_numbers_are_an_error():
    rows = [[0.1, 0.1, 0.2, 0.3, 0.1], [math.nan] * 5]
    judge = Judge(make_engine(FixedEngine, rows))
    assert judge.score(make_records("x")[0], n_cot=1).score > 0
    with pytest.raises(ValueError, match="not numbers"):
        judge.score(make_records("x")[0], n_cot=2)


@pytest.mark.parametrize("text", ["fine", "LONG", None])
def test_nothing_is_kept_of_an_item_that_is_done(text):
    class Name(str):
        pass

    names = []

    def records():
        for number in range(500):
            name = Name(number)
            names.append(weakref.ref(name))
            yield Record(prompt=text, response="x", id=name)

    judgements = Judge(make_engine()).score_many(records())
    for _ in islice(judgements, 99, None, 100):
        gc.collect()
        assert sum(name() is not None for name in names) < 20
    assert len(names) == 500


@pytest.mark.parametrize("text", ["fine", "LONG", None])
def test_answers_do_not_wait_for_the_faulty_records_after_them(text):
    """An engine that looks ahead passes over faulty records, for it is asked nothing there."""
    taken = []

    def records():
        for number in range(3 * MOST_WAITING):
            taken.append(number)
            # One that can be judged, so that the engine has something to wait with.
            yield Record(prompt="first" if number == 2 else text, response="x", id=str(number))

    judgements = Judge(make_engine()).score_many(records())
    assert [next(judgements).id for _ in range(3)] == ["0", "1", "2"]
    assert len(taken) <= MOST_WAITING + 10
    assert [judgement.id for judgement in judgements] == [str(n) for n in range(3, 3 * MOST_WAITING)]


def test_top_log_probabilities_leave_a_bound_on_the_error():
    class ServingEngine(WritingEngine):
        def run(self, tasks):
            for index, task in enumerate(tasks):
                seen = np.log([0.1, 0.1, 0.2, 0.3, 0.1])
                yield (index, [Sample([5], False, seen, 0.1 * n, 0.2 * n) for n, _ in enumerate(task.seeds)])

    served = Judge(make_engine(ServingEngine)).score(make_records("x")[0], n_cot=3)
    assert served.missing_mass == pytest.approx(0.1) and served.error_bound == pytest.approx(0.2)
    local = Judge(make_engine()).score(make_records("x")[0])
    assert local.missing_mass == local.error_bound == 0


def test_fewer_than_no_reasonings_are_an_error_of_each_item():
    judgements = list(Judge(make_engine()).score_many(make_records("a", "b"), n_cot=-1))
    assert [judgement.error for judgement in judgements] == ["n_cot must be at least 0"] * 2


def test_without_reasonings_the_score_is_read_straight_after_the_prompt():
    engine, records = make_engine(), make_records("x", "CUT", "LONG")
    direct, _, failed = Judge(engine).score_many(records, n_cot=0)
    assert direct.feedback == direct.feedback_ids == [] and direct.scores == [direct.score]
    assert engine.tasks[-1] == Task.direct(prompt_ids(records[0], engine.spec, engine.vocabulary), engine.spec.tokens)
    assert failed.error == "too long" and failed.scores == []
    # What was judged so is read again in the same way, beside what was reasoned.
    reasoned = Judge(engine).score(records[0])
    given = [direct.feedback_ids, reasoned.feedback_ids]
    again = Judge(make_engine()).score_many([records[0]] * 2, reasonings=given)
    assert [judgement.feedback_ids for judgement in again] == given
    assert [j.id for _, j in Judge(make_engine()).as_completed(records, n_cot=0)] == ["id 2", "id 1", "id 0"]


def test_a_reasoning_that_is_empty_was_written_all_the_same():
    judgement = Judge(make_engine()).score(make_records("EMPTY")[0])
    assert judgement.feedback == [""] and judgement.feedback_ids == [[]]


@pytest.mark.parametrize("share, reasonings", [(1.0, 0), (0.5, 1), (0.0, 1), (None, 1)])
def test_a_judge_is_asked_in_the_way_that_it_was_taught_unless_told_otherwise(share, reasonings, tmp_path, caplog):
    engine = make_engine()
    method = {} if share is None else {"raft_weight": 1.0, "direct_share": share}
    engine.spec = replace(engine.spec, method=method)
    judge, [record] = Judge(engine), make_records("x")
    assert judge.is_direct == (reasonings == 0) and judge.how() == judge.how(reasonings)
    assert len(judge.score(record).feedback) == reasonings
    [(_, judgement)] = judge.as_completed([record])
    assert len(judgement.feedback) == reasonings
    [row] = judge.score_many([record], resume=tmp_path / "judged.jsonl")
    assert len(row.feedback) == reasonings and not caplog.messages
    [gated] = judge.score_many([record], gate=0.0)
    assert len(gated.feedback) == 1 and judge.how(gate=0.0)["n_cot"] == 1
    assert len(judge.score(record, n_cot=2).feedback) == 2


@pytest.mark.parametrize(
    ("method", "told"), [({"raft_weight": 1.0, "direct_share": 0.0}, 1), ({"raft_weight": 1.0}, 1), ({}, 0)]
)
def test_what_a_trained_judge_never_learnt_is_told(caplog, method, told):
    engine = make_engine()
    for share in (method, {**method, "direct_share": 0.3}):
        engine.spec = replace(engine.spec, method=share)
        list(Judge(engine).score_many(make_records("a", "b")))
    assert not caplog.records
    list(Judge(engine).score_many(make_records("a", "b"), n_cot=0))
    assert not caplog.records
    engine.spec = replace(engine.spec, method=method)
    for ways in ({"n_cot": 0}, {"gate": 0.5}):
        caplog.clear()
        list(Judge(engine).score_many(make_records("a", "b"), **ways))
        assert len(caplog.records) == told and all("--direct-share" in r.getMessage() for r in caplog.records)


# Through a gate


def both_ways(records, **how):
    return (list(Judge(make_engine()).score_many(records, n_cot=n_cot, **how)) for n_cot in (0, 2))


@pytest.mark.parametrize("count", [1, 4, 11, 30])
def test_a_gate_reasons_where_the_direct_score_is_in_more_doubt_and_nowhere_else(count):
    records = make_mixed(count)
    direct, reasoned = both_ways(records)
    gate = sorted(judgement.doubt for judgement in direct if not judgement.error)[-(count // 3 + 1)]
    engine = make_engine()
    gated = list(Judge(engine).score_many(iter(records), n_cot=2, gate=gate))
    expected = [two if not one.error and one.doubt > gate else one for one, two in zip(direct, reasoned)]
    assert [judgement.to_row() for judgement in gated] == [judgement.to_row() for judgement in expected]
    assert sum(bool(judgement.feedback) for judgement in gated) == count // 3
    # Nothing is asked twice: an item directly, and some of them once more.
    assert len(engine.tasks) == sum(record.prompt is not None for record in records) + count // 3


def test_a_gate_that_none_or_all_pass_is_one_of_the_two_ways():
    records = make_records(*"abcdefgh")
    direct, reasoned = both_ways(records)
    assert list(Judge(make_engine()).score_many(records, n_cot=2, gate=4.0)) == direct
    assert list(Judge(make_engine()).score_many(records, n_cot=2, gate=0.0)) == reasoned


def test_reasonings_are_written_many_together_and_not_after_all_items_are_asked_directly():
    engine, taken = make_engine(), []
    records = make_records(*map(str, range(4 * SECOND_TOGETHER)))
    judgements = Judge(engine).score_many((taken.append(record) or record for record in records), gate=0.0)
    next(judgements)
    assert len(taken) <= SECOND_TOGETHER + 8
    assert len(list(judgements)) == len(records) - 1
    ways = [task.reasonings is None for task in engine.tasks]
    assert sum(ways) == len(records) and sum(map(operator.ne, ways, ways[1:])) <= 9


def test_missing_probability_counts_as_doubt_for_a_gate():
    rows = [[0.0, 0.01, 0.0, 0.0, 0.0], [1e-9, 1e-9, 1e-9, 1.0, 1e-9]]
    with np.errstate(divide="ignore"):
        [judgement] = Judge(make_engine(FixedEngine, rows)).score_many(make_records("a"), gate=1.0)
        sure = Judge(make_engine(FixedEngine, rows[1:])).score_many(make_records("a"), gate=1.0)
    assert judgement.feedback and not next(sure).feedback


@pytest.mark.parametrize("others", [{"n_cot": 0}, {"reasonings": [[[5]]]}])
def test_a_gate_with_nothing_to_choose_is_refused_at_once(others, tmp_path):
    with pytest.raises(ValueError, match="a gate chooses between"):
        Judge(make_engine()).score_many(make_records("a"), gate=0.5, **others)
    with pytest.raises(ValueError, match="a gate chooses between"):
        Judge(make_engine()).score_many(make_records("a"), gate=0.5, n_cot=0, resume=tmp_path / "judged.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_single_record_that_can_t_be_judged_raises_its_error():
    with pytest.raises(ValueError, match="too long"):
        Judge(make_engine()).score(Record(prompt="LONG"))


def test_lone_surrogates_are_judged():
    record = Record(prompt="a \ud83d b", id="id \udc00")
    assert math.isfinite(Judge(make_engine()).score(record).score)


def test_a_sample_depends_on_seed_record_and_number_alone():
    judge = Judge(make_engine())
    records = make_records(*"abcdef")
    many = list(judge.score_many(records, n_cot=2))
    assert [judge.score(record, n_cot=2) for record in records] == many
    assert [j.scores for j in judge.score_many(records[::-1], n_cot=2)][::-1] == [j.scores for j in many]
    assert [j.scores[0] for j in many] == pytest.approx([j.score for j in judge.score_many(records)])
    assert judge.score(records[0], seed=1).score != judge.score(records[0]).score
    assert len({score for judgement in many for score in judgement.scores}) == 12


def test_given_reasonings_are_read_instead_of_sampled():
    engine = make_engine()
    given = [[[7, 8], [9]], [[10]]]
    judgements = list(Judge(engine).score_many(make_records("a", "b"), reasonings=given))
    assert [judgement.feedback_ids for judgement in judgements] == given
    assert [len(judgement.scores) for judgement in judgements] == [2, 1]


def test_the_prompt_of_a_record_is_the_one_of_training():
    engine = make_engine()
    record = Record("Add 2 and 2.", "It is 4.", Rubric("Is it right?"), id="1")
    Judge(engine).score(record)
    assert engine.prompts == [engine.vocabulary.decode(prompt_ids(record, engine.spec, engine.vocabulary))]


def test_feedback_is_the_text_of_its_ids_and_truncation_is_told():
    engine = make_engine()
    cut, whole = Judge(engine).score_many(make_records("CUT", "x"))
    assert cut.truncated and not whole.truncated
    assert whole.feedback == [engine.vocabulary.decode(whole.feedback_ids[0]).strip()]


def test_a_judgement_is_a_row_of_json():
    good, bad = Judge(make_engine()).score_many(make_records("x", "LONG"))
    row = json.loads(json.dumps(good.to_row(), allow_nan=False))
    assert row["score"] == good.score and row["probabilities"] == good.probabilities
    row = json.loads(json.dumps(bad.to_row(), allow_nan=False))
    assert row["score"] is None and row["error"] == "too long" and row["id"] == "id 1"


def test_how_tells_one_judge_and_one_way_of_judging_from_others():
    judge = Judge(make_engine())
    assert judge.how() == Judge(make_engine()).how()
    others = [
        judge.how(n_cot=0),
        judge.how(n_cot=2),
        judge.how(gate=0.5),
        judge.how(seed=1),
        Judge(make_engine(FixedEngine, [])).how(),
    ]
    engine = make_engine()
    engine.spec = replace(engine.spec, sampling=Sampling(temperature=0.5))
    assert all(how != judge.how() for how in [*others, Judge(engine).how()])


# With a file, to go on with


def test_judgements_are_in_the_file_as_they_come_and_are_not_made_again(tmp_path):
    path, records = tmp_path / "judged.jsonl", make_records(*"abcdefgh")
    whole = list(Judge(make_engine()).score_many(records, n_cot=2))
    judgements = Judge(make_engine()).score_many(records, n_cot=2, resume=path)
    for number in range(3):
        assert next(judgements) == whole[number]
        assert [row["id"] for row in read_rows(path)] == [f"id {n}" for n in range(number + 1)]
    del judgements
    before, engine = path.read_bytes(), make_engine()
    assert list(Judge(engine).score_many(records, n_cot=2, resume=path)) == whole
    assert path.read_bytes().startswith(before) and len(read_rows(path)) == 8
    assert sorted(prompt.strip() for prompt in engine.prompts) == list("defgh")
    before, engine = path.read_bytes(), make_engine()
    assert list(Judge(engine).score_many(iter(records), n_cot=2, resume=str(path))) == whole
    assert engine.prompts == [] and path.read_bytes() == before


@pytest.mark.parametrize("how", [{"n_cot": 0}, {"gate": 1.4}])
def test_a_call_without_reasonings_or_with_a_gate_goes_on_too(tmp_path, how):
    path, records = tmp_path / "judged.jsonl", make_records(*"abcdefgh")
    whole = list(Judge(make_engine()).score_many(records, **how))
    assert "gate" not in how or 0 < sum(bool(judgement.feedback) for judgement in whole) < 8
    next(Judge(make_engine()).score_many(records, **how, resume=path))
    assert list(Judge(make_engine()).score_many(records, **how, resume=path)) == whole
    assert read_rows(path) == [{**j.to_row(), "key": r.key} for j, r in zip(whole, records)]
    with pytest.raises(ValueError, match=f"{next(iter(how))}: .* there"):
        Judge(make_engine()).score_many(records, resume=path)


def test_the_file_says_how_the_judgements_were_made(tmp_path):
    judge = Judge(make_engine())
    [judgement] = judge.score_many([Record(prompt="a", score=4.0, id="x")], resume=tmp_path / "judged.jsonl")
    [row] = read_rows(tmp_path / "judged.jsonl")
    assert row == {**judgement.to_row(), "gold": 4.0, "key": Record(prompt="a").key}
    assert read_json(tmp_path / "judged.run.json") == {**judge.how(), "shapes": [judge.engine.shape]}


def test_failed_items_are_judged_again_and_stay_in_their_order(tmp_path):
    path = tmp_path / "judged.jsonl"
    records = make_records("a", "LONG", "b", "LONG")
    first = list(Judge(make_engine()).score_many(records, resume=path))
    assert [bool(judgement.error) for judgement in first] == [False, True, False, True]
    # As when the first call had less room: the same records, which fit now.
    engine = make_engine(RoomyEngine)
    second = list(Judge(engine).score_many(records, resume=path))
    assert [judgement.id for judgement in second] == [f"id {n}" for n in range(4)]
    assert not any(judgement.error for judgement in second)
    assert second[0] == first[0] and second[2] == first[2]
    assert sorted(row["id"] for row in read_rows(path)) == [f"id {n}" for n in range(4)]
    assert not any(row["error"] for row in read_rows(path))


def test_records_without_an_id_are_known_by_their_content(tmp_path):
    records = [Record(prompt=text) for text in "abcab"]
    whole = list(Judge(make_engine()).score_many(records, resume=tmp_path / "judged.jsonl"))
    assert [judgement.id for judgement in whole] == [None] * 5
    assert whole[0].scores == whole[3].scores and len(read_rows(tmp_path / "judged.jsonl")) == 3
    engine = make_engine()
    again = list(Judge(engine).score_many([*records, Record(prompt="d")], resume=tmp_path / "judged.jsonl"))
    assert [judgement.scores for judgement in again[:5]] == [judgement.scores for judgement in whole]
    assert [prompt.strip() for prompt in engine.prompts] == ["d"]


def test_another_judge_or_another_way_is_refused_with_what_differs(tmp_path):
    path, records = tmp_path / "judged.jsonl", make_records("a", "b")
    list(Judge(make_engine()).score_many(records, resume=path))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"\n  seed: 0 there, 1 now$"):
        Judge(make_engine()).score_many(records, seed=1, resume=path)
    with pytest.raises(ValueError) as refused:
        Judge(make_engine(FixedEngine, [])).score_many(records, n_cot=3, resume=path)
    assert [line.split(":")[0].strip() for line in str(refused.value).splitlines()[1:]] == ["fingerprint", "n_cot"]
    assert path.read_bytes() == before


def test_another_input_of_the_same_ids_is_refused(tmp_path):
    path = tmp_path / "judged.jsonl"
    list(Judge(make_engine()).score_many(make_records("a", "b"), resume=path))
    with pytest.raises(ValueError, match="another item with the id 'id 1'"):
        list(Judge(make_engine()).score_many(make_records("a", "x"), resume=path))


def test_given_reasonings_are_not_resumed(tmp_path):
    with pytest.raises(ValueError, match="not both"):
        Judge(make_engine()).score_many(make_records("a"), reasonings=[[[5]]], resume=tmp_path / "judged.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_record_of_no_kind_is_an_error_also_where_rows_are_kept(tmp_path):
    with pytest.raises(ValueError, match="not a Record"):
        list(Judge(make_engine()).score_many([{"response": "b"}], resume=tmp_path / "judged.jsonl"))


def test_a_merged_folder_is_a_judge_and_closing_frees_it(tmp_path):
    folder = make_family(tmp_path / "model", make_spm(tmp_path / "spm", make_sentences()), "llama")
    _, tokenizer = load_seed(folder, False, backend="transformers")
    spec = make_spec(tokenizer, ScoreScale.integers(1, 5), max_length=200, sampling=Sampling(max_new_tokens=5))
    spec.save(folder)
    with Judge.from_pretrained(folder, parallel=2) as judge:
        judgements = list(judge.score_many(make_records("The answer.", "is " * 300, "kind"), n_cot=2))
        assert [bool(judgement.error) for judgement in judgements] == [False, True, False]
        assert 0 < judgements[0].mass < 1 and len(judgements[0].feedback) == 2
    assert judge.engine.model is None
    assert Judge.from_pretrained(folder, replace(spec, max_length=50)).spec.max_length == 50

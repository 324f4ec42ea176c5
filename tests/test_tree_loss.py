"""The loss over labels of several tokens, and the hidden states at the nodes of their trees."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from hybrids import HYBRIDS, LARGER
from hypothesis import given, settings, strategies as st
from judges import SCALES, make_reader
from stages import load, load_exact, make_records
from test_loss import assert_close
from tiny import load_tokenizer, make_family, vocabulary_folder
from transformers import AutoModelForCausalLM

from tract_lite.judge import Judge
from tract_lite.loss import projection
from tract_lite.loss.cot_raft import IGNORE_INDEX, cot_raft_loss
from tract_lite.loss.label_trees import cot_raft_tree_loss
from tract_lite.record import Record
from tract_lite.scale import ScoreScale, ScoreTokens
from tract_lite.spec import JudgeSpec, make_spec
from tract_lite.training import branches as branches_module, trainer as trainer_module
from tract_lite.training.branches import PAPER_WIDTH, branches_of, label_trees, node_states
from tract_lite.training.encode import Example, collate, encode_record, encode_records
from tract_lite.training.layers import lm_head_weight
from tract_lite.training.preflight import preflight
from tract_lite.training.seed_model import add_lora, hidden_states
from tract_lite.training.settings import TrainSettings
from tract_lite.training.stage import train_stage
from tract_lite.training.trainer import CotRaftTrainer
from tract_lite.vocabulary import TransformersVocabulary

END, VOCABULARY = 1, 13
TEN = ScoreScale.parse("0-10")


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """A sequence of random tokens that ends with a label of a random tree, and the end token."""
    paths = st.lists(st.integers(2, 5), min_size=1, max_size=3).map(tuple)
    labels = tuple(draw(st.lists(paths, min_size=2, max_size=7, unique=True)))
    values = draw(st.lists(st.integers(-5, 9), min_size=len(labels), max_size=len(labels), unique=True))
    tokens = ScoreTokens((6,), labels, tuple(map(float, values)))
    text = draw(st.lists(st.integers(2, VOCABULARY - 1), min_size=2, max_size=6))
    label, weights = draw(st.integers(0, len(labels) - 1)), draw(st.lists(st.integers(0, 3), min_size=2, max_size=2))
    shares = {label: 1.0}
    if sum(weights) and draw(st.booleans()):
        # Some of the labels, perhaps without the sequence's own.
        chosen = draw(st.lists(st.integers(0, len(labels) - 1), min_size=2, max_size=2, unique=True))
        shares = {place: weight / sum(weights) for place, weight in zip(chosen, weights)}
    ids = [*text, *labels[label], END]
    prompt_length = draw(st.integers(1, len(text)))
    return Example(ids, prompt_length, len(text), draw(st.floats(-5, 9)), tokens, label, shares)


def log_probabilities(states: torch.Tensor, head: torch.Tensor, **options: Any) -> torch.Tensor:
    logits = states @ head.T
    bias, cap = options.get("head_bias"), options.get("softcap")
    logits = options.get("logit_scale", 1.0) * (logits if bias is None else logits + bias)
    return (cap * torch.tanh(logits / cap) if cap else logits).log_softmax(-1)


def plain_tree_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    states: torch.Tensor,
    batch: list[Example],
    nodes: list[Any],
    raft_weight: float = 1.0,
    ce_on_score: bool = True,
    num_tokens: int | None = None,
    num_sequences: int | None = None,
    **options: Any,
) -> list[torch.Tensor]:
    """The same loss label by label, by autograd: loss, ce, raft, predictions."""
    after_text, after = log_probabilities(hidden, head, **options), log_probabilities(states, head, **options)
    places = {node: place for place, node in enumerate(nodes)}
    ce = squared = torch.zeros((), dtype=torch.float64)
    count, predictions = 0, []
    for row, example in enumerate(batch):
        labels, own = example.tokens.labels, len(example.tokens.labels[example.label])
        is_soft = sum(share > 0 for share in example.shares.values()) > 1
        for place in range(example.prompt_length, len(example.ids)):
            is_label = example.score_position <= place < example.score_position + own
            count += ce_on_score or not is_label
            if not is_label or (ce_on_score and not is_soft):
                ce = ce - after_text[row, place - 1, example.ids[place]]
        prediction = torch.zeros((), dtype=torch.float64)
        for index, label in enumerate(labels):
            path = sum(after[places[row, label[:n]], token] for n, token in enumerate(label))
            longer = sorted({other[len(label)] for other in labels if other[: len(label)] == label != other})
            stops = 1 - sum(after[places[row, label], token].exp() for token in longer) if longer else 1
            prediction = prediction + example.tokens.values[index] * path.exp() * stops
            if ce_on_score and is_soft and (share := example.shares.get(index, 0)):
                ends = after[places[row, label], END] if longer and index != example.label else 0
                ce = ce - share * (path + ends)
        width = max(example.tokens.values) - min(example.tokens.values)
        squared = squared + (4 / width) ** 2 * (prediction - example.target) ** 2
        predictions.append(prediction)
    ce = ce / max(1, num_tokens or count)
    raft = squared / (num_sequences or len(batch))
    return [ce + raft_weight * raft, ce, raft, torch.stack(predictions)]


def arguments(
    batch: list[Example], seed: int, scale: float, hidden: int = 5
) -> tuple[dict[str, torch.Tensor], Any, Any]:
    """Random hidden states, states of the nodes and head, with the trees and their nodes."""
    trees, nodes = label_trees(batch, END)
    draw = torch.Generator().manual_seed(seed)
    longest = max(len(example.ids) for example in batch)
    sizes = {"hidden": (len(batch), longest, hidden), "states": (len(nodes), hidden), "head": (VOCABULARY, hidden)}
    found = {name: torch.randn(size, generator=draw, dtype=torch.float64) for name, size in sizes.items()}
    return found | {"hidden": scale * found["hidden"], "states": scale * found["states"]}, trees, nodes


def tree_loss(
    hidden: Any, head: Any, states: Any, batch: list[Example], trees: Any, **options: Any
) -> list[torch.Tensor]:
    collated = collate(batch, pad_id=0)
    spans = torch.stack([collated["score_positions"], collated["score_lengths"]], dim=1)
    targets = torch.tensor([example.target for example in batch], dtype=torch.float64)
    found = cot_raft_tree_loss(hidden, head, collated["labels"], spans, states, trees, targets, **options)
    return [found.loss, found.ce, found.raft, found.predictions]


def with_gradients(
    function: Callable[..., list[torch.Tensor]], leaves: dict[str, torch.Tensor], *args: Any, **options: Any
):
    """What a loss returns, and the gradients of its leaves in their order."""
    made = {name: leaf.clone().requires_grad_(True) for name, leaf in leaves.items()}
    bias = {"head_bias": made["head_bias"]} if "head_bias" in made else {}
    found = function(made["hidden"], made["head"], made["states"], *args, **bias, **options)
    found[0].backward()
    return [one.detach() for one in found], [leaf.grad for leaf in made.values()]


loss_options = st.fixed_dictionaries(
    {
        "raft_weight": st.sampled_from([0.0, 0.2, 1.0, 10.0]),
        "ce_on_score": st.booleans(),
        "num_tokens": st.sampled_from([None, 17]),
        "num_sequences": st.sampled_from([None, 3]),
        "softcap": st.sampled_from([None, None, 0.5, 30.0]),
        "logit_scale": st.sampled_from([1.0, 0.0625, 3.0]),
    }
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(examples(), min_size=1, max_size=4),
    loss_options,
    st.booleans(),
    st.integers(0, 999),
    st.sampled_from([0.1, 1.0, 3.0]),
    st.sampled_from([1, 40, 10**6]),
)
def test_value_and_gradients_are_those_of_each_label_alone(batch, options, biased, seed, scale, elements):
    leaves, trees, nodes = arguments(batch, seed, scale)
    if biased:
        leaves["head_bias"] = leaves["head"].sum(1)
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(projection, "CHUNK_ELEMENTS", elements)
        ours, our_gradients = with_gradients(tree_loss, leaves, batch, trees, **options)
    theirs, their_gradients = with_gradients(plain_tree_loss, leaves, batch, nodes, **options)
    # What scales the terms of the sums.
    tolerance = 1e-9 * max(1, options["raft_weight"]) * max(1, options["logit_scale"])
    assert_close(ours, theirs, tolerance)
    assert_close(our_gradients, their_gradients, tolerance)


@settings(max_examples=30, deadline=None)
@given(st.lists(examples(), min_size=2, max_size=4), st.booleans(), st.integers(0, 99))
def test_sequences_of_several_trees_are_as_each_in_a_batch_of_its_own(batch, ce_on_score, seed):
    leaves, trees, nodes = arguments(batch, seed, 1.0)
    counts = {"num_tokens": 9, "num_sequences": len(batch), "ce_on_score": ce_on_score}
    whole, gradients = with_gradients(tree_loss, leaves, batch, trees, **counts)
    loss, head = torch.zeros((), dtype=torch.float64), torch.zeros_like(leaves["head"])
    for row, example in enumerate(batch):
        own = [place for place, (number, _) in enumerate(nodes) if number == row]
        part = {"hidden": leaves["hidden"][row : row + 1, : len(example.ids)], "states": leaves["states"][own]}
        found, part_gradients = with_gradients(
            tree_loss, {**part, "head": leaves["head"]}, [example], label_trees([example], END)[0], **counts
        )
        loss, head = loss + found[0], head + part_gradients[2]
    assert_close([whole[0], gradients[2]], [loss, head], 1e-10)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(1, 4), loss_options)
def test_of_labels_of_one_token_the_loss_is_the_flat_one(seed, count, options):
    drawn = random.Random(seed)
    tokens = ScoreTokens((6,), ((2,), (3,), (4,)), (1.0, 3.0, 5.0))
    batch = []
    for _ in range(count):
        text, label = [drawn.randrange(2, VOCABULARY) for _ in range(drawn.randint(3, 7))], drawn.randrange(3)
        ids = [*text, *tokens.labels[label], END]
        batch.append(Example(ids, 2, len(text), drawn.uniform(1, 5), tokens, label, {label: 1.0}))
    leaves, trees, _ = arguments(batch, seed, 1.0)
    collated = collate(batch, pad_id=0)
    # The only node is the position before the label, which the sequence holds itself.
    places = (torch.arange(count), collated["score_positions"] - 1)
    targets = torch.tensor([example.target for example in batch], dtype=torch.float64)

    def ours(hidden: torch.Tensor, head: torch.Tensor) -> list[torch.Tensor]:
        return tree_loss(hidden, head, hidden[places], batch, trees, **options)

    def flat(hidden: torch.Tensor, head: torch.Tensor) -> list[torch.Tensor]:
        ids, values = torch.tensor([2, 3, 4]), torch.tensor(tokens.values)
        found = cot_raft_loss(
            hidden, head, collated["labels"], collated["score_positions"], ids, values, targets, **options
        )
        return [found.loss, found.ce, found.raft, found.predictions]

    results = []
    for function in (ours, flat):
        hidden, head = (leaves[name].clone().requires_grad_(True) for name in ("hidden", "head"))
        found = function(hidden, head)
        found[0].backward()
        results.append(([one.detach() for one in found], [hidden.grad, head.grad]))
    for one, other in zip(*results):
        assert_close(one, other, 1e-10 * max(1, options["raft_weight"]))


def test_float32_is_near_and_16_bits_keep_their_type():
    tokens = ScoreTokens((6,), ((2,), (2, 3), (4, 5)), (1.0, 3.0, 5.0))
    batch = [Example([7, 8, 2, 3, END], 1, 2, 2.0, tokens, 1, {1: 0.5, 0: 0.5})]
    leaves, trees, _ = arguments(batch, 0, 1.0)
    expected, expected_gradients = with_gradients(tree_loss, leaves, batch, trees)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        found, gradients = with_gradients(
            tree_loss, {name: leaf.to(dtype) for name, leaf in leaves.items()}, batch, trees
        )
        assert_close(found, expected, tolerance)
        assert_close(gradients, expected_gradients, tolerance)
        assert {gradient.dtype for gradient in gradients} == {dtype} and found[0].dtype == torch.float32


@pytest.fixture(scope="module")
def seed_model(shared_once) -> Path:
    """A random Llama that spells ten with two tokens."""
    return shared_once(
        "llama_of_split_digits", lambda out: make_family(out, vocabulary_folder("split digits"), "llama")
    )


def records_on(*scales: ScoreScale, count: int = 12) -> list[Record]:
    """Responses whose first word tells the share of the range."""
    records = []
    for number, record in enumerate(make_records(count, seed=3)):
        scale = scales[number % len(scales)]
        score = min(scale.values) + (record.score - 1) / 4 * scale.width
        records.append(replace(record, score=score, scale=scale))
    return records


def load_mixed(seed_model: Path) -> tuple[Any, Any, JudgeSpec]:
    model, tokenizer = load_exact(seed_model)
    return (
        add_lora(model, gradient_checkpointing=False),
        tokenizer,
        make_spec(tokenizer, TEN, max_length=128, any_scale=True),
    )


MIXTURE = (
    TEN,
    ScoreScale.parse("1-5"),
    ScoreScale.parse("0-100:25"),
    ScoreScale.parse("wrong=0,wrong and short=1,right=2"),
)


def states_with_gradients(model: Any, batch: list[Example], seed: int = 0):
    """Hidden states of sequences and nodes, and the gradients of a random sum of them."""
    ids = collate(batch, pad_id=0)["input_ids"]
    _, nodes = label_trees(batch, END)
    hidden, states = node_states(model, batch, ids, nodes)
    draw = torch.Generator().manual_seed(seed)
    real = torch.arange(ids.shape[1]) < torch.tensor([len(example.ids) for example in batch])[:, None]
    weights = [torch.randn(one.shape, generator=draw) for one in (hidden, states)]
    ((hidden * weights[0])[real].sum() + (states * weights[1]).sum()).backward()
    named = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    gradients = {name: gradient.clone() for name, gradient in named.items()}
    model.zero_grad()
    return hidden.detach()[real], states.detach(), gradients


def encoded(records: list[Record], spec: JudgeSpec, tokenizer: Any, **options: Any) -> list[Example]:
    found, dropped = encode_records(records, spec, TransformersVocabulary(tokenizer), **options)
    assert not dropped
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_branches_as_suffixes_are_as_rows_of_their_own(shared_once, monkeypatch, family):
    folder = vocabulary_folder("split digits")
    seed = shared_once(f"{family}_of_split_digits", lambda out: make_family(out, folder, family))
    model, tokenizer, spec = load_mixed(seed)
    model.train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    batch = encoded(records_on(*MIXTURE, count=5), spec, tokenizer)
    assert len({len(example.ids) for example in batch}) > 2
    monkeypatch.setattr(branches_module, "_by_rows", refuse)
    suffixes = states_with_gradients(model, batch)
    monkeypatch.undo()
    monkeypatch.setattr(branches_module, "goes_on_from_prefixes", lambda model: False)
    rows = states_with_gradients(model, batch)
    for ours, theirs in zip(suffixes[:2], rows[:2]):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert suffixes[2].keys() == rows[2].keys() and any("lora_A" in name for name in rows[2])
    for name, gradient in rows[2].items():
        size = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(suffixes[2][name], gradient, rtol=0, atol=1e-4 * size)


def by_itself(model: Any, batch: list[Example]) -> torch.Tensor:
    """The state after each node, in a sequence of its own that ends there."""
    found = []
    for row, node in label_trees(batch, END)[1]:
        ids = torch.tensor([[*batch[row].ids[: batch[row].score_position], *node]])
        found.append(hidden_states(model, ids, torch.ones_like(ids))[0, -1])
    return torch.stack(found)


def refuse(*_: Any) -> None:
    raise AssertionError("not the way that was meant")


@pytest.mark.parametrize(
    "kind", ["plain", "gradient checkpointing", "lfm2", "qwen3.5", "falcon-h1", "granite-4", "gemma2"]
)
def test_states_of_nodes_are_those_of_sequences_that_end_there(shared_once, monkeypatch, kind):
    tokenizer = load_tokenizer("split digits")
    torch.manual_seed(0)
    if kind in HYBRIDS:
        ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
        config = HYBRIDS[kind](**LARGER, **ids, vocab_size=len(tokenizer))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        family = "gemma2" if kind == "gemma2" else "llama"
        options: dict[str, Any] = {"query_pre_attn_scalar": 16, "std": 0.05, "sliding_window": 8}

        def make(folder: Path) -> None:
            make_family(folder, vocabulary_folder("split digits"), family, **(options if kind == "gemma2" else {}))

        folder = shared_once(f"{family}_of_split_digits", make)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train()
    if kind == "gradient checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    monkeypatch.setattr(branches_module, "_by_rows" if kind == "plain" else "_by_suffixes", refuse)
    spec = make_spec(tokenizer, TEN, max_length=128, any_scale=True)
    batch = encoded(records_on(*MIXTURE, count=4), spec, tokenizer)
    ids, nodes = collate(batch, pad_id=0)["input_ids"], label_trees(batch, END)[1]
    hidden, states = node_states(model, batch, ids, nodes)
    assert branches_of(batch, nodes) and len(nodes) > len(batch)
    states.sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    expected = by_itself(model, batch)
    expected.sum().backward()
    torch.testing.assert_close(states.detach(), expected.detach(), rtol=0, atol=1e-5 * expected.abs().max().item())
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(
                gradients[name], weight.grad, rtol=0, atol=1e-4 * max(1.0, weight.grad.abs().max().item())
            )


@pytest.mark.training
@pytest.mark.parametrize("scales", [(TEN,), MIXTURE], ids=["0-10", "mixture"])
@pytest.mark.parametrize("target", ["nearest", "soft"])
def test_a_stage_on_labels_of_several_tokens_learns(seed_model, tmp_path, scales, target):
    """Preflight, which each stage begins with, passes as well."""
    model, tokenizer = load_exact(seed_model)
    mixed = len(scales) > 1
    spec = make_spec(tokenizer, TEN, max_length=128, any_scale=mixed)
    records = records_on(*scales, count=24)
    settings = TrainSettings(batch_size=4, micro_batch_size=2, learning_rate=1e-2, log_every=1, epochs=5, target=target)
    result = train_stage(add_lora(model), tokenizer, records, spec, tmp_path, settings, validation=records[:6])
    log = [entry for entry in result["log"] if "loss" in entry]
    first, last = log[:4], log[-4:]
    for name in ("loss", "ce", "raft"):
        assert sum(entry[name] for entry in last) < 0.6 * sum(entry[name] for entry in first), (name, log)
    judged = list(Judge.from_model(model, tokenizer, spec).score_many(records, n_cot=0))
    assert not any(judgement.error for judgement in judged)


@pytest.mark.training
@pytest.mark.parametrize("ce_on_score", [True, False])
def test_the_micro_batch_size_changes_no_loss_of_trees(seed_model, tmp_path, ce_on_score):
    losses = []
    for size in (6, 3, 1):
        model, tokenizer, spec = load_mixed(seed_model)
        some = encoded(records_on(*MIXTURE, count=6), spec, tokenizer)
        options: dict[str, Any] = {"batch_size": 6, "micro_batch_size": size, "max_steps": 3, "log_every": 1}
        settings = TrainSettings(learning_rate=1e-3, ce_on_score=ce_on_score, **options)
        trainer = CotRaftTrainer(model, some, spec, tokenizer, tmp_path / str(size), settings)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3 and losses[0][0] != losses[0][2]
    for others in losses[1:]:
        assert others == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("shape", ["rolled", "of zeros", "of the layer before", "of the marker alone"])
@pytest.mark.parametrize("mixed", [False, True])
def test_preflight_finds_states_of_nodes_that_are_not_the_model_s(shared_once, tmp_path, monkeypatch, shape, mixed):
    def tampered(model: Any, batch: Any, ids: torch.Tensor, nodes: Any) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, states = node_states(model, batch, ids, nodes)
        first = [place for place, (_, node) in enumerate(nodes) if not node]
        if shape == "of the layer before":
            held = model(input_ids=ids, output_hidden_states=True).hidden_states[-2]
            for place in first:
                row = nodes[place][0]
                states[place] = held[row, batch[row].score_position - 1]
        if shape == "of the marker alone":
            ones = {nodes[place][0]: states[place] for place in first}
            return hidden, torch.stack([ones[row] for row, _ in nodes])
        return hidden, {"rolled": states.roll(1, dims=0), "of zeros": states * 0}.get(shape, states)

    # A model whose labels have some probability.
    folder = shared_once("reader split digits", lambda out: make_reader(out, "split digits"))
    model, tokenizer = load_exact(folder / "model")
    model, spec = add_lora(model), make_spec(tokenizer, TEN, max_length=128, any_scale=mixed)
    records = records_on(*(TEN, SCALES["0-100"])[: 1 + mixed], count=4)
    vocabulary = TransformersVocabulary(tokenizer)
    some = encoded(records, spec, tokenizer)
    trainer = CotRaftTrainer(model, some, spec, tokenizer, tmp_path, TrainSettings())
    preflight(trainer, some, spec, vocabulary, tokenizer.pad_token_id)
    monkeypatch.setattr(trainer_module, "node_states", tampered)
    with pytest.raises(RuntimeError, match="by the plain formula"):
        preflight(trainer, some, spec, vocabulary, tokenizer.pad_token_id)


def test_one_scale_of_one_token_labels_takes_the_flat_way_and_gives_its_loss(seed_model, tmp_path, monkeypatch):
    model, tokenizer, spec = load(seed_model)
    some = encoded(make_records(4), spec, tokenizer)
    batch = collate(some, tokenizer.pad_token_id)
    trainer = CotRaftTrainer(model, some, spec, tokenizer, tmp_path, TrainSettings())
    model.eval()
    assert trainer.is_flat
    for asked, mixed in ((TrainSettings(target="soft"), False), (TrainSettings(), True)):
        other = CotRaftTrainer(model, some, replace(spec, any_scale=mixed), tokenizer, tmp_path, asked)
        assert not other.is_flat
        with torch.no_grad():
            assert other.loss_of(model, batch).loss == pytest.approx(
                trainer.loss_of(model, batch).loss.item(), rel=1e-5
            )
    monkeypatch.setattr(trainer_module, "cot_raft_tree_loss", refuse)
    with torch.no_grad():
        expected = cot_raft_loss(
            hidden_states(model, batch["input_ids"], batch["attention_mask"]),
            lm_head_weight(model),
            batch["labels"],
            batch["score_positions"],
            torch.tensor([token for (token,) in spec.label_ids]),
            torch.tensor(spec.scale.values),
            batch["targets"],
        )
        found = trainer.loss_of(model, batch)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.predictions, expected.predictions)


def test_on_a_wider_scale_errors_count_by_their_share_of_its_width(seed_model, tmp_path):
    """A scale of the same labels, ten times as wide: the same judge has the same loss."""
    model, tokenizer, spec = load(seed_model)
    model.eval()
    wide = replace(spec, scale=ScoreScale(spec.scale.labels, tuple(10 * value for value in spec.scale.values)))
    losses = []
    for each, factor in ((spec, 1), (wide, 10)):
        for mixed in (False, True):
            asked = replace(each, any_scale=mixed)
            records = [replace(record, score=factor * record.score) for record in make_records(4)]
            some = encoded(records, asked, tokenizer)
            trainer = CotRaftTrainer(model, some, asked, tokenizer, tmp_path, TrainSettings())
            with torch.no_grad():
                losses.append(trainer.loss_of(model, collate(some, tokenizer.pad_token_id)).loss.item())
    assert PAPER_WIDTH == spec.scale.width and losses == pytest.approx([losses[0]] * 4, rel=1e-5)


def test_a_soft_target_shares_the_score_between_its_neighbours_and_a_nearest_one_does_not(seed_model):
    tokenizer = load_tokenizer("split digits")
    spec, vocabulary = make_spec(tokenizer, TEN, max_length=128), TransformersVocabulary(tokenizer)
    record = Record(prompt="clear\n", feedback="It is clear.", score=9.75)
    nearest, soft = (encode_record(record, spec, vocabulary, soft=way) for way in (False, True))
    assert nearest.ids == soft.ids and nearest.ids[nearest.score_position :] == [*spec.label_ids[10], spec.eos_id]
    assert (nearest.shares, soft.shares) == ({10: 1.0}, {9: pytest.approx(0.25), 10: pytest.approx(0.75)})
    several = encode_record(replace(record, score=4.0, gold_scores=(3.0, 4.0, 4.5)), spec, vocabulary, soft=True)
    assert several.shares == pytest.approx({3: 1 / 3, 4: 1 / 2, 5: 1 / 6}) and several.target == 4
    assert math.isclose(sum(several.shares.values()), 1)


def test_a_batch_tells_where_each_label_begins_and_how_long_it_is():
    tokenizer = load_tokenizer("split digits")
    spec = make_spec(tokenizer, TEN, max_length=128)
    records = [Record(prompt="clear\n", feedback="It is clear.", score=score) for score in (10.0, 7.0)]
    batch = collate(encoded(records, spec, tokenizer), pad_id=0)
    assert batch["score_lengths"].tolist() == [2, 1]
    for row, label, start in zip(batch["input_ids"].tolist(), (10, 7), batch["score_positions"].tolist()):
        path = list(spec.label_ids[label])
        assert row[start : start + len(path) + 1] == [*path, spec.eos_id]
    assert (batch["labels"] != IGNORE_INDEX).sum(1).diff().tolist() == [-1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_is_said_where_branches_cost_whole_sequences(seed_model, tmp_path, caplog, checkpointing):
    model, tokenizer = load_exact(seed_model)
    model, spec = add_lora(model, gradient_checkpointing=checkpointing), make_spec(tokenizer, TEN, max_length=128)
    # Of ten labels, 1 and 10 hold the one branch of their tree themselves.
    some = encoded(records_on(TEN, count=10), spec, tokenizer)
    with caplog.at_level("WARNING"):
        CotRaftTrainer(model, some, spec, tokenizer, tmp_path, TrainSettings())
    own = sum(example.tokens.labels[example.label][:1] == example.tokens.labels[1][:1] for example in some)
    said = f"each sequence is read {1 - own / len(some):.1f} times more"
    assert (said in caplog.text) == checkpointing and 0 < own < len(some)


def test_a_stage_learns_both_neighbours_of_a_score_between_labels_where_its_target_is_soft(seed_model, tmp_path):
    records = [replace(record, score=record.score + 0.5) for record in records_on(ScoreScale.integers(1, 4), count=8)]
    records = [replace(record, score=min(record.score, 3.5)) for record in records]
    first = []
    for target in ("nearest", "soft"):
        model, tokenizer = load_exact(seed_model)
        model, spec = add_lora(model), make_spec(tokenizer, ScoreScale.integers(1, 4), max_length=128)
        asked = TrainSettings(target=target, max_steps=1, log_every=1)
        first.append(train_stage(model, tokenizer, records, spec, tmp_path / target, asked)["log"][0]["ce"])
    assert abs(first[0] - first[1]) > 1e-3

import pytest
import torch
from hypothesis import given, settings, strategies as st

from tract_lite.loss import projection
from tract_lite.loss.cot_raft import IGNORE_INDEX, cot_raft_loss

VALUES = (1.0, 2.0, 3.5, 5.0)


def make_batch(batch=8, length=9, hidden=6, vocabulary=31, *, seed=0, scoreless=0, scale=1.0, dtype=torch.float64):
    """Random arguments of `cot_raft_loss`; the last `scoreless` rows have no score."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocabulary, (batch, length), generator=draw)
    labels[torch.rand(batch, length, generator=draw) < 0.4] = IGNORE_INDEX
    ids = torch.randperm(vocabulary, generator=draw)[: len(VALUES)]
    positions = torch.randint(1, length, (batch,), generator=draw)
    labels[torch.arange(batch), positions] = ids[torch.randint(len(ids), (batch,), generator=draw)]
    positions[batch - scoreless :] = -1
    return {
        "hidden_states": scale * torch.randn(batch, length, hidden, generator=draw, dtype=torch.float64).to(dtype),
        "lm_head_weight": torch.randn(vocabulary, hidden, generator=draw, dtype=torch.float64).to(dtype),
        "labels": labels,
        "score_positions": positions,
        "score_token_ids": ids,
        "score_values": torch.tensor(VALUES),
        "targets": 1 + 4 * torch.rand(batch, generator=draw),
    }


def plain_loss(
    hidden_states,
    lm_head_weight,
    labels,
    score_positions,
    score_token_ids,
    score_values,
    targets,
    raft_weight=1.0,
    ce_on_score=True,
    num_tokens=None,
    num_sequences=None,
    softcap=None,
    logit_scale=1.0,
    head_bias=None,
):
    """The same loss, row by row, by autograd in float64: (loss, ce, raft, predictions)."""
    logits = hidden_states.double() @ lm_head_weight.double().T
    logits = logit_scale * (logits if head_bias is None else logits + head_bias.double())
    log_p = (softcap * torch.tanh(logits / softcap) if softcap else logits).log_softmax(-1)
    ce = squared = torch.zeros((), dtype=torch.float64)
    tokens, predictions = 0, []
    for row, position in enumerate(score_positions.tolist()):
        for t in range(1, labels.shape[1]):
            if labels[row, t] != IGNORE_INDEX and (ce_on_score or t != position):
                ce = ce - log_p[row, t - 1, labels[row, t]]
                tokens += 1
        predictions.append(float("nan"))
        if position > 0:
            y = log_p[row, position - 1, score_token_ids].exp() @ score_values.double()
            squared = squared + (y - targets[row].double()) ** 2
            predictions[-1] = y.item()
    ce = ce / max(1, num_tokens or tokens)
    raft = squared / max(1, num_sequences or (score_positions > 0).sum().item())
    return ce + raft_weight * raft, ce, raft, torch.tensor(predictions, dtype=torch.float64)


def with_gradients(function, batch, **options):
    """What `function` returns and the gradients of hidden states and head."""
    names = [name for name in ("hidden_states", "lm_head_weight", "head_bias") if name in batch]
    leaves = {name: batch[name].detach().clone().requires_grad_(True) for name in names}
    result = function(**{**batch, **leaves}, **options)
    fields = result if isinstance(result, tuple) else (result.loss, result.ce, result.raft, result.predictions)
    if fields[0].requires_grad:
        fields[0].backward()
    return [f.detach() for f in fields], [leaf.grad for leaf in leaves.values()]


def assert_close(ours, theirs, tolerance):
    """Within `tolerance` of each tensor's largest entry, or of the terms summed in it (about 1)."""
    for a, b in zip(ours, theirs, strict=True):
        b = torch.zeros_like(a, dtype=torch.float64) if b is None else b.double()
        size = max(1.0, b.nan_to_num().abs().max().item())
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * size, equal_nan=True)


shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 5),
        "length": st.integers(2, 9),
        "hidden": st.integers(1, 8),
        "vocabulary": st.integers(len(VALUES), 40),
        "seed": st.integers(0, 999),
        "scale": st.sampled_from([0.1, 1.0, 4.0]),
    }
).flatmap(lambda shape: st.integers(0, shape["batch"]).map(lambda n: {**shape, "scoreless": n}))
options = st.fixed_dictionaries(
    {
        "raft_weight": st.sampled_from([0.0, 0.2, 1.0, 10.0]),
        "ce_on_score": st.booleans(),
        "num_tokens": st.sampled_from([None, 17]),
        "num_sequences": st.sampled_from([None, 3]),
        "softcap": st.sampled_from([None, None, 0.5, 30.0]),
        "logit_scale": st.sampled_from([1.0, 0.0625, 3.0]),
    }
)


@settings(max_examples=120, deadline=None)
@given(shapes, options, st.booleans(), st.sampled_from([(torch.float64, 1e-10), (torch.float32, 1e-5)]))
def test_value_and_gradient_are_those_of_the_plain_formula(shape, options, biased, precision):
    dtype, tolerance = precision
    # What scales the terms of the sums.
    tolerance *= max(1, options["raft_weight"]) * max(1, options["logit_scale"])
    batch = make_batch(**shape, dtype=dtype)
    if biased:
        batch["head_bias"] = batch["lm_head_weight"].sum(1)
    ours, our_gradients = with_gradients(cot_raft_loss, batch, **options)
    theirs, their_gradients = with_gradients(
        plain_loss,
        {name: value.double() if value.is_floating_point() else value for name, value in batch.items()},
        **options,
    )
    assert_close(ours, theirs, tolerance)
    assert_close(our_gradients, their_gradients, tolerance)
    assert {gradient.dtype for gradient in our_gradients} == {dtype}


def test_a_token_that_a_softcap_makes_impossible_still_gets_its_gradient():
    """At the ends of a wide cap a probability is no float32 any more."""
    batch = make_batch(scale=200.0, dtype=torch.float32)
    ours, our_gradients = with_gradients(cot_raft_loss, batch, softcap=60.0)
    theirs, their_gradients = with_gradients(plain_loss, batch, softcap=60.0)
    assert ours[0] > 50
    assert_close(ours, theirs, 1e-5)
    assert_close(our_gradients, their_gradients, 1e-5)


def test_a_bias_that_is_frozen_gets_no_gradient():
    batch = make_batch() | {"head_bias": torch.zeros(31)}
    batch["hidden_states"].requires_grad_(True)
    cot_raft_loss(**batch).loss.backward()
    assert batch["head_bias"].grad is None and batch["hidden_states"].grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_float32(dtype):
    batch = make_batch(dtype=dtype)
    (loss, *rest), gradients = with_gradients(cot_raft_loss, batch)
    theirs, their_gradients = with_gradients(
        cot_raft_loss,
        {**batch, "hidden_states": batch["hidden_states"].float(), "lm_head_weight": batch["lm_head_weight"].float()},
    )
    assert loss.dtype == torch.float32
    assert_close([loss, *rest], theirs, 1e-6)
    for ours, expected in zip(gradients, their_gradients):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("head", [torch.float32, torch.bfloat16])
def test_a_vocabulary_of_several_blocks_gives_the_same(monkeypatch, head):
    batch = make_batch(dtype=torch.bfloat16)
    batch["lm_head_weight"] = batch["lm_head_weight"].to(head)
    whole = with_gradients(cot_raft_loss, batch)
    monkeypatch.setattr(projection, "VOCABULARY_BLOCK", 7)
    blocks = with_gradients(cot_raft_loss, batch)
    for ours, theirs in zip(blocks, whole):
        assert_close(ours, theirs, 1e-2)  # gradients are rounded to bfloat16 at the end
    assert_close(blocks[0], whole[0], 1e-6)


def test_nothing_supervised_gives_zero_and_a_backward_that_works():
    batch = make_batch(scoreless=8)
    batch["labels"].fill_(IGNORE_INDEX)
    (loss, ce, raft, predictions), gradients = with_gradients(cot_raft_loss, batch)
    assert (loss, ce, raft) == (0, 0, 0) and predictions.isnan().all()
    assert all((gradient == 0).all() for gradient in gradients)


def test_a_row_without_a_score_ignores_its_target():
    batch = make_batch(scoreless=3)
    expected = with_gradients(cot_raft_loss, batch)
    batch["targets"][-3:] = float("nan")
    ours = with_gradients(cot_raft_loss, batch)
    for a, b in zip(ours, expected):
        assert_close(a, b, 1e-12)


def test_a_score_left_out_of_the_labels_is_learnt_by_its_error_alone():
    batch = make_batch()
    without = {**batch, "labels": batch["labels"].clone()}
    without["labels"][torch.arange(8), batch["score_positions"]] = IGNORE_INDEX
    ours = with_gradients(cot_raft_loss, without)
    expected = with_gradients(cot_raft_loss, batch, ce_on_score=False)
    for a, b in zip(ours, expected):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_splitting_a_batch_gives_the_same_gradient(size):
    batch = make_batch(scoreless=2)
    labels = batch["labels"]
    counts = {
        "num_tokens": (labels[:, 1:] != IGNORE_INDEX).sum(),
        "num_sequences": (batch["score_positions"] > 0).sum(),
    }
    _, whole = with_gradients(cot_raft_loss, batch)
    per_row = ("hidden_states", "labels", "score_positions", "targets")
    hidden, head = [], torch.zeros_like(whole[1])
    for start in range(0, 8, size):
        part = {name: value[start : start + size] if name in per_row else value for name, value in batch.items()}
        _, (hidden_gradient, head_gradient) = with_gradients(cot_raft_loss, part, **counts)
        hidden.append(hidden_gradient)
        head += head_gradient
    assert_close([torch.cat(hidden), head], whole, 1e-12)


def test_a_frozen_head_gets_no_gradient_and_changes_no_other():
    batch = make_batch()
    _, (expected, _) = with_gradients(cot_raft_loss, batch)
    batch["hidden_states"].requires_grad_(True)
    cot_raft_loss(**batch).loss.backward()
    assert batch["lm_head_weight"].grad is None
    torch.testing.assert_close(batch["hidden_states"].grad, expected)


def test_frozen_hidden_states_leave_the_gradient_of_the_head():
    batch = make_batch()
    _, (_, expected) = with_gradients(cot_raft_loss, batch)
    batch["lm_head_weight"].requires_grad_(True)
    cot_raft_loss(**batch).loss.backward()
    torch.testing.assert_close(batch["lm_head_weight"].grad, expected)


@pytest.mark.parametrize("elements", [1, 31, 100])
def test_chunks_change_nothing(monkeypatch, elements):
    batch = make_batch(scoreless=1)
    whole = with_gradients(cot_raft_loss, batch)
    monkeypatch.setattr(projection, "CHUNK_ELEMENTS", elements)
    chunked = with_gradients(cot_raft_loss, batch)
    for a, b in zip(chunked, whole):
        assert_close(a, b, 1e-12)


def test_autocast_changes_nothing():
    batch = make_batch(dtype=torch.float32)
    expected = with_gradients(cot_raft_loss, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = with_gradients(cot_raft_loss, batch)
    for a, b in zip(ours, expected):
        assert_close(a, b, 1e-7)


def test_a_scaled_loss_gives_scaled_gradients():
    batch = make_batch()
    _, expected = with_gradients(cot_raft_loss, batch)
    batch["hidden_states"].requires_grad_(True)
    (1024 * cot_raft_loss(**batch).loss).backward()
    torch.testing.assert_close(batch["hidden_states"].grad, 1024 * expected[0])


def test_a_gradient_below_the_least_float16_outlives_a_scaler():
    batch = make_batch(dtype=torch.float16)
    smallest = torch.finfo(torch.float16).smallest_normal
    gradients = []
    for scale in (1, 2**16):
        leaf = batch["hidden_states"].detach().requires_grad_(True)
        loss = cot_raft_loss(**{**batch, "hidden_states": leaf}, num_tokens=10**8, raft_weight=0.0)
        (loss.loss * scale).backward()
        gradients.append(leaf.grad.double() / scale)
    lost, kept = gradients
    assert 0 < kept.abs().max() < smallest
    assert (lost != 0).sum() < 0.9 * (kept != 0).sum()


def test_the_caller_s_tensors_stay_as_they_were():
    batch = make_batch()
    before = {name: value.clone() for name, value in batch.items()}
    cot_raft_loss(**batch, ce_on_score=False)
    assert all(torch.equal(value, before[name]) for name, value in batch.items())


def test_the_expectation_is_not_renormalised():
    batch = make_batch(batch=1, hidden=2, vocabulary=8)
    batch["lm_head_weight"].zero_()
    prediction = cot_raft_loss(**batch).predictions
    torch.testing.assert_close(prediction, torch.tensor([sum(VALUES) / 8], dtype=torch.float64))

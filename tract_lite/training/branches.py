"""The labels' trees of training sequences, and the hidden states at their nodes.

A sequence holds its own label. What else is read of the tree, such as what the model makes of a 1
where the label is 7, is a branch: the label's beginning after the same prompt and reasoning.
"""

from statistics import fmean
from typing import Any, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from tract_lite.loss.label_trees import LabelTrees
from tract_lite.scale import Path
from tract_lite.training.encode import Example
from tract_lite.training.layers import prefix_states
from tract_lite.training.seed_model import goes_on_from_prefixes, hidden_states

# As wide as 1 to 5, the paper's scale.
PAPER_WIDTH = 4.0

# The sequence (its place in the batch) and the tokens behind its marker.
Node = tuple[int, Path]


def raft_factor(width: float) -> float:
    """By what a squared error is multiplied, so that errors count by their share of the width."""
    return (PAPER_WIDTH / width) ** 2


def label_trees(examples: Sequence[Example], end_id: int) -> tuple[LabelTrees, list[Node]]:
    """The trees of the examples' labels, and their nodes in the order of the trees."""
    nodes = [(row, node) for row, example in enumerate(examples) for node in example.tokens.following]
    places = {node: place for place, node in enumerate(nodes)}
    asked = [examples[row].tokens.asked(node, end_id) for row, node in nodes]
    width = max(map(len, asked))
    nowhere = len(nodes) * width
    paths, ends, stops, rows, values, shares = [], [], [], [], [], []
    for row, example in enumerate(examples):
        for index, (label, value) in enumerate(zip(example.tokens.labels, example.tokens.values)):
            steps = ((places[row, label[:n]], token) for n, token in enumerate(label))
            paths.append(torch.tensor([place * width + asked[place].index(token) for place, token in steps]))
            stop = places.get((row, label), len(nodes))
            leads_on = stop < len(nodes)
            # The sequence itself has the end token behind its own label.
            ends.append(stop * width + len(asked[stop]) - 1 if leads_on and index != example.label else nowhere)
            stops.append(stop)
            rows.append(row)
            values.append(value)
            shares.append(example.shares.get(index, 0.0))
    tokens = pad_sequence([torch.tensor(one) for one in asked], batch_first=True)
    following = [len(examples[row].tokens.following[node]) for row, node in nodes]
    leads = torch.arange(width) < torch.tensor(following)[:, None]
    trees = LabelTrees(
        tokens=tokens,
        leads=leads,
        paths=pad_sequence(paths, batch_first=True, padding_value=nowhere),
        ends=torch.tensor(ends),
        stops=torch.tensor(stops),
        rows=torch.tensor(rows),
        values=torch.tensor(values, dtype=torch.float64),
        shares=torch.tensor(shares, dtype=torch.float64),
        weights=torch.tensor([raft_factor(example.tokens.width) for example in examples], dtype=torch.float64),
    )
    return trees, nodes


def extra_rows(model: Any, examples: Sequence[Example]) -> float:
    """How many sequences more, for each one, the model reads for branches; 0: suffixes do."""
    if goes_on_from_prefixes(model):
        return 0.0
    return fmean(len(branches_of([one], [(0, node) for node in one.tokens.following])) for one in examples)


def branches_of(examples: Sequence[Example], nodes: Sequence[Node]) -> list[Node]:
    """Those of the nodes that the sequences do not hold themselves."""
    own = [example.tokens.labels[example.label] for example in examples]
    return [(row, node) for row, node in nodes if own[row][: len(node)] != node]


def node_states(
    model: Any, examples: Sequence[Example], input_ids: torch.Tensor, nodes: Sequence[Node]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states of the sequences (B, T, H) and of the nodes (M, H), with gradients.

    Branches are short suffixes to what the model keeps of the sequences, where it can: else each is
    a sequence again, as many at once as there are examples.
    """
    branches = branches_of(examples, nodes)
    if branches and goes_on_from_prefixes(model):
        hidden, found = _by_suffixes(model, examples, input_ids, branches)
    else:
        hidden = hidden_states(model, input_ids, torch.ones_like(input_ids))
        found = _by_rows(model, examples, input_ids, branches)
    states = dict(zip(branches, found))
    for row, node in nodes:
        if (row, node) not in states:
            states[row, node] = hidden[row, examples[row].score_position - 1 + len(node)]
    return hidden, torch.stack([states[node] for node in nodes])


def _by_suffixes(
    model: Any, examples: Sequence[Example], input_ids: torch.Tensor, branches: Sequence[Node]
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    rows = torch.tensor([row for row, _ in branches], device=input_ids.device)
    starts = torch.tensor([examples[row].score_position for row, _ in branches], device=input_ids.device)
    suffixes = pad_sequence([torch.tensor(node) for _, node in branches], batch_first=True).to(input_ids.device)
    hidden, found = prefix_states(model, input_ids, rows, starts, suffixes)
    return hidden, [found[place, len(node) - 1] for place, (_, node) in enumerate(branches)]


def _by_rows(
    model: Any, examples: Sequence[Example], input_ids: torch.Tensor, branches: Sequence[Node]
) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for start in range(0, len(branches), len(examples)):
        some = branches[start : start + len(examples)]
        ids = [torch.tensor([*examples[row].ids[: examples[row].score_position], *node]) for row, node in some]
        padded = pad_sequence(ids, batch_first=True).to(input_ids.device)
        # Padding is behind all real tokens, which never read it.
        hidden = hidden_states(model, padded, torch.ones_like(padded))
        found += [hidden[place, len(one) - 1] for place, one in enumerate(ids)]
    return found

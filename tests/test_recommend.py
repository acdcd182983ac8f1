"""Advice: every rule with a situation that calls it and one that does not, how rules add up, and what is said."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normswap import NormswapError, Situation, recommend, registry
from normswap.advice.rules import OVER_BATCH, RULES, SPECTRAL, WEIGHTS, When
from normswap.advice.situation import traits
from scripts.recommend_doc import PATH, document
from tests.support import picture


def images(norm: Any = nn.BatchNorm2d, channels: int = 16) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, channels, 3), norm(channels), nn.ReLU(), nn.Conv2d(channels, 8, 1), norm(8))


def volumes() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 8, 3), nn.BatchNorm3d(8), nn.ReLU())


def tokens() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False)


def recurrent() -> nn.Module:
    return nn.ModuleDict({"rnn": nn.GRU(8, 8), "norm": nn.LayerNorm(8)})


def vectors() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def norm_first() -> nn.Module:
    """No norm stands behind a linear layer."""
    return nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 1))


Case = tuple[Any, dict[str, Any]]
CASES: dict[str, tuple[Case, Case]] = {
    "private": ((images, {"private": True}), (images, {})),
    "federated": ((images, {"federated": True}), (images, {})),
    "one sample": ((images, {"batch_size": 1}), (images, {"batch_size": 1, "devices": 8})),
    "few samples": ((images, {"batch_size": 7}), (images, {"batch_size": 8})),
    "medium batches": ((images, {"batch_size": 8}), (images, {"batch_size": 16})),
    "classification, large batches": (
        (images, {"task": "classification", "batch_size": 16}),
        (images, {"task": "classification", "batch_size": 15}),
    ),
    "very large batches": ((images, {"batch_size": 512}), (images, {"batch_size": 511})),
    "several devices, few samples on each": (
        (images, {"devices": 8, "batch_size": 2}),
        (images, {"devices": 7, "batch_size": 2}),
    ),
    "detection or segmentation": ((images, {"task": "detection"}), (images, {"task": "classification"})),
    "detection or segmentation on several devices": (
        (images, {"task": "segmentation", "devices": 2}),
        (images, {"task": "segmentation"}),
    ),
    "detection or segmentation from a trained backbone": (
        (images, {"task": "detection", "pretrained": True}),
        (lambda: images(lambda c: nn.GroupNorm(2, c)), {"task": "detection", "pretrained": True}),
    ),
    "volumes": ((volumes, {"task": "segmentation"}), (images, {"task": "segmentation"})),
    "style transfer": ((images, {"task": "style_transfer"}), (images, {"task": "restoration"})),
    "adversarial training": ((images, {"task": "gan"}), (images, {"task": "restoration"})),
    "restoration": ((images, {"task": "restoration"}), (images, {"task": "gan"})),
    "reinforcement learning": ((vectors, {"task": "reinforcement"}), (vectors, {})),
    "sequences": ((tokens, {"task": "sequence"}), (tokens, {})),
    "transformers": ((tokens, {}), (images, {})),
    "transformers, to be run": ((tokens, {"deployment": "server"}), (tokens, {"deployment": "int8"})),
    "recurrent networks": ((recurrent, {}), (tokens, {})),
    "changing batches": ((images, {"batches": "variable"}), (images, {"batches": "online"})),
    "online": ((images, {"batches": "online"}), (images, {"batches": "fixed"})),
    "folded away where it runs": ((images, {"deployment": "edge"}), (norm_first, {"deployment": "edge"})),
    "trained weights to be kept": ((images, {"pretrained": True}), (images, {})),
    "one position a channel": (
        (vectors, {"example_inputs": (torch.zeros(2, 8),)}),
        (images, {"example_inputs": (torch.zeros(2, 3, 9, 9),)}),
    ),
    "unsure": ((images, {}), (images, {"task": "detection"})),
}


def advised(case: Case) -> Any:
    return recommend(case[0](), **case[1])


def test_every_rule_has_cases_and_a_source() -> None:
    assert list(CASES) == [rule.name for rule in RULES]
    known = {*registry.kinds(), SPECTRAL}
    for rule in RULES:
        assert rule.source
        assert rule.reason
        assert set(rule.take) | set(rule.avoid) <= known
        assert not set(rule.take) & set(rule.avoid)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_holds_where_it_should(name: str) -> None:
    holds, does_not = (name in [rule.name for rule in advised(case).rules] for case in CASES[name])
    assert (holds, does_not) == (True, False)


USUAL: list[tuple[Any, dict[str, Any], str, str | None]] = [
    (images, {"task": "classification", "batch_size": 64}, "batch", "group"),
    (images, {"task": "classification", "batch_size": 4}, "group", "frn"),
    (images, {"task": "detection", "batch_size": 2}, "group", "frn"),
    (images, {"task": "detection", "batch_size": 2, "devices": 8}, "sync", "group"),
    (images, {"task": "detection", "pretrained": True}, "frozen", "group"),
    (images, {"task": "detection", "pretrained": True, "devices": 8, "batch_size": 2}, "sync", "frozen"),
    (images, {"task": "style_transfer"}, "instance", "batch_instance"),
    (tokens, {"task": "sequence"}, "layer", "rms"),
    (tokens, {"task": "sequence", "deployment": "server"}, "layer", "rms"),
    (images, {"task": "gan"}, SPECTRAL, "identity"),
    (images, {"task": "classification", "batch_size": 4, "devices": 8}, "sync", "group"),
    (images, {"task": "classification", "batch_size": 4, "devices": 2}, "group", "frn"),
    (images, {"batch_size": 8, "devices": 8}, "sync", "group"),
    (images, {"batch_size": 1, "task": "classification"}, "layer", "instance"),
    (images, {}, "switchable", None),
    (images, {"deployment": "int8", "task": "classification"}, "batch", "sync"),
    (images, {"private": True, "batch_size": 256, "task": "classification"}, "group", "layer"),
    (images, {"federated": True, "batch_size": 32, "task": "classification"}, "group", "layer"),
]


@pytest.mark.parametrize(("make", "facts", "winner", "second"), USUAL)
def test_the_usual_guidance(make: Any, facts: dict[str, Any], winner: str, second: str | None) -> None:
    found = recommend(make(), **facts)
    assert found.winner is not None
    assert found.winner.kind == winner, found
    assert (None if found.runner_up is None else found.runner_up.kind) == second, found


def test_privacy_rules_out_what_mixes_samples() -> None:
    found = recommend(images(), private=True, task="classification", batch_size=256, deployment="edge")
    ruled_out = {each.kind: each.obstacle for each in found.candidates if each.obstacle is not None}
    assert ruled_out == {"batch": "ruled out by: private", "sync": "ruled out by: private"}
    assert "classification, large batches asks for batch, else group; against it: private" in found.conflicts
    assert {"batch", "sync", "switchable"} <= set(OVER_BATCH)


def test_scores_are_the_sums_of_the_rules() -> None:
    found = recommend(images(), task="classification", batch_size=4, devices=8, federated=True, batches="variable")
    scores = {each.kind: each.score for each in found.candidates}
    assert scores["group"] == 2 * WEIGHTS["should"] + 1  # federated, changing batches; second of several devices
    assert scores["sync"] == 0  # several devices, against: federated
    assert (scores["layer"], scores["frn"]) == (1, 1)


def test_a_kind_that_no_norm_can_become_is_passed_over() -> None:
    found = recommend(tokens(), batches="variable")
    group = next(each for each in found.candidates if each.kind == "group")
    assert "channels are on the last axis" in (group.obstacle or "")
    assert found.winner is not None
    assert found.winner.kind == "layer"


def test_the_command() -> None:
    model = images()
    kept = recommend(model, task="classification", batch_size=4, pretrained=True)
    words = shlex.split(kept.command("net.py:net", "net.pt", ["--input", "1x3x9x9"]) or "")
    assert words[:3] == ["normswap", "convert", "net.pt"]
    assert words[words.index("--to") + 1] == "group"
    assert words[words.index("--channels-per-group") + 1] == "8"
    assert "--data" in words
    afresh = recommend(model, task="classification", batch_size=4).command("net.py:net", None) or ""
    assert "--data" not in afresh
    assert afresh == "normswap convert --model net.py:net --to group -o group.pt"
    odd = recommend(images(channels=12), task="classification", batch_size=4, pretrained=True)
    assert "--groups auto" in (odd.command() or "")
    stays = recommend(model, task="classification", batch_size=64)
    assert stays.unchanged
    assert stays.command() is None
    assert str(stays).startswith("stay with batch; then group")
    assert "spectral_norm" in (recommend(model, task="gan").command() or "")


def test_text_and_json_tell_all() -> None:
    found = recommend(images(), task="detection", batch_size=2, pretrained=True, deployment="edge")
    text, record = str(found), json.loads(json.dumps(found.to_dict()))
    for rule in found.rules:
        assert rule.reason in text
        assert rule.source in text
    assert [rule["name"] for rule in record["rules"]] == [rule.name for rule in found.rules]
    assert all(conflict in text for conflict in found.conflicts)
    assert found.conflicts
    assert f"run: {record['command']}" in text


def test_the_model_is_left_as_it_was() -> None:
    model = images().train()
    before = picture(model)
    recommend(model, batch_size=4, example_inputs=(torch.randn(2, 3, 9, 9),))
    assert before.differences(model) == []


def test_traits() -> None:
    seen = traits(images(), (torch.zeros(1, 3, 9, 9),))
    assert (seen.architecture, seen.kinds, seen.rank, seen.single) == ("convolutional", {"batch": 2}, 4, False)
    assert (seen.foldable, seen.channels) == (1.0, (8, 16))
    assert traits(volumes()).rank == 5
    assert traits(images().train()).foldable == 1.0
    assert traits(vectors()).architecture == "vectors"
    assert traits(vectors()).single is None
    assert traits(nn.ReLU()).architecture is None
    assert traits(norm_first()).foldable < 0.5


def test_a_model_without_norms() -> None:
    found = recommend(nn.Sequential(nn.Conv2d(3, 8, 3)), task="classification", batch_size=4)
    assert found.winner is not None
    assert found.winner.norms == 0
    assert found.command() is None
    assert "the model has no norm to convert" in str(found)


MISUSE: list[tuple[dict[str, Any], str]] = [
    ({"task": "driving"}, "task='driving'; it is one of: classification"),
    ({"batch_size": 0}, "batch_size=0: it must be a whole number of at least 1"),
    ({"devices": True}, "devices=True"),
    ({"private": 1}, "private=1: it is True or False"),
    ({"size": 3}, "a situation has no size; it has: task"),
    ({"situation": Situation(), "task": "gan"}, "either a Situation or its fields"),
]


@pytest.mark.parametrize(("facts", "told"), MISUSE, ids=[case[1] for case in MISUSE])
def test_misuse(facts: dict[str, Any], told: str) -> None:
    with pytest.raises(NormswapError, match=told.replace("(", r"\(")):
        recommend(images(), **facts)


def test_what_is_not_known_meets_no_condition() -> None:
    assert not When("batch_size", "<", 8).holds({"batch_size": None})
    assert not When("task", "in", ("gan",)).holds({"task": None})
    assert When("task", "is", None).holds({"task": None})


def test_the_document_is_up_to_date() -> None:
    assert PATH.read_text(encoding="utf-8") == document(), "run python scripts/recommend_doc.py"


class Both(nn.Module):
    """Convolutions, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, 8, 4, 4), tokens()

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.patches(x).flatten(2).transpose(1, 2))


def test_a_vision_transformer_is_one() -> None:
    assert traits(Both()).architecture == "transformer"

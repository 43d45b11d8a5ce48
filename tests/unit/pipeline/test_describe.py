import json
from pathlib import Path

import pytest

from kdcompress.pipeline._describe import describe_training, last_words
from kdcompress.pipeline.base import RunFacts
from kdcompress.recipe import build_recipe


def test_the_variant_of_a_method_is_named_though_the_recipe_does_not_say_it() -> None:
    recipe = build_recipe({"student": {"arch": "resnet20"}}, ["method.label_weight=0.5", "seed=3"])
    told = describe_training(recipe, RunFacts(init={"kind": "teacher", "why": "92% of its tensors fit teacher 1"}))
    shared = {"loss": "kl", "standardise": False, "mix": "targets", "hint_pool": "map"}
    assert told["options"] == {"variant": "repaired", "label_weight": 0.5, **shared}
    assert told["start"] == "teacher: 92% of its tensors fit teacher 1"
    assert (told["method"], told["seed"], told["student"]) == ("amtml-kd", 3, "resnet20")


def test_several_students_are_all_named() -> None:
    content = {"students": [{"arch": "resnet20"}, {"arch": "dscnn"}], "method": {"name": "ctsl-mkt"}}
    init = {"kind": "random", "why": "asked for", "peers": [{"kind": "file", "why": "asked for"}]}
    told = describe_training(build_recipe(content, ["train.pretrain_epochs=7"]), RunFacts(init=init))
    assert told["student"] == "resnet20 + dscnn"
    assert told["start"] == "random: asked for + file: asked for"
    assert told["pretrain_epochs"] == 7


def test_the_last_epoch_has_the_last_word_on_the_weights(tmp_path: Path) -> None:
    def epoch(choice: float) -> str:
        diagnostics = {
            "teacher_weight_mean": [0.7, 0.3],
            "teacher_weight_std": [0.25, 0.25],
            "gate_choice": choice,
            "gate_gain": 0.2,
            "gate_gain_error": 0.02,
        }
        return json.dumps({"event": "epoch", "students": [{"diagnostics": diagnostics}]})

    log = tmp_path / "log.jsonl"
    log.write_text("\n".join([epoch(0.0), epoch(2.0), '{"event": "step"}']))
    (sentence,) = last_words(log, ("a", "b"))
    assert "image by image" in sentence
    assert "a 0.700, b 0.300" in sentence
    assert "spread over the images 0.250, 0.250" in sentence


@pytest.mark.parametrize("content", ["", '{"event": "epoch"}', "not json", '{"event": "epoch", "students": [{}]}'])
def test_a_log_that_says_nothing_is_no_reason_to_fail(tmp_path: Path, content: str) -> None:
    log = tmp_path / "log.jsonl"
    assert last_words(log, ()) == ()
    log.write_text(content)
    assert last_words(log, ()) == ()

from __future__ import annotations

import pytest
import yaml

from mobillama.config import load_recipe, resolved, to_yaml
from mobillama.errors import UsageError
from mobillama.recipe import PRESETS, ModelConfig, PrepareRecipe, PretrainRecipe


def write(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_preset_gives_defaults_that_file_and_overrides_change_in_turn(tmp_path):
    path = write(tmp_path, "{data: d, run: r, model: {preset: baseline2, vocab_size: 64}}")
    recipe = load_recipe(PretrainRecipe, path, ["--model.vocab_size", "128", "--optimizer.learning_rate=1e-3"])
    assert recipe.model == ModelConfig(vocab_size=128, num_hidden_layers=8, share="none")
    assert recipe.optimizer.learning_rate == 1e-3
    assert load_recipe(PretrainRecipe, path, ["--model.preset", "baseline3"]).model.share == "block"


def test_resolved_recipe_reads_back_equal(tmp_path):
    recipe = load_recipe(PretrainRecipe, write(tmp_path, "{data: d, run: r, model: {preset: mobillama-0.8b-paper}}"))
    assert load_recipe(PretrainRecipe, write(tmp_path, to_yaml(recipe))) == recipe
    assert yaml.safe_load(to_yaml(recipe)) == resolved(recipe)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{data: d, run: r, train: {stepz: 3}}", "unknown key 'train.stepz' (did you mean 'train.steps'?)"),
        ("{data: d, run: r, trian: {steps: 3}}", "unknown key 'trian' (did you mean 'train'?)"),
        ("{data: d, run: r, lr: 3}", "unknown key 'lr'"),
        ("{data: d, run: r, train: {steps: many}}", "train.steps"),
        ("{data: d, run: r, train: 7}", "'train' is a section"),
        ("{data: d, run: r, model: {share: some}}", "model.share"),
        ("{data: d, run: r, model: {preset: mobillama-0.5}}", "did you mean 'mobillama-0.5b'?"),
        ("{data: d, run: r, model: {hidden_size: 2532}}", "set head_dim, for example 80"),
        ("{data: d, run: r, model: {num_key_value_heads: 5}}", "does not divide"),
        ("{data: d, run: r, model: {ffn_groups: 23}}", "ffn_groups"),
        ("{data: d, run: r, model: {ffn_groups: 2, share: none}}", "need share=ffn"),
        ("{data: d, run: r, train: {steps: 0}}", "train.steps: 0 is not a positive number"),
        ("{data: d, run: r, train: {keep_checkpoints: -1}}", "train.keep_checkpoints: -1 is not 0 or more"),
        ("{data: d, run: r, optimizer: {learning_rate: null}}", "optimizer.learning_rate: has no value"),
        ("{data: d, run: r, optimizer: {learning_rate: -1}}", "optimizer.learning_rate: -1.0 is not above 0"),
        ("{data: d, run: r, optimizer: {learning_rate: 1e-5}}", "optimizer.min_learning_rate"),
        ("{data: d, run: r, optimizer: {clip_norm: -1}}", "optimizer.clip_norm"),
        ("{data: d, run: r, optimizer: {beta1: 1.5}}", "optimizer.beta1"),
        ("{data: d, run: r, optimizer: {eps: .nan}}", "optimizer.eps"),
        ("{data: d, run: r, model: {preset: [a]}}", "unknown preset"),
        ("{data: d, run: r, model: {head_dim: -2}}", "model.head_dim"),
        ("{data: d, run: r, seed: 100000000000000000000000}", "seed"),
        ("{data: d}", "run"),
        ("{data: d, run: r, data: e}", "key 'data' stands twice"),
        ("[1, 2]", "a recipe is a mapping"),
        ("{data: [", "not valid YAML"),
    ],
)
def test_bad_recipe_is_one_line_that_names_the_place(tmp_path, text, said):
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        load_recipe(PretrainRecipe, path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_recipe_and_malformed_overrides(tmp_path):
    with pytest.raises(UsageError, match="no such recipe"):
        load_recipe(PretrainRecipe, tmp_path / "absent.yaml")
    path = write(tmp_path, "{data: d, run: r}")
    with pytest.raises(UsageError, match="value is missing"):
        load_recipe(PretrainRecipe, path, ["--train.steps"])
    with pytest.raises(UsageError, match=r"written --dotted\.key value"):
        load_recipe(PretrainRecipe, path, ["steps", "3"])
    with pytest.raises(UsageError, match=r"unknown key 'train.stps' \(did you mean 'train.steps'"):
        load_recipe(PretrainRecipe, path, ["--train.stps", "3"])


def test_sources_are_a_mapping_of_typed_entries(tmp_path):
    good = "{tokenizer: t, sources: {books: {path: b.jsonl, licence: MIT}}}"
    assert load_recipe(PrepareRecipe, write(tmp_path, good)).sources["books"].licence == "MIT"
    for entry in ("{5: {path: b}}", "{a/b: {path: b}}", "{}"):
        with pytest.raises(UsageError, match="sources"):
            load_recipe(PrepareRecipe, write(tmp_path, f"{{tokenizer: t, sources: {entry}}}"))
    with pytest.raises(UsageError, match="paht"):
        load_recipe(PrepareRecipe, write(tmp_path, "{tokenizer: t, sources: {books: {paht: b.jsonl}}}"))


def test_an_override_changes_its_source_alone_although_yaml_shares_it(tmp_path):
    text = "{tokenizer: t, sources: {a: &a {path: x, clean: {repair: true}}, b: *a}}"
    recipe = load_recipe(PrepareRecipe, write(tmp_path, text), ["--sources.a.clean.repair", "false"])
    assert [source.clean.repair for source in recipe.sources.values()] == [False, True]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{weight: 1}", "sources.s.path: is missing; give it a value"),
        ("{path: ''}", "sources.s.path: '' is not the name of a file"),
        ("{path: x, weight: .inf}", "sources.s.weight: inf is not above 0 and finite"),
        ("{path: x, format: amber, clean: {repair: true}}", "sources.s.clean: has no effect with format: amber"),
        ("{path: x, format: text, text_field: body}", "sources.s.text_field: has no effect with format: text"),
        ("{path: x, split: test}", "sources.s.split: has no effect with format: auto"),
        ("{path: x, path: y}", "line 1: key 'path' stands twice"),
    ],
)
def test_keys_of_a_source_that_cannot_be_meant(tmp_path, source, said):
    with pytest.raises(UsageError) as caught:
        load_recipe(PrepareRecipe, write(tmp_path, f"{{tokenizer: t, sources: {{s: {source}}}}}"))
    assert said in str(caught.value)


def test_every_preset_is_a_valid_recipe(tmp_path):
    for name, (config, _) in PRESETS.items():
        path = write(tmp_path, f"{{data: d, run: r, model: {{preset: {name}}}}}")
        assert load_recipe(PretrainRecipe, path).model == config

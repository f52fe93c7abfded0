"""Settings: where a value comes from, how text is read, and what a wrong key says."""

from pathlib import Path

import pytest

from dpt_t2i.config import (
    DemoConfig,
    DiscriminationConfig,
    GenerateConfig,
    ProbeConfig,
    TuneConfig,
    build_config,
    leaves,
    resolve_key,
    save_config,
)
from dpt_t2i.errors import InputError


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_default_then_file_then_override(tmp_path: Path) -> None:
    file = written(tmp_path, "train:\n  learning_rate: 3e-4\n  lr_warmup_steps: 7\n")
    config = build_config(ProbeConfig, file, {"train.learning_rate": "5e-4"})
    assert config.train.learning_rate == 5e-4  # override over file
    assert config.train.lr_warmup_steps == 7  # file over default
    assert config.train.max_train_steps == 60_000  # default


def test_stage_two_has_its_own_defaults() -> None:
    config = build_config(TuneConfig)
    assert (config.train.max_train_steps, config.train.train_batch_size, config.train.lr_scheduler) == (
        5_000,
        8,
        "cosine",
    )


def test_a_section_with_its_own_defaults_keeps_them_when_another_key_is_set() -> None:
    assert build_config(DemoConfig).sample.steps == 30  # 50 elsewhere
    assert build_config(DemoConfig, None, {"guidance_scale": "5"}).sample.steps == 30


def test_words_of_yaml_reach_the_leaf_that_they_are_meant_for(tmp_path: Path) -> None:
    # YAML 1.1 reads `no` as false and `0` as a number: a word and a seed list here
    train = "train: {mixed_precision: no, gradient_checkpointing: no}"
    assert build_config(ProbeConfig, written(tmp_path, train)).train.mixed_precision == "no"
    assert build_config(ProbeConfig, written(tmp_path, train)).train.gradient_checkpointing is False
    assert build_config(GenerateConfig, written(tmp_path, "seeds: 0")).seeds == "0"


def test_a_bare_leaf_a_hyphen_and_an_alias_are_the_same_key() -> None:
    assert resolve_key(TuneConfig, "learning-rate") == "train.learning_rate"
    assert resolve_key(TuneConfig, "lora_rank") == "lora.rank"
    assert resolve_key(TuneConfig, "model.unet_feature") == "model.tap"
    assert resolve_key(GenerateConfig, "num_inference_steps") == "sample.steps"
    assert resolve_key(GenerateConfig, "correction_factor") == "correction.correct"


@pytest.mark.parametrize(
    "key, nearest", [("lerning_rate", "learning_rate"), ("train.max_train_step", "train.max_train_steps")]
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"unknown config key `{key}`; did you mean `{nearest}`"):
        resolve_key(ProbeConfig, key)


def test_an_unknown_key_of_a_file_is_refused_too(tmp_path: Path) -> None:
    said = "config.yaml: unknown config key .* did you mean `train.learning_rate`.*; is it another command's config"
    with pytest.raises(InputError, match=said):
        build_config(ProbeConfig, written(tmp_path, "train:\n  learning_rte: 1\n"))


def test_none_is_nothing_except_for_lora_and_adapter() -> None:
    config = build_config(
        TuneConfig, None, {"snr_gamma": "none", "report_to": "None", "lora": "none", "adapter": "null"}
    )
    assert config.denoise.snr_gamma is None and config.train.report_to is None
    assert config.model.lora == "none"
    assert config.model.adapter is None


def test_text_becomes_a_list_where_a_list_is_wanted() -> None:
    assert build_config(DiscriminationConfig, None, {"timesteps": "[10, 20]"}).timesteps == (10, 20)
    assert build_config(DiscriminationConfig, None, {"timesteps": "10"}).timesteps == (10,)
    assert build_config(GenerateConfig, None, {"prompt": "a red, round ball"}).prompt == ("a red, round ball",)


@pytest.mark.parametrize(
    "key, value",
    [
        ("learning_rate", "-1"),
        ("learning_rate", "nan"),
        ("max_train_steps", "0"),
        ("lr_scheduler", "cosin"),
        ("dropout", "2"),
    ],
)
def test_a_value_out_of_range_names_its_key(key: str, value: str) -> None:
    with pytest.raises(InputError, match=rf"config key `\w+\.{key}`: .*\(got '{value}'\)"):
        build_config(ProbeConfig, None, {key: value})


@pytest.mark.parametrize("text, complaint", [("[1, 2", "not valid YAML"), ("- a\n- b\n", "must hold `key: value`")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        build_config(ProbeConfig, written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.yaml does not exist"):
        build_config(ProbeConfig, tmp_path / "absent.yaml")


def test_saved_settings_build_the_same_config(tmp_path: Path) -> None:
    first = build_config(TuneConfig, None, {"rank": "8", "lora": "none", "snr_gamma": "5", "mixed_precision": "no"})
    save_config(first, tmp_path / "run" / "config.yaml")
    assert build_config(TuneConfig, tmp_path / "run" / "config.yaml") == first


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        build_config(ProbeConfig).train.learning_rate = 1.0  # type: ignore[misc]


def test_every_leaf_is_described() -> None:
    assert all(info.description for command in (ProbeConfig, TuneConfig, GenerateConfig) for _, info in leaves(command))


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not valid YAML: key `steps` stands twice"):
        build_config(GenerateConfig, written(tmp_path, "sample:\n  steps: 1\n  steps: 2\n"))


def test_what_is_left_empty_in_a_file_is_as_if_left_out(tmp_path: Path) -> None:
    text = "sample:\n  # steps: 1\nprompt:\nprompts_file: null\nseeds: 3\n"
    config = build_config(GenerateConfig, written(tmp_path, text))
    assert config == build_config(GenerateConfig, None, {"seeds": "3"}) and config.prompt == ()
    assert build_config(GenerateConfig, written(tmp_path, "prompt: null\n")).prompt == ()
    with pytest.raises(InputError, match="`output_dir` is empty; give a path, or leave it out"):
        build_config(GenerateConfig, None, {"output_dir": ""})


def test_a_section_knows_what_was_given_even_at_its_default() -> None:
    config = build_config(GenerateConfig, overrides={"correction_end": "1.0", "seeds": "0"})
    assert config == GenerateConfig()
    assert config.model_fields_set == {"correction", "seeds"}
    assert config.correction.model_fields_set == {"correction_end"}
    assert config.search.model_fields_set == set()

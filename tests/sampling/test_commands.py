import json

import pytest

from dpt_t2i.config import GenerateConfig, build_config
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.commands import arm_name, parse_seeds, read_prompts, run_generate
from tests.tiny import tiny_pipeline


def test_seeds():
    assert parse_seeds("0") == [0]
    assert parse_seeds("0,3, 7") == [0, 3, 7]
    assert parse_seeds("0-3") == [0, 1, 2, 3]
    assert parse_seeds("5,2-4,3") == [5, 2, 3, 4]
    for wrong in ("", "a", "3-1", "1-", "-1", "1,,2", "0.5"):
        with pytest.raises(InputError, match="neither a number nor a range"):
            parse_seeds(wrong)
    for wrong in ("99999999999999999999", "0-999999999999", f"0,{2**32}", "0-1000000"):
        with pytest.raises(InputError, match="below 2\\^32, and at most 1000000 in a range"):
            parse_seeds(wrong)
    assert parse_seeds(f"{2**32 - 1}") == [2**32 - 1]


def test_prompts_come_from_flags_and_then_from_a_file(tmp_path):
    plain, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_text("a star\n\n  two stars \n", encoding="utf-8")
    rows.write_text('{"prompt": "a star", "id": 1}\n\n{"prompt": "two"}\n', encoding="utf-8")
    config = GenerateConfig(prompt=("first",), prompts_file=plain)
    assert read_prompts(config) == ["first", "a star", "two stars"]
    assert read_prompts(GenerateConfig(prompts_file=rows)) == ["a star", "two"]
    for content, message in (('{"prompt": 3}', "line 1: no text"), ('{"prompt": "a"}\nno', "line 2: no JSON")):
        rows.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            read_prompts(GenerateConfig(prompts_file=rows))
    # as other editors save it: with a mark in front, other ends of lines, and what only looks like an end
    plain.write_bytes("\ufeffa star\r\n\r\ntwo stars\r\n".encode())
    rows.write_text('{"prompt": "a\u2028star"}\n', encoding="utf-8")
    assert read_prompts(GenerateConfig(prompts_file=plain)) == ["a star", "two stars"]
    assert read_prompts(GenerateConfig(prompts_file=rows)) == ["a\u2028star"]
    with pytest.raises(InputError, match="missing.txt cannot be read"):
        read_prompts(GenerateConfig(prompts_file=tmp_path / "missing.txt"))


def test_arms():
    plain = GenerateConfig()
    everything = build_config(GenerateConfig, overrides={"correct": 0.5, "best_of": 4})
    assert arm_name(plain, has_lora=False) == "base"
    assert arm_name(plain, has_lora=True) == "tuned"
    assert arm_name(everything, has_lora=True) == "tuned+correct+best_of_4"
    judging = build_config(GenerateConfig, overrides={"correct": 0.5, "lora_draws": False})
    assert arm_name(judging, has_lora=True) == "judge+correct"


def test_the_whole_command(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    flags = {
        "pretrained_model_name_or_path": str(tmp_path / "base"),
        "prompt": ("a red circle", "two blue stars"),
        "seeds": "0-1",
        "steps": 2,
        "device": "cpu",
        "output_dir": tmp_path / "out",
    }
    summary = run_generate(build_config(GenerateConfig, overrides=flags))
    assert (summary["images"], summary["mean_score"], len(summary["files"])) == (4, None, 4)
    assert json.loads(json.dumps(summary)) == summary
    rows = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [(row["prompt_index"], row["seed"], row["arm"]) for row in rows] == [
        (0, 0, "base"),
        (0, 1, "base"),
        (1, 0, "base"),
        (1, 1, "base"),
    ]
    assert str(tmp_path) not in json.dumps(rows)
    with pytest.raises(InputError, match="at least one prompt"):
        run_generate(GenerateConfig())


def test_settings_of_a_correction_that_does_not_take_place_are_told(tmp_path, caplog):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    common = {"pretrained_model_name_or_path": str(tmp_path / "base"), "prompt": ("a star",), "steps": 1}
    common |= {"device": "cpu", "output_dir": tmp_path / "out"}
    run_generate(build_config(GenerateConfig, overrides=common))
    assert "nothing is corrected" not in caplog.text
    run_generate(build_config(GenerateConfig, overrides=common | {"correction_end": "0.5"}))
    assert "`correction_end` is set, but `correct` is 0, so nothing is corrected" in caplog.text


def test_a_negative_prompt_without_guidance_is_told(tmp_path, caplog):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    common = {"pretrained_model_name_or_path": str(tmp_path / "base"), "prompt": ("a star",), "steps": 1}
    common |= {"device": "cpu", "output_dir": tmp_path / "out", "negative_prompt": "blue"}
    run_generate(build_config(GenerateConfig, overrides=common))
    assert "negative_prompt changes nothing" not in caplog.text
    run_generate(build_config(GenerateConfig, overrides=common | {"guidance_scale": "1"}))
    assert "negative_prompt changes nothing at guidance_scale 1; give more than 1" in caplog.text


def test_more_steps_than_timesteps_are_refused(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    common = {"pretrained_model_name_or_path": str(tmp_path / "base"), "prompt": ("a star",), "steps": 1001}
    for scheduler in ("ddim", "unipc"):
        with pytest.raises(InputError, match="steps 1001: base `base` has 1000 timesteps"):
            run_generate(
                build_config(GenerateConfig, overrides=common | {"output_dir": tmp_path, "scheduler": scheduler})
            )

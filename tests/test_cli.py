"""The `dpt` command: arguments -> config -> one call, with the work itself replaced."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors import SafetensorError

from dpt_t2i import cli
from dpt_t2i.config import GenerateConfig, ProbeConfig, TuneConfig
from dpt_t2i.errors import InputError, Stopped

COMMANDS = [
    "demo", "probe", "tune", "generate", "score", "import-official", "export", "doctor", "app",
    "evaluate", "evaluate alignment", "evaluate itm", "evaluate rec", "evaluate images",
    "scenes", "scenes render", "scenes export",
    "data", "data inspect", "data cache", "data mine", "data perturb", "runs", "runs compare",
]  # fmt: skip


class Work:
    """Stands in for the function behind a command: keeps what it was called with."""

    def __init__(self, answer: Callable[[], dict[str, Any]]) -> None:
        self.answer = answer
        self.config: Any = None
        self.named: dict[str, Any] = {}

    def __call__(self, config: Any = None, **named: Any) -> dict[str, Any]:
        self.config, self.named = config, named
        return self.answer()


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Work]:
    """`work(module, function, answer)` replaces `module:function`; the test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def replace(target: str, answer: Callable[[], dict[str, Any]] = dict) -> Work:
        module, _, function = target.partition(":")
        stub, stand_in = ModuleType(module), Work(answer)
        setattr(stub, function, stand_in)
        monkeypatch.setitem(sys.modules, module, stub)
        return stand_in

    return replace


PROBE, TUNE = "dpt_t2i.report:probe", "dpt_t2i.report:tune"
GENERATE, SCORE = "dpt_t2i.sampling.commands:run_generate", "dpt_t2i.evaluation.commands:run_score"


def refuse(message: str) -> Callable[[], dict[str, Any]]:
    def answer() -> dict[str, Any]:
        raise InputError(message)

    return answer


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Usage: dpt {command}" in shown and "--help" in shown


def test_help_shows_the_defaults_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for command, steps in (("demo", 30), ("generate", 50)):
        assert cli.main([command, "--help"]) == 0
        assert f"sampling steps [default: {steps}]" in " ".join(capsys.readouterr().out.split())


def test_without_arguments_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "Usage: dpt" in capsys.readouterr().out


def test_help_imports_no_torch() -> None:
    code = (
        "import sys, dpt_t2i.cli as cli\n"
        "for name in sys.argv[1:]: assert cli.main([*name.split(), '--help']) == 0\n"
        "sys.exit(' '.join({'torch', 'diffusers', 'transformers'} & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *COMMANDS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_flag_beats_an_override_beats_the_file_beats_the_default(work: Callable[..., Work]) -> None:
    Path("a.yaml").write_text("train:\n  learning_rate: 1e-3\n  lr_warmup_steps: 1\n  max_grad_norm: 3\n")
    probe = work(PROBE)
    arguments = [
        "probe",
        "--config",
        "a.yaml",
        "--learning_rate",
        "4e-3",
        "train.learning_rate=2e-3",
        "lr_warmup_steps=2",
    ]
    assert cli.main(arguments) == 0
    assert isinstance(probe.config, ProbeConfig)
    train = probe.config.train
    assert (train.learning_rate, train.lr_warmup_steps, train.max_grad_norm, train.max_train_steps) == (
        4e-3,
        2,
        3.0,
        60_000,
    )


def test_hyphen_is_underscore_and_aliases_are_flags(work: Callable[..., Work]) -> None:
    tune, generate = work(TUNE), work(GENERATE)
    assert cli.main(["tune", "--learning-rate", "1e-3", "--lora_rank", "8", "--unet-feature", "mid"]) == 0
    assert isinstance(tune.config, TuneConfig)
    assert (tune.config.train.learning_rate, tune.config.lora.rank, tune.config.model.tap) == (1e-3, 8, "mid")
    arguments = ["--correction_factor", "0.5", "--num_inference_steps", "20", "--best-of", "4"]
    assert cli.main(["generate", *arguments]) == 0
    assert isinstance(generate.config, GenerateConfig)
    chosen = generate.config
    assert (chosen.correction.correct, chosen.sample.steps, chosen.search.best_of) == (0.5, 20, 4)


def test_switches_lists_and_none(work: Callable[..., Work]) -> None:
    tune, generate = work(TUNE), work(GENERATE)
    assert (
        cli.main(
            ["tune", "--no-normalize-features", "--gradient_checkpointing", "--lora", "none", "--report_to", "none"]
        )
        == 0
    )
    config = tune.config
    assert config.adapter.normalize_features is False and config.train.gradient_checkpointing is True
    assert config.model.lora == "none" and config.train.report_to is None
    assert cli.main(["generate", "--prompt", "a b", "--prompt", "c", "--seeds", "0-3"]) == 0
    assert generate.config.prompt == ("a b", "c") and generate.config.seeds == "0-3"


def test_a_repeated_flag_replaces_the_list_of_the_file(work: Callable[..., Work]) -> None:
    Path("a.yaml").write_text("prompt: [from the file]\n")
    generate = work(GENERATE)
    assert cli.main(["generate", "--config", "a.yaml"]) == 0
    assert generate.config.prompt == ("from the file",)
    assert cli.main(["generate", "--config", "a.yaml", "--prompt", "mine"]) == 0
    assert generate.config.prompt == ("mine",)


def test_score_takes_an_image_and_a_prompt(work: Callable[..., Work]) -> None:
    score = work(SCORE)
    assert cli.main(["score", "cat.png", "a cat", "model.device=cpu"]) == 0
    assert score.named == {"image": Path("cat.png"), "prompt": "a cat"}
    assert score.config.model.device == "cpu"


def test_scenes_call_their_functions(work: Callable[..., Work], capsys: pytest.CaptureFixture[str]) -> None:
    render = work("dpt_t2i.scenes.commands:render_grid")
    assert cli.main(["scenes", "render", "--n", "4", "--output", "out/a.png", "--seed", "3", "--size", "32"]) == 0
    assert render.named == {"n": 4, "output": Path("out/a.png"), "seed": 3, "size": 32, "split": "train"}
    export = work("dpt_t2i.scenes.commands:export_scenes")
    assert cli.main(["scenes", "export", "--output-dir", "out", "--n", "2"]) == 0
    assert export.named == {"output_dir": Path("out"), "n": 2, "seed": 0, "size": 64, "split": "train"}
    assert cli.main(["scenes", "export", "--n", "0"]) == 2
    assert cli.main(["scenes", "export", "--split", "test"]) == 2


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["probe", "--lerning_rate", "1"], "did you mean `--learning_rate`"),
        (["probe", "lerning_rate=1"], "did you mean `learning_rate`"),
        (["generate", "--resolution", "64"], "did you mean `--height` and `--width`?"),
        (["generate", "--model", "x"], "unknown option `--model`; did you mean `--pretrained_model_name_or_path`?"),
        (["data", "perturb", "--model", "x"], "unknown option `--model`; did you mean `--help`?"),
        (["data", "mine", "--model", "x"], "unknown option `--model`; did you mean `--encoder`?"),
        (["tune", "--batch_size", "4"], "unknown option `--batch_size`; did you mean `--train_batch_size`?"),
        (["data", "inspect", "--path", "x"], "unknown option `--path`; did you mean `--dataset`?"),
        (["export", "--device", "cpu"], "unknown option `--device`; files are all it reads and writes"),
        (["probe", "train.learning_rate"], "unexpected argument `train.learning_rate`"),
        (["prob"], "Did you mean 'probe'"),
        (["probe", "--learning_rate", "-1"], "`train.learning_rate`: Input should be greater than 0"),
        (["probe", "--learning_rate"], "requires an argument"),
        (["probe", "--config", "absent.yaml"], "config file absent.yaml does not exist"),
        (["score", "a.png"], "Missing argument 'PROMPT'"),
        (["evaluate"], "see `dpt evaluate --help`"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    arguments: list[str], complaint: str, work: Callable[..., Work], capsys: pytest.CaptureFixture[str]
) -> None:
    work(PROBE)
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and complaint in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_an_input_error_of_the_work_is_the_users(work: Callable[..., Work], capsys: pytest.CaptureFixture[str]) -> None:
    work(PROBE, refuse("adapter runs/x does not exist"))
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == "error: adapter runs/x does not exist\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_stopped_by_a_signal_tells_and_has_its_own_code(
    work: Callable[..., Work], capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    def stopped() -> dict[str, Any]:
        raise Stopped(number, "stopped at step 3 of 9")

    work(PROBE, stopped)
    assert cli.main(["probe"]) == code
    assert capsys.readouterr().err == "stopped at step 3 of 9\n"


def test_any_other_error_is_ours(work: Callable[..., Work], capsys: pytest.CaptureFixture[str]) -> None:
    work(PROBE, lambda: {"loss": 1 / 0})
    assert cli.main(["probe", "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" in err and "ZeroDivisionError" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_the_middle_is_no_fault(
    work: Callable[..., Work], capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int
) -> None:
    cleared = []

    def work_long() -> dict[str, Any]:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            cleared.append(number)
        return {}

    before = signal.getsignal(signal.SIGTERM)
    interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    work(PROBE, work_long)
    try:
        assert cli.main(["probe"]) == code
    finally:
        signal.signal(signal.SIGINT, interrupts)
    assert cleared == [number] and signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == f"{number.name}: stopped; files that were finished stay\n"


def test_a_place_that_is_a_file_is_refused_before_the_work(
    work: Callable[..., Work], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken").write_text("")
    probe = work(PROBE)
    for place in ("taken", "taken/run"):
        assert cli.main(["probe", "--output_dir", place]) == 2
        assert f"error: cannot write {place}" in capsys.readouterr().err
    assert probe.config is None


def test_a_place_that_may_not_be_looked_into_is_the_users(
    work: Callable[..., Work], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(place: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(place))

    probe = work(PROBE)
    monkeypatch.setattr(Path, "exists", closed)
    assert cli.main(["probe", "--output_dir", "closed/run"]) == 2
    assert re.search(r"error: cannot write \S*closed/run: Permission denied\n", capsys.readouterr().err)
    assert probe.config is None


@pytest.mark.parametrize("code, expected", [(errno.EROFS, 2), (errno.ENOSPC, 2), (errno.EACCES, 2), (errno.EIO, 1)])
def test_a_place_that_cannot_be_written_is_the_users(
    code: int, expected: int, work: Callable[..., Work], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> dict[str, Any]:
        raise OSError(code, "says the system", "runs/probe/metrics.jsonl")

    work(PROBE, fail)
    assert cli.main(["probe"]) == expected
    assert ("Traceback" in capsys.readouterr().err) == (expected == 1)


@pytest.mark.parametrize("readable, verb", [(False, "read"), (True, "write")])
def test_a_file_that_may_not_be_read_is_told_so(
    readable: bool,
    verb: str,
    tmp_path: Path,
    work: Callable[..., Work],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "a.png").touch()

    def fail() -> dict[str, Any]:
        monkeypatch.setattr(os, "access", lambda place, mode: readable or mode != os.R_OK)
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "a.png"))

    work(PROBE, fail)
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == f"error: cannot {verb} {tmp_path / 'a.png'}: Permission denied\n"


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_a_result_that_nobody_can_take_is_one_line(
    json_flag: list[str],
    work: Callable[..., Work],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Full(io.StringIO):
        def write(self, _text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    work(PROBE, lambda: {"accuracy": 0.5})
    monkeypatch.setattr(sys, "stdout", Full())
    assert cli.main(["probe", "--output_dir", "runs/mine", *json_flag]) == 2
    assert sys.stdout is None  # nothing is left that Python would try to write when it ends
    told = "cannot write the result to standard output: No space left on device; all that was made is in runs/mine"
    assert capsys.readouterr().err == f"error: {told}\n"


@pytest.mark.parametrize("said, expected", [("No space left on device (os error 28)", 2), ("header is wrong", 1)])
def test_a_full_disk_that_safetensors_met_is_the_users(
    said: str, expected: int, work: Callable[..., Work], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> dict[str, Any]:
        raise SafetensorError(f"Error while serializing: I/O error: {said}")

    work(PROBE, fail)
    assert cli.main(["probe", "--output_dir", "runs/a"]) == expected
    assert ("error: cannot write runs/a: No space left on device\n" in capsys.readouterr().err) == (expected == 2)


def test_a_folder_that_cannot_be_made_is_the_users_a_missing_file_is_not(work: Callable[..., Work]) -> None:
    def missing(name: str) -> Callable[[], dict[str, Any]]:
        def fail() -> dict[str, Any]:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", name)

        return fail

    work(PROBE, missing("runs/probe"))
    assert cli.main(["probe"]) == 2
    work(PROBE, missing("elsewhere/weights.safetensors"))
    assert cli.main(["probe"]) == 1


def test_json_is_all_there_is_on_stdout(work: Callable[..., Work], capsys: pytest.CaptureFixture[str]) -> None:
    def noisy() -> dict[str, Any]:
        sys.stdout.write("a library talks\n")
        return {"accuracy": 0.5, "gap": float("nan"), "files": [Path("a.png")], 3: (1, True, None)}

    work(PROBE, noisy)
    assert cli.main(["probe", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"accuracy": 0.5, "gap": None, "files": ["a.png"], "3": [1, True, None]}
    assert out.count("\n") == 1 and "a library talks" in err


def test_the_last_line_for_a_person_names_the_folder(
    work: Callable[..., Work], capsys: pytest.CaptureFixture[str]
) -> None:
    work(PROBE, lambda: {"summary": ["accuracy 0.5", "loss 1.2"], "accuracy": 0.5})
    assert cli.main(["probe", "--output_dir", "runs/mine"]) == 0
    assert capsys.readouterr().out == "accuracy 0.5\nloss 1.2\noutput: runs/mine\n"
    work(PROBE, lambda: {"accuracy": 0.5, "rows": [1, 2]})
    assert cli.main(["probe"]) == 0
    assert capsys.readouterr().out == "accuracy: 0.5\noutput: runs/probe\n"


def test_a_rank_left_in_the_environment_silences_nobody(
    work: Callable[..., Work], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    work(PROBE, lambda: {"accuracy": 0.5})
    assert cli.main(["probe", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"accuracy": 0.5}


def test_only_the_first_process_speaks(
    work: Callable[..., Work], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    work(PROBE, lambda: {"accuracy": 0.5})
    assert cli.main(["probe", "--json"]) == 0
    assert capsys.readouterr().out == ""


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "dpt_t2i", "probe", "--nope"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: unknown option `--nope`")


def test_a_name_that_is_too_long_and_a_folder_in_a_files_place_are_the_users(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["scenes", "render", "--n", "1", "--output", str(tmp_path / ("x" * 300) / "a.png")]) == 2
    assert "File name too long" in capsys.readouterr().err
    (tmp_path / "d.png").mkdir()
    assert cli.main(["scenes", "render", "--n", "1", "--output", str(tmp_path / "d.png")]) == 2
    assert "Is a directory" in capsys.readouterr().err

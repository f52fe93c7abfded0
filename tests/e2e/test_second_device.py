"""Every command puts every tensor on the device it was given: run on one that does not mix with the CPU.

No GPU is needed: `tests/second_device.py` is such a device. What comes out must be what the CPU gives.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from dpt_t2i.backbones.lora import LORA_FILE
from dpt_t2i.cli import main
from tests.e2e.test_families import CASES, read
from tests.e2e.test_families import SMALL as SMALL_WITH_DROPOUT
from tests.families import FAMILIES
from tests.second_device import NAME
from tests.tiny import tiny_pipeline

SMALL = SMALL_WITH_DROPOUT | {"dropout": 0}  # each device drops by masks of its own
ROOT = Path(__file__).parents[2]
CORRECTED = {"prompt": "a red circle", "steps": 3, "guidance_scale": 3.0, "correct": 0.5, "correction_rule": "relative"}

# Ways to train that take other paths through the code, one after the other; `{out}` is the folder of all.
TRAININGS: dict[str, tuple[str, dict[str, Any]]] = {
    "probe": ("probe", {}),
    "atlas": ("probe", {"tap": None, "taps": "all", "timestep_buckets": 2}),
    "fusion": ("probe", {"tap": "bottom2_bottom3_mid", "fusion_channels": 16, "fusion_size": 4}),
    "cached": ("probe", {"cache_dir": "{out}/cache"}),
    "on_policy": ("probe", {"on_policy_fraction": 0.5, "on_policy_pool": 4, "on_policy_steps": 2}),
    "half": ("tune", {"mixed_precision": "bf16", "learning_rate": 1e-6}),  # at 1e-2 rounding turns updates around
    "frugal": ("tune", {"gradient_checkpointing": True, "ema_decay": 0.9, "sample_every": 1, "sample_steps": 2}),
    "by_error": ("tune", {"denoise_itm_coef": 0.5, "denoise_dpo_coef": 0.5}),
    "distilled": ("tune", {"distill_coef": 0.5, "distill_adapter": "{out}/probe/adapter"}),
    "shared": ("tune", {"lora_itm_rec_share": 0.5, "lora_scope": "to_tap", "snr_gamma": 5}),
    "control": ("tune", {"objective": "denoise_only"}),
    "resumed": ("tune", {"max_train_steps": 1}),
    "resumed again": ("tune", {"resume_from_checkpoint": "latest"}),
}
DRAWINGS: dict[str, dict[str, Any]] = {
    "euler": {"scheduler": "euler", "correction_mode": "state"},
    "dpm++": {"scheduler": "dpm++", "correction_mode": "noise"},
    "unipc, fused": {"scheduler": "unipc", "correction_fused": True},
    "search": {"best_of": 2, "eta": 1, "negative_prompt": "blue", "correction_every": 2},
}


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family == "sd2_v" else pytest.mark.slow) for family in CASES]
)
def test_from_probe_to_an_image_as_on_the_cpu(family, tmp_path):
    base = FAMILIES[family](tmp_path / "base")
    folders = {device: tmp_path / device for device in ("cpu", NAME)}
    on_both({device: loop(base, CASES[family][0], device, folder) for device, folder in folders.items()})
    for run in ("probe", "tune"):
        same_metrics(folders, run)
    same_image(folders, "images")
    assert (folders[NAME] / "tune" / LORA_FILE).is_file()


@pytest.mark.slow
def test_every_way_to_train_and_draw_as_on_the_cpu(tmp_path):
    base, folders = tmp_path / "base", {device: tmp_path / device for device in ("cpu", NAME)}
    tiny_pipeline().save_pretrained(base)
    on_both({device: everything(base, device, folder) for device, folder in folders.items()})
    for run in TRAININGS:
        same_metrics(folders, run.split()[0], within=2e-2 if run == "half" else 2e-3)
    for run in DRAWINGS:
        same_image(folders, run)
    for file in ("itm/itm_scores.jsonl", "image_scores/image_scores.jsonl", "score/score.json"):
        here, there = (numbers((folder / file).read_text()) for folder in folders.values())
        assert here and there == pytest.approx(here, rel=2e-3, abs=2e-3), file
    mined, other = ((folder / "scenes/mined.jsonl").read_text() for folder in folders.values())
    assert mined == other


@pytest.mark.parametrize("how", ["hook", "callback"])
def test_a_corrected_pipeline_whose_parts_are_offloaded(how):
    done = on_twin_python(f"""
        from tests.sampling.test_self_correction import offloaded_and_expected
        got, expected = offloaded_and_expected({how!r}, "{NAME}")
        assert got.device.type == "{NAME}", got.device
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)
    """)
    assert done.returncode == 0, done.stderr


def test_our_own_model_draws_and_judges_with_its_parts_offloaded():
    """The way to FLUX and SD 3.5 on 24 GB: `model.pipeline.enable_model_cpu_offload()`."""
    done = on_twin_python(f"""
        from dpt_t2i.sampling.model import T2IModel
        from tests.tiny import tiny_adapter, tiny_backbone
        def made(offloaded):
            backbone = tiny_backbone()
            model = T2IModel(backbone, tiny_adapter(backbone))
            if offloaded:
                model.pipeline.enable_model_cpu_offload(device="{NAME}")
            how = {{"steps": 2, "correct": 0.1, "correction_rule": "relative"}}
            image = model.generate("a red circle", **how)[0]
            return image, model.score(image, "a red circle", draws=1).score
        here, there = made(False), made(True)
        assert here[0].tobytes() == there[0].tobytes() and abs(here[1] - there[1]) < 1e-4, (here, there)
    """)
    assert done.returncode == 0, done.stderr


def test_the_device_refuses_what_lies_on_the_cpu_and_autocasts():
    done = on_twin_python("""
        layer = torch.nn.Linear(2, 2).to("twin")
        here, there = torch.ones(1, 2, device="twin"), torch.ones(1, 2)
        assert layer(here).device.type == "twin" and (here @ there.to("twin").T).tolist() == [[2.0]]
        assert here[:, torch.tensor([1, 0])].tolist() == [[1.0, 1.0]] and (here * torch.tensor(3.0)).sum() == 6
        with torch.autocast("twin", torch.bfloat16):
            assert layer(here).dtype == torch.bfloat16 and (here + 1).dtype == torch.float32
        for mixed in (lambda: layer(there), lambda: here + there, lambda: torch.cat([here, there])):
            try:
                mixed()
            except RuntimeError as error:
                print(error)
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("expected all tensors on the same device") == 3


def loop(base: Path, tap: str, device: str, folder: Path) -> list[list[str]]:
    small = {"pretrained_model_name_or_path": base, **SMALL, "device": device, "tap": tap, "max_train_steps": 2}
    tuned = folder / "tune"
    draw = {"pretrained_model_name_or_path": base, "device": device, "lora": tuned, **CORRECTED}
    return [
        words("probe", small | {"output_dir": folder / "probe"}),
        words("tune", small | {"adapter": folder / "probe" / "adapter", "output_dir": tuned}),
        words("generate", draw | {"output_dir": folder / "images"}),
    ]


def everything(base: Path, device: str, folder: Path) -> list[list[str]]:
    model = {"pretrained_model_name_or_path": base, "device": device}
    data = {"dataset": "scenes", "resolution": 32, "val_samples": 2}
    read_by = model | {"lora": folder / "frugal", "adapter": folder / "frugal/adapter"}
    commands = [
        words("scenes", "export", {"n": 8, "output_dir": folder / "scenes"}),
        words(
            "data", "mine", {"dataset": folder / "scenes", "device": device, "top_k": 1, "output_dir": folder / "mined"}
        ),
        words("data", "cache", model | data | {"max_samples": SMALL["max_samples"], "cache_dir": folder / "cache"}),
    ]
    for name, (command, settings) in TRAININGS.items():
        own = {"tap": "up1", "max_train_steps": 2, "output_dir": folder / name.split()[0]}
        if command == "tune":
            own |= {"adapter": folder / "probe" / "adapter", "sample_every": 0, "checkpointing_steps": 1}
        own |= {key: str(value).format(out=folder) if value is not None else None for key, value in settings.items()}
        commands.append(words(command, SMALL | model | own))
    for name, settings in DRAWINGS.items():
        commands.append(words("generate", read_by | CORRECTED | settings | {"output_dir": folder / name}))
    first = str(folder / "euler/images/00000_0.png")
    return [
        *commands,
        words("score", first, "a red circle", read_by | {"output_dir": folder / "score"}),
        words("evaluate", "itm", read_by | data | {"output_dir": folder / "itm", "timesteps": 250}),
        words(
            "evaluate",
            "images",
            {"folders": folder / "euler", "device": device, "scorers": "bundled"}
            | {"output_dir": folder / "image_scores"},
        ),
        words(
            "export",
            {"pretrained_model_name_or_path": base, "lora": folder / "frugal", "format": "merged"}
            | {"output_dir": folder / "merged"},
        ),
    ]


def words(*parts: Any) -> list[str]:
    """The words of a command line: names, then settings as flags; what is None is left out."""
    *names, settings = parts
    flags = [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]
    return [*names, *(word for word in flags if word != "True")]  # a switch has no value


def on_both(commands: dict[str, Sequence[list[str]]]) -> None:
    for command in commands["cpu"]:
        AcceleratorState._reset_state(reset_partial_state=True)  # one process, several precisions
        assert main(command) == 0
    done = run_python(["-m", "tests.second_device"], json.dumps(commands[NAME]))
    assert done.returncode == 0, done.stderr


def on_twin_python(body: str) -> subprocess.CompletedProcess[str]:
    lines = "\n".join(line.removeprefix(" " * 8) for line in body.splitlines())
    return run_python(
        ["-c", f"import torch\nfrom tests.second_device import install, leave\ninstall()\n{lines}\nleave()"]
    )


def run_python(arguments: list[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, input=stdin, capture_output=True, text=True)


def same_metrics(folders: dict[str, Path], run: str, within: float = 2e-3) -> None:
    here, there = (metrics(folder / run) for folder in folders.values())
    assert here
    for mine, other in zip(here, there, strict=True):
        assert other == pytest.approx(mine, rel=within, abs=within), run  # attention by another kernel


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name.startswith(("loss", "itm", "rec"))} for line in lines]


def numbers(text: str) -> list[float]:
    """All fractions of a JSON text, in their order: scores and boxes."""
    return [float(found) for found in re.findall(r"-?\d+\.\d+", text)]


def same_image(folders: dict[str, Path], run: str) -> None:
    here, there = (read(folder / run / "images/00000_0.png").int() for folder in folders.values())
    assert (here - there).abs().max() <= 2, run

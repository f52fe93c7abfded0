"""The `dpt` command: arguments -> config -> one call.

Each command is made from its config class: every leaf is a flag. Nothing here imports torch; the
work's module is imported when the command runs, so that `dpt --help` answers at once.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from dpt_t2i import config as settings
from dpt_t2i.config import ALIASES, Section, build_config, is_optional, is_tuple, leaves, resolve_key
from dpt_t2i.errors import InputError, Stopped, stopping_on_signals, writing_to

# hyphen = underscore in every flag
SETTINGS = {"token_normalize_func": lambda name: name.replace("-", "_"), "max_content_width": 120}

# (command, flag that it does not have) -> what to do instead, where that is spelt otherwise or there is nothing to say
INSTEAD = {
    ("generate", "--resolution"): "did you mean `--height` and `--width`?",
    ("score", "--timesteps"): "did you mean `--score_timestep`?",
    ("inspect", "--path"): "did you mean `--dataset`?",
    ("inspect", "--format"): "did you mean `--data_format`?",
    ("probe", "--batch_size"): "did you mean `--train_batch_size`?",
    ("tune", "--batch_size"): "did you mean `--train_batch_size`?",
    ("mine", "--model"): "did you mean `--encoder`?",
    ("export", "--device"): "files are all it reads and writes, by the CPU alone",
}

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="YAML with any of the keys below"),
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout, everything else on stderr")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 our fault, 2 bad input, 128 + n ended by signal n.

    130 = interrupted; 143 = asked to end by SIGTERM: training has then left a checkpoint.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        code = app(args=arguments, prog_name="dpt", standalone_mode=False)
    except InputError as error:
        return _refuse(str(error))
    except typer.TyperException as error:
        return _refuse(_usage_message(error))
    except Stopped as stop:
        if _is_first_process() and _is_first_to_fail():  # a launcher ends the others of one that failed
            typer.echo(" ".join(str(stop).split()), err=True)
        return 128 + stop.signal
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except Exception:
        if _is_first_to_fail():
            traceback.print_exc()
        return 1
    return code if isinstance(code, int) else 0


def command(
    app: typer.Typer,
    name: str,
    config_class: type[Section],
    run: str,
    arguments: Mapping[str, tuple[type, str]] | None = None,
) -> None:
    """Register command `name`, whose flags are the leaves of `config_class`.

    Args:
        run: `module:function`, called as `function(config, **arguments)`; returns the result as a dict.
        arguments: positional arguments before the dotted overrides: name -> (type, help).
    """
    extra = dict(arguments or {})

    def call(**values: Any) -> None:
        flags = dict(_given(config_class, values))
        overrides = dict(_parse_override(config_class, text) for text in values["overrides"] or ())
        config = build_config(config_class, values["config"], overrides | flags)
        folder = getattr(config, "folder", None) or getattr(config, "output_dir", None)
        _perform(run, (config,), {key: values[key] for key in extra}, values["json"], folder)

    call.__signature__ = inspect.Signature(list(_parameters(config_class, extra)))  # type: ignore[attr-defined]
    summary = inspect.getdoc(config_class) or ""
    app.command(name, help=summary, context_settings=SETTINGS)(call)


def _parameters(config_class: type[Section], extra: Mapping[str, tuple[type, str]]) -> Iterator[inspect.Parameter]:
    """The signature that typer reads: positional arguments, overrides, common flags, a flag for each leaf."""

    def parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    for name, (kind, text) in extra.items():
        yield parameter(name, Annotated[kind, typer.Argument(metavar=name.upper(), help=text, show_default=False)])
    override = typer.Argument(
        metavar="[KEY=VALUE]...", help="dotted override, such as model.device=cpu", show_default=False
    )
    yield parameter("overrides", Annotated[list[str] | None, override], None)
    yield parameter("config", ConfigFile, None)
    yield parameter("json", AsJson, False)
    defaults = config_class()
    for path, info in leaves(config_class):
        yield parameter(_leaf(path), _flag(path, info, attrgetter(path)(defaults)), None)


def _flag(path: str, info: FieldInfo, default: Any) -> Any:
    """The annotated type of a leaf's flag. Text stays text: the config's own type reads it, as it does for YAML."""
    leaf = _leaf(path)
    names = [leaf, *(alias for alias, target in ALIASES.items() if target == leaf)]
    help_text = info.description if default in (None, ()) else f"{info.description} [default: {_show(default)}]"
    if info.annotation is bool:
        both = "/".join(["--" + leaf, "--no_" + leaf])
        return Annotated[bool | None, typer.Option(both, help=help_text, show_default=False)]
    option = typer.Option(
        *(f"--{name}" for name in names),
        metavar=_metavar(info),
        help=help_text,
        show_default=False,
    )
    return Annotated[(list[str] if is_tuple(info) else str) | None, option]


def _metavar(info: FieldInfo) -> str:
    kinds = [kind for kind in get_args(info.annotation) if kind is not type(None)] if is_optional(info) else []
    kind: Any = kinds[0] if kinds else info.annotation
    while get_origin(kind) in (Annotated, tuple):
        kind = get_args(kind)[0]
    if options := [choice for choice in get_args(kind) if isinstance(choice, str)]:  # a Literal
        return "|".join(options)
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _show(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default) or "empty"


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _given(config_class: type[Section], values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted path and value of the flags that were on the command line."""
    for path, _ in leaves(config_class):
        value = values[_leaf(path)]
        if value is not None and value != []:
            yield path, value


def _parse_override(config_class: type[Section], text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"unexpected argument `{text}`; an override looks like train.learning_rate=1e-4")
    return resolve_key(config_class, key), value


def _perform(
    run: str, positional: tuple[Any, ...], named: Mapping[str, Any], as_json: bool, output_dir: Path | None
) -> None:
    """Import `module:function`, call it, show what it returns."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if _is_first_process():
        logging.getLogger("dpt_t2i").setLevel(logging.INFO)
    else:
        logging.getLogger().setLevel(logging.ERROR)
    module, _, function = run.partition(":")
    # A library that writes to stdout would spoil the JSON.
    kept_clean = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    with stopping_on_signals(), writing_to(output_dir), kept_clean:
        work: Callable[..., dict[str, Any]] = getattr(import_module(module), function)
        result = work(*positional, **named)
    if not _is_first_process():
        return
    try:
        if as_json:
            typer.echo(json.dumps(_plain(result), allow_nan=False))
        else:
            _tell(result, output_dir)
    except OSError as error:  # the work is done; whoever reads on may have left (`dpt ... | head`)
        sys.stdout = None  # nor try once more at the end
        kept = f"; all that was made is in {output_dir}" if output_dir is not None and output_dir != Path() else ""
        raise InputError(f"cannot write the result to standard output: {error.strerror}{kept}") from error


def _tell(result: Mapping[str, Any], output_dir: Path | None) -> None:
    """The result for a person: its `summary` lines, else its plain values; last the output folder."""
    lines = result.get("summary")
    if lines is None:
        plain = {key: value for key, value in result.items() if isinstance(value, str | int | float | Path)}
        lines = [f"{key}: {value}" for key, value in plain.items() if key != "output_dir"]
    for line in lines:
        typer.echo(line)
    if output_dir is not None and output_dir != Path():
        typer.echo(f"output: {output_dir}")


def _plain(value: Any) -> Any:
    """What JSON can hold: keys and paths as text, numbers of numpy and torch as numbers, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def _refuse(message: str) -> int:
    if _is_first_to_fail():
        beside_a_bar = "\n" if _world_size() > 1 else ""  # another process may be in the middle of its progress bar
        typer.echo(f"{beside_a_bar}error: {' '.join(message.split())}", err=True)
    return 2


def _is_first_process() -> bool:
    """Under a launcher the first process alone tells how it goes."""
    return _world_size() == 1 or os.environ.get("RANK", "0") == "0"


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_first_to_fail() -> bool:
    """Whether this process should say why the run ends: alone always, under a launcher only the first to fail.

    One failure takes the others with it (all met the same bad input, or lose the connection to the first), and their
    complaints would bury the cause. The processes of a machine share the launcher as parent: who first makes the
    file that is named by it speaks.
    """
    if _world_size() == 1:
        return True
    import psutil

    parent = os.getppid()
    try:
        started = psutil.Process(parent).create_time()  # the number alone may be given again
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun --max_restarts: under the same parent
        mark = f"dpt-failed-{parent}-{started:.2f}-{attempt}"
        (Path(tempfile.gettempdir()) / mark).touch(exist_ok=False)
    except FileExistsError:
        return False
    except (OSError, psutil.Error):  # nowhere to leave a mark: rather say it twice
        return True
    return True


def _usage_message(error: typer.TyperException) -> str:
    """typer's complaint on one line, with the nearest flag where one is near."""
    option = getattr(error, "option_name", None)
    if not hasattr(error, "possibilities"):
        context = getattr(error, "ctx", None)
        message = error.format_message().rstrip(".")
        return f"{message}; see `{context.command_path} --help`" if context and message[-1:] != "?" else message
    nearest = f"did you mean `{error.possibilities[0]}`?" if error.possibilities else "--help lists the flags"
    context = getattr(error, "ctx", None)
    command_name = str(context and context.info_name)
    known = {name for parameter in getattr(context and context.command, "params", ()) for name in parameter.opts}
    if option == "--model" and "--pretrained_model_name_or_path" in known:
        nearest = "did you mean `--pretrained_model_name_or_path`?"
    nearest = INSTEAD.get((command_name, str(option)), nearest)
    return f"unknown option `{option}`; {nearest}"


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("dpt-t2i"))
        raise typer.Exit


app = typer.Typer(
    help="Discriminative probing and tuning of text-to-image diffusion models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut long flags short
    context_settings=SETTINGS,
)
evaluate = typer.Typer(
    help="Measure alignment, image-text matching, grounding, or images by outside encoders.", context_settings=SETTINGS
)
scenes = typer.Typer(help="The drawn world: look at it, or write it out as a dataset.", context_settings=SETTINGS)
data = typer.Typer(
    help="Your own pictures and texts: look at them, add hard negatives, encode them once.", context_settings=SETTINGS
)
runs = typer.Typer(help="Look at finished or unfinished runs.", context_settings=SETTINGS)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


command(app, "demo", settings.DemoConfig, "dpt_t2i.demo:run_demo")
command(app, "probe", settings.ProbeConfig, "dpt_t2i.report:probe")
command(app, "tune", settings.TuneConfig, "dpt_t2i.report:tune")
command(app, "generate", settings.GenerateConfig, "dpt_t2i.sampling.commands:run_generate")
command(
    app,
    "score",
    settings.ScoreConfig,
    "dpt_t2i.evaluation.commands:run_score",
    {"image": (Path, "image file"), "prompt": (str, "the caption to judge")},
)
app.add_typer(evaluate, name="evaluate")
command(evaluate, "alignment", settings.AlignmentConfig, "dpt_t2i.report:evaluate_alignment")
command(evaluate, "itm", settings.DiscriminationConfig, "dpt_t2i.evaluation.commands:run_itm")
command(evaluate, "rec", settings.DiscriminationConfig, "dpt_t2i.evaluation.commands:run_rec")
command(evaluate, "images", settings.ImageScoresConfig, "dpt_t2i.evaluation.image_scores:run_image_scores")
app.add_typer(scenes, name="scenes")
app.add_typer(data, name="data")
command(data, "cache", settings.CacheConfig, "dpt_t2i.training.cached:run_cache")
command(data, "inspect", settings.InspectConfig, "dpt_t2i.data.inspection:run_inspect")
command(data, "mine", settings.MineConfig, "dpt_t2i.training.mining:run_mine")
command(data, "perturb", settings.PerturbConfig, "dpt_t2i.data.commands:run_perturb")
app.add_typer(runs, name="runs")
command(
    app,
    "import-official",
    settings.ImportOfficialConfig,
    "dpt_t2i.training.official:run_import",
    {"checkpoint": (Path, "the release's pytorch_model.bin, or the folder that holds it")},
)
command(app, "export", settings.ExportConfig, "dpt_t2i.publish.export:run_export")
command(app, "doctor", settings.DoctorConfig, "dpt_t2i.doctor:run_doctor")
command(app, "app", settings.AppConfig, "dpt_t2i.publish.app:run_app")

Count = Annotated[int, typer.Option("--n", min=1, help="number of scenes")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="seed of the scenes")]
Size = Annotated[int, typer.Option("--size", min=16, help="pixels of the square image")]
Split = Annotated[Literal["train", "val", "heldout"], typer.Option("--split", help="split of the drawn world")]


@scenes.command("render")
def _render(
    n: Count = 16,
    output: Annotated[Path, typer.Option("--output", help="image file")] = Path("runs/scenes.png"),
    seed: Seed = 0,
    size: Size = 64,
    split: Split = "train",
    json: AsJson = False,
) -> None:
    """Draw scenes into one contact sheet with their captions."""
    named = {"n": n, "output": output, "seed": seed, "size": size, "split": split}
    _perform("dpt_t2i.scenes.commands:render_grid", (), named, json, output.parent)


@scenes.command("export")
def _export(
    output_dir: Annotated[Path, typer.Option("--output_dir", help="dataset folder")] = Path("runs/scenes"),
    n: Count = 1000,
    seed: Seed = 0,
    size: Size = 64,
    split: Split = "train",
    json: AsJson = False,
) -> None:
    """Write scenes as an imagefolder with metadata.jsonl: captions, expressions, boxes, hard negatives."""
    named = {"output_dir": output_dir, "n": n, "seed": seed, "size": size, "split": split}
    _perform("dpt_t2i.scenes.commands:export_scenes", (), named, json, output_dir)


@runs.command("compare")
def _compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="run folder", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="run folder", show_default=False)],
    output: Annotated[Path, typer.Option("--output", help="image file")] = Path("runs/compare.png"),
    json: AsJson = False,
) -> None:
    """Two runs side by side: settings that differ, figures, and a plot of their curves."""
    _perform("dpt_t2i.training.runs:compare_runs", (a, b, output), {}, json, output.parent)

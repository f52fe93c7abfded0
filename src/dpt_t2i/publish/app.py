"""`dpt app`: a local web page over one loaded model (gradio; the extra `app`)."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dpt_t2i.config import AppConfig, SampleConfig
from dpt_t2i.errors import InputError
from dpt_t2i.publish.session import Beside, Drawing, Session, evidence_rows
from dpt_t2i.sampling.annotate import annotate
from dpt_t2i.sampling.loop import eta_of, guidance_of
from dpt_t2i.sampling.model import open_model

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # the page calls nobody
try:
    import gradio as gr
    import pandas as pd
except ImportError as error:
    raise InputError("dpt app needs gradio: pip install 'dpt-t2i[app]'") from error

logger = logging.getLogger(__name__)

TITLE = "dpt-t2i: does the picture obey the prompt?"
EVIDENCE = ["phrase", "confidence", "score alone"]
KEPT = 3600  # seconds that gradio keeps a drawing for the page; the files in the output folder stay
SEEN = ["download", "fullscreen"]  # what a picture may be asked for
CURVE = ["step", "matching score"]
EXAMPLES = ("a red circle left of a blue square", "exactly three green triangles", "a small yellow cross and a circle")


def run_app(config: AppConfig) -> dict[str, Any]:
    """Load the model once and serve the page until it is interrupted.

    Raises:
        InputError: gradio is not installed, the port is taken, or anything that `load_model` refuses.
    """
    model = open_model(config.model)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    page = build(Session(model, config.output_dir))
    url = serve(page, config.host, config.port)
    logger.info("open %s in a browser; Ctrl-C ends it", url)
    try:
        page.block_thread()
    finally:
        page.close()
    return {"url": url, "output_dir": str(config.output_dir)}


def serve(page: gr.Blocks, host: str, port: int) -> str:
    """Start the page in the background; its address.

    Args:
        port: 0 = any that is free.

    Raises:
        InputError: the port is taken, the host is none of this machine's, or gradio cannot start.
    """
    port = _free_port(host, port)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,  # else gradio opens a tunnel by itself on some machines
            run_history=False,
            prevent_thread_lock=True,
            quiet=True,
            theme=theme,  # gradio's own fetches its letters from the net
            footer_links=[],
        )
    except Exception as error:  # gradio and what it asks itself over HTTP raise whatever they like
        raise InputError(f"the page does not start on {host}:{port}: {error}; behind a proxy set NO_PROXY") from error
    return str(url)


def _free_port(host: str, port: int) -> int:
    """`port`, or one that is free. Raises `InputError` where nothing can listen there."""
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise InputError(f"nothing can listen on {host}:{port} ({error}); give another --host or --port") from error


def build(session: Session) -> gr.Blocks:
    """The page: one tab draws, one judges."""
    model = session.model
    parts = f"base `{model.backbone.name}`, LoRA {'on' if session.tuned else 'none'}, adapter "
    parts += (
        "none: no scores, no correction" if model.adapter is None else f"at `{'`, `'.join(model.adapter.tap_channels)}`"
    )
    with gr.Blocks(title="dpt-t2i", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gr.Markdown(f"## {TITLE}\n{parts}")
        with gr.Tab("Draw"):
            _draw_tab(session)
        if model.adapter is not None:
            with gr.Tab("Judge"):
                _judge_tab(session)
    return page


def _draw_tab(session: Session) -> None:
    judged = session.model.adapter is not None
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            prompt = gr.Textbox(label="Prompt", lines=2, placeholder=EXAMPLES[0])
            beside = gr.Radio(list(session.choices()), value=session.choices()[0], label="Beside it, same seed")
            with gr.Row():
                seed = gr.Number(label="Seed", value=0, precision=0, minimum=0)
                any_seed = gr.Checkbox(label="any seed", value=True)
            controls = _controls(session)
            button = gr.Button("Draw", variant="primary")
            gr.Examples([[text] for text in EXAMPLES], [prompt])
        with gr.Column(scale=3, min_width=320):
            with gr.Tab("Side by side"), gr.Row():
                left = gr.Image(
                    label="beside", type="pil", format="png", interactive=False, min_width=200, buttons=SEEN
                )
                right = gr.Image(
                    label="as asked", type="pil", format="png", interactive=False, min_width=200, buttons=SEEN
                )
            with gr.Tab("One over the other"):
                slider = gr.ImageSlider(
                    label="beside | as asked", type="pil", format="png", interactive=False, height=520
                )
            boxes = gr.Checkbox(label="Show where it sees what the prompt names", value=judged, visible=judged)
            verdict = gr.Markdown()
            evidence = gr.Dataframe(headers=EVIDENCE, label="Evidence, as asked", visible=judged, interactive=False)
            curve = gr.LinePlot(x=CURVE[0], y=CURVE[1], label="Score before each correction", visible=False, height=220)
            files = gr.Files(label="Files, beside first; each holds its settings", interactive=False)
    copies = tempfile.TemporaryDirectory()  # gradio hands on files of temporary folders without being shown the others
    last = gr.State(None, time_to_live=KEPT)

    def draw(
        text: str,
        wanted: float | None,
        free: bool,
        other: Beside,
        show: bool,
        *values: Any,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how gradio is asked for one
    ) -> list[Any]:
        settings = dict(zip(controls, values, strict=True))
        try:
            if wanted is None and not free:
                raise InputError("the seed is empty; write a number, or tick `any seed`")
            drawing = session.draw(text, None if free else int(wanted or 0), other, settings, progress)
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error
        points = pd.DataFrame(drawing.curve, columns=CURVE)
        made = [drawn for drawn in (drawing.beside, drawing.steered) if drawn is not None]
        return [
            drawing,
            *_images(drawing, show),
            _verdict(drawing),
            evidence_rows(drawing.steered.judgement),
            gr.LinePlot(points, visible=len(points) > 0),
            _copies([drawn.file for drawn in made], Path(copies.name)),
            drawing.seed,
        ]

    images, asked = [left, right, slider], [button.click, prompt.submit]
    inputs = [prompt, seed, any_seed, beside, boxes, *controls.values()]
    outputs = [last, *images, verdict, evidence, curve, files, seed]
    gr.on(asked, draw, inputs, outputs, api_name="draw", concurrency_limit=1, show_progress_on=images)
    boxes.change(_images, [last, boxes], images, show_progress="hidden")


def _controls(session: Session) -> dict[str, Any]:
    """The settings of `dpt generate` that the page offers, by their names; the rest under "Advanced"."""
    stored, sampling, backbone = session.stored_correction, SampleConfig(), session.model.backbone
    judged = session.model.adapter is not None
    strength = gr.Number(
        stored.correct, label="Self-correction", info="strength; 0 = off", minimum=0, interactive=judged
    )
    best_of = gr.Slider(1, 8, 1, step=1, label="Best of so many seeds", interactive=judged)
    with gr.Accordion("Advanced", open=False):
        return {
            "correct": strength,
            "best_of": best_of,
            "steps": gr.Slider(1, 100, 30, step=1, label="Steps"),
            "guidance_scale": gr.Number(guidance_of(backbone, sampling), label="Guidance", minimum=0),
            "eta": gr.Slider(0, 1, eta_of(backbone, sampling), label="Fresh noise in a step of DDIM (eta)"),
            "scheduler": gr.Dropdown(["ddim", "euler", "dpm++", "unipc"], value=sampling.scheduler, label="Sampler"),
            "negative_prompt": gr.Textbox(label="Negative prompt"),
            "height": gr.Number(session.sides[0], label="Height in pixels", precision=0),
            "width": gr.Number(session.sides[1], label="Width in pixels", precision=0),
            "correction_rule": gr.Radio(["fixed", "relative"], value=stored.correction_rule, label="Correction: rule"),
            "correction_mode": gr.Radio(["state", "noise"], value=stored.correction_mode, label="Correction: mode"),
            "correction_start": gr.Slider(
                0, 1, stored.correction_start, label="Correction: from this part of the steps"
            ),
            "correction_end": gr.Slider(0, 1, stored.correction_end, label="Correction: to this part"),
        }


def _judge_tab(session: Session) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            image = _upload(label="Picture")
            prompt = gr.Textbox(label="Prompt", lines=2, placeholder=EXAMPLES[0])
            with gr.Accordion("Advanced", open=False):
                timestep = gr.Number(label="Timestep at which it is judged", value=250, precision=0, minimum=0)
                draws = gr.Slider(1, 16, value=4, step=1, label="Noises averaged")
            button = gr.Button("Judge", variant="primary")
        with gr.Column(scale=3, min_width=320):
            seen = gr.Image(label="What speaks for it", type="pil", format="png", interactive=False, buttons=SEEN)
            verdict = gr.Markdown()
            evidence = gr.Dataframe(headers=EVIDENCE, label="Evidence", interactive=False)

    def judge(picture: Any, text: str, step: float, count: float) -> tuple[Any, ...]:
        if picture is None:
            raise gr.Error("there is no picture; drop one on the page", print_exception=False)
        try:
            if step is None or count is None:
                raise InputError("timestep and noises are numbers; none of them may be empty")
            judgement = session.judge(picture, text, int(step), int(count))
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return (
            annotate(picture, judgement.marks()),
            f"matching score **{judgement.score:.3f}**",
            evidence_rows(judgement),
        )

    asked, inputs, outputs = [button.click, prompt.submit], [image, prompt, timestep, draws], [seen, verdict, evidence]
    gr.on(asked, judge, inputs, outputs, api_name="judge", concurrency_limit=1)


def _upload(**how: Any) -> gr.Image:
    """An image of the user's; one that cannot be read is told in a line.

    Not a subclass: gradio writes a stub file beside the source of each.
    """
    image = gr.Image(type="pil", **how)
    read = image.preprocess

    def preprocess(payload: Any) -> Any:
        try:
            return read(payload)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise gr.Error(f"the picture cannot be read: {error}; give a PNG or JPEG", print_exception=False) from error

    image.preprocess = preprocess
    return image


def _copies(files: Sequence[Path], folder: Path) -> list[str]:
    """Copies of `arm/images/name.png`, called `arm_name.png`, in place of those of the drawing before, which gradio has
    taken by then."""
    for old in folder.iterdir():
        old.unlink()
    return [shutil.copyfile(file, str(folder / f"{file.parts[-3]}_{file.name}")) for file in files]


def _images(drawing: Drawing | None, boxes: bool) -> list[Any]:
    """The two pictures, and both for the slider, which needs two."""
    if drawing is None:
        return [None, None, None]
    steered = drawing.steered.shown(boxes)
    beside = drawing.beside.shown(boxes) if drawing.beside else None
    return [beside, steered, (beside, steered) if beside else None]


def _verdict(drawing: Drawing) -> str:
    """One line: the seed, and what the model's own judge says of both."""
    parts = [f"seed **{drawing.seed}**"]
    for name, drawn in (("beside", drawing.beside), ("as asked", drawing.steered)):
        if drawn is not None and drawn.judgement is not None:
            parts.append(f"matching score {name} **{drawn.judgement.score:.3f}**")
    return " · ".join(parts)

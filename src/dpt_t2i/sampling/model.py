"""A text-to-image model with what was learned on it: what `dpt_t2i.load` gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

from dpt_t2i.adapter.io import load_adapter
from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.backbones.fingerprint import config_hash, lora_hash, part_hashes, weights_hash
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.loading import choose_artifacts, load_backbone
from dpt_t2i.backbones.lora import load_lora, lora_parameters, lora_sizes
from dpt_t2i.config import GenerateConfig, ModelConfig, SampleConfig, build_config, resolve_key
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.generate import Generated, Job, generate, jobs_of, parse_seeds
from dpt_t2i.sampling.images import open_image
from dpt_t2i.sampling.judgement import Judgement, judge_image
from dpt_t2i.sampling.loop import Step, eta_of, guidance_interval_of, guidance_of
from dpt_t2i.sampling.scoring import Judge, MatchScorer
from dpt_t2i.sampling.search import best_of

# Of `dpt generate`'s settings those that a model in memory has no use for.
ELSEWHERE = {
    "prompt": "give `prompts`",
    "prompts_file": "give `prompts`",
    "output_dir": "save the pictures that it returns",
}


class T2IModel:
    """Backbone, LoRA (inside the backbone) and adapter, ready to generate and to judge."""

    def __init__(self, backbone: Backbone, adapter: DiscriminativeAdapter | None = None) -> None:
        self.backbone = backbone
        self.adapter = adapter
        self._parts: dict[str, str] | None = None
        self._weights: str | None = None
        self.scorer = None if adapter is None else MatchScorer.of(backbone, adapter)

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline, with the LoRA in it."""
        return self.backbone.pipeline

    def generate(
        self, prompts: str | Sequence[str], seeds: int | str | Sequence[int] = 0, **settings: Any
    ) -> list[Image.Image]:
        """Every prompt with every seed, prompt by prompt.

        Args:
            seeds: one, several, or as the command line has them: `"0-3"`.
            settings: any setting of `dpt generate` by its flag's name: `steps=20, guidance_scale=5, correct=0.5,
                best_of=4, height=64`.

        Raises:
            InputError: an unknown setting (names the nearest), one that is `load`'s or the command's own, seeds that
                cannot be read, or a setting that needs an adapter where there is none.
        """
        for name in settings:
            if (path := resolve_key(GenerateConfig, name)).startswith("model.") or path in ELSEWHERE:
                raise InputError(f"`{name}` is no setting of a picture; {ELSEWHERE.get(path, 'give it to `load`')}")
        config = build_config(GenerateConfig, overrides=settings)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        numbers = parse_seeds(seeds) if isinstance(seeds, str) else [seeds] if isinstance(seeds, int) else list(seeds)
        jobs = jobs_of(texts, numbers, config.own_noise)
        return [made.image for made in self.run(jobs, config)]

    def run(
        self, jobs: Sequence[Job], config: GenerateConfig, on_step: Callable[[Step], None] | None = None
    ) -> Iterable[Generated]:
        """The images of `jobs` as `config` says; scored if there is an adapter, the best of several if it asks so.

        Args:
            on_step: is told of every sampling step, candidate by candidate where it searches.

        Raises:
            InputError: a search without an adapter, or `lora_draws` off without a LoRA and its adapter.
        """
        if not config.sample.lora_draws and (self.adapter is None or not lora_parameters(self.backbone)):
            raise InputError("`no_lora_draws` lets the LoRA judge and not draw; it needs a LoRA and its adapter")
        self._place_adapter()
        judge = self.judge(config.search.score_timestep, config.search.score_draws, config.seed)
        how, size = (config.sample, config.correction, self.scorer), (config.height, config.width)
        if config.search.best_of == 1:
            yield from generate(self.backbone, jobs, *how, judge, *size, on_step)
            return
        if judge is None:
            raise InputError("`best_of` > 1 ranks by the matching score and needs an adapter; give `adapter`")
        for result in best_of(self.backbone, jobs, config.search.best_of, judge, *how, *size, on_step):
            yield result.best

    def judge(self, timestep: int, draws: int, seed: int) -> Judge | None:
        """A judge of finished images, None without an adapter."""
        return None if self.scorer is None else Judge(self.scorer, timestep, draws, seed)

    def score(
        self, image: Image.Image | str | PathLike[str], prompt: str, timestep: int = 250, draws: int = 4, seed: int = 0
    ) -> Judgement:
        """Score an image of any size against a prompt, and say where each thing that it names was found.

        Args:
            image: a picture in RGB, or the path of a file.
            timestep: noise level at which the image is judged.
            draws: fixed noises over which scores and boxes are averaged.

        Raises:
            InputError: there is no adapter, the prompt is empty, or the file is no picture.
        """
        if self.scorer is None:
            raise InputError("scoring needs an adapter; give `adapter`, or a base that ships one")
        if not isinstance(prompt, str) or not isinstance(image, Image.Image | str | PathLike):
            raise InputError("`score` takes one picture, or the path of one, and one prompt")
        self._place_adapter()
        if not isinstance(image, Image.Image):
            image = open_image(Path(image))
        return judge_image(self.scorer, image, prompt, timestep, draws, seed)

    def _place_adapter(self) -> None:
        """To where the denoiser runs, which `pipeline.enable_model_cpu_offload()` may have changed since."""
        if self.adapter is not None:
            self.adapter.to(self.backbone.device)

    def settings(self, config: GenerateConfig) -> dict[str, Any]:
        """Plain JSON of all that decides an image beside prompt and seed: weights by hash, every setting by value."""
        height, width = self.backbone.image_size
        self._parts = self._parts or part_hashes(self.pipeline)  # read once: seconds for a big model
        self._weights = self._weights or weights_hash(self.backbone.denoiser)
        base = {
            "guidance_scale": guidance_of(self.backbone, config.sample),
            "eta": eta_of(self.backbone, config.sample),
        }
        if (interval := guidance_interval_of(self.backbone, config.sample)) != (0.0, 1.0):
            base |= {"guidance_start": interval[0], "guidance_end": interval[1]}
        return {
            "base": {
                "name": self.backbone.name,
                "weights": self._weights,
                "parts": self._parts,
                "config": config_hash(self.pipeline),
            },
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "lora": lora_hash(self.backbone.denoiser),
            "lora_sizes": [list(pair) for pair in lora_sizes(self.backbone)],
            "adapter": None if self.adapter is None else weights_hash(self.adapter),
            "height": config.height or height,
            "width": config.width or width,
            "sample": _deciding(config.sample) | base,
            "correction": config.correction.model_dump(mode="json"),
            "own_noise": config.own_noise,
            "search": {**config.search.model_dump(mode="json"), "seed": config.seed},
        }


def _deciding(settings: SampleConfig) -> dict[str, Any]:
    """Of sampling all that decides an image; `lora_draws` where it is not as ever, so that older images still count.

    The guided part of the schedule is told likewise, by `settings`, which knows the base's own.
    """
    told = settings.model_dump(mode="json", exclude={"batch_size", "guidance_start", "guidance_end"})
    return {name: value for name, value in told.items() if name != "lora_draws" or not value}


def load_model(
    base: str = "bundled",
    lora: str | None = None,
    adapter: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    revision: str | None = None,
) -> T2IModel:
    """See `dpt_t2i.load`; `dtype` is that of the frozen weights."""
    backbone = load_backbone(base, revision, device, dtype)
    lora_path, adapter_path = choose_artifacts(base, lora, adapter, revision)
    if lora_path is not None:
        load_lora(backbone, lora_path)
    return T2IModel(backbone, None if adapter_path is None else _load_adapter(backbone, adapter_path))


def open_model(config: ModelConfig) -> T2IModel:
    """`load_model` of what a command's `model` section says."""
    return load_model(
        config.pretrained_model_name_or_path, config.lora, config.adapter, config.device, config.dtype, config.revision
    )


def _load_adapter(backbone: Backbone, folder: Path) -> DiscriminativeAdapter:
    fingerprint = {**backbone.fingerprint(), "lora": lora_hash(backbone.denoiser)}
    # Frozen: a corrected step then keeps nothing for gradients that nobody asks for.
    return load_adapter(folder, backbone.device, fingerprint)[0].requires_grad_(False)

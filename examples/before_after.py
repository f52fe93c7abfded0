"""The README's picture: the same prompts and seeds, base and tuned, with self-correction, and the best of four seeds.

python examples/before_after.py docs/images/before_after.png
"""

import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw

import dpt_t2i
from dpt_t2i.evaluation.suites import open_suite
from dpt_t2i.scenes.checker import check

SIDE, TEXT = 128, 14
HEAD = 2 * TEXT  # two lines of a prompt
PROMPTS = 6

output = Path(sys.argv[1] if len(sys.argv) > 1 else "before_after.png")
prompts = [numbered.prompt for numbered in open_suite("dev", 24)][::4][:PROMPTS]
texts = [p.text for p in prompts]
sampling = {"seeds": 0, "own_noise": True, "steps": 30}  # guidance and eta: what the base publishes
base, tuned = dpt_t2i.load(lora="none"), dpt_t2i.load()
corrected = sampling | {"correct": 0.07, "correction_rule": "relative", "correction_end": 0.5}
rows = {
    "base": base.generate(texts, **sampling),
    "base + correction": base.generate(texts, **corrected),
    "DPT": tuned.generate(texts, **sampling),
    "DPT + correction": tuned.generate(texts, **corrected),
    "DPT, best of 4": tuned.generate(texts, **sampling, best_of=4),
}
sheet = Image.new("RGB", (SIDE * len(prompts), (SIDE + TEXT) * len(rows) + HEAD), "white")
draw = ImageDraw.Draw(sheet)
for column, prompt in enumerate(prompts):
    lines = textwrap.wrap(prompt.text, 22)[:2]
    draw.multiline_text((column * SIDE + 2, 1), "\n".join(lines), fill="black", spacing=1)
    for row, (name, images) in enumerate(rows.items()):
        top = HEAD + row * (SIDE + TEXT)
        sheet.paste(images[column].resize((SIDE, SIDE), Image.Resampling.NEAREST), (column * SIDE, top))
        mark = "right" if check(images[column], prompt.facts).correct else "wrong"
        draw.text((column * SIDE + 2, top + SIDE), f"{name}: {mark}", fill="green" if mark == "right" else "red")
output.parent.mkdir(parents=True, exist_ok=True)
sheet.save(output)

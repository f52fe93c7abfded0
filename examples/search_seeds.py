"""Draw several seeds of a prompt and keep the one that the model itself says fits best.

python examples/search_seeds.py "a red circle left of a blue square"
"""

import sys

import dpt_t2i

prompt = sys.argv[1] if len(sys.argv) > 1 else "a red circle left of a blue square"
model = dpt_t2i.load("bundled")
images = model.generate(prompt, seeds=range(4), steps=30)
scores = [model.score(image, prompt).score for image in images]
best = max(range(4), key=scores.__getitem__)
images[best].save("best.png")
sys.stdout.write(f"scores {[round(score, 3) for score in scores]}: best.png is seed {best}\n")

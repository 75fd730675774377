# %% [markdown]
# # Patch an image region and flip the answer
#
# Two pages differ in one value. Patching the clean residual stream into the corrupt run, only at the tokens that show
# the value, flips the answer.

# %%
from dataclasses import replace
from pathlib import Path

import numpy as np

from hooked_vlm import HookedVLM
from hooked_vlm.interventions import PatchActivation
from hooked_vlm.metrics import logit_difference
from hooked_vlm.patching import Pair, Region, attribute, patch
from hooked_vlm.toys import make_page, random_lines

pictures = Path("out/notebooks")
pictures.mkdir(parents=True, exist_ok=True)

model = HookedVLM.from_pretrained("toy-internvl2")
ASKED, OTHER = 1, "7h2k"


def two_pages(seed):
    """A page, and the same page with another value on the line of the question."""
    lines = random_lines(np.random.default_rng(seed), 3)
    changed = [replace(line, value=OTHER) if i == ASKED else line for i, line in enumerate(lines)]
    return [make_page(np.random.default_rng(seed), lines=own, font_size=14) for own in (lines, changed)]


page, other = two_pages(0)
clean = model.to_inputs(page.question(ASKED), images=page.image)
corrupt = clean.with_image(0, other.image)
for inputs in (clean, corrupt):
    print(model.generate(inputs, max_new_tokens=8, return_type="str"))

# %%
value = tuple(clean.tokens_in_box(0, page.lines[ASKED].value_box))
_, cache = model.run_with_cache(clean)
flip = PatchActivation("blocks.0.hook_resid_pre", cache["resid_pre", 0], value)
flipped = model.generate(corrupt, max_new_tokens=8, fwd_hooks=flip.hooks(model, corrupt), return_type="str")
print(f"the page says {OTHER}, the model now says {flipped}")

# %% [markdown]
# Where is the information about the answer? Effects by layer and place, on eight pairs of pages.

# %%
pairs, metrics = [], []
for seed in range(8):
    page, other = two_pages(seed)
    clean = model.to_inputs(page.question(ASKED), images=page.image)
    box = page.lines[ASKED].value_box
    pairs.append(Pair(clean, clean.with_image(0, other.image), {"value": Region(box)}))
    right, wrong = (model.to_tokens(text)[0, 0].item() for text in (page.lines[ASKED].value, OTHER))
    metrics.append(logit_difference(right, wrong))
result = patch(model, pairs, "resid_pre", metrics, where=("value", "image", "question", "final"))
result.heatmap("clean stream into the corrupt run, 8 pairs").savefig(pictures / "places.png")
print(result.estimate(layer=0, place="value"))
print(result.estimate(layer=3, place="final"))

# %% [markdown]
# Effects by token, on the picture of the last pair; and the heads that move it to the last token, patched exactly and
# estimated from one backward pass per pair (attribution patching).

# %%
each = patch(model, pairs[-1], "resid_pre", metrics[-1], where="each", layers=(0, 1, 2))
each.on_image(clean, page.image).savefig(pictures / "tokens.png")
heads = patch(model, pairs, "z", metrics, where="final")
heads.heatmap("head outputs at the last token").savefig(pictures / "heads.png")
print(attribute(model, pairs, "z", metrics, where="final").agreement)
print(heads.summary().sort_values("mean").tail(2)[["layer", "head", "mean", "low", "high", "p"]])

# %% [markdown]
# # Patch an image region and flip the answer
#
# Two pages differ in one value. Patching the clean residual stream into the corrupt run, only at the tokens that show
# the value, flips the answer. The model is bundled: nothing is downloaded.

# %%
from dataclasses import replace

import numpy as np

from hooked_vlm import HookedVLM
from hooked_vlm.interventions import PatchActivation
from hooked_vlm.metrics import logit_difference
from hooked_vlm.patching import Pair, Region, attribute, patch
from hooked_vlm.toys import make_page, random_lines

model = HookedVLM.from_pretrained("toy-internvl2")
ASKED, OTHER = 1, "7h2k"


def two_pages(seed):
    """A page, and the same page with another value on the line of the question."""
    lines = random_lines(np.random.default_rng(seed), 3)
    changed = [*lines]
    changed[ASKED] = replace(lines[ASKED], value=OTHER)
    rngs = (np.random.default_rng(seed) for _ in range(2))
    sides = zip(rngs, (lines, changed), strict=True)
    return [make_page(rng, lines=own, font_size=14) for rng, own in sides]


page, other = two_pages(0)
clean = model.to_inputs(page.question(ASKED), images=page.image)
corrupt = clean.with_image(0, other.image)
for inputs in (clean, corrupt):
    print(model.generate(inputs, max_new_tokens=8, return_type="str"))

# %%
value = tuple(clean.tokens_in_box(0, page.lines[ASKED].value_box))
_, cache = model.run_with_cache(clean)
flip = PatchActivation("blocks.0.hook_resid_pre", cache["resid_pre", 0], value)
hooks = flip.hooks(model, corrupt)
flipped = model.generate(corrupt, max_new_tokens=8, fwd_hooks=hooks, return_type="str")
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
    texts = (page.lines[ASKED].value, OTHER)
    right, wrong = (model.to_tokens(text)[0, 0].item() for text in texts)
    metrics.append(logit_difference(right, wrong))
places = ("value", "image", "question", "final")
result = patch(model, pairs, "resid_pre", metrics, where=places)
print(result.estimate(layer=0, place="value"))
print(result.estimate(layer=3, place="final"))
result.show("clean stream into the corrupt run, 8 pairs")

# %% [markdown]
# Effects by token, on the picture of the last pair.

# %%
each = patch(model, pairs[-1], "resid_pre", metrics[-1], where="each", layers=(0, 1, 2))
each.on_image(clean, page.image)

# %% [markdown]
# The heads that move it to the last token, patched exactly, and estimated from one backward pass per pair (attribution
# patching).

# %%
heads = patch(model, pairs, "z", metrics, where="final")
print(attribute(model, pairs, "z", metrics, where="final").agreement)
columns = ["layer", "head", "mean", "low", "high", "p"]
print(heads.summary().sort_values("mean").tail(2)[columns])
heads.show("head outputs at the last token")

# %% [markdown]
# # The same on Qwen2-VL-2B
#
# Needs the published checkpoint and preferably a GPU: this notebook was not run, and has no pictures. `sign.jpg` is a
# photograph that contains a word, `box` the word's box in pixels.

# %%
import torch

from hooked_vlm import HookedVLM
from hooked_vlm.analysis import heatmap
from hooked_vlm.lens import head_lens
from hooked_vlm.metrics import logit_difference
from hooked_vlm.patching import Pair, Region, attribute, masked, patch, sweep_knockout

model = HookedVLM.from_pretrained("Qwen/Qwen2-VL-2B-Instruct", dtype=torch.bfloat16)
photo, box, word, other = "sign.jpg", (412, 180, 655, 262), "STOP", "the"

question = "What does the sign say? Answer with the word only."
clean = model.to_inputs(question, images=photo, max_pixels=512 * 28 * 28)
corrupt = clean.with_image(0, masked(photo, box))
pair = Pair(clean, corrupt, {"sign": Region(box)})
right, wrong = (model.to_tokens(text)[0, 0].item() for text in (word, other))
metric = logit_difference(right, wrong)
print(model.generate(clean, max_new_tokens=8, return_type="str"))

# %% [markdown]
# Patch the residual stream by layer and place.

# %%
places = ("sign", "image", "question", "assistant_header", "final")
patch(model, pair, "resid_pre", metric, where=places, progress=True).show()

# %% [markdown]
# Patch the vision tower by layer and region.

# %%
patch(model, pair, "resid_post", metric, where=("sign", "image"), tower="vision").show()

# %% [markdown]
# Estimate all heads from one backward pass, with 64 exact checks; then block attention in windows of five layers; then
# read what each head writes.

# %%
heads = attribute(model, pair, "z", metric, where="final", check=64)
print(heads.agreement)
heads.show()

# %%
edges = [("final", "sign"), ("question", "sign"), ("final", "question")]
cut = sweep_knockout(model, clean, metric, edges=edges, window=5, places=pair.places)
cut.show()

# %%
writes = head_lens(model, clean, right)[0]
layers, numbers = range(model.cfg.n_layers), range(model.cfg.n_heads)
heatmap(writes, layers, numbers, ("layer", "head"), "P(first token of the word)")

# %% [markdown]
# # Cache a run and look at attention
#
# One forward pass caches every activation of both towers. Where does each head attend just before the answer? The model
# is bundled: nothing is downloaded.

# %%
import numpy as np

from hooked_vlm import HookedVLM, viewer
from hooked_vlm.analysis import heatmap
from hooked_vlm.lens import head_lens, logit_lens
from hooked_vlm.toys import make_page

model = HookedVLM.from_pretrained("toy-internvl2")
page = make_page(np.random.default_rng(9), n_lines=3)
inputs = model.to_inputs(page.question(1), images=page.image)
print(inputs)
print(page.question(1), model.generate(inputs, max_new_tokens=8, return_type="str"))
page.image

# %% [markdown]
# The cache has TransformerLens' names. `cache.vision` has the vision tower's; patterns are computed on demand.

# %%
logits, cache = model.run_with_cache(inputs)
print(cache["resid_post", -1].shape, cache["pattern", 2].shape)
print(cache.vision["resid_post", 1].shape)

# %% [markdown]
# The last token's attention in layer 2, on the image. Two heads attend to the value.

# %%
cache.show(2, picture=page.image)

# %% [markdown]
# Each head's attention to the value.

# %%
value = inputs.tokens_in_box(0, page.lines[1].value_box)
layers, heads = range(model.cfg.n_layers), range(model.cfg.n_heads)
mass = np.stack([cache["pattern", layer][0, :, -1, value].sum(-1) for layer in layers])
best = np.argsort(mass, axis=None)[-2:]
reading = sorted(zip(*np.unravel_index(best, mass.shape), strict=True))
names = [f"{layer}.{head}" for layer, head in reading]
print("heads that look at the value most:", names)
heatmap(mass, layers, heads, ("layer", "head"), "attention to the value")

# %% [markdown]
# Each head's output through the head lens: the probability of the answer's first character from that head's output
# alone, through the final norm and the unembedding.

# %%
answer = model.to_tokens(page.lines[1].value)[0, 0].item()
writes = head_lens(model, inputs, answer)[0]
heatmap(writes, layers, heads, ("layer", "head"), "P(answer)")

# %% [markdown]
# The logit lens: from which layer on does the last token predict the answer?

# %%
lens = logit_lens(model, inputs, "final", targets=[answer])
print(lens.to_dataframe(model).query("rank == 0")[["layer", "text", "prob"]])

# %% [markdown]
# The same as a page: choose a token, a layer and a head, see the attention to the picture and to the text. A last line
# `view` would show it below the cell; `view.save("attention.html")` writes it.

# %%
view = viewer.attention(model, inputs, images=page.image)
dict(view.facts)

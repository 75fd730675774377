# %% [markdown]
# # Cache a run and look at attention
#
# One forward pass caches every activation of both towers. Where does each head attend just before the answer?
# Run this file, or open it in an editor that supports cells (`# %%`).

# %%
from pathlib import Path

import numpy as np

from hooked_vlm import HookedVLM
from hooked_vlm.analysis import heatmap, overlay
from hooked_vlm.lens import head_lens, logit_lens
from hooked_vlm.toys import make_page

pictures = Path("out/notebooks")
pictures.mkdir(parents=True, exist_ok=True)

model = HookedVLM.from_pretrained("toy-internvl2")
page = make_page(np.random.default_rng(9), n_lines=3)
inputs = model.to_inputs(page.question(1), images=page.image)
print(inputs, model.generate(inputs, max_new_tokens=8, return_type="str"))

# %% [markdown]
# The cache has TransformerLens' names. `cache.vision` has the vision tower's; patterns are computed on demand.

# %%
logits, cache = model.run_with_cache(inputs)
print(cache["resid_post", -1].shape, cache.vision["resid_post", 1].shape, cache["pattern", 2].shape)

# %% [markdown]
# The last token's attention in layer 2, on the image. Two heads attend to the value.

# %%
attention = cache.on_image(2)
figure = overlay(page.image, attention.numpy(), [f"head 2.{h}" for h in range(4)], "attention")
figure.savefig(pictures / "attention.png")

# %% [markdown]
# Each head's attention on the value, and its output through the head lens: the probability of the answer's first
# character from that head's output alone, through the final norm and the unembedding.

# %%
value = inputs.tokens_in_box(0, page.lines[1].value_box)
layers = range(model.cfg.n_layers)
mass = np.stack([cache["pattern", layer][0, :, -1, value].sum(-1).numpy() for layer in layers])
answer = model.to_tokens(page.lines[1].value)[0, 0].item()
writes = head_lens(model, inputs, answer)[0]
heads = range(model.cfg.n_heads)
heatmap(mass, layers, heads, ("layer", "head"), "attention to the value").savefig(pictures / "mass.png")
heatmap(writes, layers, heads, ("layer", "head"), "P(answer)").savefig(pictures / "writes.png")
reading = sorted(zip(*np.unravel_index(np.argsort(mass, axis=None)[-2:], mass.shape), strict=True))
print("heads that look at the value most:", [f"{layer}.{head}" for layer, head in reading])

# %% [markdown]
# The logit lens: from which layer on does the last token predict the answer?

# %%
lens = logit_lens(model, inputs, "final", targets=[answer])
print(lens.to_dataframe(model).query("rank == 0")[["layer", "text", "prob"]])

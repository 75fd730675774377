# %% [markdown]
# # Ablate and steer during generation
#
# An intervention applies to the prompt and to every step of generation. With two heads zero-ablated the model can no
# longer read; with a steering vector it names another object.

# %%
from pathlib import Path

import numpy as np

from hooked_vlm import HookedVLM, sweep
from hooked_vlm.analysis import heatmap
from hooked_vlm.interventions import AddVector, ZeroHeads
from hooked_vlm.metrics import log_prob
from hooked_vlm.toys import NAMING_PROMPT, make_page, naming_sample

pictures = Path("out/notebooks")
pictures.mkdir(parents=True, exist_ok=True)

model = HookedVLM.from_pretrained("toy-qwen2-vl")
page = make_page(np.random.default_rng(7), n_lines=4)
inputs = model.to_inputs(page.question(2), images=page.image)

# %% [markdown]
# Zero-ablate each head in turn, in one sweep.

# %%
heads = [(layer, head) for layer in range(4) for head in range(4)]
answer = model.to_tokens(page.lines[2].value)[0, 0].item()
effects = sweep(model, inputs, [ZeroHeads((head,)) for head in heads], log_prob(answer)).effects.view(4, 4)
heatmap(effects.numpy(), range(4), range(4), ("layer", "head"), "log-prob of the answer").savefig(
    pictures / "zeroed.png"
)

# %%
blind = ZeroHeads(((2, 0), (2, 1)))
before = model.generate(inputs, max_new_tokens=8, return_type="str")
without = model.generate(inputs, max_new_tokens=8, fwd_hooks=blind.hooks(model, inputs), return_type="str")
print(f"the page says {page.lines[2].value}; read: {before}; without heads 2.0 and 2.1: {without}")

# %% [markdown]
# The model no longer reads, but still names objects.

# %%
drawing = naming_sample(np.random.default_rng(5), name="square").image
square = model.to_inputs(NAMING_PROMPT, images=drawing)
named = model.generate(square, max_new_tokens=8, fwd_hooks=blind.hooks(model, square), return_type="str")
print(named)

# %% [markdown]
# A steering vector from squares to circles: the difference of mean residual streams at the last token, after layer 2.


# %%
def mean_stream(name):
    """Mean residual stream over eight drawings of an object."""
    rng = np.random.default_rng(0)
    drawings = model.to_inputs([NAMING_PROMPT] * 8, images=[[naming_sample(rng, name=name).image] for _ in range(8)])
    _, cache = model.run_with_cache(drawings, names_filter="blocks.2.hook_resid_post", pos_slice=-1)
    return cache["resid_post", 2][:, 0].mean(0)


direction = mean_stream("circle") - mean_stream("square")
steer = AddVector("blocks.2.hook_resid_post", direction, scale=2.0, positions="final")
steered = model.generate(square, max_new_tokens=8, fwd_hooks=steer.hooks(model, square), return_type="str")
print(f"a drawn square, steered: {steered}")

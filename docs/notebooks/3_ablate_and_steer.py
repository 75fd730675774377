# %% [markdown]
# # Ablate and steer during generation
#
# An intervention applies to the prompt and to every step of generation. With two heads zero-ablated the model can no
# longer read; with a steering vector it names another object. The model is bundled: nothing is downloaded.

# %%
import numpy as np

from hooked_vlm import HookedVLM, sweep
from hooked_vlm.interventions import AddVector, ZeroHeads
from hooked_vlm.metrics import log_prob
from hooked_vlm.toys import NAMING_PROMPT, make_page, naming_sample

model = HookedVLM.from_pretrained("toy-qwen2-vl")
page = make_page(np.random.default_rng(7), n_lines=4)
inputs = model.to_inputs(page.question(2), images=page.image)


def answer_of(inputs, hooks=()):
    """The model's answer, with hooks at every step."""
    return model.generate(inputs, max_new_tokens=8, fwd_hooks=hooks, return_type="str")


# %% [markdown]
# Zero-ablate each head in turn, in one sweep.

# %%
heads = [(layer, head) for layer in range(4) for head in range(4)]
answer = model.to_tokens(page.lines[2].value)[0, 0].item()
result = sweep(model, inputs, [ZeroHeads((head,)) for head in heads], log_prob(answer))
result.show("log-probability of the answer, without a head")

# %%
blind = ZeroHeads(((2, 0), (2, 1)))
without = answer_of(inputs, blind.hooks(model, inputs))
print(f"the page says {page.lines[2].value}; read: {answer_of(inputs)}")
print(f"without heads 2.0 and 2.1: {without}")

# %% [markdown]
# The model no longer reads, but still names objects.

# %%
drawing = naming_sample(np.random.default_rng(5), name="square").image
square = model.to_inputs(NAMING_PROMPT, images=drawing)
print(answer_of(square, blind.hooks(model, square)))
drawing

# %% [markdown]
# A steering vector from squares to circles: the difference of mean residual streams at the last token, after layer 2.

# %%
STREAM = "blocks.2.hook_resid_post"


def mean_stream(name):
    """Mean residual stream over eight drawings of an object."""
    rng = np.random.default_rng(0)
    images = [[naming_sample(rng, name=name).image] for _ in range(8)]
    drawings = model.to_inputs([NAMING_PROMPT] * 8, images=images)
    _, cache = model.run_with_cache(drawings, names_filter=STREAM, pos_slice=-1)
    return cache["resid_post", 2][:, 0].mean(0)


direction = mean_stream("circle") - mean_stream("square")
steer = AddVector(STREAM, direction, scale=2.0, positions="final")
print(f"a drawn square, steered: {answer_of(square, steer.hooks(model, square))}")

"""What a page is about: the model, the prompt and the answer, in words."""

from typing import TYPE_CHECKING

from hooked_vlm.inputs.vlm_inputs import VLMInputs
from hooked_vlm.viewer.view import Facts

if TYPE_CHECKING:
    from hooked_vlm.model.vlm import HookedVLM


def facts_of(inputs: VLMInputs, model: "HookedVLM | None" = None) -> Facts:
    """Model, prompt and answer of one row, as far as there are any.

    The prompt is the question: the page shows the tokens of the template beside the picture. Without a tokenizer texts
    are the numbers of their tokens.
    """
    groups, tokens = inputs.positions, inputs.tokens[0].cpu()
    prompt = inputs.spec.decode(tokens[groups.question[0]].tolist()).strip()
    stops = model.cfg.eos_token_ids if model is not None else ()
    ids = [token for token in tokens[groups.generated[0]].tolist() if token not in stops]
    name = "" if model is None else model.cfg.model_name
    facts = (("model", name), ("prompt", prompt), ("answer", inputs.spec.decode(ids)))
    return tuple((what, text) for what, text in facts if text)

"""The study on checkpoint folders of later families, with COCO's annotations: the paper's setting."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from probes import ablation, value_under
from whole_folders import Named, save_named

from hooked_vlm import HookedVLM, cli
from hooked_vlm.experiments.common.claims import VERDICTS
from hooked_vlm.experiments.head_attribution import Attribute
from hooked_vlm.experiments.head_attribution.ablation import Probe, metric_of
from hooked_vlm.experiments.head_attribution.appearance import looks_of
from hooked_vlm.experiments.head_attribution.claims import CLAIMS
from hooked_vlm.experiments.head_attribution.image_flow import coverage
from hooked_vlm.experiments.head_attribution.items import Item
from hooked_vlm.experiments.head_attribution.tasks import Case, items_of
from hooked_vlm.experiments.head_attribution.text_flow import text_groups

FAMILIES = ("llava", "llava-next", "llava-onevision", "qwen3-vl", "smolvlm", "gemma3", "paligemma2")
ROLES = {
    "llava": "ASSISTANT:",
    "llava-next": "[/INST]",
    "llava-onevision": "<|im_end|>\n<|im_start|>assistant\n",
    "qwen3-vl": "<|im_end|>\n<|im_start|>assistant\n",
    "smolvlm": "<end_of_utterance>\nAssistant:",
    "gemma3": "<end_of_turn>\n<start_of_turn>model\n",
    "paligemma2": "\n",
}
QUESTION = "What is the main object in the image? Answer with one word."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders by family, each made once."""
    made: dict[str, Named] = {}

    def folder_of(family: str) -> Named:
        if family not in made:
            made[family] = save_named(family, tmp_path_factory.mktemp(family.replace("-", "_")))
        return made[family]

    return folder_of


def probe_of(named: Named) -> Probe:
    """The first picture of a folder."""
    model = HookedVLM.from_pretrained(named.model, device="cpu")
    item = items_of(Attribute(annotations=named.annotations, images=named.images))[0]
    inputs = model.to_inputs(item.question, images=item.image)
    inputs = inputs.with_image_features(model.encode_images(inputs).detach())
    token = int(model(inputs, logits_at="last")[0, 0].argmax())
    case = Case(item, inputs, token, None)
    return Probe(model, case, metric_of(case, "logit"))


@pytest.mark.parametrize("family", ["llava", *(pytest.param(own, marks=pytest.mark.full) for own in FAMILIES[1:])])
@pytest.mark.repeats_shapes
def test_the_command_goes_from_a_folder_and_coco_to_the_papers_claims(
    family: str, folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model names all pictures by what it sees."""
    named = folders(family)
    asked = ["--model", named.model, "--annotations", named.annotations, "--images", named.images, "--out", tmp_path]
    small = ["--samples", 2, "--masks", 24, "--token-masks", 40, "--bootstrap", 5, "--random-rankings", 1]
    asked += [*small, "--device", "cpu", "--quiet"]
    monkeypatch.setattr(sys, "argv", ["hooked-vlm", "head-attribution", "all", *map(str, asked)])
    cli.main()
    shown = capsys.readouterr().out
    tables = {path.stem: pd.read_parquet(path) for path in (tmp_path / "tables").glob("*.parquet")}
    found: Any = tables["summary"].set_index("measure")["value"]
    assert found["answered correctly"] == 1.0 and len(tables["answers"]) == 2
    assert found["logit, all heads"] == pytest.approx(10, abs=0.1) and found["logit, no head"] < 2
    groups = set(tables["receivers"].query("change == 'ablated'")["text"])
    headed = family != "paligemma2"  # whose header is the final token
    assert {"question", "final"} <= groups and ("assistant header" in groups) == headed
    edges = {"image → final", "question → final"}
    edges |= {"image → assistant header", "question → assistant header"} if headed else set()
    assert edges <= set(tables["edges"]["edge"])
    claims: Any = tables["claims"].set_index("claim")
    assert list(claims.index) == [claim.name for claim in CLAIMS] and set(claims["verdict"]) <= set(VERDICTS)
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ("a blocked edge cuts the direct way alone" in report) == (family == "paligemma2")
    for claim in CLAIMS:
        row = next(line for line in shown.splitlines() if claim.name in line and "  " in line)
        assert claims["verdict"][claim.name] in row and claim.says in report
    assert json.loads((tmp_path / "run.json").read_text())["config"]["model"] == str(named.model)


@pytest.mark.parametrize(
    "family", ["llava", "qwen3-vl", *(pytest.param(n, marks=pytest.mark.full) for n in (*FAMILIES[1:3], *FAMILIES[4:]))]
)
def test_role_tokens_are_found_by_their_text(family: str, folders: Any) -> None:
    """The last of them is the final token; all of the text behind the image is shared out."""
    probe = probe_of(folders(family))
    groups, tokens, model = text_groups(probe), probe.case.inputs.tokens[0], probe.model
    assert sorted(p for members in groups.values() for p in members) == list(probe.text)
    role = [*groups.get("assistant header", ()), *groups["final"]]
    assert role == list(range(role[0], probe.case.inputs.stop[0]))
    assert str(model.to_string(tokens[role])).strip(" ") == ROLES[family]
    assert str(model.to_string(tokens[list(groups["question"])])).strip() == QUESTION
    if family == "llava":
        assert model.to_str_tokens(tokens[role]) == [" A", "SS", "IST", "ANT", ":"]


@pytest.mark.parametrize("family", ["llava-next", *(pytest.param(own, marks=pytest.mark.full) for own in FAMILIES[2:])])
def test_heads_that_do_not_see_the_image_see_nothing_of_it_anywhere(family: str, folders: Any) -> None:
    """With all heads' image keys and values masked, what enters the stream at image tokens changes nothing: neither a
    line break, nor the first tile, nor DeepStack's features. Their means, by contrast, do."""
    probe = probe_of(folders(family))
    features = probe.case.inputs.image_features
    assert features is not None
    other = probe.case.inputs.with_image_features(torch.randn_like(features))
    changed = Probe(probe.model, Case(probe.case.item, other, probe.case.target, None), probe.metric)
    hidden = [Probe(p.model, p.case, p.metric, "knockout").ends[1] for p in (probe, changed)]
    assert hidden[0] == pytest.approx(hidden[1], abs=1e-4)
    assert abs(probe.ends[1] - changed.ends[1]) > 0.05
    assert probe.ends[1] == pytest.approx(value_under(probe, ablation(probe, probe.heads)), abs=1e-4)
    assert probe.ends[0] == pytest.approx(value_under(probe, []), abs=1e-4)


# ---------------------------------------------------------------- places


@pytest.mark.parametrize("size", [(60, 33), (20, 90), (29, 30)], ids=str)
@pytest.mark.parametrize("family", FAMILIES[:3])
def test_coverage_is_counted_in_pixels_of_the_picture(family: str, size: tuple[int, int], folders: Any) -> None:
    """An object that is the whole picture covers every token on it, and no line break; a margin has no pixels."""
    probe = probe_of(folders(family))
    item = Item(Image.new("RGB", size), "dog", QUESTION, np.ones(size[::-1], dtype=bool))
    inputs = probe.model.to_inputs(item.question, images=item.image)
    found = coverage(replace(probe, case=Case(item, inputs, probe.case.target, None)))
    layout = inputs.image_grid(0)
    assert found is not None and len(found) == layout.n_tokens
    for token, share in enumerate(found):
        x0, y0, x1, y1 = layout.box_of(token) or (0, 0, 0, 0)
        assert share == float(min(x1, size[0]) > max(x0, 0) and min(y1, size[1]) > max(y0, 0))
    assert found.any() and (found.all() == (family == "llava"))


@pytest.mark.parametrize("family", ["qwen3-vl", *(pytest.param(own, marks=pytest.mark.full) for own in FAMILIES[:3])])
def test_looks_are_of_all_that_enters_the_stream(family: str, folders: Any) -> None:
    """Pictures that differ in DeepStack's features alone look different."""
    named = folders(family)
    probe = probe_of(named)
    features = probe.case.inputs.image_features
    assert features is not None and (features.ndim == 3) == (family == "qwen3-vl")
    generator = torch.Generator().manual_seed(0)
    cases = []
    for _ in range(3):
        noise = torch.randn(features.shape, generator=generator)
        if features.ndim == 3:
            noise[:, 0] = 0  # of the embeddings
        inputs = probe.case.inputs.with_image_features(features + noise)
        cases.append(Case(probe.case.item, inputs, probe.case.target, None))
    looks = looks_of(cases, probe.model, 0)
    assert {"image tokens", "mean features"} <= set(looks)
    flat = np.stack([case.inputs.image_features.flatten(1).numpy().mean(0) for case in cases]).astype(float)
    flat -= flat.mean(0)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(looks["mean features"].first, unit @ unit.T, atol=1e-6)
    assert looks["image tokens"].first.shape == (3, 3) and looks["image tokens"].first[0, 1] < 0.9

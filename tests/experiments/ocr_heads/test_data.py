"""Pages, texts, tasks and the folders they are kept in."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hooked_vlm import HookedVLM
from hooked_vlm.errors import StudyError
from hooked_vlm.experiments.ocr_heads.answers import anls, edit_distance, exact_match, f1, judge
from hooked_vlm.experiments.ocr_heads.data import haystack as haystack_module
from hooked_vlm.experiments.ocr_heads.data import tasks as tasks_module
from hooked_vlm.experiments.ocr_heads.data.haystack import HUB, SYNTHETIC, niah_items
from hooked_vlm.experiments.ocr_heads.data.made_up import documents, single_facts, two_facts
from hooked_vlm.experiments.ocr_heads.data.pages import evidence_of, render, wrap
from hooked_vlm.experiments.ocr_heads.data.scored import niah_pages, passkey_pages, single_characters, toy_pages
from hooked_vlm.experiments.ocr_heads.data.store import load_or_build
from hooked_vlm.experiments.ocr_heads.data.tasks import all_kinds, load_tasks
from hooked_vlm.experiments.ocr_heads.examples import Example, batches, prompt_length, to_inputs

# ---------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    ("answer", "reply", "em", "f_1", "similar"),
    [
        ("The Blue Gate", "blue gate.", 1, 1, 1 - 5 / 13),
        ("blue oak", "a blue stone", 0, 0.5, 0.5),
        ("12.5", "125", 1, 1, 0.75),  # punctuation does not count for SQuAD
        ("yes", "", 0, 0, 0),
        ("red", "green", 0, 0, 0),
        ("abc", "abd", 0, 0, 2 / 3),
    ],
)
def test_metrics_by_hand(answer: str, reply: str, em: float, f_1: float, similar: float) -> None:
    assert exact_match(answer, reply) == em
    assert f1(answer, reply) == pytest.approx(f_1)
    assert anls(answer, reply) == pytest.approx(similar if similar >= 0.5 else 0)


def test_edit_distance_by_hand() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3


def test_the_best_of_several_answers_counts() -> None:
    found = judge(Example("", ("one", "two")), "two")
    assert found == {"exact": 1, "em": 1, "f1": 1, "anls": 1, "contains": 1}
    assert judge(Example("", ("one", "two")), "It is two.")["contains"] == 1


# ---------------------------------------------------------------- pages


def test_wrapped_lines_stand_where_they_say() -> None:
    text = "The first line is long enough to be broken into two of them, surely.\n\nAnd\ta tab."
    lines = wrap(text)
    assert all(len(line.text) <= 50 for line in lines)
    for line in lines:
        assert text[line.start : line.start + len(line.text)].replace("\t", " ") == line.text


def test_a_box_holds_the_ink_of_its_character_and_of_no_other() -> None:
    text = "word " * 60 + "The pass key is 48159. Remember it. " + "word " * 60
    lines = wrap(text)
    start = text.index("48159")
    evidence = evidence_of(lines, start, [(i, i + 1) for i in range(5)])
    assert [e.start for e in evidence] == list(range(5))
    for part in evidence:
        at = start + part.start
        other_text = text[:at] + ("1" if text[at] != "1" else "8") + text[at + 1 :]
        page, other = (
            np.asarray(p[part.image].convert("L"), dtype=int) for p in (render(lines), render(wrap(other_text)))
        )
        width = min(page.shape[1], other.shape[1])
        changed = np.argwhere(np.abs(page[:, :width] - other[:, :width]) > 100)
        x0, y0, x1, y1 = part.box
        assert len(changed)
        # digits of this font are equally wide, so what follows does not move
        assert (changed[:, 1] >= x0 - 1).all() and (changed[:, 1] < x1 + 1).all()
        assert (changed[:, 0] >= y0 - 1).all() and (changed[:, 0] < y1 + 3).all()


def test_paper_pages_have_the_papers_shape() -> None:
    examples, source = passkey_pages(0, 2, (1024,))
    assert source == SYNTHETIC
    for example in examples:
        assert len(example.images) > 1 and len(example.evidence) == 5 and not example.context
        assert all(isinstance(page, Image.Image) and page.mode == "RGB" for page in example.images)
    niah, source = niah_pages(0, 2, (1024, 2048))
    assert source == SYNTHETIC
    assert len(niah[1].images) > len(niah[0].images)
    assert all(e.answer[part.start : part.stop].isalnum() for e in niah for part in e.evidence)


@pytest.mark.parametrize("make", [passkey_pages, niah_pages])
def test_the_text_version_says_the_same(make: Any) -> None:
    (page,), _ = make(0, 1, (512,))
    (text,), _ = make(0, 1, (512,), True)
    assert text.answer == page.answer and not text.images
    assert text.context[text.answer_at :].startswith(text.answer)
    assert text.question.endswith(page.question)


def test_toy_texts_hold_their_answer_where_they_say() -> None:
    for page, text in zip(toy_pages(1, 6), toy_pages(1, 6, as_text=True), strict=True):
        assert (page.question, page.answer) == (text.question, text.answer)
        assert text.answer_at is not None
        key = text.question.removeprefix("What is the value of ").removesuffix("?")
        assert text.context[: text.answer_at].endswith(f"{key} = ")
        assert text.context[text.answer_at :].startswith(text.answer)


def test_single_characters_stand_in_the_keys_place() -> None:
    examples, _ = single_characters(0, 1, "7q", 256)
    assert [e.answer for e in examples] == ["7", "q"]
    boxes = [e.evidence[0].box for e in examples]
    assert boxes[0][:2] == boxes[1][:2] and len(examples[0].evidence) == 1


def test_data_is_a_function_of_the_seed() -> None:
    def same(a: list[Example], b: list[Example]) -> bool:
        return all(
            x.prompt == y.prompt
            and x.answers == y.answers
            and all(np.array_equal(np.asarray(p), np.asarray(q)) for p, q in zip(x.images, y.images, strict=True))
            for x, y in zip(a, b, strict=True)
        )

    assert same(toy_pages(1, 3), toy_pages(1, 3)) and not same(toy_pages(1, 3), toy_pages(2, 3))
    assert same(passkey_pages(1, 2, (1024,))[0], passkey_pages(1, 2, (1024,))[0])
    assert same(two_facts(1, 3, 5), two_facts(1, 3, 5)) and not same(two_facts(1, 3, 5), two_facts(2, 3, 5))


def test_prompt_length_bounds_the_prompt(toy: HookedVLM) -> None:
    for example in [*toy_pages(0, 3), *toy_pages(0, 3, as_text=True)]:
        n = to_inputs(toy, [example], None).shape[1]
        assert n <= prompt_length(toy, example, None) <= n + 3


def test_batches_hold_every_index_once_and_keep_to_the_budget() -> None:
    lengths = [10, 300, 20, 300, 5, 1000]
    groups = batches(lengths, 600)
    assert sorted(i for g in groups for i in g) == list(range(6))
    assert all(len(g) == 1 or max(lengths[i] for i in g) * len(g) <= 600 for g in groups)


# ---------------------------------------------------------------- the folder


def test_a_data_set_is_built_once_and_read_as_it_was(tmp_path: Path, toy: HookedVLM) -> None:
    built = []

    def build() -> tuple[list[Example], str]:
        built.append(1)
        return toy_pages(2, 3), "synthetic"

    first = load_or_build(tmp_path, "toy", {"seed": 2, "n": 3}, build)
    again = load_or_build(tmp_path, "toy", {"n": 3, "seed": 2}, build)
    assert len(built) == 1 and first.digest == again.digest and again.source == "synthetic"
    assert load_or_build(tmp_path, "toy", {"seed": 3, "n": 3}, lambda: (toy_pages(3, 3), "")).digest != first.digest
    for made, read in zip(toy_pages(2, 3), again.examples, strict=True):
        assert (made.prompt, made.answers) == (read.prompt, read.answers)
        assert [e.box for e in made.evidence] == [e.box for e in read.evidence]
        a, b = (to_inputs(toy, [example], None) for example in (made, read))
        assert a.pixel_values is not None and b.pixel_values is not None
        assert a.tokens.equal(b.tokens) and a.pixel_values.equal(b.pixel_values)
    manifest = json.loads(next(tmp_path.glob("toy-*/manifest.json")).read_text())
    assert manifest["n"] == 3 and manifest["settings"]["seed"] in (2, 3) and len(manifest["sha256"]) == 4
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["changed", "missing", "manifest"])
def test_a_damaged_data_set_says_what_to_do(damage: str, tmp_path: Path) -> None:
    load_or_build(tmp_path, "toy", {}, lambda: (toy_pages(2, 2), ""))
    folder = next(tmp_path.glob("toy-*"))
    if damage == "changed":
        (folder / "examples.jsonl").write_text((folder / "examples.jsonl").read_text().replace("What", "That"))
    elif damage == "missing":
        (folder / "images" / "00001-0.png").unlink()
    else:
        (folder / "manifest.json").write_text("{")
    with pytest.raises(StudyError, match="delete"):
        load_or_build(tmp_path, "toy", {}, lambda: (toy_pages(2, 2), ""))


def test_a_data_set_that_another_process_built_meanwhile_stays(tmp_path: Path) -> None:
    def build_late() -> tuple[list[Example], str]:
        load_or_build(tmp_path, "toy", {}, lambda: (toy_pages(2, 2), "another process"))
        return toy_pages(2, 2), "this process"

    assert load_or_build(tmp_path, "toy", {}, build_late).source == "another process"


def test_a_build_that_was_cut_off_is_not_taken_for_a_data_set(tmp_path: Path) -> None:
    def stopped() -> tuple[list[Example], str]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_or_build(tmp_path, "toy", {}, stopped)
    assert len(load_or_build(tmp_path, "toy", {}, lambda: (toy_pages(2, 2), "")).examples) == 2


# ---------------------------------------------------------------- tasks


def test_made_up_tasks_have_their_answers_in_them() -> None:
    for example in single_facts(0, 5, 5) + two_facts(0, 5, 5):
        assert example.context.count("Evidence ") >= 3
        assert example.answer in example.context
    for pages in (1, 3):
        for example in documents(0, 3, pages):
            assert len(example.images) == pages and example.question.startswith("Question: What is the ")


def test_every_task_loads_without_a_network(tmp_path: Path) -> None:
    names = list(all_kinds((256,)))
    tasks = load_tasks(tmp_path, names, 0, 2, (256,), None)
    assert [task.name for task in tasks] == names
    assert all(len(task.data.examples) == 2 for task in tasks)
    assert {task.name for task in tasks if task.data.source == SYNTHETIC} >= {"docvqa", "nq", "hotpotqa", "passkey"}
    with pytest.raises(StudyError, match=r"'vqa'.*page, text"):
        load_tasks(tmp_path, ["vqa"], 0, 2, (256,), None)


PAGE = Image.new("RGB", (40, 30), "white")
ROWS: dict[str, list[dict[str, Any]]] = {
    "lmms-lab/DocVQA": [
        {"question": "What?", "image": PAGE, "answers": ["12", "twelve"]},
        {"question": "No answer?", "image": PAGE, "answers": []},
        {"question": "Who?", "image": PAGE, "answers": ["Ann"]},
    ],
    "lmms-lab/MP-DocVQA": [
        {"question": "Long?", "answers": "['x']".replace("'", '"'), **{f"image_{i}": PAGE for i in range(1, 12)}},
        {"question": "Short?", "answers": "['y']", "image_1": PAGE, "image_2": PAGE, "image_3": None},
    ],
    "hotpotqa/hotpot_qa": [
        {
            "question": "Where?",
            "answer": "Rome",
            "context": {"title": ["A", "B", "C"], "sentences": [["a1 ", "a2"], ["b Rome"], ["c"]]},
            "supporting_facts": {"title": ["A", "B"], "sent_id": [0, 0]},
        }
    ],
}


def test_hub_data_sets_are_read_by_their_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_module, "from_hub", lambda name, subset, split: ROWS[name])
    (tmp_path / "biencoder-nq-dev.json").write_text(
        json.dumps(
            [
                {
                    "question": "who?",
                    "answers": ["Bob"],
                    "positive_ctxs": [{"text": "It was Bob.", "title_score": 1}, {"text": "no", "title_score": 0}],
                    "negative_ctxs": [{"text": f"wrong {i}"} for i in range(9)],
                }
            ]
        )
    )
    doc, pages, hotpot, nq = load_tasks(
        tmp_path / "data", ["docvqa", "mpdocvqa", "hotpotqa", "nq"], 0, 2, (256,), tmp_path
    )
    assert [e.answers for e in doc.data.examples] == [("12", "twelve"), ("Ann",)]
    assert doc.data.source == HUB and doc.metric == "anls"
    assert [(e.answer, len(e.images)) for e in pages.data.examples] == [("y", 2)]
    context = hotpot.data.examples[0].context
    assert "a1  a2" in context and "b Rome" in context and context.count("Evidence") == 3
    assert nq.data.examples[0].context.count("wrong") == 5 and "It was Bob." in nq.data.examples[0].context
    assert "no\n" not in nq.data.examples[0].context


def test_needles_of_the_hub_are_hidden_again_where_more_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"needle": "The gate is blue.", "retrieval_question": "What is the gate?", "arg2": "blue"}
    sets = {"en_haystack_texts": {"text": ["word " * 100]}, "retrieval_needles": [row] * 194}
    monkeypatch.setattr(haystack_module, "from_hub", lambda name, subset, split: sets[subset])
    items, source = niah_items(0, 7, (64, 128))
    assert source == HUB and [item.length for item in items] == [64, 128, 64, 128, 64, 128, 64]
    assert all(item.context.count(row["needle"]) == 1 for item in items)
    sets["retrieval_needles"] = [row] * 10
    with pytest.raises(StudyError, match="10 needles"):
        niah_items(0, 7, (64, 128))


def test_a_data_set_with_another_schema_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_module, "from_hub", lambda *_: [{"query": "What?", "image": PAGE}])
    with pytest.raises(StudyError, match=r"DocVQA.*'question'.*query, image"):
        load_tasks(tmp_path, ["docvqa"], 0, 2, (256,), None)
    (tmp_path / "biencoder-nq-dev.json").write_text("not json")
    with pytest.raises(StudyError, match=r"biencoder-nq-dev\.json"):
        load_tasks(tmp_path, ["nq"], 0, 2, (256,), tmp_path)

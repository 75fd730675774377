"""Text for the terminal: long lines are wrapped, paths are not."""

from hooked_vlm.analysis.text_tables import in_width


def test_sentences_and_columns_are_wrapped_and_paths_stay_whole() -> None:
    path = "page: /" + "a" * 90
    sentence = "word " * 30
    wrapped = in_width(f"{path}\n{sentence}\nname  {'cell ' * 20}", 40).split("\n")
    assert wrapped[0] == path
    assert max(map(len, wrapped[1:])) <= 40 and " ".join(" ".join(wrapped[1:]).split()).count("word") == 30
    assert wrapped[-1].startswith("      cell")

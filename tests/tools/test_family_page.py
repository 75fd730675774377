"""The page of families holds what the configurations say."""

from tools.family_page import LAWS, PAGE, VALUES, one_of_each, page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tools.family_page"


def test_every_family_has_every_value_and_families_differ() -> None:
    families = one_of_each()
    for table in (VALUES, LAWS):
        assert all(read(cfg) for read in table.values() for cfg in families.values())
    told = [tuple(read(cfg) for read in VALUES.values()) for cfg in families.values()]
    assert len(set(told)) == len(told)

"""docs/architecture.md is current, and the imports it shows point down."""

import re

from tools.architecture_page import LAYERS, LIBRARY, ROOT, arrows, page


def test_the_page_is_generated() -> None:
    assert (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8") == page()


def test_every_package_and_module_is_a_layer() -> None:
    found = {path.stem for path in LIBRARY.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__"} == {name for name, _ in LAYERS}


def test_imports_point_down() -> None:
    order = [name for name, _ in LAYERS]
    upwards = {
        (name, other) for name, below in arrows().items() for other in below if order.index(other) < order.index(name)
    }
    assert upwards == {("model", "analysis")}  # `cache.show`, as the page says


def test_folders_named_on_the_page_exist() -> None:
    for name in re.findall(r"`((?:tests|experiments|converters|benchmarks|tools)/[\w/.]*)`", page()):
        assert (ROOT / name).exists(), name

"""Annotations are executed as jaxtyping executes them, for each kind of call once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec

import jaxtyping
import pytest
import torch
from beartype import beartype
from executed_shapes import by_jaxtyping, executed
from jaxtyping import Float, Int, TypeCheckError
from torch import Tensor, zeros

from hooked_vlm.nn.components import Norm

P = ParamSpec("P")


@pytest.fixture(params=[executed, by_jaxtyping], ids=["ours", "jaxtyping"])
def decorate(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return request.param(typechecker=beartype)


def test_the_library_is_decorated() -> None:
    norm = Norm(4, 1e-6, False)
    for _ in range(2):
        assert norm(zeros(2, 4)).shape == (2, 4)
        with pytest.raises(TypeCheckError, match=r"hooked_vlm\.nn\.components\.Norm\.forward"):
            norm("no tensor")


def test_arguments_are_refused_before_the_function_runs_and_after_any_number_of_right_calls(decorate: Any) -> None:
    ran = []

    @decorate
    def product(x: Float[Tensor, "m k"], *, y: Float[Tensor, "k n"], axis: Literal["row", "column"] = "row") -> None:
        ran.append(x.shape)

    for _ in range(3):
        product(zeros(2, 3), y=zeros(3, 4))
        for x, y, more in (
            (zeros(2, 3), zeros(4, 4), {}),
            (zeros(2, 3), zeros(3), {}),
            (zeros(2, 3).long(), zeros(3, 4), {}),
            (zeros(2, 3), zeros(3, 4), {"axis": "diagonal"}),
            (zeros(2, 3), [zeros(3, 4)], {}),
        ):
            with pytest.raises(TypeCheckError, match="product"):
                product(x, y=y, **more)
    assert ran == [(2, 3)] * 3
    with pytest.raises(TypeError, match="missing"):
        product(zeros(2, 3))


def test_a_result_is_refused_whatever_equal_arguments_gave_before(decorate: Any) -> None:
    results: Iterator[Any] = iter([zeros(3, 2), zeros(3, 2), zeros(2, 3), zeros(3, 2), None])

    @decorate
    def transposed(x: Float[Tensor, "m n"]) -> Float[Tensor, "n m"]:
        return next(results)

    for right in (True, True, False, True, False):
        if right:
            assert transposed(zeros(2, 3)).shape == (3, 2)
        else:
            with pytest.raises(TypeCheckError, match="return value"):
                transposed(zeros(2, 3))


def test_functions_that_others_define_at_each_call_have_their_own_annotations(decorate: Any) -> None:
    def made(dims: str) -> Any:
        @decorate
        def same(x: Float[Tensor, dims]) -> Float[Tensor, dims]:
            return x

        return same

    for _ in range(2):
        assert made("a b")(zeros(2, 3)).shape == (2, 3)
        assert made("a a")(zeros(2, 2)).shape == (2, 2)
        with pytest.raises(TypeCheckError):
            made("a a")(zeros(2, 3))
    first, second = made("a b"), made("a a")
    assert first(zeros(2, 3)) is not None
    with pytest.raises(TypeCheckError):
        second(zeros(2, 3))
    assert first(zeros(2, 3)) is not None


def test_methods_of_every_kind_and_dataclasses_are_decorated(decorate: Any) -> None:
    @decorate
    @dataclass(frozen=True)
    class Pair:
        x: Float[Tensor, " n"]
        y: Float[Tensor, " n"]

    @decorate
    class Holder:
        @classmethod
        @decorate
        def of_class(cls, x: Int[Tensor, "2"]) -> Int[Tensor, "2"]:
            return x

        @staticmethod
        @decorate
        def static(x: Int[Tensor, "2"]) -> Int[Tensor, "2"]:
            return x

        @property
        @decorate
        def size(self) -> int:
            return "two"  # pyright: ignore[reportReturnType]

    assert Pair(zeros(2), zeros(2)).y.shape == (2,)
    with pytest.raises(TypeCheckError):
        Pair(zeros(2), zeros(3))
    for call in (Holder.of_class, Holder.static):
        assert call(zeros(2).long()).shape == (2,)
        with pytest.raises(TypeCheckError):
            call(zeros(3).long())
    with pytest.raises(TypeCheckError, match="size"):
        Holder().size  # noqa: B018
    assert isinstance(decorate(Holder.__dict__["of_class"]), classmethod)
    assert isinstance(decorate(Holder.__dict__["static"]), staticmethod)
    assert isinstance(decorate(Holder.__dict__["size"]), property)


def test_entries_of_containers_are_seen(decorate: Any) -> None:
    @decorate
    def first(
        pair: tuple[Float[Tensor, " n"], Int[Tensor, " n"]], more: list[Float[Tensor, " n"]], named: dict[str, int]
    ) -> Tensor:
        return pair[0]

    right: tuple[Any, ...] = ((zeros(2), zeros(2).long()), [zeros(2)], {"a": 1})
    wrong: dict[int, Any] = {0: (zeros(2), zeros(3).long()), 1: [zeros(3)], 2: {"a": "one"}}
    for _ in range(2):
        assert first(*right).shape == (2,)
        for at, value in wrong.items():
            with pytest.raises(TypeCheckError):
                first(*right[:at], value, *right[at + 1 :])


def test_generators_and_free_parameters_run(decorate: Any) -> None:
    @decorate
    def counted(n: int) -> Iterator[int]:
        yield from range(n)

    @decorate
    def called(fn: Callable[P, int], *args: P.args, **kwargs: P.kwargs) -> int:
        return fn(*args, **kwargs)

    assert [*counted(3)] == [0, 1, 2] and called(max, 1, 2) == 2
    with pytest.raises(TypeCheckError):
        counted("3")


def test_switched_off_nothing_is_refused(decorate: Any) -> None:
    @decorate
    def same(x: Float[Tensor, "a a"]) -> int:
        return x  # pyright: ignore[reportReturnType]

    jaxtyping.config.update("jaxtyping_disable", True)
    assert same(zeros(2, 3)).shape == (2, 3)
    jaxtyping.config.update("jaxtyping_disable", False)
    with pytest.raises(TypeCheckError):
        same(zeros(2, 3))
    assert torch.equal(same.__wrapped__(zeros(2, 3)), zeros(2, 3))


def test_tensors_that_answer_for_themselves_are_arguments_like_others(decorate: Any) -> None:
    class Own(Tensor):
        @classmethod
        @decorate
        def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            return super().__torch_function__(func, types, args, kwargs or {})

    @decorate
    def same(x: Float[Tensor, "a a"]) -> Tensor:
        return x

    for _ in range(2):
        assert same(zeros(2, 2).as_subclass(Own)).shape == (2, 2)
        with pytest.raises(TypeCheckError):
            same(zeros(2, 3).as_subclass(Own))

"""Execute the annotations of the library's calls: once for each kind of arguments and result.

`jaxtyping.jaxtyped` compiles its checks where a function is defined (a nested one at every call of the outer) and makes
them at every call, though most calls of the tests repeat shapes that were checked already.
"""

import inspect
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import is_dataclass
from functools import partial, wraps
from itertools import islice
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import jaxtyping
import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

by_jaxtyping = jaxtyping.jaxtyped
ENTRIES = 8
"""Of a list, tuple or dict. beartype looks at every entry of a tuple of stated length, else at one drawn at random."""


class ArgumentsPass(Exception):
    """Said by a stand-in that was given no result: its arguments have been checked."""


class Checks(NamedTuple):
    stand_in: Callable[..., Any]
    passed: dict[Hashable, set[Hashable]]
    """Kinds of arguments, and the kinds of their results."""


known: dict[CodeType, tuple[dict[str, Any], Checks]] = {}
"""Annotations and their checks: functions that are defined anew at each call of another share them."""

ways: dict[type, Callable[[Any], Hashable]] = {}
"""What tells values of a class apart, by class."""


def executed(fn: Any = None, *, typechecker: Any) -> Any:
    """Decorate as `jaxtyping.jaxtyped` does: functions, and the `__init__` of dataclasses."""
    if fn is None:
        return partial(executed, typechecker=typechecker)
    if inspect.isclass(fn):
        if is_dataclass(fn) and not hasattr(fn.__init__, "__wrapped__"):
            fn.__init__ = executed(fn.__init__, typechecker=typechecker)
        return fn
    if isinstance(fn, (classmethod, staticmethod)):
        return type(fn)(executed(fn.__func__, typechecker=typechecker))
    if isinstance(fn, property):
        parts = (part and executed(part, typechecker=typechecker) for part in (fn.fget, fn.fset, fn.fdel))
        return property(*parts)
    return checked(fn, typechecker) if fn.__annotations__ else fn


def checked(fn: FunctionType, typechecker: Any) -> Any:
    """The function between its checks: of the arguments before it runs, of the result after."""
    checks: Checks | None = None

    @wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal checks
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **kwargs)
        checks = checks or checks_of(fn, typechecker)
        given = tuple([kind_of(value) for value in args])
        if kwargs:
            given += tuple([(name, kind_of(value)) for name, value in kwargs.items()])
        passed = checks.passed.get(given)
        if passed is None:
            with suppress(ArgumentsPass):
                checks.stand_in(*args, **kwargs)
        result = fn(*args, **kwargs)
        kind = kind_of(result)
        if passed is None or kind not in passed:
            checks.stand_in(*args, **kwargs, _result=(result,))
            checks.passed.setdefault(given, set()).add(kind)
        return result

    return run


def kind_of(value: Any) -> Hashable:
    """All that an annotation asks of a value."""
    of = type(value)
    way = ways.get(of) or ways.setdefault(of, way_for(of))
    return of if way is type else way(value)


def way_for(of: type) -> Callable[[Any], Hashable]:
    """What tells values of a class apart; `type`: their class alone."""
    if issubclass(of, (Tensor, np.ndarray)):
        return own_tensor if issubclass(of, Tensor) and of not in (Tensor, Parameter) else array
    if issubclass(of, (list, tuple)):
        return entries
    if issubclass(of, dict):
        return items
    return by_value if of in (bool, int, float, str) or issubclass(of, type) else type


def array(value: Any) -> Hashable:
    return type(value), value.dtype, value.shape


def own_tensor(value: Tensor) -> Hashable:
    """A subclass may answer with functions that are checked themselves."""
    with torch._C.DisableTorchFunctionSubclass():
        return array(value)


def entries(value: Any) -> Hashable:
    return type(value), len(value), *map(kind_of, value[:ENTRIES])


def items(value: dict[Any, Any]) -> Hashable:
    return type(value), len(value), *((kind_of(key), kind_of(entry)) for key, entry in islice(value.items(), ENTRIES))


def by_value(value: Any) -> Hashable:
    return type(value), value


def checks_of(fn: FunctionType, typechecker: Any) -> Checks:
    annotations, checks = known.get(fn.__code__, (None, None))
    if checks is None or annotations != fn.__annotations__:
        checks = Checks(by_jaxtyping(typechecker=typechecker)(stand_in(fn)), {})
        known[fn.__code__] = fn.__annotations__, checks
    return checks


def stand_in(fn: FunctionType) -> Any:
    """A function of this name and signature that returns the result it is given, in a tuple."""
    stop = ArgumentsPass

    def returned(*args: Any, _result: tuple[Any, ...] = (), **kwargs: Any) -> Any:
        if not _result:
            raise stop
        return _result[0]

    own = FunctionType(returned.__code__, fn.__globals__, fn.__name__, None, returned.__closure__)
    own.__kwdefaults__, own.__module__, own.__qualname__ = {"_result": ()}, fn.__module__, fn.__qualname__
    own.__signature__ = with_result(inspect.signature(fn))  # pyright: ignore[reportFunctionMemberAccess]
    return own


def with_result(signature: inspect.Signature) -> inspect.Signature:
    """The signature, with the result as one more keyword."""
    parameters = [*signature.parameters.values()]
    end = len(parameters) - any(each.kind is each.VAR_KEYWORD for each in parameters)
    parameters.insert(end, inspect.Parameter("_result", inspect.Parameter.KEYWORD_ONLY, default=()))
    return signature.replace(parameters=parameters)

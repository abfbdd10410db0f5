"""Keeps torch.compile out of frames that are none of its business, at no cost to each call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Literal, TypeVar

from torch._C._dynamo import eval_frame

from .errors import OffloadError

# torch.compiler.disable does the same at a microsecond a call, on the hottest path there is; and it imports the whole
# of torch._dynamo, seconds of it, into programs that compile nothing.

_WHY = (
    "a lighterage section begins or ends here, which a graph cannot hold. Compile each layer by itself, "
    "layer.compile(fullgraph=True), or leave fullgraph out: the model then becomes one graph a layer"
)

_Result = TypeVar("_Result", covariant=True)
_Function = TypeVar("_Function", bound=Callable[..., object])


def unseen(function: _Function) -> _Function:
    """Run `function`, and all that it calls, as plain Python; where it is called, a graph ends."""
    return _skip(function, eval_frame._FrameAction.SKIP)


def see_through(function: _Function) -> _Function:
    """Run the frame of `function` as plain Python; what it calls is compiled as ever."""
    return _skip(function, eval_frame._FrameAction.DEFAULT)


def _skip(function: _Function, callees: eval_frame._FrameAction) -> _Function:
    strategy = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, callees)
    eval_frame.set_code_exec_strategy(function.__code__, strategy)
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = _WHY  # type: ignore[attr-defined]
    return function


class Unseen(AbstractContextManager[_Result]):
    """A context manager that is entered and left as plain Python; what its block does is compiled as ever."""

    __slots__ = ("_context", "_state", "_what")

    def __init__(self, context: AbstractContextManager[_Result], what: str = "this context") -> None:
        """`what` names it in errors."""
        self._context = context
        self._what = what
        self._state: Literal["new", "entered", "left"] = "new"

    @unseen
    def __enter__(self) -> _Result:
        if self._state != "new":
            raise OffloadError(f"{self._what} was {self._state} already, and is entered once. Make another each time.")
        entered = self._context.__enter__()
        self._state = "entered"
        return entered

    @unseen
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if self._state != "entered":
            raise OffloadError(f"{self._what} is left without having been entered. Write `with {self._what}: ...`.")
        self._state = "left"
        return self._context.__exit__(kind, error, traceback)

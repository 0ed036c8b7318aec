"""The one way to declare an op.

An op is a value: its schema, its definition (`reference`), its checks, and its derivatives written with other
ops. From that it gets every path by which a call can reach a kernel:

    tracing (compile, export)       one node `marquardt::<op>` with fake, autograd and vmap registrations
    torch.func and forward mode     an autograd.Function with setup_context, jvp and vmap
    eager training                  an old-style autograd.Function, three times cheaper than the former
    inference                       the bare kernel, `marquardt::_<op>`

Arguments of an op are tensors (its scalars too, see `scalars`), at most one list of tensors, and plain values at the
end. Derivatives call other ops through the `call` they are given, so that one formula serves all paths.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import _native, backends, batching, errors

Tensor = torch.Tensor
NAMESPACE = "marquardt"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_functorch_active = torch._C._are_functorch_transforms_active
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_forward_ad = torch.autograd.forward_ad
_increment_version = torch._C._increment_version
_vjp: Any = torch.func.vjp  # whose stubs know only the form with auxiliary outputs

registry: dict[str, Op] = {}
operator_of: dict[str, str] = {}  # public function -> the operator that it calls, where the two differ

_NO_GRADIENT = (
    "{}: out= does not support automatic differentiation, but one of the arguments requires grad; call it under "
    "torch.no_grad() or without out="
)


@dataclass(frozen=True)
class Argument:
    """One argument of a schema: its name and what it carries."""

    name: str
    kind: str  # "tensor", "list" or "value"


def parse_schema(schema: str) -> tuple[str, tuple[Argument, ...]]:
    """Name and arguments of `name(Tensor a, Tensor[] b, Tensor coef, int c) -> ...`."""
    head, _, rest = schema.partition("(")
    arguments = []
    for part in rest[: rest.index(")")].split(","):
        type_, name = part.split()
        arguments.append(
            Argument(name, {"Tensor": "tensor", "Tensor?": "tensor", "Tensor[]": "list"}.get(type_, "value"))
        )
    return head, tuple(arguments)


class Op:
    """An operator of the library; see the module. Call it with the arguments of its schema."""

    def __init__(
        self,
        schema: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        check: Callable[..., None],
        backward: Callable[..., Any] | None = None,
        jvp: Callable[..., Any] | None = None,
        out: bool = False,
        returns_scalars: bool = False,
        public: Sequence[str] = (),
    ) -> None:
        """
        schema      `name(...) -> ...` of the traced op
        reference   the definition: plain differentiable PyTorch with the same arguments
        fake        outputs without values, for tracing
        check       raises for bad arguments, in the words of the C++ checks
        backward    backward(call, grads, needs, *args) -> one gradient (or None, or list) per argument;
                    None: derived from the reference
        jvp         jvp(call, tangents, *args) -> tangents of the outputs; None: derived from the reference
        out         whether C++ has `<name>_out` too
        returns_scalars  whether the last output holds numbers per sample, [B, m]
        public      the public functions that call this op, if they have other names
        """
        self.name, self.arguments = parse_schema(schema)
        self.reference, self.fake, self.check = reference, fake, check
        self.backward = backward or functools.partial(backward_of_reference, self)
        self.jvp = jvp or functools.partial(_jvp_of_reference, self)
        self.has_out, self.returns_scalars = out, returns_scalars
        kinds = [a.kind for a in self.arguments]
        self.list_at = kinds.index("list") if "list" in kinds else None
        self.tensors = len(kinds) - kinds.count("value")  # tensors come first, values behind
        registry[self.name] = self
        operator_of.update(dict.fromkeys(public, self.name))
        # Devices for which `auto` takes the native kernels; the CPU needs no entry.
        self.native_on = backends.native_devices(self.name)
        self.native: Callable[..., Any] | None = None
        if _native.why_not() is None:
            operators = torch.ops.marquardt
            self.native = getattr(operators, "_" + self.name).default._op
            if out:
                self.native_out = getattr(operators, f"_{self.name}_out").default._op
        else:
            self._define_without_native(schema)
        self.traced = getattr(torch.ops.marquardt, self.name).default
        self.returns_tuple = len(self.traced._schema.returns) > 1
        self.returns_list = any(isinstance(r.type, torch.ListType) for r in self.traced._schema.returns)
        if out:
            self.traced_out = getattr(torch.ops.marquardt, f"{self.name}_out").default
        from . import autograd

        self.apply_functorch, self.apply_eager = autograd.functions_of(self)
        self._register()
        self.call, self.asks_gradient = _written_out(self)

    # --- calls -------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def plain(self, *args: Any) -> Any:
        """The kernel itself, without autograd."""
        first = args[0][0] if type(args[0]) is list and args[0] else args[0]
        try:
            if backends._forced is None and self.native is not None:
                if first.is_cpu or first.device in self.native_on:
                    return self.native(*args)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise errors.translate(error, self.check, args) from None
        return self._on_other_backend(args)

    def recover(self, error: Exception, args: tuple[Any, ...]) -> Any:
        """What a failed call means: the definition for tensors of an old vmap, else an error that says what is wrong.

        `torch.autograd.grad(is_grads_batched=True)` maps by a mechanism that cannot split lists of outputs.
        """
        if "Batching rule not implemented" in str(error):
            return self.reference(*args)
        raise errors.translate(error, self.check, args) from None

    def to_out(self, out: Tensor, *args: Any) -> Tensor:
        """The variant that writes into `out` (which may be an input) and returns it."""
        if _is_compiling():
            self._check_out(out, *args)
            if _is_grad_enabled() and (self.asks_gradient(*args) or out.requires_grad):
                raise RuntimeError(_NO_GRADIENT.format(self.name))
            self.traced_out(*args, out=out)
            return out
        if _functorch_active() or _forward_ad._current_level >= 0:
            self._check_out(out, *args)
            return out.copy_(self(*args))
        first = args[0][0] if type(args[0]) is list and args[0] else args[0]
        asked = False
        try:
            asked = _is_grad_enabled() and (self.asks_gradient(*args) or out.requires_grad)
            if not asked and backends._forced is None and self.native is not None:
                if first.is_cpu or first.device in self.native_on:
                    self.native_out(*args, out)
                    if not out.is_inference():
                        _increment_version((out,))  # whoever saved `out` for a backward must notice
                    return out
        except (RuntimeError, AttributeError, TypeError) as error:
            raise errors.translate(error, functools.partial(self._check_out, out), args) from None
        if asked:
            raise RuntimeError(_NO_GRADIENT.format(self.name))
        self._check_out(out, *args)
        if backends.choose(self.name, first) in backends.NATIVE and self.native is not None:
            try:
                self.native_out(*args, out)
            except RuntimeError as error:
                raise errors.translate(error, None, args) from None
            if not out.is_inference():
                _increment_version((out,))
            return out
        return out.copy_(self.plain(*args))

    def _check_out(self, out: Tensor, *args: Any) -> None:
        from . import checks

        self.check(*args)
        label, first = self.arguments[0].name, args[0]
        inputs = [
            t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)
        ]
        if isinstance(first, (list, tuple)):
            label, first = f"{label}[0]", first[0]
        checks.out(self.name, out, label, first, inputs)

    def _on_other_backend(self, args: tuple[Any, ...]) -> Any:
        self.check(*args)
        first = args[0][0] if type(args[0]) is list else args[0]
        backend = backends.choose(self.name, first)
        if backend in backends.NATIVE and self.native is not None:
            try:
                return self.native(*args)
            except RuntimeError as error:
                return self.recover(error, args)
        if backend == "triton":
            from .triton_kernels import frame

            try:
                return getattr(frame, self.name)(*args)
            except RuntimeError as error:
                if "Batching rule not implemented" not in str(error):
                    raise
                return self.reference(*args)
        with torch.no_grad():
            return self.reference(*args)

    def _apply(self, function: Any, args: tuple[Any, ...]) -> Any:
        result = function(*self.flatten(args))
        return (list(result[:-1]), result[-1]) if self.returns_list else result

    def _trace(self, args: tuple[Any, ...]) -> Any:
        self.check(*args)
        device = (args[0][0] if isinstance(args[0], list) else args[0]).device
        backend = backends._forced
        if backend is None and device.type == "cuda":
            backend = backends.when_traced(self.name, device.index)
        if backend == "reference":
            return self.reference(*args)
        if backend == "triton":
            from . import triton_kernels

            return triton_kernels.traced(self.name)(*args)
        return self.traced(*args)

    # --- a list of tensors as flat arguments -------------------------------------------------------------------

    def flatten(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Arguments for Function.apply, which sees tensors only outside lists: the list goes to the end."""
        if self.list_at is None:
            return tuple(args)
        return (*args[: self.list_at], *args[self.list_at + 1 :], *args[self.list_at])

    def unflatten(self, flat: Sequence[Any]) -> tuple[Any, ...]:
        """The inverse of `flatten`."""
        if self.list_at is None:
            return tuple(flat)
        fixed = len(self.arguments) - 1
        return (*flat[: self.list_at], list(flat[fixed:]), *flat[self.list_at : fixed])

    def flatten_outputs(self, result: Any) -> Any:
        """Function.apply returns tensors only: the list of (Tensor[], Tensor) is spread in front."""
        if isinstance(result, tuple) and isinstance(result[0], (list, tuple)):
            return (*result[0], *result[1:])
        return result

    # --- registrations -----------------------------------------------------------------------------------------

    def _define_without_native(self, schema: str) -> None:
        """Without the native library the traced operator is the reference, so that tracing still works."""
        _library.define(schema)
        _library.impl(self.name, self.reference, "CompositeExplicitAutograd")
        if self.has_out:
            inner = schema[schema.index("(") + 1 : schema.index(")")]
            _library.define(f"{self.name}_out({inner}, *, Tensor(a!) out) -> ()")

            def write(*args: Any, out: Tensor) -> None:
                out.copy_(self.reference(*args))

            _library.impl(f"{self.name}_out", write, "CompositeExplicitAutograd")

    def _register(self) -> None:
        from . import autograd

        def fake(*args: Any) -> Any:
            self.check(*args)
            return self.fake(*args)

        qualified = f"{NAMESPACE}::{self.name}"
        torch.library.register_fake(qualified, fake, lib=_library)
        torch.library.register_vmap(qualified, functools.partial(batching.vmap_traced, self), lib=_library)
        autograd.register(self, qualified, _library)
        if self.has_out:
            torch.library.register_fake(f"{qualified}_out", self._fake_out, lib=_library)
        if _native.why_not() is None:
            raw = f"{NAMESPACE}::_{self.name}"
            # Without an entry every call would pass a fallback that only looks for gradients.
            for key in ("AutogradCPU", "AutogradCUDA"):
                _library.impl(f"_{self.name}", torch.library.fallthrough_kernel, key)
            torch.library.register_fake(raw, fake, lib=_library)
            torch.library.register_vmap(raw, functools.partial(batching.vmap_raw, self), lib=_library)

    def _fake_out(self, *args: Any, out: Tensor) -> None:
        self._check_out(out, *args)


_CALL = """
def {name}({names}):
    if is_compiling():
        return op._trace(({names},))
    if functorch_active() or forward_ad._current_level >= 0:
        return op._apply(op.apply_functorch, ({names},))
    try:
        asked = is_grad_enabled() and ({asked})
        if not asked and backends._forced is None and native is not None:
            if {first}.is_cpu or {first}.device in native_on:
                return native({names})
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        return op.recover(error, ({names},))
    if asked:
        return {apply}
    return op.plain({names})


def asks_gradient({names}):
    return {asked}
"""


def _written_out(op: Op) -> tuple[Callable[..., Any], Callable[..., bool]]:
    """The choice among the four paths, and whether a gradient is asked, as straight code for one op's arguments.

    A loop over arguments would cost as much as a small kernel; so would a second Python call.
    """

    def asked(argument: Argument) -> str:
        if argument.kind == "list":
            return f"any([t.requires_grad for t in {argument.name}])"
        return f"({argument.name} is not None and {argument.name}.requires_grad)"

    names = ", ".join(a.name for a in op.arguments)
    first = op.arguments[0]
    text = _CALL.format(
        name=op.name,
        names=names,
        asked=" or ".join(asked(a) for a in op.arguments[: op.tensors]),
        first=f"{first.name}[0]" if first.kind == "list" else first.name,
        apply=f"eager({names})" if op.list_at is None else f"op._apply(op.apply_eager, ({names},))",
    )
    scope: dict[str, Any] = {
        "op": op,
        "native": op.native,
        "native_on": op.native_on,
        "eager": op.apply_eager,
        "backends": backends,
        "is_compiling": _is_compiling,
        "functorch_active": _functorch_active,
        "forward_ad": _forward_ad,
        "is_grad_enabled": _is_grad_enabled,
    }
    exec(text, scope)
    return scope[op.name], scope["asks_gradient"]


def _on_tensors(op: Op, args: Sequence[Any]) -> tuple[Callable[..., Any], list[Any], list[int]]:
    """The reference as a function of its floating tensors alone; those tensors; their flat positions."""
    flat = op.flatten(args)
    positions = [i for i, a in enumerate(flat) if isinstance(a, Tensor) and a.is_floating_point()]

    def function(*tensors: Tensor) -> Any:
        full = list(flat)
        for i, t in zip(positions, tensors, strict=True):
            full[i] = t
        result = op.flatten_outputs(op.reference(*op.unflatten(full)))
        return result if isinstance(result, tuple) else (result,)

    return function, [flat[i] for i in positions], positions


def backward_of_reference(op: Op, call: Any, grads: Sequence[Any], needs: Any, *args: Any) -> tuple[Any, ...]:
    """Gradients of the definition itself; differentiable again, to any order."""
    function, tensors, positions = _on_tensors(op, args)
    outputs, pullback = _vjp(function, *tensors)
    flat_grads = op.flatten_outputs(tuple(grads))
    filled = tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, flat_grads, strict=True))
    result: list[Any] = [None] * len(op.flatten(args))
    for i, g in zip(positions, pullback(filled), strict=True):
        result[i] = g
    return op.unflatten(result)


def _jvp_of_reference(op: Op, call: Any, tangents: Sequence[Any], *args: Any) -> Any:
    """Tangents of the definition itself, from two backward products: forward mode cannot be nested."""
    function, tensors, positions = _on_tensors(op, args)
    flat = op.flatten(tangents)
    moved = tuple(
        torch.zeros_like(t) if flat[i] is None else flat[i] for i, t in zip(positions, tensors, strict=True)
    )
    outputs, pullback = _vjp(function, *tensors)
    _, along = _vjp(pullback, tuple(torch.zeros_like(o) for o in outputs))
    (out,) = along(moved)
    return out if len(out) > 1 else out[0]

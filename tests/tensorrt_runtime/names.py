"""Which names of TensorRT a source uses that do not exist in every version it has to run with."""

import ast
from collections.abc import Iterator, Sequence

from .surface import Surface

# Of TensorRT-RTX alone, which is told what to build for; a source asks for them only there.
RTX_ONLY = frozenset({"ComputeCapability", "num_compute_capabilities", "set_compute_capability"})
# Whose objects the sources hold. Others' members, such as the precision of a layer, are names of much else.
CLASSES = (
    "Builder", "IBuilderConfig", "INetworkDefinition", "IOptimizationProfile", "OnnxParser", "OnnxParserRefitter",
    "ParserError", "Runtime", "ICudaEngine", "IExecutionContext", "Refitter", "IHostMemory", "ITimingCache", "ILogger",
    "IProgressMonitor", "ISerializationConfig", "IRuntimeConfig", "EngineInspector",
)  # fmt: skip
IMPORTS = frozenset({"tensorrt", "tensorrt_rtx"})
IMPORTERS = frozenset({"import_package", "import_module"})


def unknown_names(source: str, surfaces: Sequence[Surface], allowed: frozenset[str] = RTX_ONLY) -> list[str]:
    """Each use of a name that some surface lacks, as "line: name".

    The package is known by what it is: an argument of the type `ModuleType`, or what an import gives. Attributes of
    other objects are unknown when some surface's classes have them, and another's do not. What stands where `hasattr`
    has asked for it, and `getattr` with a default, is guarded.

    Args:
        source: of a module.
        surfaces: each must have every name.
        allowed: names that only some have, which are guarded otherwise.
    """
    return [f"{line}: {name}" for line, name in _Walk(surfaces, allowed).walk(ast.parse(source), frozenset(), allowed)]


def packages_in(source: str) -> int:
    """How many times a source uses a package that it was given or has imported."""
    walk = _Walk([], frozenset())
    list(walk.walk(ast.parse(source), frozenset(), frozenset()))
    return walk.uses


class _Walk:
    def __init__(self, surfaces: Sequence[Surface], allowed: frozenset[str]) -> None:
        self.surfaces, self.allowed, self.uses = surfaces, allowed, 0
        everywhere = [{name for kind in CLASSES for name in surface.members.get(kind, {})} for surface in surfaces]
        self.in_some = set().union(*everywhere)
        self.in_all = set.intersection(*everywhere) if everywhere else set()

    def walk(self, node: ast.AST, packages: frozenset[str], guarded: frozenset[str]) -> Iterator[tuple[int, str]]:
        """Unknown names of a node and below.

        Args:
            node: where to look.
            packages: expressions that are a package here, such as "trt" or "self._package".
            guarded: names that are known to exist here.
        """
        if isinstance(node, ast.FunctionDef | ast.Module | ast.ClassDef):
            packages = packages | self._packages_of(node, packages)
        if isinstance(node, ast.If | ast.IfExp):
            asked = {
                call.args[1].value
                for call in ast.walk(node.test)
                if isinstance(call, ast.Call) and _called(call) == "hasattr" and isinstance(call.args[1], ast.Constant)
            }
            yield from self.walk(node.test, packages, guarded | asked)
            body = node.body if isinstance(node.body, list) else [node.body]
            orelse = node.orelse if isinstance(node.orelse, list) else [node.orelse]
            for inner, known in [(body, guarded | asked), (orelse, guarded)]:
                for child in inner:
                    yield from self.walk(child, packages, known)
            return
        if isinstance(node, ast.Attribute):
            yield from self._attribute(node, node.attr, node.value, packages, guarded)
        if isinstance(node, ast.Call) and _called(node) == "getattr" and len(node.args) == 2:
            name = node.args[1]
            if isinstance(name, ast.Constant):
                yield from self._attribute(node, name.value, node.args[0], packages, guarded)
        for child in ast.iter_child_nodes(node):
            yield from self.walk(child, packages, guarded)

    def _packages_of(self, scope: ast.AST, outer: frozenset[str]) -> frozenset[str]:
        """Expressions that are a package in a scope: arguments, imports, and what either is assigned to."""
        found: set[str] = set()
        if isinstance(scope, ast.FunctionDef):
            arguments = [*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs]
            found |= {
                argument.arg
                for argument in arguments
                if argument.annotation is not None and "ModuleType" in ast.unparse(argument.annotation)
            }
        for node in _own(scope):
            if isinstance(node, ast.Import):
                found |= {name.asname or name.name for name in node.names if name.name in IMPORTS}
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    pairs = (
                        zip(target.elts, node.value.elts, strict=False)
                        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                        else [(target, node.value)]
                    )
                    found |= {ast.unparse(to) for to, value in pairs if self._is_package(value, outer | found)}
        if isinstance(scope, ast.ClassDef):  # what one method keeps as self's, the others use
            methods = [node for node in scope.body if isinstance(node, ast.FunctionDef)]
            kept = [self._packages_of(method, outer) for method in methods]
            return frozenset(name for names in kept for name in names if name.startswith("self."))
        return frozenset(found)

    def _is_package(self, value: ast.AST, packages: set[str] | frozenset[str]) -> bool:
        if isinstance(value, ast.BoolOp):
            return any(self._is_package(part, packages) for part in value.values)
        if isinstance(value, ast.Call):
            return _called(value) in IMPORTERS
        return isinstance(value, ast.Name | ast.Attribute) and ast.unparse(value) in packages

    def _attribute(
        self, node: ast.expr, name: str, owner: ast.AST, packages: frozenset[str], guarded: frozenset[str]
    ) -> Iterator[tuple[int, str]]:
        if name in guarded or (name.startswith("__") and name != "__version__"):
            return
        chain = ast.unparse(owner)
        package = next((found for found in packages if chain == found or chain.startswith(f"{found}.")), None)
        if package is None:
            if name in self.in_some - self.in_all:
                yield node.lineno, f"{name}, which some versions lack"
            return
        self.uses += 1
        inside = chain.removeprefix(package).removeprefix(".")
        for surface in self.surfaces:
            if inside and inside.split(".")[0] in guarded:
                continue
            known = surface.members.get(inside, {}) if inside else surface.names
            if name not in known and name not in ("name", "value"):
                yield node.lineno, f"{ast.unparse(owner)}.{name} in {surface.version}"


def _own(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a scope, without those of functions and classes in it."""
    for node in ast.iter_child_nodes(scope):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node
            yield from _own(node)


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")

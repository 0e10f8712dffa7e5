"""What a notebook depends on: which oodlib modules its code can reach, found without running or importing anything.

A package's ``__init__`` re-exports everything, so importing one name from it must not count as using all of it. Names
are followed through the re-export to the module that defines them; whatever cannot be followed counts as "the whole
package". Detectors made by name reach every module of ``oodlib.scores``.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

__all__ = ["ModuleGraph"]

_BY_NAME = {"create", "load_detector", "names"}     # these find their module by a string


class ModuleGraph:
    """The import graph of a package folder, by static analysis.

    Parameters
    ----------
    package : folder of the package, for example ``root() / "oodlib"``
    """

    def __init__(self, package: Path) -> None:
        self.name = package.name
        self.files: dict[str, Path] = {}
        for path in package.rglob("*.py"):
            parts = path.relative_to(package.parent).with_suffix("").parts
            self.files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        self.packages = {name for name, path in self.files.items() if path.name == "__init__.py"}
        self._tree = cache(lambda name: ast.parse(self.files[name].read_text(encoding="utf-8")))

    def reachable(self, sources: list[str]) -> set[str]:
        """Modules that the code in ``sources`` (one text per cell) can reach, directly or through others."""
        text = "\n".join(sources)
        try:
            tree = ast.parse(text)
        except SyntaxError:     # top-level await, magics inside a block: assume the most
            return set(self.files)
        done: set[str] = set()
        todo = self._resolve_all(self._references(tree, module=None))
        while todo:
            name = todo.pop()
            if name not in done:
                done.add(name)
                todo |= self._of_module(name) - done
        return done

    def _of_module(self, name: str) -> set[str]:
        if name in self.packages:       # reached for a name it re-exports; its other imports are not used
            return set()
        return self._uses(name)

    def _uses(self, name: str) -> set[str]:
        """Modules that the body of a module uses; a module that imports by string uses its whole package."""
        tree = self._tree(name)
        found = self._resolve_all(self._references(tree, module=name))
        dynamic = {"import_module", "iter_modules", "walk_packages"}
        if any(getattr(node, "attr", getattr(node, "id", None)) in dynamic for node in ast.walk(tree)):
            found |= self._whole(name if name in self.packages else name.rpartition(".")[0])
        return found

    def _whole(self, package: str) -> set[str]:
        return {name for name in self.files if name == package or name.startswith(package + ".")}

    def _references(self, tree: ast.AST, module: str | None) -> set[str]:
        """Dotted names under this package that the code imports or uses."""
        aliases: dict[str, set[str]] = {}
        found: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for item in node.names:
                    if self._ours(item.name):
                        local = item.asname or self.name
                        aliases.setdefault(local, set()).add(item.name if item.asname else self.name)
                        found.add(item.name)
            elif isinstance(node, ast.ImportFrom):
                base = self._base(node, module)
                if self._ours(base):
                    for item in node.names:
                        target = base if item.name == "*" else f"{base}.{item.name}"
                        if item.name == "*":
                            found |= self._whole(base)
                        aliases.setdefault(item.asname or item.name, set()).add(target)
                        found.add(target)
        found -= self.packages          # a package counts by the names used from it, below
        inner: set[int] = set()
        for node in ast.walk(tree):     # parents come before children
            if id(node) in inner or not isinstance(node, ast.Attribute | ast.Name):
                continue
            chain: list[str] = []
            part: ast.AST = node
            while isinstance(part, ast.Attribute):
                chain.append(part.attr)
                part = part.value
                inner.add(id(part))
            if isinstance(part, ast.Name):
                for target in aliases.get(part.id, ()):
                    found.add(".".join([target, *reversed(chain)]))
        return found

    def _base(self, node: ast.ImportFrom, module: str | None) -> str:
        if not node.level:
            return node.module or ""
        if module is None:
            return ""
        parts = module.split(".") if module in self.packages else module.split(".")[:-1]
        parts = parts[:len(parts) - node.level + 1]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _ours(self, dotted: str) -> bool:
        return dotted == self.name or dotted.startswith(self.name + ".")

    def _resolve_all(self, references: set[str]) -> set[str]:
        found: set[str] = set()
        for reference in references:
            found |= self._resolve(reference, frozenset())
        return found

    def _resolve(self, dotted: str, seen: frozenset[str]) -> set[str]:
        """Modules behind one dotted name."""
        parts = dotted.split(".")
        module = self.name
        if _BY_NAME.intersection(parts[1:]) and (len(parts) == 2 or parts[1] == "scores"):
            return self._whole(f"{self.name}.scores")
        for at in range(1, len(parts) + 1):
            if at == len(parts):                # a package used as a value
                return self._whole(module)
            name, longer = parts[at], f"{module}.{parts[at]}"
            exported = self._exports(module)
            if longer in self.files and longer not in self.packages:
                return {longer}                 # also where a function of the module has the module's name
            if longer in self.packages:
                module = longer
                continue
            if name in exported and dotted not in seen:
                target = ".".join([exported[name], *parts[at + 1:]])
                return self._resolve(target, seen | {dotted}) | {module}
            if name.startswith("__"):           # __version__ and the like
                return {module}
            return {module} | self._uses(module)    # defined in the __init__ itself
        return set()

    def _exports(self, package: str) -> dict[str, str]:
        """Names that an ``__init__`` imports from this package, and where from (TYPE_CHECKING imports too)."""
        found = {}
        for node in ast.walk(self._tree(package)):
            if isinstance(node, ast.ImportFrom):
                base = self._base(node, package)
                if self._ours(base):
                    found.update({item.asname or item.name: f"{base}.{item.name}" for item in node.names})
        return found

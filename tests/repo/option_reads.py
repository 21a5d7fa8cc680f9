"""Which config options a package reads, by the types that its annotations give: `options.lr` counts for optimizer.lr only where
`options` is known to be an OptimizerConfig.

Known are annotated parameters and fields, what is assigned from them, what a function or property is annotated to return, `self`
inside a section, elements of a tuple of sections, and getattr with a constant name. What is read of a section's base class is read
of all sections that are derived from it. What a section's own property reads counts once
the property is read; what a validator reads does not count, since no run is changed by it.
"""

import ast
import re
from collections.abc import Iterable

Option = tuple[str, str]  # (section class, field or property)


class OptionReads:
    """The options that `sources` (Python text) read, given `sections`: class name -> {field: class of the section it holds, or None}."""

    def __init__(self, sections: dict[str, dict[str, str | None]], sources: Iterable[str]):
        self.sections = sections
        self.attributes: dict[str, dict[str, str]] = {}  # class -> attribute, property or method -> class of its value
        self.returns: dict[str, str] = {}  # function -> class it returns
        self._found: dict[tuple[str, str] | None, set[Option]] = {}  # by the section's method that reads; None: any other code
        trees = [ast.parse(source) for source in sources]
        self._bases = {node.name: [base.id for base in node.bases if isinstance(base, ast.Name)]
                       for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        self.classes = {*sections, *(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))}
        # Twice: what an attribute holds may be known only after a class further on has been seen.
        for _ in range(2):
            self._found.clear()
            for tree in trees:
                _Reader(self).visit(tree)

    def add(self, reader: tuple[str, str] | None, option: Option) -> None:
        self._found.setdefault(reader, set()).add(option)

    def sections_of(self, name: str | None) -> set[str]:
        """The sections that are, or are derived from, the class of that name."""
        return {section for section in self.sections if self._is(section, name)} if name else set()

    def _is(self, section: str, name: str | None) -> bool:
        return section == name or any(self._is(base, name) for base in self._bases.get(section, ()))

    def read(self) -> set[Option]:
        """Fields and properties that code outside the sections reads, with what those properties read in turn."""
        read, ahead = set(), [*self._found.get(None, ())]
        while ahead:
            option = ahead.pop()
            if option not in read:
                read.add(option)
                ahead += self._found.get(option, ())
        return read

    def annotated(self, annotation: ast.expr | None) -> str | None:
        """The class that an annotation names: X, "X", X | None, tuple[X, ...] (as X: what is read of it are its elements)."""
        words = re.findall(r"\w+", ast.unparse(annotation)) if annotation is not None else []
        return next((word for word in words if word in self.classes), None)


class _Reader(ast.NodeVisitor):
    """Walks one file, with the types of the names in scope."""

    def __init__(self, found: OptionReads):
        self._all, self._scopes, self._class, self._method = found, [{}], None, None

    def type_of(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self._scopes) if node.id in scope), None)
        if isinstance(node, ast.Attribute):
            owner = self.type_of(node.value)
            return self._all.sections.get(owner, {}).get(node.attr) or self._all.attributes.get(owner, {}).get(node.attr)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                return self.type_of(node.func)
            name = node.func.id if isinstance(node.func, ast.Name) else None
            return name if name in self._all.classes else self._all.returns.get(name)
        if isinstance(node, (ast.IfExp, ast.BoolOp)):
            parts = (node.body, node.orelse) if isinstance(node, ast.IfExp) else node.values
            return next(filter(None, map(self.type_of, parts)), None)
        return self.type_of(node.value) if isinstance(node, (ast.Subscript, ast.NamedExpr)) else None

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self._class = self._class, node.name
        own = self._all.attributes.setdefault(node.name, {})
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and (held := self._all.annotated(item.annotation)):
                own[item.target.id] = held
            if isinstance(item, ast.FunctionDef) and (given := self._all.annotated(item.returns)):
                own[item.name] = given
        self.generic_visit(node)
        self._class = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if self._class is None and (given := self._all.annotated(node.returns)):
            self._all.returns[node.name] = given
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        scope = {argument.arg: known for argument in arguments if (known := self._all.annotated(argument.annotation))}
        method = self._class is not None and len(self._scopes) == 1
        if method and arguments:
            scope[arguments[0].arg] = self._class
        outer, self._method = self._method, node.name if method else self._method
        self._scopes.append(scope)
        self.generic_visit(node)
        self._scopes.pop()
        self._method = outer

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            several = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple) and len(target.elts) == len(node.value.elts)
            for one, value in zip(target.elts, node.value.elts, strict=True) if several else [(target, node.value)]:
                self._bind(one, self.type_of(value))

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        self._bind(node.target, self.type_of(node.value))

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, self.type_of(node.iter))
        self.generic_visit(node)

    def visit_GeneratorExp(self, node) -> None:
        for part in node.generators:
            self._bind(part.target, self.type_of(part.iter))
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp

    def _bind(self, target: ast.expr, known: str | None) -> None:
        if isinstance(target, ast.Name):
            # A name that now holds something else is no section any more.
            self._scopes[-1].pop(target.id, None) if known is None else self._scopes[-1].__setitem__(target.id, known)
        elif isinstance(target, ast.Attribute) and known and (owner := self.type_of(target.value)):
            self._all.attributes.setdefault(owner, {}).setdefault(target.attr, known)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self._record(node.value, node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and isinstance(node.args[1], ast.Constant):
            self._record(node.args[0], node.args[1].value)
        self.generic_visit(node)

    def _record(self, owner: ast.expr, name: str) -> None:
        for known in self._all.sections_of(self.type_of(owner)):
            self._all.add((self._class, self._method) if self._class in self._all.sections else None, (known, name))

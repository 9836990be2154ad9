"""The style check: python .ci/style.py FILES. A line for each finding, exit code 1 if any.

Held in every file: lines of 100 columns, functions whose code fits a screen. Held in the four
modules, whose vendoring and reading depend on it: the four allowed packages, no import of a sibling
when a file is imported, nothing used at import before it is defined, every flag read, room between
the lines of functions, and few assignments of several things at once.
"""
import ast
import re
import sys
from pathlib import Path

WIDTH = 100                               # columns
SCREEN = 50                               # lines of code of a function
AIR = .06                                 # blank or comment lines for each line of code
TUPLES = .12                              # of the assignments in functions
PACKAGES = {'numpy', 'scipy', 'torch', 'requests'}
MODULES = {'llminit', 'models', 'data', 'embed'}


def imported(node):
    """Root names that an import statement brings, none for other nodes."""
    names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
    names += ['.' * node.level + (node.module or '')] if isinstance(node, ast.ImportFrom) else []
    return {name.split('.')[0] for name in names} - set(sys.stdlib_module_names)


def body_lines(function, lines):
    """The lines of a function below its signature and docstring: of code, and blank or comment."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    if not body:
        return 0, 0
    above = function.body[0].end_lineno if ast.get_docstring(function) else body[0].lineno - 1
    rest = [line.strip() for line in lines[above:function.end_lineno]]
    air = sum(line[:1] in ('', '#') for line in rest)
    return len(rest) - air, air


def used_at_import(node):
    """Yields the Name nodes that an import looks up: those outside of function bodies."""
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        args = node.args
        parts = [*args.defaults, *filter(None, args.kw_defaults)]
        parts += getattr(node, 'decorator_list', [])
    else:
        parts = ast.iter_child_nodes(node)
    if isinstance(node, ast.Name):
        yield node
    for part in parts:
        yield from used_at_import(part)


def check_module(tree, lines):
    """Yields (line, finding) of what is held in the four modules."""
    nodes = list(ast.walk(tree))
    yield from ((n.lineno, f'imports {name}') for n in nodes for name in imported(n)
                if name not in PACKAGES | MODULES or n in tree.body and name in MODULES)
    top = {n.name: n.lineno for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    yield from ((n.lineno, f'{n.id} is used before it is defined')
                for n in used_at_import(tree) if top.get(n.id, 0) > n.lineno)

    read = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    for n in nodes:
        flag = str(getattr(n.args[0], 'value', '')) if isinstance(n, ast.Call) and n.args else ''
        if re.fullmatch('--[a-z-]+', flag) and flag[2:].replace('-', '_') not in read:
            yield n.lineno, f'the flag {flag} is read by nothing'

    code, air, tuples, assignments = measures(tree, lines)
    if air < AIR * code:
        yield 1, f'{air} blank or comment lines in {code} lines of code'
    if tuples > TUPLES * assignments:
        yield 1, f'{tuples} of {assignments} assignments have several targets'


def measures(tree, lines):
    """Lines of code in functions, blank or comment lines there; assignments to a tuple, and all."""
    nested = {inner for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)
              for inner in ast.walk(f) if inner is not f}
    sizes = [body_lines(f, lines) for f in ast.walk(tree)
             if isinstance(f, ast.FunctionDef) and f not in nested]
    assigned = [n for n in nested if isinstance(n, ast.Assign)]
    tuples = [n for n in assigned if isinstance(n.targets[0], ast.Tuple)]
    return *map(sum, zip(*sizes)), len(tuples), len(assigned)


def check(path):
    """Yields (line, finding) for one file."""
    source = Path(path).read_text(encoding='utf8')
    lines = source.splitlines()
    tree = ast.parse(source)
    yield from ((n, f'{len(line)} columns') for n, line in enumerate(lines, 1)
                if len(line) > WIDTH)
    for f in ast.walk(tree):
        if isinstance(f, ast.FunctionDef) and (size := body_lines(f, lines)[0]) > SCREEN:
            yield f.lineno, f'{f.name} has {size} lines of code'
    if Path(path).stem in MODULES:
        yield from check_module(tree, lines)


def main(paths):
    findings = [f'{path}:{line}: {what}' for path in paths for line, what in check(path)]
    print('\n'.join(findings) or f'style: {len(paths)} files, nothing found')
    return bool(findings)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

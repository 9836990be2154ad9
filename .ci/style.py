"""The style check: python .ci/style.py FILES. A line for each finding, exit code 1 if any.

Held in every file: lines of 100 columns, functions that fit a screen. Held in the four modules,
whose vendoring and reading depend on it: the four allowed packages, no import of a sibling when
a file is imported, nothing defined after its use, every flag read.
"""
import ast
import re
import sys
from pathlib import Path

WIDTH, SCREEN = 100, 50                   # columns; lines of a function without its docstring
PACKAGES = {'numpy', 'scipy', 'torch', 'requests'}
MODULES = {'llminit', 'models', 'data', 'embed'}


def imported(node):
    """Root names that an import statement brings, none for other nodes."""
    names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
    names += ['.' * node.level + (node.module or '')] if isinstance(node, ast.ImportFrom) else []
    return {name.split('.')[0] for name in names} - set(sys.stdlib_module_names)


def body_lines(function):
    """Lines of a function without its docstring."""
    text = function.body[0] if ast.get_docstring(function) else None
    prose = text.end_lineno - text.lineno + 1 if text else 0
    return function.end_lineno - function.lineno + 1 - prose


def check(path):
    """Yields (line, finding) for one file."""
    source = Path(path).read_text(encoding='utf8')
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef)]
    top = {n.name: n.lineno for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    yield from ((n, f'{len(line)} columns') for n, line in enumerate(source.splitlines(), 1)
                if len(line) > WIDTH)
    yield from ((f.lineno, f'{f.name} has {body_lines(f)} lines') for f in functions
                if body_lines(f) > SCREEN)
    if Path(path).stem not in MODULES:
        return
    yield from ((n.lineno, f'imports {name}') for n in nodes for name in imported(n)
                if name not in PACKAGES | MODULES or n in tree.body and name in MODULES)
    yield from ((n.lineno, f'{n.id} is defined further down')
                for d in tree.body for n in ast.walk(d) if isinstance(n, ast.Name)
                and top.get(n.id, 0) > max(n.lineno, d.end_lineno))
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    for n in nodes:
        flag = str(getattr(n.args[0], 'value', '')) if isinstance(n, ast.Call) and n.args else ''
        if re.fullmatch('--[a-z-]+', flag) and flag[2:].replace('-', '_') not in read:
            yield n.lineno, f'the flag {flag} is read by nothing'


def main(paths):
    findings = [f'{path}:{line}: {what}' for path in paths for line, what in check(path)]
    print('\n'.join(findings) or f'style: {len(paths)} files, nothing found')
    return bool(findings)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

"""The same name means the same text: compares the project's scripts, and repairs copies.

    python tests/sync.py                        lists the differences; exit status 1 if there are any
    python tests/sync.py --from ppo_a_b.py      writes that script's text into all others that have the same names

It compares the classes, functions and assignments at a script's top level: all of their lines, with decorators,
docstrings, and comments inside and directly above. `Args` and `ActorCritic` may differ, and between tasks also
`make_env` and `main`. Fields of Args with the same name share their type and their comment up to the first bracket.

It neither compares nor writes scripts that you add: a copy may differ as you like.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from pathlib import Path

PROJECT = (
    "ppo_agalite_tmaze.py",
    "ppo_galite_tmaze.py",
    "ppo_gtrxl_tmaze.py",
    "ppo_lstm_tmaze.py",
    "ppo_gru_tmaze.py",
    "ppo_agalite_mysterypath.py",
    "ppo_gtrxl_mysterypath.py",
    "ppo_agalite_craftax.py",
    "ppo_gtrxl_craftax.py",
    "ppo_agalite_memorymaze.py",
    "ppo_gtrxl_memorymaze.py",
    "ppo_lstm_memorymaze.py",
)
MAY_DIFFER, SAME_WITHIN_A_TASK = {"Args", "ActorCritic"}, {"make_env", "main"}
SECTION = re.compile(r"# -{10,}")  # the rule above a section belongs to no block


class Script:
    """A script split into blocks. spans: from a name to its pieces, each (first, last) line, counted from 0."""

    def __init__(self, path: Path):
        self.path, self.task = path, path.stem.split("_")[-1]
        self.lines = path.read_text().splitlines()
        self.tree = ast.parse("\n".join(self.lines))
        self.spans = {}
        for node in self.tree.body:
            for name in names_of(node):
                self.spans.setdefault(name, []).append(self.span(node))

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Its first and last line, with decorators, comments directly above and indented comments at the end."""
        first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", []))]) - 1
        last = node.end_lineno - 1
        while first > 0 and self.lines[first - 1].startswith("#") and not SECTION.match(self.lines[first - 1]):
            first -= 1
        after = last + 1
        while after < len(self.lines) and re.match(r"\s+#|\s*$", self.lines[after]):
            last = after if self.lines[after].strip() else last
            after += 1
        return first, last

    def text(self, name: str) -> list[str]:
        """The pieces of a block: usually one, two if a second assignment adds to the first."""
        return ["\n".join(self.lines[first : last + 1]) for first, last in self.spans[name]]

    def fields(self) -> dict[str, tuple[str, str]]:
        """The type of each field of Args, and its comment up to the first bracket."""
        return {
            name: (ast.unparse(node.annotation), shared_part(comment).strip())
            for name, (node, comment) in self.field_nodes().items()
        }

    def field_nodes(self) -> dict[str, tuple[ast.AnnAssign, str]]:
        """The statement of each field of Args, and the comment after it."""
        tokens = tokenize.generate_tokens(io.StringIO("\n".join(self.lines) + "\n").readline)
        comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
        found = {}
        for node in next((node.body for node in self.tree.body if getattr(node, "name", "") == "Args"), []):
            if isinstance(node, ast.AnnAssign):
                if node.end_lineno not in comments:
                    raise SystemExit(f"{self.path.name}: Args.{node.target.id} has no comment behind it")
                found[node.target.id] = node, comments[node.end_lineno]
        return found


def shared_part(comment: str) -> str:
    """A field's comment up to the first bracket, which may hold a script's own published value."""
    return comment.split("(")[0]


def names_of(node: ast.AST) -> list[str]:
    """The names that a top-level statement defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [x.id for target in targets if target for x in ast.walk(target) if isinstance(x, ast.Name)]


def own_scripts(folder: Path) -> list[Path]:
    """The project's scripts in a folder, without those that a user added."""
    return [folder / name for name in PROJECT if (folder / name).exists()]


def differences(paths: list[Path]) -> list[str]:
    """A line for each name whose text differs; each script is compared with the first one that has the name."""
    first_text, first_field, found = {}, {}, []
    for script in map(Script, paths):
        for name in script.spans:
            if name not in MAY_DIFFER:
                task = script.task if name in SAME_WITHIN_A_TASK else "any"
                path, text = first_text.setdefault((name, task), (script.path, script.text(name)))
                if text != script.text(name):
                    found.append(f"{name} differs between {path.name} and {script.path.name}")
        for name, field in script.fields().items():
            path, expected = first_field.setdefault(name, (script.path, field))
            if expected != field:
                found.append(f"Args.{name} differs between {path.name}, {expected}, and {script.path.name}, {field}")
    return found


def repaired(script: Script, source: Script) -> list[str]:
    """The lines of the script; blocks and fields that the source also has are replaced by the source's."""
    edits = []  # (first line, last line, new lines)
    done = set()
    for name in script.spans:
        if name in MAY_DIFFER or name not in source.spans or script.text(name) == source.text(name):
            continue
        if name in SAME_WITHIN_A_TASK and script.task != source.task:
            continue
        old, new = script.spans[name], source.text(name)
        if tuple(old) in done:  # two names of one assignment
            continue
        done.add(tuple(old))
        if len(old) == len(new):
            edits += [(first, last, text.splitlines()) for (first, last), text in zip(old, new, strict=True)]
        else:  # all pieces in place of the first one
            edits.append((*old[0], "\n".join(new).splitlines()))
            edits += [(first, last, []) for first, last in old[1:]]

    right_fields, right_nodes, nodes = source.fields(), source.field_nodes(), script.field_nodes()
    for name, field in script.fields().items():
        if name in right_fields and field != right_fields[name]:
            (node, comment), (_, right_comment) = nodes[name], right_nodes[name]
            bracket = comment[len(shared_part(comment)) :]
            new_comment = shared_part(right_comment).rstrip() + (" " + bracket if bracket else "")
            first, last = node.annotation.lineno - 1, node.end_lineno - 1
            before = script.lines[first].encode()[: node.annotation.col_offset].decode()  # ast counts bytes
            rest = "\n".join([script.lines[first].encode()[node.annotation.end_col_offset :].decode()]
                             + script.lines[first + 1 : last + 1])  # fmt: skip
            text = before + right_fields[name][0] + rest.removesuffix(comment) + new_comment
            edits.append((first, last, text.splitlines()))

    lines = list(script.lines)
    for first, last, new in sorted(edits, reverse=True):
        lines[first : last + 1] = new
    return lines


def main(folder: Path, argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", metavar="SCRIPT", help="the script whose text is right")
    source = parser.parse_args(argv).source
    paths = own_scripts(folder)
    if source:
        right = folder / Path(source).name
        if right not in paths:
            parser.error(f"--from {source}: not one of the project's scripts, {[path.name for path in paths]}")
        for path in paths:
            script = Script(path)
            lines = repaired(script, Script(right))
            if lines != script.lines:
                path.write_text("\n".join(lines) + "\n")
                print(f"{path.name} repaired from {right.name}")
    found = differences(paths)
    print("\n".join(found) or f"{len(paths)} scripts: the same name means the same text")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent.parent))

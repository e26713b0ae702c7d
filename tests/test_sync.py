"""The same name means the same text in all scripts, and the tool that checks it notices what it should."""

import ast
from pathlib import Path

import plant_faults
import pytest
import sync

ROOT = Path(__file__).parent.parent

SCRIPT = '''"""What this script is about may differ."""

import math
{imports}
# ----------------------------------------------------------------------------------------------- Arguments of {title}
Number = int | float
KINDS = {{"a"}}
KINDS |= {{"b"}}
UP, DOWN = range(2)


@dataclass
class Args:
    steps: int = {default}  # how many — with a dash (published: {default})
    rate: float = 0.1  # how fast
    only_here_{title}: str = "# no comment"  # of one script
    doubled = property(lambda self: 2 * self.steps)


# Comment right above.
@cache
@trace
def shared(x):
    """What it does."""
    # why it does it
    return x + 1
    # a last word


def of_{title}():
    return "{title}"


class Shared:
    size: int = 3  # a comment at the end


async def wait():
    pass


def main():
    print("{title}")


if __name__ == "__main__":
    main()
'''


@pytest.fixture
def scripts(tmp_path):
    """Scripts of two tasks that keep the rule; everything that may differ differs."""
    first, second = tmp_path / "ppo_agalite_tmaze.py", tmp_path / "ppo_agalite_craftax.py"
    first.write_text(SCRIPT.format(imports="", title="first", default=1))
    second.write_text(SCRIPT.format(imports="import sys\n", title="second", default=2))
    return first, second


def test_the_scripts_agree():
    """The rule itself."""
    paths = sync.own_scripts(ROOT)
    assert [path.name for path in paths] == list(sync.PROJECT)
    assert sync.differences(paths) == []


def test_every_block_of_a_script_is_compared():
    """All top-level definitions of a script are seen, and every line of code belongs to one of them."""
    for path in sync.own_scripts(ROOT):
        script = sync.Script(path)
        others = [node for node in script.tree.body if not sync.names_of(node)]
        others = [node for node in others if not isinstance(node, ast.Import | ast.ImportFrom)]
        docstring, run = others
        assert isinstance(docstring.value, ast.Constant)
        assert ast.unparse(run.test) == "__name__ == '__main__'"
        inside = {i for spans in script.spans.values() for first, last in spans for i in range(first, last + 1)}
        comments = [line for i, line in enumerate(script.lines) if line.strip().startswith("#") and i not in inside]
        assert all(map(sync.SECTION.match, comments)), "a comment that belongs to no block is not compared"


@pytest.mark.parametrize("path", sync.own_scripts(ROOT), ids=lambda path: path.stem)
def test_nothing_in_a_script_is_unused(path):
    """Every class, function and constant at its top level is used somewhere in it."""
    script = sync.Script(path)
    used = {x.id for x in ast.walk(script.tree) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load)}
    assert set(script.spans) - used == set()


@pytest.mark.parametrize("path", sync.own_scripts(ROOT), ids=lambda path: path.stem)
def test_what_libraries_ask_of_a_script(path):
    """W&B, which takes a second to import, is imported only with --track. JAX_DISABLE_JIT=1 refuses `.lower()`."""
    script = sync.Script(path)
    imports = [node for node in script.tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports and not [node for node in imports if "wandb" in ast.unparse(node)]
    attributes = {x.attr for x in ast.walk(script.tree) if isinstance(x, ast.Attribute)}
    assert "lower" not in attributes and {"jit", "init"} <= attributes


def test_equal_scripts_pass(scripts, capsys):
    """If only what may differ differs, then nothing is found, and repairing changes nothing."""
    before = [path.read_text() for path in scripts]
    assert sync.differences(scripts) == []
    assert sync.main(scripts[0].parent, ["--from", scripts[0].name]) == 0
    assert [path.read_text() for path in scripts] == before
    assert "2 scripts" in capsys.readouterr().out


CHANGES = {
    "code": ("return x + 1", "return x + 2", "shared"),
    "docstring": ("What it does.", "What it did.", "shared"),
    "comment inside": ("# why it does it", "# why it did it", "shared"),
    "comment at the end of the body": ("    # a last word\n", "", "shared"),
    "comment right above": ("# Comment right above.", "# Comment above.", "shared"),
    "decorator": ("@cache\n", "", "shared"),
    "order of decorators": ("@cache\n@trace", "@trace\n@cache", "shared"),
    "comment at the end of a line": ("# a comment at the end", "# a comment", "Shared"),
    "space": ("size: int = 3", "size: int  =  3", "Shared"),
    "assignment": ("Number = int | float", "Number = float", "Number"),
    "addition to an assignment": ('KINDS |= {"b"}', 'KINDS |= {"c"}', "KINDS"),
    "addition left out": ('KINDS |= {"b"}\n', "", "KINDS"),
    "one of two names": ("UP, DOWN = range(2)", "UP, DOWN = 0, 1", "DOWN"),
    "coroutine": ("    pass\n", "    await wait()\n", "wait"),
    "type of a field": ("rate: float", "rate: float | None", "Args.rate"),
    "comment of a field before its bracket": ("how many — with", "how much — with", "Args.steps"),
    "comment of a field": ("# how fast", "# how quick", "Args.rate"),
    "type and comment of a field": ("rate: float = 0.1  # how fast", "rate: int = 0.1  # how often", "Args.rate"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_difference_is_found_and_repaired(scripts, change, capsys):
    """Each kind of difference is named; --from writes the right text, in either direction, and changes nothing else."""
    old, new, name = CHANGES[change]
    first, second = scripts
    original = second.read_text()
    assert original.count(old) == 1
    second.write_text(original.replace(old, new))
    changed = second.read_text()
    found = sync.differences(scripts)
    assert any(line.startswith(f"{name} differs between {first.name}") and second.name in line for line in found)
    assert sync.main(first.parent, []) == 1
    assert second.read_text() == changed, "without --from nothing is written"
    assert name in capsys.readouterr().out

    assert sync.main(first.parent, ["--from", str(first)]) == 0
    assert second.read_text() == original

    second.write_text(changed)  # now in the other direction
    kept = first.read_text()
    assert sync.main(first.parent, ["--from", second.name]) == 0
    assert second.read_text() == changed
    assert first.read_text() == kept.replace(old, new)


def test_a_task_has_one_main(scripts):
    """`main` may differ between tasks (as here), but not between scripts of one task, and is repaired there."""
    first, second = scripts
    third = first.with_name("ppo_gtrxl_tmaze.py")
    third.write_text(second.read_text())
    assert sync.differences([first, third, second]) == [f"main differs between {first.name} and {third.name}"]
    kept = second.read_text()
    sync.main(first.parent, ["--from", first.name])
    assert 'print("first")' in third.read_text() and second.read_text() == kept
    assert sync.differences([first, third, second]) == []
    assert sync.SAME_WITHIN_A_TASK == {"make_env", "main"}


def test_fields_without_comment_are_refused(scripts):
    """Each field of Args has a comment to compare; one inside a string does not count."""
    original = scripts[0].read_text()
    for comment, name in (("  # how fast", "rate"), ("  # of one script", "only_here_first")):
        assert original.count(comment) == 1
        scripts[0].write_text(original.replace(comment, ""))
        with pytest.raises(SystemExit, match=f"Args.{name} has no comment"):
            sync.differences(scripts)


def test_a_script_that_a_user_added_is_left_alone(scripts, capsys):
    """A copy under another name may differ freely: it is not compared, not written, and not a source of repairs."""
    first, second = scripts
    mine = first.with_name("ppo_mine_tmaze.py")
    mine.write_text(first.read_text().replace("return x + 1", "return x + 3").replace("  # how fast", ""))
    before = mine.read_bytes()
    assert sync.main(first.parent, []) == 0
    second.write_text(second.read_text().replace("return x + 1", "return x + 2"))
    assert sync.main(first.parent, ["--from", first.name]) == 0
    assert mine.read_bytes() == before and "return x + 1" in second.read_text()
    with pytest.raises(SystemExit):
        sync.main(first.parent, ["--from", mine.name])
    assert "not one of the project's scripts" in capsys.readouterr().err
    assert "return x + 1" in second.read_text()


def test_an_unknown_source_is_refused(scripts, capsys):
    """--from must name a script that exists."""
    with pytest.raises(SystemExit):
        sync.main(scripts[0].parent, ["--from", "ppo_third.py"])
    assert "not one of the project's scripts" in capsys.readouterr().err


def test_every_planted_fault_finds_its_place():
    """Each text that plant_faults.py replaces occurs once in its file, and the fault differs from it."""
    for name, (file, text, faulty, _) in plant_faults.FAULTS.items():
        assert (ROOT / file).read_text().count(text) == 1 and faulty != text, name
